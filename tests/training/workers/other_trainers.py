"""transformers' and TRL's trainers with `MaskLearningCallback`; started by torchrun, or called in-process.

    torchrun --nproc_per_node 2 other_trainers.py FOLDER KIND ...

FOLDER holds a model in `model`. Each KIND, `plain` or `trl`, leaves `FOLDER/KIND.pt`: the logged losses, gates and
weights. All processes together see the same rows in each micro-batch, whatever their number.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.callbacks import MaskLearningCallback
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig, attach_mask_learning

STEPS, ROWS, SEQ_LEN = 3, 4, 48
MASKS = MaskLearningConfig(end_head_sparsity=0.5, mask_learning_rate=0.3, reg_learning_rate=0.1, init_log_alpha=0.5)


def make_rows(vocab: int) -> list[dict[str, list[int]]]:
    """Rows with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(2 * STEPS * ROWS):
        ids = torch.randint(2, vocab, (SEQ_LEN,), generator=generator).tolist()
        first = 5 * (number % 7)
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return rows


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", 1)),
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # or the rounding of gradients near 0 becomes steps of the whole rate
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **changes,
    }


def make_trainer(kind: str, folder: Path, **changes: Any) -> tuple[Trainer, MaskLearning]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks="all_full"))
    learning = attach_mask_learning(model, MASKS)
    rows = make_rows(model.config.vocab_size)
    values = settings(folder / kind, **changes)
    trainer: Trainer
    if kind == "plain":
        trainer = Trainer(model, TrainingArguments(**values), train_dataset=rows)
    else:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            model,
            args=SFTConfig(**values, max_length=SEQ_LEN, dataset_num_proc=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder / "model", pad_token="</s>"),
        )
    return trainer, learning


def run_case(kind: str, folder: Path) -> dict[str, Any]:
    trainer, learning = make_trainer(kind, folder)
    MaskLearningCallback(learning).add_to(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "world": trainer.args.world_size,
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "losses": [row["loss"] for row in rows],
        "penalties": [row["loss/penalty"] for row in rows],
        "gates": {name: tensor.clone() for name, tensor in learning.state_dict().items()},
        "weights": {
            name: tensor.clone()
            for name, tensor in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        },
    }


def main(folder: Path, kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    for kind in kinds:
        found = run_case(kind, folder)
        gates: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gates, found["gates"])
        assert all(torch.equal(gates[0][n], other[n]) for other in gates for n in gates[0]), "gates differ by rank"
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
