"""The folder of a run: whose it is, where to go on, and what its trainer is told. One process decides for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from sparse_hf_training.checkpoint import checkpoints, last_complete_checkpoint
from sparse_hf_training.config import RunConfig
from sparse_hf_training.engines.cpu import allow_fsdp_on_cpu

T = TypeVar("T")

CONFIG_NAME = "config.yaml"
FREE_TO_CHANGE = ("resume", "observe", "num_processes")
"""Sections that change nothing of what is trained, so that a run goes on under others."""
DEFAULT_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 1e-5,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "seed": 0,
}


def find_resume_point(config: RunConfig, output: Path) -> Path | None:
    """The checkpoint in the output folder to go on from, or None to begin.

    Raises:
        ValueError: if the folder holds another run, or this one and `resume` is off.
    """
    written = output / CONFIG_NAME
    if not written.exists():
        if checkpoints(output):
            raise ValueError(f"{output} holds checkpoints but no {CONFIG_NAME}; choose another output_dir")
        return None
    if not config.resume:
        raise ValueError(f"{output} holds a run already; choose another output_dir, or set resume=true to go on")
    earlier, now = RunConfig.load(written).to_dict(), config.to_dict()
    if differ := [name for name in now if name not in FREE_TO_CHANGE and earlier[name] != now[name]]:
        raise ValueError(
            f"{output} holds a run with another configuration (see {written}; {', '.join(differ)} differ); "
            "choose another output_dir"
        )
    return last_complete_checkpoint(output)


def claim_output(config: RunConfig, output: Path) -> None:
    """Makes the output folder this run's own: writes its configuration there."""
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{CONFIG_NAME}"
    config.save(temporary)
    os.replace(temporary, output / CONFIG_NAME)


def training_arguments(config: RunConfig, output: Path) -> TrainingArguments:
    """The run's `TrainingArguments`: its own over the defaults. Under a launcher, the processes meet here.

    Raises:
        ValueError: for values that `TrainingArguments` does not take.
    """
    chosen = _chosen(config)
    try:
        arguments = TrainingArguments(
            **chosen,
            output_dir=str(output),
            remove_unused_columns=False,
            prediction_loss_only=True,
            disable_tqdm=True,
        )
    except (TypeError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from error
    except ValueError as error:
        if chosen.get("use_cpu") or not chosen.get("bf16"):
            raise
        raise ValueError(f"{error} To train on a CPU, add trainer.use_cpu=true.") from error
    allow_fsdp_on_cpu(arguments)
    if arguments.n_gpu > 1:
        # Several GPUs and no launcher: one is used. torch.nn.DataParallel would copy the model without its gates.
        arguments._n_gpu = 1
    return arguments


def _chosen(config: RunConfig) -> dict[str, Any]:
    chosen = {**DEFAULT_ARGUMENTS, **config.trainer}
    name = "gradient_checkpointing_kwargs"
    # Other options than this one keep it: without it torch checkpoints in a way that gates get no gradient through.
    chosen[name] = {**DEFAULT_ARGUMENTS[name], **(chosen[name] or {})}
    if config.activation_offload:
        # transformers' own: torch.autograd.graph.save_on_cpu around each checkpoint.
        chosen[name]["offload"] = True
    return chosen


def from_main_process(compute: Callable[[], T]) -> T:
    """What the main process computes, on every process; where it fails, all fail alike."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = compute()
        except (ValueError, OSError) as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    value: T = result
    return value
