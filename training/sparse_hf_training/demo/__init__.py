"""The demo: a small real Llama, learned, exported, reloaded and judged on a laptop's CPU in minutes."""

from sparse_hf_training.demo.demo import DemoReport, run_demo

__all__ = ["DemoReport", "run_demo"]
