"""Launching the kernels of the cache. A decode step is launched once per layer and token, hence as little as can be
asked in each call: what depends on shapes alone is looked up, and the compiled kernel is called directly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_hf_kernels.kv_cache.decode_kernel import LARGEST_DISTANCE, _decode_kernel
from sparse_hf_kernels.kv_cache.layout import head_table
from sparse_hf_kernels.kv_cache.storage import QUANTIZED, KVDtype, KVStorage
from sparse_hf_kernels.kv_cache.store_kernel import _store_kernel

LOG2E = 1.4426950408889634
TOKENS_PER_PROGRAM = 32
INTERPRETED = not isinstance(_decode_kernel, triton.JITFunction)
"""Kernels run on the host, program after program, where waiting for another one would never end."""

RESERVED_SHARED = 1024
"""Bytes of shared memory that a program takes beside its own."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a decode step is cut up.

    Args:
        block: slots that a program visits at once.
        num_warps, num_stages: of the launch; stages of loads in flight.
        programs: per multiprocessor, at most: fewer where no more fit.
        min_share: blocks that a program takes at least, so that short contexts need no merge.
        head_cost: blocks that a program could read in the time that beginning with another head takes.
    """

    block: int
    num_warps: int = 2
    num_stages: int = 3
    programs: int = 4
    min_share: int = 1
    head_cost: int = 2


def decode_config(head_dim: int, itemsize: int) -> DecodeConfig:
    """By the bytes of a key: so much that loads in flight fill the bandwidth, in shared memory for all programs."""
    row = triton.next_power_of_2(head_dim) * max(itemsize, 2)  # 8-bit tiles are widened
    if itemsize == 1:  # which takes more registers than two warps have
        return DecodeConfig(block=max(16, min(128, 64 * 256 // row)), num_warps=4, programs=2)
    return DecodeConfig(block=max(16, min(128, 32 * 256 // row)))


def launches_overlap() -> bool:
    """Whether a launch may begin while the kernel before it ends: from Hopper on."""
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


@lru_cache
def num_programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a decode launch; off the GPU, where only the interpreter runs, a few."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor


def fitting(shared: int, registers: int, num_warps: int, properties: Any) -> int:
    """How many programs a multiprocessor holds at once.

    Args:
        shared: bytes of shared memory that a program takes.
        registers: of each of its threads.
        num_warps: of a program.
        properties: as `torch.cuda.get_device_properties` has them.
    """
    by_shared = properties.shared_memory_per_multiprocessor // (-(-shared // 128) * 128 + RESERVED_SHARED)
    # Each quarter of a multiprocessor has warps and registers of its own, and gives them out in eights.
    warps = 4 * (properties.regs_per_multiprocessor // 4 // (-(-registers // 8) * 8 * 32))
    warps = min(warps, properties.max_threads_per_multi_processor // 32)
    return min(by_shared, warps // num_warps)


def resident_programs(kernel: Any, device: torch.device) -> int:
    """`fitting` of a compiled kernel."""
    _ = kernel.run  # loads it, which tells its registers
    properties = torch.cuda.get_device_properties(device)
    found = fitting(kernel.metadata.shared, kernel.n_regs, kernel.metadata.num_warps, properties)
    assert found, "what can be loaded fits once"
    return found


@lru_cache(maxsize=1)
def only_device() -> bool:
    """There is at most one GPU, so that it is the current one."""
    return torch.cuda.device_count() <= 1


class Workspace:
    """Scratch of decode launches on one device, for all layers of a cache: they run one after the other.

    Attributes:
        parts, stats: what programs leave of the at most two heads that each shares with others: weighted values
            `[programs, 2, group, head_dim]`, and maximum and sum of weights `[programs, 2, 2, group]`.
        counters: int32 `[2 + 2 * rows]`: how many programs have ended, 0 between launches; which of two sets is the
            next launch's; and the sets: for each row, how many programs have left their part. As programs wait on a
            launch's set to its end, it clears the other one instead, for the launch after it.
    """

    def __init__(self, device: torch.device, rows: int, group: int, head_dim: int, programs: int) -> None:
        self.parts = torch.empty(programs, 2, group, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(programs, 2, 2, group, dtype=torch.float32, device=device)
        self.counters = torch.zeros(2 + 2 * rows, dtype=torch.int32, device=device)

    def fits(self, rows: int, group: int, head_dim: int, programs: int) -> bool:
        return self.counters.shape[0] == 2 + 2 * rows and self.parts.shape == (programs, 2, group, head_dim)


def quantized_options(kv_dtype: KVDtype | None) -> dict[str, Any]:
    """Constants that both kernels need to write tokens."""
    largest = 1.0 if kv_dtype is None else QUANTIZED[kv_dtype][1]
    return {"QUANTIZED": kv_dtype is not None, "ROUNDS": kv_dtype == "int8", "LARGEST": largest}


def decode_options(
    num_heads: int, num_kv_heads: int, head_dim: int, batch: int, dtype: torch.dtype, storage: KVStorage, valid: bool
) -> dict[str, Any]:
    """Constants and launch options of `_decode_kernel`."""
    config = decode_config(head_dim, storage.keys.element_size())
    group = num_heads // num_kv_heads
    overlaps = not INTERPRETED and launches_overlap()
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "BG": max(16, triton.next_power_of_2(group)),
        "D": head_dim,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "BN": config.block,
        "ROWS": triton.next_power_of_2(batch * num_kv_heads),
        "MIN_SHARE": config.min_share,
        "HEAD_COST": config.head_cost,
        "BM": triton.next_power_of_2(group),
        "HAS_VALID": valid,
        **quantized_options(storage.kv_dtype),
        "STAGES": config.num_stages,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "WAITS": not INTERPRETED,
        "OVERLAPS": overlaps,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Programs that wait for each other have to be on the device at once, also beside other kernels: this way a
        # launch is refused where they cannot be.
        "launch_cooperative_grid": not INTERPRETED,
        "launch_pdl": overlaps,
    }


def decode_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    storage: KVStorage,
    work: Workspace,
    scale: float,
    valid: Tensor | None,
) -> tuple[Any, ...]:
    """Of `_decode_kernel`, up to its constants."""
    layout = storage.layout
    return (
        q, k, v, storage.keys, storage.values, storage.k_scales, storage.v_scales, out,
        storage.state, storage.state if valid is None else valid, head_table(layout, q.device),
        work.parts, work.stats, work.counters,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        storage.capacity, layout.ring_slots, layout.num_linear, q.shape[0] * k.shape[1],
        layout.num_dense_rows, min(layout.max_distance, LARGEST_DISTANCE.value), scale * LOG2E,
    )  # fmt: skip


class BoundLaunch:
    """A decode launch on a storage whose tensors stay where they are: only the new token's tensors differ per call.

    Triton's own launch looks at every argument again, which takes longer than the kernel. What it would look at is
    compared here: strides, and whether pointers are multiples of 16.

    Args:
        kernel: as it was compiled for a first call with these strides.
        arguments: all of that call's, constants included.
        grid: of the launch.
        work: the scratch among them.
    """

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], grid: tuple[int, int, int], work: Workspace) -> None:
        self.run = kernel[grid]
        self.work = work
        self.kept = arguments  # what the addresses lead to has to stay
        self.head = tuple(_pointer(x) for x in arguments[3:7])
        self.middle = arguments[8].data_ptr()
        self.tail = tuple(_pointer(x) for x in arguments[10:])

    def __call__(self, q: int, k: int, v: int, out: int, valid: int | None) -> None:
        state = self.middle
        self.run(q, k, v, *self.head, out, state, state if valid is None else valid, *self.tail)


def _pointer(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, Tensor) else x


def decode_fused(
    q: Tensor, k: Tensor, v: Tensor, storage: KVStorage, work: Workspace | None, scale: float, valid: Tensor | None
) -> tuple[Tensor, Workspace]:
    """`decode_attention` by the kernel, which must not refuse the storage."""
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, num_heads, _, head_dim = q.shape
    out = torch.empty(batch, 1, num_heads, head_dim, dtype=q.dtype, device=q.device)
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    has_valid, aligned = valid is not None, (pointers[0] | pointers[1] | pointers[2]) % 16
    key = num_heads, q.stride(), k.stride(), v.stride(), scale, has_valid, aligned
    here = only_device() or q.device.index == torch.cuda.current_device()
    bound = storage.launches.get(key)
    if bound is not None and here:
        bound(*pointers, None if valid is None else valid.data_ptr())
        return out, bound.work
    num_kv_heads = k.shape[1]
    most = decode_config(head_dim, storage.keys.element_size()).programs
    shape = batch * num_kv_heads, num_heads // num_kv_heads, head_dim, num_programs(q.device, most)
    if work is None or not work.fits(*shape):
        work = Workspace(q.device, *shape)
    arguments = decode_arguments(q, k, v, out, storage, work, scale, valid)
    options = decode_options(num_heads, num_kv_heads, head_dim, batch, q.dtype, storage, has_valid)
    if INTERPRETED:
        _decode_kernel[(num_programs(q.device, most),)](*arguments, **options)
        return out, work
    with torch.cuda.device_of(q):
        kernel = _decode_kernel.warmup(*arguments, grid=(1,), **options)
        programs = num_programs(q.device, min(most, resident_programs(kernel, q.device)))
        constants = tuple(options[name] for name in _decode_kernel.arg_names[len(arguments) :])
        bound = BoundLaunch(kernel, (*arguments, *constants), (programs, 1, 1), work)
        bound(*pointers, None if valid is None else valid.data_ptr())
    storage.launches[key] = bound
    return out, work


def store_arguments(
    k: Tensor, v: Tensor, storage: KVStorage, positions: Tensor | None, lengths: Tensor | None, seen: int
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and options of `_store_kernel`."""
    batch, num_kv_heads, num_new, head_dim = k.shape
    layout = storage.layout
    arguments = (
        k, v, storage.keys, storage.values, storage.k_scales, storage.v_scales,
        storage.state if positions is None else positions, storage.state if lengths is None else lengths,
        head_table(layout, k.device), *k.stride()[:3], *v.stride()[:3],
        num_new, seen, storage.capacity, layout.ring_slots, layout.num_linear,
    )  # fmt: skip
    options = {
        "D": head_dim,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "BT": TOKENS_PER_PROGRAM,
        "HAS_POSITIONS": positions is not None,
        **quantized_options(storage.kv_dtype),
        "num_warps": 4,
    }
    return (triton.cdiv(num_new, TOKENS_PER_PROGRAM), num_kv_heads, batch), arguments, options


def store_triton(
    k: Tensor, v: Tensor, storage: KVStorage, positions: Tensor | None, lengths: Tensor | None, seen: int
) -> None:
    """See `store_tokens`."""
    grid, arguments, options = store_arguments(k, v, storage, positions, lengths, seen)
    with torch.cuda.device_of(k):
        _store_kernel[grid](*arguments, **options)
