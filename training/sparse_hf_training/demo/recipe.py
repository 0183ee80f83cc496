"""What the demo trains and how it is judged: the shipped recipe, on the shipped model and text.

Two stages. Masks: which 10 of 16 KV heads read a window, distilled from the dense model on recall tasks hidden in
novels. Fine-tuning: a minute under those masks, distilled from the base model, since on this model 6 full heads alone
cannot follow a chain of three variables (docs/training.md has the search that shows it).
"""

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
MASKS_FOLDER = "masks"
# Chains need more heads than the other tasks and are learned last.
MASK_TASKS = ("needle", "key_value", "chain", "chain", "chain")
TUNE_TASKS = ("needle", "key_value", *["chain"] * 8)


def masks_config(output: Path, *, steps: int, num_samples: int, seed: int) -> RunConfig:
    """The first stage, in a folder of its own under the demo's.

    Args:
        output: the demo's folder.
        steps: optimizer steps of one row each.
        num_samples: judged recall samples per task.
        seed: of data and gates.
    """
    streaming = {"method": "streaming", "num_sink_tokens": NUM_SINK_TOKENS, "window_size": WINDOW_SIZE}
    return RunConfig(
        model=str(MODEL),
        output_dir=str(output / MASKS_FOLDER),
        sparse={"sparse": streaming, "head_masks": "all_full"},
        data=DataConfig(text=_text("train"), seq_len=1024, recall=RecallConfig(ratio=1.0, tasks=MASK_TASKS), seed=seed),
        masks=MaskLearningConfig(end_head_sparsity=HEAD_SPARSITY, seed=seed),
        objective=ObjectiveConfig(kl=3.0),
        evaluation=_evaluation(num_samples),
        trainer={"max_steps": steps, "logging_steps": 5, "save_steps": steps, "seed": seed},
    )


def tune_config(output: Path, *, steps: int, num_samples: int, seed: int) -> RunConfig:
    """The second stage: fine-tuning under the masks of the first."""
    return RunConfig(
        model=str(MODEL),
        output_dir=str(output),
        stage="sft",
        sparse=str(output / MASKS_FOLDER / "artefact"),
        data=DataConfig(
            text=_text("train"), seq_len=1024, recall=RecallConfig(ratio=0.9, tasks=TUNE_TASKS), seed=seed + 1
        ),
        objective=ObjectiveConfig(kl=1.0),
        evaluation=_evaluation(num_samples),
        trainer={
            "max_steps": steps,
            "learning_rate": 2.2e-4,
            "warmup_steps": 5,
            "lr_scheduler_type": "linear",
            "logging_steps": 5,
            "save_steps": steps,
            "seed": seed,
        },
    )


def _text(split: str) -> tuple[TextSource, ...]:
    return (TextSource(path=str(ASSETS / "text" / split)),)


def _evaluation(num_samples: int) -> EvaluationConfig:
    return EvaluationConfig(text=_text("validation")[0], seq_len=SEQ_LEN, num_samples=num_samples, num_rows=6)
