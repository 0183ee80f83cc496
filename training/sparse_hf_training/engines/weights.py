"""Whole weights out of and into a model that an engine shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparse_hf.artefact import read_tensors
from sparse_hf.lora import ADAPTER_WEIGHTS_FILE, has_adapter, read_adapter

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDS = "pytorch_model_fsdp_0"  # accelerate's name


def whole_weights(
    accelerator: Accelerator, wrapped: torch.nn.Module, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a prepared model, on the main process; others get what is cheap, perhaps nothing.

    Every process must call it.

    Args:
        accelerator: that prepared the model.
        wrapped: what it returned.
        dtype: to cast floating weights to: engines may keep fp32 where the model was loaded in 16 bits.

    Raises:
        ValueError: if the engine is configured not to give them (ZeRO-3 without its gather setting).
    """
    state: dict[str, Tensor] = accelerator.get_state_dict(wrapped)
    if dtype is None or state is None:
        return state or {}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def export_weights(trainer: Trainer, trained: bool, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What an artefact needs of sharded weights: all where they were trained, else the embedding, which it probes.

    Every process must call it; the main process gets them.
    """
    if trained:
        return whole_weights(trainer.accelerator, trainer.model_wrapped, dtype)
    model = trainer.accelerator.unwrap_model(trainer.model)
    embedding = model.get_input_embeddings().weight
    name = next(name for name, own in model.named_parameters() if own is embedding)
    with _gathered(embedding):
        whole = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding
        return {name: whole.detach().to(dtype).cpu()}


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is configured to save shards, not whole weights."""
    from torch.distributed.fsdp import StateDictType

    return bool(accelerator.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT)


def save_trained_shards(model: torch.nn.Module, folder: Path) -> None:
    """Writes this process's shards of what trains, for any number of processes to read. Every process must call it."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    save({"model": _trained_shards(model)}, storage_writer=FileSystemWriter(folder / SHARDS))


def load_trained_shards(model: torch.nn.Module, folder: Path) -> None:
    """Reads them back. Every process must call it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {"model": _trained_shards(model)}
    load(state, storage_reader=FileSystemReader(folder / SHARDS))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))


def _trained_shards(model: torch.nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no process holds a NaN or an infinity, in its shards of sharded tensors. Every process must call it."""
    finite = all(bool(_shard(tensor).isfinite().all()) for tensor in tensors)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        outcomes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, finite)
        finite = all(outcomes)
    return finite


def _shard(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
    return local.to_local() if hasattr(local, "to_local") else local  # FSDP2


def has_whole_weights(folder: Path) -> bool:
    """Whether the folder holds weights, or the adapter that trains in their place, as safetensors."""
    names = (ADAPTER_WEIGHTS_FILE, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return any((folder / name).is_file() for name in names)


def load_whole_weights(model: PreTrainedModel, folder: Path) -> None:
    """Reads safetensors into a model that no engine has wrapped yet (under ZeRO-3 it may be sharded already).

    Of a model with an adapter, they are the adapter's.

    Raises:
        ValueError: if the files are missing or corrupt, or do not fit the model.
    """
    if has_adapter(model):
        read_adapter(model, folder, gathered=_gathered)
        return
    state: dict[str, Tensor] = {}
    for name in _files(folder):
        state |= read_tensors(folder / name)
    own = set(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if set(state) - own or own - tied - set(state):
        raise ValueError(
            f"{folder} holds the weights of another model: unexpected {sorted(set(state) - own)[:3]}, "
            f"missing {sorted(own - tied - set(state))[:3]}"
        )
    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if name not in targets:  # the second name of a tied weight
            continue
        target = targets[name]
        shape = getattr(target, "ds_shape", target.shape)
        if tensor.shape != shape:
            raise ValueError(f"{folder}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        with torch.no_grad(), _gathered(target) as writes:
            if writes:
                target.copy_(tensor)


@contextmanager
def _gathered(target: Tensor) -> Iterator[bool]:
    """Makes a parameter whole that ZeRO-3 shards; yields whether this process is one that writes it."""
    if not hasattr(target, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
        yield torch.distributed.get_rank() == 0


def _files(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [SAFE_WEIGHTS_NAME]
