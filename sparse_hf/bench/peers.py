"""What users would pick instead. Each says why it cannot take part; none is needed for the benchmark to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.bench.contenders import Call
from sparse_hf.bench.workload import BLOCK_SIZE, Shape
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, HeadPattern


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention, causal.

    Args:
        name: what tables call it.
        backend: a name of `torch.nn.attention.SDPBackend`, or None for torch's own choice.
    """

    name: str
    backend: str | None = None

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        return None if layout.is_dense else "SDPA has no sparse pattern"

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = None if self.backend is None else getattr(SDPBackend, self.backend)

        def forward() -> Tensor:
            with nullcontext() if chosen is None else sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return Call(forward=forward, inputs=(q, k, v))


CUDNN = Sdpa("SDPA cuDNN", "CUDNN_ATTENTION")
FLASH = Sdpa("SDPA flash", "FLASH_ATTENTION")


@dataclass(frozen=True)
class FlashAttention4:
    """flash-attn-4 (CuTe): causal, or a causal window. It has no sink tokens in one call."""

    name: str = "flash-attn-4"

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        if len(layout.groups) > 1 or layout.patterns[0].blocks is not None or layout.patterns[0].num_sink_tokens:
            return "serves dense attention and plain windows here"
        return _flash_attention_4_missing()

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        from flash_attn.cute import flash_attn_func

        # Its own order of dimensions, so that it pays for no strides.
        leaves = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
        window = layout.patterns[0].window
        window_size = (None, None) if window == UNBOUNDED else (window - 1, 0)
        return Call(
            forward=lambda: flash_attn_func(*leaves, causal=True, window_size=window_size)[0],
            inputs=leaves,
            heads_first=False,
        )


@lru_cache(maxsize=1)
def _flash_attention_4_missing() -> str | None:
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:  # its imports reach far: drivers, compilers, other packages
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


@dataclass(frozen=True)
class Flex:
    """FlexAttention, compiled, with 128-blocks.

    Args:
        lengths: the lengths it is compiled for, since each costs about 10 s per direction; None means every length.
    """

    lengths: tuple[int, ...] | None = None
    name: str = "FlexAttention"

    def refuses(self, shape: Shape, layout: AttentionLayout) -> str | None:
        if self.lengths is not None and shape.seq_len not in self.lengths:
            which = ", ".join(map(str, self.lengths)) or "no length"
            return f"takes long to compile; in this run it is compiled for {which} here"
        if shape.seq_len % BLOCK_SIZE:
            return f"asked for multiples of {BLOCK_SIZE} tokens only"
        kinds = {_kind(pattern) for pattern in layout.patterns}
        return None if len(kinds) == 1 else "one mask function serves all heads; these differ"

    def bind(self, q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Call:
        import torch._dynamo.config as dynamo
        import torch._functorch.config as functorch

        block_mask = flex_block_mask(layout, q.shape[2], q.shape[1], q.device)
        attend = _compiled_flex()

        def forward() -> Tensor:
            # The backward runs again and again on one graph, so its buffers must not be given away; and it must never
            # run uncompiled, where it would write out all scores.
            with functorch.patch(donated_buffer=False), dynamo.patch(recompile_limit=64):
                return attend(q, k, v, block_mask=block_mask, enable_gqa=True)

        held = sum(x.nbytes for x in block_mask.as_tuple() if isinstance(x, Tensor))
        return Call(forward=forward, inputs=(q, k, v), held_bytes=held)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _kind(pattern: HeadPattern) -> tuple[int, int, int, bool]:
    return pattern.window, pattern.num_sink_tokens, pattern.num_last_tokens, pattern.blocks is not None


def flex_block_mask(layout: AttentionLayout, seq_len: int, num_heads: int, device: torch.device) -> Any:
    """A BlockMask of the layout, made from block numbers alone.

    Raises:
        ValueError: if a block list has another block size.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_rows = -(-seq_len // BLOCK_SIZE)
    # One mask serves all heads where they agree.
    patterns = layout.patterns[:1] if len(layout.groups) == 1 else layout.patterns
    pairs = [_blocks(pattern, num_rows, seq_len) for pattern in patterns]
    repeats = 1 if len(patterns) == 1 else num_heads // len(patterns)
    full, partial = (torch.stack(x).repeat_interleave(repeats, 0)[None].to(device) for x in zip(*pairs, strict=True))
    window, sinks, last, listed = _kind(layout.patterns[0])

    def causal(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def in_reach(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((q - k < window) | (k < sinks))

    def in_reach_or_last(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((q - k < window) | (k < sinks) | (q >= seq_len - last))

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=causal if listed or window == UNBOUNDED else in_reach_or_last if last else in_reach,
        seq_lengths=(seq_len, seq_len),
    )


def _ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.sum(-1, dtype=torch.int32)
    return counts, mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()


def _blocks(pattern: HeadPattern, num_rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Boolean `[num_rows, num_rows]`: blocks read without a mask, and blocks that need one."""
    row, column = torch.arange(num_rows)[:, None], torch.arange(num_rows)
    below = column < row
    if pattern.blocks is not None:
        if pattern.blocks.block_size != BLOCK_SIZE:
            raise ValueError(f"FlexAttention takes blocks of {BLOCK_SIZE} here, got {pattern.blocks.block_size}")
        listed = pattern.blocks.block_mask(num_rows)
        return listed & below, listed & (row == column)
    nearest = ((row - column) * BLOCK_SIZE - (BLOCK_SIZE - 1)).clamp_min(0)
    farthest = (row - column) * BLOCK_SIZE + BLOCK_SIZE - 1
    first_dense = seq_len - pattern.num_last_tokens if pattern.num_last_tokens else num_rows * BLOCK_SIZE
    touched = (nearest < pattern.window) | (column * BLOCK_SIZE < pattern.num_sink_tokens)
    touched = (column <= row) & (touched | ((row + 1) * BLOCK_SIZE > first_dense))
    full = (farthest < pattern.window) | ((column + 1) * BLOCK_SIZE <= pattern.num_sink_tokens)
    full = below & (full | (row * BLOCK_SIZE >= first_dense))
    return full, touched & ~full


def make_peers(flex_lengths: tuple[int, ...] | None) -> tuple[Sdpa | FlashAttention4 | Flex, ...]:
    """All peers; FlexAttention at these lengths."""
    return CUDNN, FLASH, FlashAttention4(), Flex(flex_lengths)
