"""Started by torchrun: `run_training` for several configurations, each under its own engine, in the same processes."""

from __future__ import annotations

import sys

from engine_parity import fresh_state

from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

for path in sys.argv[1:]:
    with fresh_state():
        run_training(RunConfig.load(path))
