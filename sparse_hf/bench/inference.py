"""The benchmark of long-context inference: a whole model, sparse and dense, through plain `generate` and without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparse_hf.answer import cache_bytes
from sparse_hf.bench.end_to_end import Models, WallClock, break_even_figures, new_cache
from sparse_hf.bench.end_to_end_model import planted_prompt
from sparse_hf.bench.inference_compare import BEST, Probe, Run, bounds, described
from sparse_hf.bench.inference_graph import measure_graph_decode
from sparse_hf.bench.inference_kernel import measure_kernel
from sparse_hf.bench.inference_kv import store_random
from sparse_hf.bench.inference_longest import measure_longest
from sparse_hf.bench.inference_plan import KV_SHARE, MEMORY, Case, InferenceOptions, Where
from sparse_hf.bench.report import plot_panels
from sparse_hf.bench.runner import Benchmark, Result, Step
from sparse_hf.bench.session import Session
from sparse_hf.figures import Figure

NAME = "inference"
HELD = "KV held"


def inference_benchmark(options: InferenceOptions) -> Benchmark:
    """The benchmark of these options."""

    def steps(session: Session) -> list[Step]:
        session.clock = WallClock(session.device)
        run = Run(options=options, session=session, models=Models(options, session.device))
        made = Step(case="model", what=f"{options.num_layers} layers", run=lambda: break_even_figures(run.models))
        return [
            made,
            *(
                Step(case=case, what=described(where), run=partial(MEASURES[case], run, where))
                for case, where in options.steps()
            ),
        ]

    return Benchmark(name=NAME, options=options, steps=steps, plots=write_plots)


def measure_first_token(run: Run, where: Where) -> list[Figure]:
    """`generate` for one token: times, what its prefill takes beyond weights and kept KV, and the KV bytes."""
    case: Case = "first token"
    prompt = _prompt(run, where)

    def first(model: PreTrainedModel) -> int:
        return cache_bytes(_generate(model, prompt, 1).past_key_values)

    calls = run.dense_calls(lambda: first(run.models.stock))
    calls |= {name: partial(first, model) for name, model in run.chosen(case, where).items()}
    samples, probes = run.compare(case, where, calls)
    seen = [
        run.figure(f"{case}, first call", where, label, probe.ms, "ms", lower_is_better=True)
        for label, probe in probes.items()
    ]
    timed = [*run.time_figures(case, where, samples), *run.ratio_figures(case, where, samples)]
    return [*timed, *seen, *_memory_figures(run, where, probes)]


def _memory_figures(run: Run, where: Where, probes: Mapping[str, Probe]) -> list[Figure]:
    """Of the sparse models, and of the stock one whatever its SDPA."""
    dense = next((probe for label, probe in probes.items() if label.startswith(BEST)), None)
    counted = {label: probe for label, probe in probes.items() if not label.startswith(BEST)}
    total = None if dense is None else dense.result
    found = []
    for label, probe in (counted if dense is None else {BEST: dense, **counted}).items():
        held = probe.result
        found.append(run.figure(HELD, where, label, held, "bytes", lower_is_better=True, baseline=total))
        if probe.peak_bytes is not None:
            asked = bounds(run.options.bound(MEMORY, label, where), True)
            found.append(run.figure(MEMORY, where, label, (probe.peak_bytes - held) / 1e9, "GB", **asked))
        if total is not None and label != BEST:
            asked = bounds(run.options.bound(KV_SHARE, label, where), True)
            found.append(run.figure(KV_SHARE, where, label, held / total, "share", **asked))
    return found


def measure_prefill(run: Run, where: Where) -> list[Figure]:
    """One forward of the prompt into a cache, without `generate` and its chunks."""
    case: Case = "prefill"
    prompt = _prompt(run, where)

    @torch.no_grad()
    def prefill(model: PreTrainedModel) -> None:
        model(prompt, past_key_values=new_cache(model), logits_to_keep=1)

    calls: dict[str, Callable[[], Any]] = run.dense_calls(lambda: prefill(run.models.stock))
    calls |= {name: partial(prefill, model) for name, model in run.chosen(case, where).items()}
    samples, _ = run.compare(case, where, calls)
    return [*run.time_figures(case, where, samples), *run.ratio_figures(case, where, samples)]


@dataclass(kw_only=True)
class Conversation:
    """A cache of random keys and values, and token ids `[batch, tokens]`, one more than it holds; both grow."""

    model: PreTrainedModel
    cache: Cache
    ids: Tensor

    @classmethod
    def begin(cls, model: PreTrainedModel, where: Where) -> Conversation:
        num_tokens, batch = where
        cache = new_cache(model)
        store_random(cache, model, num_tokens, batch)
        ids = torch.zeros(batch, num_tokens + 1, dtype=torch.long, device=model.device)
        return cls(model=model, cache=cache, ids=ids)

    def go_on(self, num_new_tokens: int) -> None:
        """Every step decodes: all but the last token are in the cache."""
        self.ids = _generate(self.model, self.ids, num_new_tokens, past_key_values=self.cache).sequences


def measure_decode(run: Run, where: Where) -> list[Figure]:
    """Time per token of eager `generate` after a long context, and tokens per second of all rows."""
    case: Case = "decode"
    new = run.options.num_decoded_tokens
    models = {BEST: run.models.stock, **run.chosen(case, where)}
    begun = run.probe(
        case, where, {label: partial(Conversation.begin, model, where) for label, model in models.items()}
    )
    talks = {label: probe.result for label, probe in begun.items()}
    calls = run.dense_calls(partial(talks.pop(BEST).go_on, new)) if BEST in talks else {}
    calls |= {label: partial(talk.go_on, new) for label, talk in talks.items()}
    samples, _ = run.compare(case, where, calls)
    speeds = [
        run.figure(
            "decode speed", where, label, 1000 * new * where[1] / sample.median, "tokens/s", lower_is_better=False
        )
        for label, sample in samples.items()
    ]
    return [*run.time_figures(case, where, samples, per=new), *speeds, *run.ratio_figures(case, where, samples)]


def measure_short_prompt(run: Run, where: Where) -> list[Figure]:
    """`generate` of a short prompt and some tokens, where sparse attention has nothing to gain."""
    case: Case = "short prompt"
    prompt, new = _prompt(run, where), run.options.num_new_tokens
    calls: dict[str, Callable[[], Any]] = run.dense_calls(partial(_generate, run.models.stock, prompt, new))
    calls |= {name: partial(_generate, model, prompt, new) for name, model in run.chosen(case, where).items()}
    samples, _ = run.compare(case, where, calls)
    ratios = run.ratio_figures(case, where, samples, lower_is_better=True)
    return [*run.time_figures(case, where, samples), *ratios]


def _prompt(run: Run, where: Where) -> Tensor:
    num_tokens, batch = where
    return planted_prompt(run.options, num_tokens, run.session.device).repeat(batch, 1)


def _generate(model: PreTrainedModel, ids: Tensor, num_new_tokens: int, **options: Any) -> Any:
    """Plain greedy `generate`, as a user would call it; exactly so many tokens, since none ends the model's text."""
    call: Any = model.generate
    return call(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


MEASURES: Mapping[Case, Callable[[Run, Where], list[Figure]]] = {
    "short prompt": measure_short_prompt,
    "first token": measure_first_token,
    "prefill": measure_prefill,
    "decode kernel": measure_kernel,
    "decode": measure_decode,
    "graph decode": measure_graph_decode,
    "longest context": measure_longest,
}


def write_plots(result: Result, path: Path) -> list[Path]:
    """Draws time to first token and KV bytes by length at batch 1, if there are any."""
    panels = [
        (f"{title}, batch 1", lines)
        for title, lines in (
            ("time to first token, ms", lines_of(result.figures, "first token time")),
            ("bytes of KV", lines_of(result.figures, HELD)),
        )
        if lines
    ]
    drawn = plot_panels(path.with_name(f"{path.name}_lengths.png"), panels, x_label="tokens", log_base=2, y_label="")
    return [drawn] if drawn else []


def lines_of(figures: Sequence[Figure], name: str) -> dict[str, list[tuple[float, float]]]:
    """Points (tokens, value) by label, of the figures of that name at batch 1."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for figure in figures:
        if found := re.fullmatch(rf"{re.escape(name)}, (\d+) tokens, batch 1: (.+)", figure.case):
            lines.setdefault(found[2], []).append((float(found[1]), figure.value))
    return lines
