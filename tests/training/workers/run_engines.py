"""Started by torchrun: `run_training` for several configurations, each under its own engine, in the same processes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

# By its path: with PYTHONSAFEPATH a program's own folder is not searched.
spec = importlib.util.spec_from_file_location("engine_parity", Path(__file__).with_name("engine_parity.py"))
assert spec is not None and spec.loader is not None
engine_parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine_parity)

for path in sys.argv[1:]:
    with engine_parity.fresh_state():
        run_training(RunConfig.load(path))
