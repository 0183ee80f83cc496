"""The longest context that fits: caches of both kinds grow, beside weights and a chunk's activations."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sparse_hf.answer import cache_bytes
from sparse_hf.bench.end_to_end import new_cache
from sparse_hf.bench.end_to_end_model import planted_prompt
from sparse_hf.bench.inference_compare import BEST, Run, bounds
from sparse_hf.bench.inference_kv import CHUNK, store_random
from sparse_hf.bench.inference_plan import Case, Where
from sparse_hf.figures import Figure

CASE: Case = "longest context"
FINE = 8192
"""Tokens of a chunk of the prefill whose activations stay, and by how many a cache grows when memory is short."""

GIB = 2**30


def measure_longest(run: Run, where: Where) -> list[Figure]:
    """Tokens of the stock model's cache and of sparse ones, batch 1, and how many times more the latter are."""
    options, session = run.options, run.session
    cuda = session.device.type == "cuda"
    if options.memory_gib is None and not cuda:
        session.miss(CASE, "all", "without a GPU --memory-gib must say how much memory there is")
        return []
    stock = run.models.stock
    resident = _activations(stock, run)  # takes its place in memory until all caches have grown
    weights = sum(x.numel() * x.element_size() for x in stock.parameters())
    limit = None if options.memory_gib is None else int(options.memory_gib * GIB) - weights - resident.numel()
    found: dict[str, int] = {}
    for label, model in {BEST: stock, **run.chosen(CASE, where)}.items():
        found[label] = longest_context(model, limit, chunk=CHUNK if cuda else FINE)
        session.free()
    total = torch.cuda.get_device_properties(session.device).total_memory / GIB if limit is None else options.memory_gib
    row = f"{total:.4g} GiB"
    figures = [
        Figure(case=f"{CASE}, {row}: {label}", value=tokens, unit="tokens", lower_is_better=False)
        for label, tokens in found.items()
    ]
    for label, tokens in found.items():
        if label != BEST:
            asked = bounds(options.bound(CASE, label, where), False)
            ratio = tokens / max(found[BEST], 1)
            figures.append(Figure(case=f"{CASE} ratio, {row}: {label}", value=ratio, unit="ratio", **asked))
    return figures


def _activations(model: PreTrainedModel, run: Run) -> torch.Tensor:
    """Memory that a chunk's prefill takes beyond its keys and values, held; nothing where that is not counted."""
    prompt = planted_prompt(run.options, FINE, model.device)
    if model.device.type != "cuda":
        return torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def prefill() -> int:
        cache = new_cache(model)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        return cache_bytes(cache)

    probe = run.probe(CASE, (FINE, 1), {BEST: prefill}).get(BEST)
    if probe is None or probe.peak_bytes is None:
        raise ValueError("the activations of a chunk could not be measured; see what is absent")
    return torch.empty(probe.peak_bytes - probe.result, dtype=torch.uint8, device=model.device)


def longest_context(model: PreTrainedModel, limit: int | None, *, chunk: int) -> int:
    """Tokens that a new cache of the model holds before memory ends.

    Args:
        model: whose cache it is.
        limit: bytes that keys and values may take; None until the device refuses.
        chunk: by how many tokens it grows; by `FINE` once a quarter of the device is all that is left.
    """
    cache, tokens = new_cache(model), 0
    while True:
        step = chunk if limit is not None or _is_roomy() else FINE
        try:
            store_random(cache, model, step, chunk=step)
        except torch.OutOfMemoryError:
            return tokens
        if limit is not None and cache_bytes(cache) > limit:
            return tokens
        tokens += step


def _is_roomy() -> bool:
    """More than a quarter of the GPU is free, or held by torch without use."""
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > total / 4
