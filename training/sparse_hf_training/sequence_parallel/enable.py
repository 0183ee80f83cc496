"""Switching a model to sequence parallelism and back, for any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparse_hf.adapters import adapter_for
from sparse_hf.attention import ATTENTION_NAME
from sparse_hf.config import SparseConfig
from sparse_hf.head_exchange import HeadExchange, check_head_counts, layer_share
from sparse_hf.patching import apply_config, get_handle, is_sparsified, unsparsify
from sparse_hf_training.sequence_parallel.groups import SequenceGroup
from sparse_hf_training.sequence_parallel.ulysses import UlyssesExchange

_ATTRIBUTE = "_sparse_hf_sequence_parallel"


@dataclass
class _Enabled:
    exchange: HeadExchange
    group: SequenceGroup | None
    made_sparse: bool
    hook: RemovableHandle


def enable_sequence_parallel(model: PreTrainedModel, group: SequenceGroup | dist.ProcessGroup) -> SequenceGroup:
    """From now on the model's inputs are slices: rank r of the group holds the r-th part of each row.

    Pass `position_ids` of the whole row's slice (`shard_batch` makes all of it), and take the loss on labels that were
    shifted before they were cut. Gradients of the weights then are this rank's share: average over all ranks of the
    world, as DDP, FSDP2 and ZeRO do, a loss of (sum over this rank's label tokens) * world / (number of label tokens of
    all ranks), and the result is that of whole rows.

    Args:
        model: a sparsified model, gates attached or not; one that is not gets our attention with dense heads, and
            its own back by `disable_sequence_parallel`. Not wrapped by DDP or FSDP; these may come after.
        group: the ranks that share a row.

    Returns:
        The group as a `SequenceGroup`, with this rank's place in it.

    Raises:
        ValueError: if the group does not fit the heads, or the model cannot be split.
    """
    place = group if isinstance(group, SequenceGroup) else SequenceGroup.of(group)
    put_exchange(model, UlyssesExchange(place), place)
    return place


def put_exchange(model: PreTrainedModel, exchange: HeadExchange, group: SequenceGroup | None) -> None:
    """`enable_sequence_parallel` with an exchange of any kind; `group` is None where another library cuts the rows."""
    if hasattr(model, _ATTRIBUTE):
        raise ValueError("the model is sequence parallel already; call disable_sequence_parallel(model) first")
    check_model(model, exchange.size)
    made_sparse = not is_sparsified(model)
    if made_sparse:
        apply_config(model, SparseConfig.from_dict({"sparse": {"method": "dense"}}))
    for state in get_handle(model).states:
        state.exchange = exchange
    hook = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    setattr(model, _ATTRIBUTE, _Enabled(exchange=exchange, group=group, made_sparse=made_sparse, hook=hook))


def disable_sequence_parallel(model: PreTrainedModel) -> None:
    """Undoes `enable_sequence_parallel`.

    Raises:
        ValueError: if the model is not sequence parallel.
    """
    enabled: _Enabled | None = getattr(model, _ATTRIBUTE, None)
    if enabled is None:
        raise ValueError("the model is not sequence parallel; call enable_sequence_parallel(model, group) first")
    for state in get_handle(model).states:
        state.exchange, state.kept_shares = None, []
    if enabled.group is None:
        from sparse_hf_training.sequence_parallel.deepspeed import take_wrapper_off

        take_wrapper_off()
    enabled.hook.remove()
    delattr(model, _ATTRIBUTE)
    if enabled.made_sparse:
        unsparsify(model)


@contextmanager
def sequence_parallel(models: Sequence[PreTrainedModel], size: int) -> Iterator[None]:
    """Within it the models share rows over groups of `size` ranks; with size 1 nothing changes."""
    if size > 1:
        group = SequenceGroup.create(size)
        for model in models:
            enable_sequence_parallel(model, group)
    try:
        yield
    finally:
        for model in models:
            if is_sequence_parallel(model):
                disable_sequence_parallel(model)


@contextmanager
def sequence_parallel_disabled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within it the model takes whole rows, each rank its own: evaluation and generation. Any model may come."""
    enabled: _Enabled | None = getattr(model, _ATTRIBUTE, None)
    if enabled is None:
        yield model
        return
    states = get_handle(model).states
    with ExitStack() as stack:
        for state in states:
            state.exchange = None
        if enabled.group is None:
            from sparse_hf_training.sequence_parallel.deepspeed import own_attention

            stack.enter_context(own_attention())
        try:
            yield model
        finally:
            for state in states:
                state.exchange = enabled.exchange


def get_sequence_group(model: nn.Module) -> SequenceGroup | None:
    """The group that shares the model's rows; None without one."""
    enabled: _Enabled | None = getattr(model, _ATTRIBUTE, None)
    return None if enabled is None else enabled.group


def is_sequence_parallel(model: nn.Module) -> bool:
    """The model is, by this package, ours or DeepSpeed's."""
    return hasattr(model, _ATTRIBUTE)


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    handle = get_handle(model)
    states, num_heads = handle.states, handle.shape.num_heads
    if states[0].exchange is None:
        return
    if kwargs.get("position_ids") is None:
        raise ValueError(
            "a sequence-parallel model needs position_ids: this rank's slice of those of the whole row; "
            "shard_batch(batch, group) makes them"
        )
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"attn_implementation={model.config._attn_implementation!r} would see this rank's slice of the sequence "
            "alone; use `with dense(model)` for dense attention under sequence parallelism"
        )
    for state in states:
        layer_share(state, num_heads)  # here rather than within a graph that is being traced


def check_model(model: PreTrainedModel, size: int) -> None:
    """Raises ValueError unless `size` ranks can share the rows of this model, sparsified or not."""
    shape = adapter_for(model).shape(model.config)
    check_head_counts(shape.num_heads, shape.num_kv_heads, size)
    # Frequencies may depend on the length, of which each rank sees its part.
    found = getattr(model.config, "rope_parameters", None) or {}
    several = [x for x in found.values() if isinstance(x, dict)]
    for parameters in several or [found]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type {kind!r} chooses frequencies by the length of the input, of which each rank sees a part; "
                "use linear, yarn or llama3 scaling for sequence parallelism"
            )
