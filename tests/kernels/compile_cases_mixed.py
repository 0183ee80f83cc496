"""The kernels of the mask-learning operator as arguments to compile, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from compile_cases_gluon import Case, launched

from sparse_hf_kernels.mixed_attention.blend_kernels import _blend_kernel, _unblend_kernel, blend, unblend


def cases(arch: int, head_dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Both kernels, for branches that overlap and for disjoint ones."""
    for head_dim in head_dims:
        for dtype in dtypes:
            out = torch.empty(1, 300, 4, head_dim, dtype=dtype, device="meta").transpose(1, 2)
            lse, gate = torch.empty(out.shape[:3], device="meta"), torch.empty(2, device="meta")
            for disjoint in (False, True):
                label = f"sm_{arch} hd{head_dim} {str(dtype)[6:]} {'disjoint' if disjoint else 'overlapping'}"
                blending, back = partial(blend, disjoint=disjoint), partial(unblend, disjoint=disjoint)
                yield *launched(_blend_kernel, blending, gate, out, lse, out, lse), f"{label} blend"
                yield *launched(_unblend_kernel, back, out, gate, out, lse, out, lse), f"{label} unblend"
