"""Started by torchrun in two processes: DeepSpeed's sequence parallelism through accelerate under `SparseTrainer`.

Argument: a folder. Prints losses, gradient norms, gates and what was refused as JSON. Our own exchange runs under each
stage of ZeRO, DeepSpeed's under the third. `train_alone` is the same of one process without DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from sparse_hf.config import SparseConfig
from sparse_hf.patching import apply_config
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.sequence_parallel import (
    SequenceGroup,
    deepspeed_parallelism,
    enable_sequence_parallel,
    is_sequence_parallel,
)
from sparse_hf_training.trainer import SparseTrainer

STREAMING = {"method": "streaming", "num_sink_tokens": 2, "window_size": 6}
STEPS = 3
LM = ObjectiveConfig(lm=1.0, kl=0.0)


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=64, intermediate_size=96, **shape)
    model = AutoModelForCausalLM.from_config(config)
    apply_config(model, SparseConfig.from_dict({"sparse": STREAMING}))
    attach_mask_learning(model, MaskLearningConfig(init_log_alpha=0.3, mask_learning_rate=0.1))
    return model


def make_rows() -> list[dict[str, Tensor]]:
    """Packed rows of two documents, with labels in the second half alone."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(8):
        ids = torch.randint(0, 97, (64,), generator=generator)
        first = 20 + 3 * number
        positions = torch.cat([torch.arange(first), torch.arange(64 - first)])
        labels = ids.masked_fill((positions == 0) | (torch.arange(64) < 24), -100)
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows


def make_trainer(folder: Path, objective: ObjectiveConfig, stage: int | None, *, own: bool = False) -> SparseTrainer:
    """`own`: our exchange instead of DeepSpeed's."""
    model = make_model()  # before DeepSpeed's configuration: ZeRO-3 would draw other weights
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        seed=0,
        deepspeed=None if stage is None else engine(stage),
        parallelism_config=None if stage is None or own else deepspeed_parallelism(2),
    )
    if own:
        enable_sequence_parallel(model, SequenceGroup.create(2))
    rows = make_rows()
    return SparseTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, objective=objective
    )


def engine(stage: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }


def train(trainer: SparseTrainer) -> dict[str, list[float]]:
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {name: [x[name] for x in trainer.state.log_history if name in x] for name in ("loss", "grad_norm")}
    return {**found, "eval_loss": [evaluated], "scores": get_mask_learning(model).gates.scores().flatten().tolist()}


def refused(folder: Path, objective: ObjectiveConfig, stage: int) -> str:
    try:
        make_trainer(folder, objective, stage).train()
    except ValueError as error:
        return str(error)
    return ""


def train_alone(folder: Path) -> dict[str, list[float]]:
    return train(make_trainer(folder, LM, None))


def main() -> None:
    folder = Path(sys.argv[1])
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    assert dist.get_world_size() == 2
    own = {}
    for stage in (1, 2, 3):
        trainer = make_trainer(folder, LM, stage, own=True)
        own[f"own, ZeRO-{stage}"] = train(trainer)
        assert trainer.engine.name == f"zero{stage}"
        AcceleratorState._reset_state()
    refusals = {"zero2": refused(folder, LM, 2)}
    AcceleratorState._reset_state()
    trainer = make_trainer(folder, LM, 3)
    found = train(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert trainer.engine.name == "zero3" and is_sequence_parallel(model)
    # The same trainer goes on: DeepSpeed makes its groups once per process.
    trainer.objective = ObjectiveConfig(lm=1.0, kl=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    try:
        trainer.compute_loss(model.train(), batch)
        refusals["kl"] = ""
    except ValueError as error:
        refusals["kl"] = str(error)
    if dist.get_rank() == 0:
        print(json.dumps({"DeepSpeed's, ZeRO-3": found, **own, "refused": refusals}), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main()
