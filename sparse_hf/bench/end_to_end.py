"""The end-to-end benchmark: prefill and decoding of a whole model, sparsified with `min_seq_len="auto"` and not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel

from sparse_hf.bench.end_to_end_model import planted_model, planted_prompt, sharing_weights
from sparse_hf.bench.end_to_end_plan import EndToEndOptions, ModelOptions
from sparse_hf.bench.runner import Benchmark, Step
from sparse_hf.bench.session import Session
from sparse_hf.bench.timing import Sample
from sparse_hf.bench.workload import Shape
from sparse_hf.break_even import ALWAYS_DENSE
from sparse_hf.cache import SparseCache
from sparse_hf.figures import Figure
from sparse_hf.patching import apply_config, get_handle, is_sparsified

NAME = "end_to_end"
MUST = 1.02
"""Of the time of dense attention, at every length."""
MIN_ROUNDS = 11
"""Medians of three rounds of the same kernels differed by 4% at 8192 tokens: too much for `MUST`."""

_FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DENSE: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "dense": nullcontext,
    "dense cuDNN": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_FALLBACKS], set_priority=True),
    "dense flash": lambda: sdpa_kernel(_FALLBACKS, set_priority=True),
}
"""The stock model with torch's own choice of SDPA, and with others preferred; the fastest counts."""


class WallClock:
    """What a user waits for: host and device, one call at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, label: str, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return 1000 * (time.perf_counter() - start)

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Models:
    """The stock model and its sparse copies, which share its weights; made when they are first asked for."""

    def __init__(self, options: ModelOptions, device: torch.device) -> None:
        self.options, self.device = options, device

    @cached_property
    def stock(self) -> LlamaForCausalLM:
        return planted_model(self.options, self.device)

    @cached_property
    def sparse(self) -> dict[str, PreTrainedModel]:
        return {
            name: apply_config(sharing_weights(self.stock), config) for name, config in self.options.configs().items()
        }

    def calls(self, case: str, num_tokens: int) -> dict[str, Callable[[], object]]:
        """What is timed, by contender; on a CPU torch has one SDPA to choose."""
        make = {"prefill": _prefill, "cached prefill": _cached_prefill, "decode": _decode}[case]
        prompt = planted_prompt(self.options, num_tokens, self.device)
        dense = DENSE if self.device.type == "cuda" else {"dense": nullcontext}
        calls = {name: within(context, make(self.stock, prompt)) for name, context in dense.items()}
        return calls | {name: make(model, prompt) for name, model in self.sparse.items()}


def end_to_end_benchmark(options: EndToEndOptions) -> Benchmark:
    """The benchmark of these options."""

    def steps(session: Session) -> list[Step]:
        session.clock, session.min_rounds = WallClock(session.device), MIN_ROUNDS
        models = Models(options, session.device)
        made = Step(case="model", what=f"{options.num_layers} layers", run=lambda: break_even_figures(models))
        return [
            made,
            *(
                Step(case=case, what=f"{n} tokens", run=partial(measure_end_to_end, session, models, case, n))
                for case, n in options.steps()
            ),
        ]

    return Benchmark(name=NAME, options=options, steps=steps, plots=lambda result, path: [])


def break_even_figures(models: Models) -> list[Figure]:
    """From which length on each model is sparse; none for one that stays dense."""
    figures = []
    for name, model in models.sparse.items():
        tokens = get_handle(model).resolved.num_dense_rows
        if tokens != ALWAYS_DENSE:
            case = f"sparse from, all cases: {name}"
            figures.append(Figure(case=case, value=tokens, unit="tokens", lower_is_better=True))
    return figures


def measure_end_to_end(session: Session, models: Models, case: str, num_tokens: int) -> list[Figure]:
    """All models in turns: medians and quartiles of times, and of the ratios to the fastest dense one in each turn."""
    options = models.options
    shape = Shape(
        seq_len=num_tokens,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
    )
    samples = session.time(case, shape, models.calls(case, num_tokens))
    figures = []
    for label, sample in samples.items():
        figures += _figures(f"{case} time", num_tokens, label, sample.times_ms, "ms")
    dense = [sample for label, sample in samples.items() if label in DENSE]
    if not dense:
        return figures
    fastest = min(dense, key=lambda sample: sample.median)
    for label, sample in samples.items():
        if label not in DENSE:
            figures += _figures(f"{case} over dense", num_tokens, label, ratios(sample, fastest), "ratio", MUST)
    return figures


def ratios(sample: Sample, other: Sample) -> list[float]:
    """Of the times in each round."""
    return [ours / theirs for ours, theirs in zip(sample.times_ms, other.times_ms, strict=True)]


def _figures(
    text: str, num_tokens: int, label: str, values: Sequence[float], unit: str, must: float | None = None
) -> list[Figure]:
    where = f"{num_tokens} tokens: {label}"
    found = []
    for part, share in (("", 0.5), (" lower quartile", 0.25), (" upper quartile", 0.75)):
        bound = must if share == 0.5 else None
        value = float(np.quantile(values, share))
        found.append(Figure(case=f"{text}{part}, {where}", value=value, unit=unit, lower_is_better=True, must=bound))
    return found


def within(context: Callable[[], AbstractContextManager[Any]], call: Callable[[], object]) -> Callable[[], object]:
    """The call in the context."""

    def run() -> object:
        with context():
            return call()

    return run


def new_cache(model: PreTrainedModel) -> Cache:
    """What `generate` would make."""
    return SparseCache.for_model(model) if is_sparsified(model) else DynamicCache(config=model.config)


def _prefill(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(prompt, use_cache=False, logits_to_keep=1).logits

    return run


def _cached_prefill(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(prompt, past_key_values=new_cache(model), logits_to_keep=1).logits

    return run


def _decode(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], object]:
    """One token after the prompt, and after those of the calls before."""
    state: dict[str, Cache] = {}

    @torch.no_grad()
    def run() -> object:
        if not state:
            state["cache"] = new_cache(model)
            model(prompt, past_key_values=state["cache"], logits_to_keep=1)
        return model(prompt[:, -1:], past_key_values=state["cache"]).logits

    return run
