"""Decode steps without launch overhead: one token at a fixed context length, on both sides with compiled layers and
captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo
from transformers import Cache, PreTrainedModel

from sparse_hf.bench.inference_compare import Call, Run, dense_contexts, described
from sparse_hf.bench.inference_kv import prefix_cache, static_sparse_cache, without_mask
from sparse_hf.bench.inference_plan import Case, Where
from sparse_hf.bench.timing import CudaClock
from sparse_hf.figures import Figure

CASE: Case = "graph decode"
WARM_UPS = 3
CALLS = 4
"""Steps between two events."""

ROOM = 1024
"""Tokens that a static sparse cache can take besides: more than all warm-ups and timed steps together."""


def measure_graph_decode(run: Run, where: Where) -> list[Figure]:
    """Times per step and per second of all rows, and the speed-up. The dense cache costs no mask and no copy."""
    session, (num_tokens, batch) = run.session, where
    if session.device.type != "cuda":
        session.miss(CASE, described(where), "CUDA graphs need a CUDA device")
        return []
    stock, shared = run.models.stock, list[Cache]()

    def dense_step(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], object]:
        if not shared:  # here, where a cache that does not fit is absent and ends nothing
            shared.append(prefix_cache(stock, num_tokens, batch))
        with without_mask(stock):
            return captured_step(stock, shared[0], where, context)

    makers: dict[str, Call] = {
        label: partial(dense_step, context) for label, context in dense_contexts(session.device).items()
    }
    makers |= {label: partial(_sparse_step, model, where) for label, model in run.chosen(CASE, where).items()}
    calls = {label: probe.result for label, probe in run.probe(CASE, where, makers).items()}
    clock = CudaClock(session.device, calls=CALLS, flush=False)  # keys and values are far larger than the L2 cache
    samples, _ = run.compare(CASE, where, calls, clock=clock)
    speeds = [run.speed_figure(CASE, where, label, batch, sample) for label, sample in samples.items()]
    return [*run.time_figures(CASE, where, samples), *speeds, *run.ratio_figures(CASE, where, samples)]


def _sparse_step(model: PreTrainedModel, where: Where) -> Callable[[], object]:
    return captured_step(model, static_sparse_cache(model, *where, ROOM), where)


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """All of the decoder layers but attention and cache compiled, by the same few graphs for all layers.

    Stock layers launch a dozen small kernels besides their matrix products, which would hide what attention takes.
    """
    layers = model.get_submodule("model.layers")
    # Else every layer's number would be a graph of its own.
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for layer in layers.children():
            layer.compile()
        try:
            yield
        finally:
            for layer in layers.children():
                layer._compiled_call_impl = None


@torch.no_grad()
def captured_step(
    model: PreTrainedModel,
    cache: Cache,
    where: Where,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], object]:
    """Replays one forward of one token per row after the cache's tokens."""
    num_tokens, batch = where
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    position = torch.full_like(token, num_tokens)

    def step() -> Any:
        return model(token, position_ids=position, past_key_values=cache, use_cache=True).logits

    with compiled_layers(model), context():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()

    # The graph holds addresses alone: what lies there has to live as long.
    held = cache, token, position

    def replay() -> object:
        graph.replay()
        return output, held

    return replay
