"""What `sparse-hf tune kernels` is asked for, and which entries of the tables that means on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sparse_hf.bench.timing import CudaClock
from sparse_hf.tune.candidates import candidates, shipped
from sparse_hf_kernels import AttentionRequest, select_backend
from sparse_hf_kernels.tuned import DTYPES, HEAD_DIMS, Key

Kind = Literal["forward", "backward", "decode"]

_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "gluon": {"forward": ("forward",), "backward": ("backward",), "decode": ()},
    "triton": {"forward": ("forward",), "backward": ("dkdv", "dq"), "decode": ("decode",)},
}
"""The kinds of the tables behind what a user asks for."""


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What is tuned.

    Args:
        backend: "gluon" or "triton"; by default the one that serves each head_dim and dtype here.
        head_dims: 64, 128, 256.
        dtypes: "bfloat16", "float16", "float32".
        kinds: "forward", "backward", "decode"; empty for all that the backend has.
        quick: few candidates and short workloads.
        seq_len: tokens of the dense workload; by default 8192, with `quick` 2048.
        num_heads, num_kv_heads: of the workloads.
    """

    backend: str | None = None
    head_dims: tuple[int, ...] = (128, 64)
    dtypes: tuple[str, ...] = ("bfloat16",)
    kinds: tuple[str, ...] = ()
    quick: bool = False
    seq_len: int | None = None
    num_heads: int = 32
    num_kv_heads: int = 8

    def __post_init__(self) -> None:
        backends = () if self.backend is None else (self.backend,)
        for name, given, known in (
            ("backend", backends, tuple(_KINDS)),
            ("head_dim", self.head_dims, HEAD_DIMS),
            ("dtype", self.dtypes, tuple(DTYPES)),
            ("kind", self.kinds, get_args(Kind)),
        ):
            if unknown := [value for value in given if value not in known]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {unknown[0]!r}")
        if not self.head_dims or not self.dtypes:
            raise ValueError("give at least one head_dim and one dtype")

    @property
    def tokens(self) -> int:
        return self.seq_len or (2048 if self.quick else 8192)

    @property
    def budget_ms(self) -> float:
        return 20.0 if self.quick else 60.0


def tuning_device() -> tuple[torch.device, CudaClock]:
    """The current CUDA device, and what measures there.

    Raises:
        ValueError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("kernels are tuned on a CUDA device and torch sees none; `sparse-hf env` shows devices")
    device = torch.device("cuda", torch.cuda.current_device())
    return device, CudaClock(device)


def plan_kernels(options: KernelOptions, device: torch.device) -> tuple[list[Key], list[str]]:
    """What will be tuned, and what of the request has no configuration of its own, with the reason.

    Raises:
        ValueError: if nothing is left, or no fused kernel serves the device.
    """
    keys, absent = [], []
    for dtype in (DTYPES[name] for name in options.dtypes):
        for head_dim in options.head_dims:
            backend = options.backend or _serving_backend(device, dtype, head_dim)
            arch = _arch(backend, device)
            for asked in options.kinds or get_args(Kind):
                if not _KINDS[backend][asked]:
                    absent.append(f"{backend} has no {asked} kernel of its own, its forward serves")
                for kind in _KINDS[backend][asked]:
                    key = Key(backend, kind, arch, head_dim, dtype)
                    try:
                        shipped(key)
                    except ValueError as error:
                        absent.append(str(error))
                    else:
                        keys.append(key)
    if not keys:
        raise ValueError(f"nothing to tune: {'; '.join(dict.fromkeys(absent))}")
    return keys, list(dict.fromkeys(absent))


def _serving_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    request = AttentionRequest(op="sparse_attention", device_type=device.type, dtype=dtype, head_dim=head_dim)
    selection = select_backend(request)
    if selection.backend.name not in _KINDS:
        raise ValueError(
            f"{selection.backend.name!r} serves {device} here ({selection.reason}) and has nothing to tune; "
            "`sparse-hf env` shows what each backend needs"
        )
    return selection.backend.name


def _arch(backend: str, device: torch.device) -> int:
    if backend == "gluon":
        from sparse_hf_kernels.sparse_attention.gluon.configs import ARCH

        return ARCH
    from sparse_hf_kernels.sparse_attention.triton.configs import current_architecture

    return current_architecture(device)


def num_steps(keys: Sequence[Key], options: KernelOptions) -> int:
    """How often `tune_kernels` calls `progress`."""
    return sum(len(candidates(key, quick=options.quick)) for key in keys)
