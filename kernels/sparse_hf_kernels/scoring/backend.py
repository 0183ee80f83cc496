"""Where a scoring operator runs: the Triton kernels on CUDA, plain torch elsewhere, or what the caller names.

The kernels specialise on strides, and on lengths only by powers of two: a new prompt length rarely compiles anything.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

BackendName = Literal["triton", "naive"]

Launch = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Grid, arguments and options of a kernel: what a launch and an offline compilation share."""

INTERPRETED_ARCH = 80
"""Configurations for tensors off the GPU: only Triton's interpreter runs there, and it takes any of them."""


def resolve_backend(backend: BackendName | None, device: torch.device) -> BackendName:
    """`backend` when given, else "triton" for CUDA tensors and "naive" for others.

    Raises:
        ValueError: for an unknown name.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "naive"
    if backend not in ("triton", "naive"):
        raise ValueError(f"backend must be 'triton', 'naive' or None, got {backend!r}")
    return backend


def arch_of(device: torch.device) -> int:
    """Key of the configuration tables: 80, 89, 90, 100 or 120, the largest not above the device's capability.

    8.6 goes with 8.9: both have 101,376 bytes of shared memory a block, against 166,912 on 8.0 and 8.7.
    """
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return 89 if minor in (6, 9) else 80
    return max((arch for arch in (80, 90, 100, 120) if arch <= 10 * major), default=80)
