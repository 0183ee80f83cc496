"""What the demo trains and how it is judged: the shipped recipe, on the shipped model and text."""

from __future__ import annotations

from pathlib import Path

from sparse_hf_training.config import DataConfig, EvaluationConfig, RecallConfig, RunConfig
from sparse_hf_training.data import TextSource
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "llama-4m"
NUM_SINK_TOKENS, WINDOW_SIZE = 16, 128
SEQ_LEN = 2048
HEAD_SPARSITY = 0.625


def demo_config(output: Path, *, steps: int = 160, num_samples: int = 20, seed: int = 0) -> RunConfig:
    """The demo's run: masks for 10 of 16 KV heads, distilled from the dense model on recall tasks hidden in novels.

    Args:
        output: run folder.
        steps: optimizer steps of one row each.
        num_samples: judged recall samples per task.
        seed: of data and gates.
    """
    streaming = {"method": "streaming", "num_sink_tokens": NUM_SINK_TOKENS, "window_size": WINDOW_SIZE}
    return RunConfig(
        model=str(MODEL),
        output_dir=str(output),
        sparse={"sparse": streaming, "head_masks": "all_full"},
        data=DataConfig(
            text=(TextSource(path=str(ASSETS / "text" / "train")),),
            seq_len=1024,
            recall=RecallConfig(ratio=1.0),
            seed=seed,
        ),
        masks=MaskLearningConfig(end_head_sparsity=HEAD_SPARSITY, seed=seed),
        objective=ObjectiveConfig(kl=1.0),
        evaluation=EvaluationConfig(
            text=TextSource(path=str(ASSETS / "text" / "validation")),
            seq_len=SEQ_LEN,
            num_samples=num_samples,
            num_rows=16,
        ),
        trainer={"max_steps": steps, "logging_steps": 5, "save_steps": 80, "seed": seed},
    )
