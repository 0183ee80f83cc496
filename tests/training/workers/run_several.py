"""Started by torchrun: `run_training` for several configurations, one after the other in the same processes."""

from __future__ import annotations

import sys

from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

for path in sys.argv[1:]:
    run_training(RunConfig.load(path))
