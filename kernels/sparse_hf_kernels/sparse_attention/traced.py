"""How layouts and positions travel through compiled graphs, which carry tensors and integers only.

A layout is a key to this module's table, positions are optional tensors and integers: neither a length nor a position
recompiles anything.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from sparse_hf_kernels.layout import AttentionLayout
from sparse_hf_kernels.positions import TokenPositions

PositionArguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int | None, int]
"""q_positions, k_positions, q_segments, k_segments, form, q_offset, k_offset of the operators."""

_ATTRIBUTE = "_graph_key"

_layouts: dict[int, AttentionLayout] = {}


def layout_key(layout: AttentionLayout) -> int:
    """The integer that stands for a layout in graphs: the same in every process, and known to this one from now on.

    `sparsify` calls it for a model's layouts. Call it yourself before compiling a function that names a layout: from
    torch 2.12 on that only spares work, torch 2.11 cannot trace the function otherwise.
    """
    known = getattr(layout, _ATTRIBUTE, 0)
    if known not in _layouts:  # an unpickled layout brings the key, not the table
        known = layout.__dict__[_ATTRIBUTE] = _new_key(layout)
    return known


def _new_key(layout: AttentionLayout) -> int:
    key = int.from_bytes(blake2b(repr(layout).encode(), digest_size=7).digest(), "big")
    known = _layouts.setdefault(key, layout)
    assert known == layout, "two layouts share 56 bits of their digests"
    return key


# What torch.compiler.assume_constant_result does, which would import torch._dynamo and with it Triton: dynamo calls the
# function while it traces, guards the layout's identity, and puts the key into the graph.
setattr(_new_key, "_dynamo_marked_constant", True)  # noqa: B010  (functions declare no such attribute)


def traced_key(layout: AttentionLayout) -> int:
    """`layout_key` within a function that is being traced: an attribute, which dynamo guards like any integer."""
    known: int | None = getattr(layout, _ATTRIBUTE, None)
    return _new_key(layout) if known is None else known


def layout_of(key: int) -> AttentionLayout:
    """The layout of a key.

    Raises:
        ValueError: if this process never saw it.
    """
    if key not in _layouts:
        raise ValueError(f"layout {key} is unknown to this process: call layout_key(layout) before running the graph")
    return _layouts[key]


@dataclass(frozen=True, kw_only=True)
class TracedPositions:
    """Positions that an operator of the same graph works out when the graph runs.

    Args:
        q_positions, k_positions, q_segments, k_segments: as in `TokenPositions`.
        form: int64 `[4]` on the CPU: 1 if there is a closed form, its offset and k_offset, and 1 if segments count.
    """

    q_positions: Tensor
    k_positions: Tensor
    q_segments: Tensor
    k_segments: Tensor
    form: Tensor

    @classmethod
    def pack(cls, positions: TokenPositions, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What an operator returns for these fields: new contiguous int64 tensors of `batch` rows, and the form."""

        def rows(x: Tensor | None, like: Tensor) -> Tensor:
            return (
                (torch.zeros_like(like) if x is None else x).expand(batch, -1).to(torch.int64, copy=True).contiguous()
            )

        packed = positions.q_segments is not None
        q, k = rows(positions.q_positions, positions.q_positions), rows(positions.k_positions, positions.k_positions)
        q_segments, k_segments = rows(positions.q_segments, q), rows(positions.k_segments, k)
        closed = positions.offset is not None
        form = torch.tensor([int(closed), positions.offset or 0, positions.k_offset, int(packed)])
        return q, k, q_segments, k_segments, form


def position_arguments(positions: TokenPositions | TracedPositions | None, q_offset: int | None) -> PositionArguments:
    if positions is None:
        return None, None, None, None, None, q_offset, 0
    if isinstance(positions, TracedPositions):
        tensors = (positions.q_positions, positions.k_positions, positions.q_segments, positions.k_segments)
        return *tensors, positions.form, None, 0
    if positions.offset is not None:
        return None, None, None, None, None, positions.offset, positions.k_offset
    return (
        positions.q_positions,
        positions.k_positions,
        positions.q_segments,
        positions.k_segments,
        None,
        None,
        0,
    )


_latest: tuple[weakref.ref[Tensor], TokenPositions] | None = None
"""The positions of the latest `form`: a model's layers share them, with what kernels derive from them."""


def restored_positions(q: Tensor, k: Tensor, arguments: PositionArguments) -> TokenPositions:
    """The positions, when the graph runs."""
    global _latest
    q_positions, k_positions, q_segments, k_segments, form, q_offset, k_offset = arguments
    if q_positions is None or k_positions is None:
        return TokenPositions.causal(q.shape[2], k.shape[2], q.device, q_offset=q_offset, k_offset=k_offset)
    if form is None:
        return TokenPositions(
            q_positions=q_positions, k_positions=k_positions, q_segments=q_segments, k_segments=k_segments
        )
    if _latest is not None and _latest[0]() is form:
        return _latest[1]
    closed, offset, first_key, packed = form.tolist()
    if closed:
        positions = TokenPositions.causal(q.shape[2], k.shape[2], q.device, q_offset=offset, k_offset=first_key)
    else:
        positions = TokenPositions(
            q_positions=q_positions,
            k_positions=k_positions,
            q_segments=q_segments if packed else None,
            k_segments=k_segments if packed else None,
        )
    _latest = weakref.ref(form), positions
    return positions
