"""The masks stage on the shipped model, through `run_training`; started by a test, which may ask it to kill itself.

    python demo_run.py cpu|cuda OUTPUT [STEP]

With STEP the process is killed by SIGKILL after that step. It needs no `datasets`: documents come from the shipped
files themselves, through the same reader and store.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA begins

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from sparse_hf_training import run
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data import TextSource, training_data
from sparse_hf_training.data.documents import read_documents
from sparse_hf_training.data.store import DocumentStore
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.typed_config import build

STEPS, SAVE = 16, 4


def read_files(source: TextSource, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None) -> DocumentStore:
    """In the place of `tokenize_source`."""
    rows = ({"text": path.read_text(encoding="utf-8")} for path in sorted(Path(source.path).glob("*.txt")))
    return DocumentStore.from_documents(read_documents(rows, source, tokenizer))


class Killed(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def config(device: str, output: str) -> RunConfig:
    streaming = {"method": "streaming", "num_sink_tokens": 16, "window_size": 64}
    values: dict[str, Any] = {
        "model": str(MODEL),
        "output_dir": output,
        "stage": "masks",
        "sparse": {"sparse": streaming, "head_masks": "all_full"},
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "data": {
            "text": [{"path": str(ASSETS / "text" / "train")}],
            "seq_len": 256 if device == "cpu" else 1024,
            "recall": {"ratio": 0.5, "tasks": ["needle"]},
        },
        "masks": {"end_head_sparsity": 0.6, "mask_learning_rate": 0.1, "init_log_alpha": 1.0},
        "objective": {"lm": 0.5, "kl": 1.0},
        "trainer": {
            "max_steps": STEPS,
            "save_steps": SAVE,
            "logging_steps": 2,
            "lr_scheduler_type": "cosine",
            "use_cpu": device == "cpu",
        },
    }
    return build(RunConfig, values)


def main(device: str, output: str, kill_after: str = "") -> None:
    # dQ of the fused kernels is added up in any order otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    training_data.tokenize_source = read_files
    observe = run.observe_training

    def observed(trainer: Any, *args: Any) -> Any:
        if kill_after:
            trainer.add_callback(Killed(int(kill_after)))
        return observe(trainer, *args)

    run.observe_training = observed
    assert device == "cpu" or torch.cuda.is_available()
    result = run.run_training(config(device, output))
    assert next(result.model.parameters()).device.type == device


if __name__ == "__main__":
    main(*sys.argv[1:])
