"""The benchmark of inference without a GPU: every case but CUDA graphs, figures from given times, caches, options."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sparse_hf import SparseCache, sparsity_summary
from sparse_hf import break_even as lookup
from sparse_hf.answer import cache_bytes
from sparse_hf.bench.end_to_end import Models
from sparse_hf.bench.inference import Conversation, inference_benchmark, lines_of
from sparse_hf.bench.inference_compare import Run
from sparse_hf.bench.inference_kv import prefix_cache, store_random
from sparse_hf.bench.inference_longest import FINE, longest_context
from sparse_hf.bench.inference_plan import CASES, HALF, MOST, SELECTING, VARIANTS, InferenceOptions
from sparse_hf.bench.plan import K
from sparse_hf.bench.runner import cuda_session, run_benchmark, write_files
from sparse_hf.bench.session import Session
from sparse_hf.bench.testing import FakeClock
from sparse_hf.cli import main
from sparse_hf.figures import Figure
from sparse_hf.patching import get_handle

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "vocab_size": 512,
    "dtype": torch.float32,
    "num_new_tokens": 3,
    "num_decoded_tokens": 2,
}
TOKENS = 1400


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Break-even lengths of this CPU: none, so that the shortest prompt is sparse."""
    entries = [
        {"arch": "cpu", "method": name, "parameters": {}, "head_dim": 64, "tokens": 0}
        for name in ("streaming", "xattention")
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"format_version": 1, "entries": entries}))
    monkeypatch.setenv(lookup.VARIABLE, str(path))
    lookup.measured.cache_clear()
    yield
    lookup.measured.cache_clear()


def make_session(clock: Any = None) -> Session:
    clock = clock or FakeClock()
    return Session(device=CPU, clock=clock, chain_clock=clock, peers=(), budget_ms=1)


def make_run(options: InferenceOptions, clock: Any = None) -> Run:
    return Run(options=options, session=make_session(clock), models=Models(options, CPU))


def by_case(figures: tuple[Figure, ...] | list[Figure]) -> dict[str, Figure]:
    return {figure.case: figure for figure in figures}


def test_every_case_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure_keys: set[str]) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    options = InferenceOptions(
        **SIZES, seq_lens=(TOKENS,), batches=(1, 2), variants=(MOST, SELECTING), quick=True, memory_gib=0.03
    )
    benchmark, session, steps = inference_benchmark(options), make_session(), list[str]()
    result = run_benchmark(benchmark, session, progress=steps.append)
    assert not result.failed, session.absences
    middle = [f"{case}, {TOKENS} tokens, batch {n}" for case in CASES[1:6] for n in (1, 2)]
    assert steps[1:] == ["short prompt, 2048 tokens, batch 1", *middle, "longest context, 0 tokens, batch 1"]
    assert {absence.case for absence in session.absences} == {"decode kernel", "graph decode"}
    found = by_case(result.figures)
    names = ["first token time", "first token, first call", "prefill time", "decode time", "decode speed", "KV held"]
    for batch in (1, 2):
        where = f"{TOKENS} tokens, batch {batch}"
        for label in ("dense", MOST, SELECTING):
            assert all(found[f"{name}, {where}: {label}"].value > 0 for name in names), label
        # Of 4 heads one is full; the others keep 64 sinks and the 1023 tokens before the next one.
        held, dense = found[f"KV held, {where}: {MOST}"], TOKENS * 2 * 2 * 64 * 2 * 4 * batch
        assert held.baseline == found[f"KV held, {where}: dense"].value == dense
        assert (TOKENS + 3 * 1087) / (4 * TOKENS) * dense <= held.value < dense
        assert found[f"KV share of dense, {where}: {MOST}"].value == held.value / dense
        assert found[f"decode speed-up, {where}: {MOST}"].unit == "ratio"
    assert found[f"short prompt over dense, 2048 tokens, batch 1: {SELECTING}"].lower_is_better
    assert found[f"longest context ratio, 0.03 GiB: {MOST}"].value > 1.5
    assert all(figure.must is None for figure in result.figures), "bounds are for the model of the plan"
    written = [path.name for path in write_files(benchmark, result, tmp_path)]
    assert written == ["inference.json", "inference.csv", "inference_lengths.png"]
    assert all(set(row) == figure_keys for row in json.loads((tmp_path / "inference.json").read_text()))
    with (tmp_path / "inference.csv").open() as file:
        rows = {(row["case"], row["contender"]) for row in csv.DictReader(file)}
    assert ("decode, batch 2", "dense") in rows and ("short prompt, batch 1", SELECTING) in rows
    assert lines_of(result.figures, "KV held")[MOST] == [
        (TOKENS, found[f"KV held, {TOKENS} tokens, batch 1: {MOST}"].value)
    ]


@pytest.mark.parametrize(
    ("case", "label", "where", "lower", "value", "must", "goal"),
    [
        ("graph decode", MOST, (128 * K, 4), False, 2.0, 2.0, 2.25),
        ("first token", SELECTING, (128 * K, 1), False, 2.0, 2.5, 3.2),
        ("first token", MOST, (32 * K, 1), False, 2.0, None, None),
        ("short prompt", HALF, (2 * K, 1), True, 0.5, 1.03, 1.0),
    ],
)
def test_ratios_and_bounds(
    case: Any, label: str, where: tuple[int, int], lower: bool, value: float, must: float, goal: float
) -> None:
    """The sparse model takes half the time of dense; the bounds are those of the default model."""
    run = make_run(InferenceOptions(), FakeClock({"dense": 14, label: 7}))
    samples, _ = run.compare(case, where, {"dense": lambda: None, label: lambda: None})
    (figure,) = run.ratio_figures(case, where, samples, lower_is_better=lower)
    assert (figure.value, figure.must, figure.goal, figure.lower_is_better) == (value, must, goal, lower)
    assert [f.value for f in run.time_figures(case, where, samples, per=7)] == [2, 1]
    assert run.speed_figure(case, where, label, 14, samples[label]).value == 2000
    other = make_run(InferenceOptions(num_layers=2), FakeClock())
    assert all(f.must is None for f in other.ratio_figures(case, where, samples))


def test_the_faster_dense_attention_counts() -> None:
    """Its first call may load; one that fails is absent, and is a failure of the run if it is ours."""
    import time

    ran: list[str] = []

    def call(label: str, *seconds: float) -> Any:
        pending = list(seconds)

        def run_it() -> None:
            ran.append(label)
            time.sleep(pending.pop(0) if pending else 0)

        return run_it

    def broken() -> None:
        raise ValueError("does not fit")

    class Calling(FakeClock):
        def record(self, label: str, call: Any) -> float:
            call()
            return 1.0

    run = make_run(InferenceOptions(**SIZES), Calling())
    calls = {"dense flash": call("flash", 0.3, 0.0), "dense cuDNN": call("cuDNN", 0.1, 0.1), "dense other": broken}
    samples, probes = run.compare("decode", (64, 1), calls)
    assert set(samples) == {"dense"} and set(probes) == {"dense flash", "dense cuDNN"}
    assert ran[:4] == ["flash", "cuDNN", "flash", "cuDNN"] and set(ran[4:]) == {"flash"} and len(ran) >= 7
    (absence,) = run.session.absences
    assert "does not fit" in absence.reason and not absence.failed
    run.compare("decode", (64, 1), {MOST: broken})
    assert run.session.absences[1].failed and run.session.absences[1].contender == f"{MOST}, 64 tokens, batch 1"


def test_caches_of_random_keys() -> None:
    """Sparse caches keep of them what they would of a prefill, and `generate` goes on after them."""
    options = InferenceOptions(**SIZES)
    models = Models(options, CPU)
    for name, model in {"dense": models.stock, **models.sparse}.items():
        talk = Conversation.begin(model, (TOKENS, 2))
        if name == "dense":
            assert isinstance(talk.cache, DynamicCache)
        else:
            assert isinstance(talk.cache, SparseCache)
            assert talk.cache.kv_bytes() >= sparsity_summary(model, TOKENS, batch_size=2).kv_bytes
        for turn in (1, 2):
            talk.go_on(3)
            assert talk.cache.get_seq_length() == TOKENS + 3 * turn and talk.ids.shape == (2, TOKENS + 1 + 3 * turn)
    assert len(get_handle(models.sparse[HALF]).head_masks.flatten().nonzero()) == 2


def test_the_static_dense_cache_answers_as_a_dynamic_one() -> None:
    models = Models(InferenceOptions(**SIZES), CPU)
    static = prefix_cache(models.stock, 37, 2)
    dynamic = DynamicCache(config=models.stock.config)
    for number, layer in enumerate(static.layers):
        assert layer.keys is not None and layer.values is not None
        dynamic.update(layer.keys[:, :, :37].clone(), layer.values[:, :, :37].clone(), number)
    token = torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = models.stock(token, past_key_values=dynamic).logits
        for _ in range(2):  # a step leaves the length as it was
            found = models.stock(token, past_key_values=static, position_ids=torch.full((2, 1), 37)).logits
            torch.testing.assert_close(found, expected)
    assert static.get_seq_length() == 37 and dynamic.get_seq_length() == 38


def test_the_longest_context_is_what_the_limit_holds() -> None:
    models = Models(InferenceOptions(**SIZES), CPU)
    cache = DynamicCache(config=models.stock.config)
    store_random(cache, models.stock, FINE)
    limit = 2 * cache_bytes(cache)
    assert longest_context(models.stock, limit, chunk=FINE) == 2 * FINE
    assert longest_context(models.stock, limit - 1, chunk=FINE) == FINE


def test_options() -> None:
    options = InferenceOptions()
    assert set(dict(options.steps())) == set(CASES) and options.longest > 128 * K
    assert set(options.configs()) == set(VARIANTS)
    for name, full in ((HALF, 128), (MOST, 77), (SELECTING, 77)):
        assert torch.tensor(options.configs()[name].head_masks).sum() == full
    assert options.configs()[SELECTING].full.name == "xattention" and options.configs()[MOST].full.name == "dense"
    assert options.chosen("decode", 1) == (HALF, MOST) and options.chosen("decode", 4) == (MOST,)
    assert options.chosen("first token", 1) == (HALF, MOST, SELECTING)
    few = InferenceOptions(cases=("decode", "short prompt"), seq_lens=(64,), batches=(2, 3), num_layers=2, memory_gib=8)
    assert few.steps() == [("short prompt", (2 * K, 1)), ("decode", (64, 2)), ("decode", (64, 3))]
    assert few.command() == (
        'sparse-hf bench inference --cases decode,"short prompt" --seq-lens 64 --batches 2,3 --layers 2 --memory-gib 8'
    )
    with pytest.raises(ValueError, match="must be positive, got -1 GiB"):
        InferenceOptions(memory_gib=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "needs a CUDA device"),
        (("--cases", "decoding"), "unknown cases decoding; known: short prompt, first token"),
        (("--variants", "streaming"), "unknown variants streaming; known: streaming 50%"),
        (("--batches", "one"), "--batches takes whole numbers"),
    ],
)
def test_command_line_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["sparse-hf", "bench", "inference", *args])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Two layers, every case, real clocks and graphs."""
    options = InferenceOptions(num_layers=2, quick=True, seq_lens=(8192,), batches=(1, 4), memory_gib=8)
    result = run_benchmark(inference_benchmark(options), cuda_session(options))
    assert not result.failed, result.session.absences
    found = by_case(result.figures)
    for batch in (1, 4):
        where = f"8192 tokens, batch {batch}"
        assert found[f"graph decode speed-up, {where}: {MOST}"].value > 0
        assert 0 < found[f"prefill memory, {where}: {MOST}"].value < 4
        assert {f"first token, first call, {where}: dense {name}" for name in ("flash", "cuDNN")} <= set(found)
    assert found[f"longest context ratio, 8 GiB: {MOST}"].value > 2
