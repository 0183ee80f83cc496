"""No figure without a right answer: contenders against the fp32 reference, before any of their times counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparse_hf.bench.contenders import Call
from sparse_hf_kernels import AttentionLayout, BlockSelection, TokenPositions, sparse_attention_reference

MAX_RELATIVE_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Frobenius. What rounding alone costs is a third of it: 2^-9 for a bf16 output, as much for weights and gradients."""

GATE_ALLOWANCE = 5.0
"""A gate's gradient sums differences of two outputs, each rounded: so many times the error is allowed there."""

SLICE_ROWS = 64


class WrongResultError(Exception):
    """A contender's numbers are not those of the reference."""


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    truth = truth.float()
    return ((actual.float() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check_forward(call: Call, inputs: Sequence[Tensor], layout: AttentionLayout) -> float:
    """Largest relative error of three slices of query rows of the timed problem itself: first, middle, last.

    Heads of selected patterns are held against what the call says it selected.

    Raises:
        WrongResultError: if it exceeds `MAX_RELATIVE_ERROR`.
    """
    q, k, v = (x.detach() for x in inputs)
    with torch.no_grad():
        out = call.forward()
    out = out if call.heads_first else out.transpose(1, 2)
    seq_len = q.shape[2]
    rows = min(SLICE_ROWS, seq_len)
    worst = 0.0
    for start in sorted({0, seq_len // 2 - rows // 2, seq_len - rows}):
        end = start + rows
        truth, _ = sparse_attention_reference(
            q[:, :, start:end].float(),
            k,  # all of them: dense last rows count from the end of the sequence
            v,
            layout,
            positions=TokenPositions.causal(rows, seq_len, q.device, q_offset=start),
            scale=q.shape[-1] ** -0.5,
            selection=None if call.selection is None else _rows(call.selection, start, end),
        )
        worst = _worse(worst, relative_error(out[:, :, start:end], truth))
    return _accepted(worst, q.dtype, f"output of {seq_len} tokens")


def _rows(selection: BlockSelection, start: int, end: int) -> BlockSelection:
    """What it says of queries [start, end) of a call that begins at 0, as a selection of theirs."""
    blocks = slice(start // selection.block_size, -(-end // selection.block_size))
    return replace(selection, counts=selection.counts[:, :, blocks], indices=selection.indices[:, :, blocks])


def check_backward(call: Call, truth: Call, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients against another call on the same values, in fp32.

    A gradient `[num_kv_heads]`, that of gates, counts a `GATE_ALLOWANCE`th.

    Raises:
        WrongResultError: if it exceeds `MAX_RELATIVE_ERROR`.
    """
    out, expected = call.forward(), truth.forward()
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, call.inputs, upstream.to(out.dtype))
    expected_gradients = torch.autograd.grad(expected, truth.inputs, upstream)
    worst = 0.0
    for actual, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        error = relative_error(actual.detach(), right.detach())
        worst = _worse(worst, error / GATE_ALLOWANCE if actual.ndim == 1 else error)
    return _accepted(worst, dtype, f"output and gradients of {out.shape[2]} tokens")


def _worse(a: float, b: float) -> float:
    return b if b != b else max(a, b)  # a NaN is the worst of all


def _accepted(error: float, dtype: torch.dtype, what: str) -> float:
    if not error <= MAX_RELATIVE_ERROR[dtype]:
        raise WrongResultError(f"wrong: {what} differs by {error:.2e}, more than {MAX_RELATIVE_ERROR[dtype]:.0e}")
    return error
