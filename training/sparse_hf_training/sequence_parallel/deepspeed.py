"""Sequence parallelism by DeepSpeed (`accelerate`'s `ParallelismConfig`) with the attention of a sparsified model.

DeepSpeed cuts the rows and trades heads itself; what it calls must know which heads it was given. ZeRO-3 alone:
under ZeRO-1 and 2 DeepSpeed divides gradients by the number of data-parallel groups instead of ranks, which makes
them `sp_size` times too large (DeepSpeed issue 5248). Our own exchange, `seq_parallel_size`, works with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparse_hf.attention import ATTENTION_NAME, sparse_attention_forward
from sparse_hf.patching import get_handle
from sparse_hf_training.sequence_parallel.enable import put_exchange

if TYPE_CHECKING:
    from accelerate import ParallelismConfig


@dataclass(frozen=True)
class DeepSpeedShare:
    """A `HeadExchange` that trades nothing: the caller's tensors are this rank's heads of whole rows already."""

    rank: int
    size: int
    num_heads: int
    num_slices: int = 1
    any_order: bool = False

    def gather_sequence(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, order: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        if q.shape[1] != self.num_heads // self.size:
            raise ValueError(
                f"expected {self.num_heads // self.size} of {self.num_heads} query heads from DeepSpeed, got "
                f"{q.shape[1]}: it trades nothing in evaluation mode, where a dense teacher runs; train on "
                f"objective.lm alone, or leave parallelism_config out and set seq_parallel_size={self.size}"
            )
        return q, k, v

    def to_sequence(self, out: Tensor, order: tuple[int, ...] | None) -> Tensor:
        return out


def deepspeed_parallelism(seq_parallel_size: int) -> ParallelismConfig:
    """The `parallelism_config` of `TrainingArguments` or `Accelerator`.

    accelerate refuses attention names that it does not know when the handler is made, so ours is set afterwards.
    """
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True)
    handler.sp_attn_implementation = ATTENTION_NAME
    return ParallelismConfig(sp_size=seq_parallel_size, sp_backend="deepspeed", sp_handler=handler)


def enable_deepspeed_sequence_parallel(model: PreTrainedModel, seq_parallel_size: int, zero_stage: int) -> None:
    """Tells a sparsified model that DeepSpeed gives it the heads of this rank; undo: `disable_sequence_parallel`.

    Args:
        model: a sparsified model; DeepSpeed wraps its attention when accelerate prepares it.
        seq_parallel_size: as in `deepspeed_parallelism`.
        zero_stage: of the DeepSpeed configuration.

    Raises:
        ValueError: for another stage than 3, a model that is not sparsified, or a size that does not fit the heads.
    """
    if zero_stage != 3:
        raise ValueError(
            f"under ZeRO-{zero_stage} DeepSpeed's sequence parallelism makes gradients {seq_parallel_size} times too "
            "large (DeepSpeed issue 5248); use ZeRO-3, or leave parallelism_config out and set "
            f"seq_parallel_size={seq_parallel_size}"
        )
    num_heads = get_handle(model).shape.num_heads
    rank = dist.get_rank() % seq_parallel_size
    put_exchange(model, DeepSpeedShare(rank=rank, size=seq_parallel_size, num_heads=num_heads), None)


def take_wrapper_off() -> None:
    """DeepSpeed wraps our attention for the whole process and never takes that back."""
    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = sparse_attention_forward


@contextmanager
def own_attention() -> Iterator[None]:
    """Takes DeepSpeed's wrapper off our attention for a while."""
    wrapped: Any = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    take_wrapper_off()
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = wrapped
