"""The decode kernel alone: all layers' attention steps of one token in a CUDA graph, against the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sparse_hf.bench.inference_compare import BEST, Run, bounds, described
from sparse_hf.bench.inference_kv import model_shape, static_sparse_cache
from sparse_hf.bench.inference_plan import KERNEL_SHARE, KERNEL_TIME, Case, Where
from sparse_hf.bench.timing import CudaClock, alternate
from sparse_hf.figures import Figure
from sparse_hf_kernels.kv_cache import decode_attention

CASE: Case = "decode kernel"
CALLS, ROOM = 4, 1024
COPIED_BYTES = 2**30


def measure_kernel(run: Run, where: Where) -> list[Figure]:
    """Times of a layer on average, its bytes over time as a share of what a copy moves, and time over bytes."""
    session = run.session
    if session.device.type != "cuda":
        session.miss(CASE, described(where), "CUDA graphs need a CUDA device")
        return []
    clock = CudaClock(session.device, calls=CALLS, flush=False)  # keys and values are far larger than the L2 cache
    bandwidth = copy_bandwidth(clock, session.device)
    figures = [run.figure("copy bandwidth", where, BEST, bandwidth / 1e12, "TB/s", lower_is_better=False)]
    num_layers = run.options.num_layers
    for label, model in run.chosen(CASE, where).items():
        step, held = _captured(model, where)
        sample = alternate({label: step}, clock, budget_ms=run.options.budget_ms)[label]
        seconds = sample.median / 1e3
        figures.append(run.figure(f"{CASE} time", where, label, sample.median / num_layers, "ms", lower_is_better=True))
        share = bounds(run.options.bound(KERNEL_SHARE, label, where), False)
        figures.append(run.figure(KERNEL_SHARE, where, label, held / seconds / bandwidth, "share", **share))
        ratio = bounds(run.options.bound(KERNEL_TIME, label, where), True)
        figures.append(run.figure(KERNEL_TIME, where, label, seconds * bandwidth / held, "ratio", **ratio))
        del step
        session.free()
    return figures


def copy_bandwidth(clock: CudaClock, device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = alternate({"copy": lambda: target.copy_(source)}, clock, budget_ms=200.0)["copy"]
    return 2 * COPIED_BYTES / copied.median * 1e3


@torch.no_grad()
def _captured(model: PreTrainedModel, where: Where) -> tuple[Callable[[], object], int]:
    """Replays one decode step of all layers, and the bytes of keys and values that they read."""
    batch = where[1]
    cache = static_sparse_cache(model, *where, ROOM)
    shape = model_shape(model)
    token = torch.randn(batch, 1, shape.num_heads, shape.head_dim, device=model.device, dtype=model.dtype)
    query, new = token.transpose(1, 2), token[:, :, : shape.num_kv_heads].transpose(1, 2)
    storages, work = cache.storages(), None

    def step() -> None:
        nonlocal work
        for storage in storages:
            _, work = decode_attention(query, new, new, storage, scale=shape.head_dim**-0.5, work=work)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    held = cache, token, work

    def replay() -> object:
        graph.replay()
        return held

    return replay, cache.kv_bytes()
