"""The end-to-end benchmark without a GPU: the model, the copies that share it, figures from given times, files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_hf import break_even as lookup
from sparse_hf import is_sparsified
from sparse_hf.bench.end_to_end import (
    MIN_ROUNDS,
    MUST,
    Models,
    WallClock,
    end_to_end_benchmark,
    measure_end_to_end,
)
from sparse_hf.bench.end_to_end_model import planted_model, planted_prompt, sharing_weights
from sparse_hf.bench.end_to_end_plan import CASES, LENGTHS, METHODS, EndToEndOptions
from sparse_hf.bench.planted import LOCAL_LOGIT, NUM_TOPICS, TOPIC_LOGIT
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
}
TINY = EndToEndOptions(**SIZES, seq_lens=(128, 384))


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Break-even lengths of this CPU: 256 tokens, triangle none at all."""
    entries = [
        {"arch": "cpu", "method": name, "parameters": {}, "head_dim": 64, "tokens": tokens}
        for name, tokens in (("streaming", 256), ("triangle", None), ("xattention", 256))
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


def by_case(figures: tuple[Figure, ...] | list[Figure]) -> dict[str, Figure]:
    return {figure.case: figure for figure in figures}


def test_scores_are_what_the_docs_say() -> None:
    """In every layer a score rises where topics agree, and near the diagonal."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((query, key))
        return sdpa_attention_forward(module, query, key, *rest, **options)

    options = EndToEndOptions(**{**SIZES, "hidden_size": 1024, "head_dim": 128}, seq_lens=(3200,))
    model = planted_model(options, CPU)
    prompt = planted_prompt(options, 3200, CPU)
    AttentionInterface.register("looks", look)
    model.config._attn_implementation = "looks"
    with torch.no_grad():
        model(prompt, use_cache=False, logits_to_keep=1)
    assert len(seen) == 2
    topic = prompt[0, ::128] % NUM_TOPICS
    assert (prompt[0].view(25, 128) % NUM_TOPICS == topic[:, None]).all() and len(topic.unique()) > 3
    far = torch.arange(25)[:, None] - torch.arange(25) > 10
    for q, k in seen:
        means = [x[0].unflatten(1, (25, 128)).mean(2) for x in (q, k)]
        for head in range(4):
            scores = means[0][head] @ means[1][head // 2].T / 128**0.5
            agrees = (topic[:, None] + head) % NUM_TOPICS == topic
            rise = scores[far & agrees].mean() - scores[far & ~agrees].mean()
            assert rise.item() == pytest.approx(TOPIC_LOGIT, abs=0.6)
        near = (q[0, 1] * k[0, 0]).sum(-1) / 128**0.5
        lagged = (q[0, 1, 1024:] * k[0, 0, :-1024]).sum(-1) / 128**0.5
        assert (near.median() - lagged.median()).item() == pytest.approx(LOCAL_LOGIT, abs=2)


def test_copies_share_weights_and_nothing_else() -> None:
    models = Models(TINY, CPU)
    stock, prompt = models.stock, planted_prompt(TINY, 128, CPU)
    with torch.no_grad():
        before = stock(prompt, use_cache=False).logits
        assert set(models.sparse) == set(METHODS) and not is_sparsified(stock)
        assert stock.config._attn_implementation == "sdpa"
        assert torch.equal(stock(prompt, use_cache=False).logits, before)
        for name, model in models.sparse.items():
            tensors = zip(model.state_dict().values(), stock.state_dict().values(), strict=True)
            assert all(one.data_ptr() == other.data_ptr() for one, other in tensors), name
            torch.testing.assert_close(model(prompt, use_cache=False).logits, before, atol=2e-4, rtol=1e-3)
    masks = get_handle(models.sparse["streaming 70%"]).head_masks
    assert masks.shape == (2, 2) and masks.sum() == 1, "of 4 heads 2.8 stream"
    assert get_handle(models.sparse["xattention"]).resolved.num_dense_rows == 256
    assert sharing_weights(stock) is not stock


@pytest.mark.parametrize("case", CASES)
def test_what_is_timed_is_the_models_answer(case: str) -> None:
    """The sparse models agree with the stock one below the break-even length, and differ where they leave keys out."""
    options = EndToEndOptions(**SIZES, cases=(case,), seq_lens=(128, 2176))
    models = Models(options, CPU)
    answers = {name: call() for name, call in models.calls(case, 128).items()}
    assert set(answers) == {"dense", *METHODS}
    for name, answer in answers.items():
        assert isinstance(answer, torch.Tensor) and answer.shape == (1, 1, 512)
        torch.testing.assert_close(answer, answers["dense"], atol=2e-4, rtol=1e-3, msg=name)
    long = {name: call() for name, call in models.calls(case, 2176).items()}
    assert (long["streaming 70%"] - long["dense"]).abs().max() > 1e-3  # type: ignore[operator]


def test_decoding_goes_on() -> None:
    models = Models(TINY, CPU)
    for name, call in models.calls("decode", 128).items():
        first, second = call(), call()
        assert not torch.equal(first, second), name  # type: ignore[arg-type]
    sample = make_session(WallClock(CPU)).time("decode", None, models.calls("decode", 128))
    assert all(len(s.times_ms) >= 3 and s.median > 0 for s in sample.values())


def test_figures_follow_from_the_times() -> None:
    class Rising(FakeClock):
        """The sparse model takes 1.1, 1.2, ... of what dense attention takes in the same turn."""

        def record(self, label: str, call: Any) -> float:
            self.times[label] = self.times.get(label, 0) + 1
            return 10.0 if label == "dense" else 10 + self.times[label]

    options = EndToEndOptions(**SIZES, methods=("triangle",), seq_lens=(128,))
    session = make_session(Rising())
    session.budget_ms = 35
    found = by_case(measure_end_to_end(session, Models(options, CPU), "prefill", 128))
    ours = session.others[1].sample.times_ms
    assert ours == tuple(10.0 + n for n in range(1, len(ours) + 1)) and len(ours) >= 3
    middle = sum(sorted(ours)[(len(ours) - 1) // 2 : len(ours) // 2 + 1]) / (2 if len(ours) % 2 == 0 else 1)
    ratio = found["prefill over dense, 128 tokens: triangle"]
    assert ratio.value == pytest.approx(middle / 10) and ratio.must == MUST == 1.02 and ratio.lower_is_better
    assert (
        found["prefill time, 128 tokens: dense"].value == 10 and found["prefill time, 128 tokens: dense"].must is None
    )
    low, high = (found[f"prefill over dense {q} quartile, 128 tokens: triangle"].value for q in ("lower", "upper"))
    assert low < ratio.value < high and "prefill over dense, 128 tokens: dense" not in found


def test_options() -> None:
    options = EndToEndOptions()
    assert (options.num_heads, options.num_kv_heads, options.num_layers, options.head_dim) == (32, 8, 32, 128)
    assert LENGTHS == (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768) and options.longest == 32768 + 1024
    assert [case for case, _ in options.steps()] == ["prefill"] * 9 + ["cached prefill"] * 9 + ["decode"]
    config = options.configs()["streaming 70%"]
    rows = torch.tensor(config.head_masks)
    assert rows.shape == (32, 8) and rows.sum() == 256 - 179 and config.min_seq_len == "auto"
    chosen = EndToEndOptions(cases=("cached prefill",), methods=("triangle",), num_layers=4, quick=True)
    assert (
        chosen.command() == 'sparse-hf bench end-to-end --quick --cases "cached prefill" --methods triangle --layers 4'
    )
    with pytest.raises(ValueError, match="head_dim >= 28, got 16"):
        planted_model(EndToEndOptions(**{**SIZES, "head_dim": 16}), CPU)


def test_a_run_leaves_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figure_keys: set[str]) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    benchmark = end_to_end_benchmark(EndToEndOptions(**SIZES, methods=("xattention",), seq_lens=(128, 384), quick=True))
    steps: list[str] = []
    result = run_benchmark(benchmark, make_session(), progress=steps.append)
    assert not result.failed, result.session.absences
    assert steps == [
        "model, 2 layers",
        *(f"{case}, {n} tokens" for case in ("prefill", "cached prefill") for n in (128, 384)),
        "decode, 2048 tokens",
    ]
    found = by_case(result.figures)
    assert found["sparse from, all cases: xattention"].value == 256
    assert found["decode over dense, 2048 tokens: xattention"].value > 0
    assert [path.name for path in write_files(benchmark, result, tmp_path)] == ["end_to_end.json", "end_to_end.csv"]
    assert all(set(row) == figure_keys for row in json.loads((tmp_path / "end_to_end.json").read_text()))
    with (tmp_path / "end_to_end.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["case"], row["contender"]) for row in rows} == {(c, n) for c in CASES for n in ("dense", "xattention")}
    assert {row["rounds"] for row in rows} == {str(MIN_ROUNDS)}, "though the budget is that of one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "needs a CUDA device"),
        (("--cases", "prefil"), "unknown cases prefil; known: prefill, cached prefill, decode"),
        (("--methods", "streaming"), "unknown methods streaming; known: streaming 70%, triangle, xattention"),
    ],
)
def test_command_line_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["sparse-hf", "bench", "end-to-end", *args])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Two layers with all contenders and real clocks."""
    benchmark = end_to_end_benchmark(EndToEndOptions(num_layers=2, quick=True, seq_lens=(128, 8192)))
    result = run_benchmark(benchmark, cuda_session(benchmark.options))
    assert not result.failed, result.session.absences
    found = by_case(result.figures)
    for name in METHODS:
        assert found[f"prefill over dense, 8192 tokens: {name}"].value < 1.1
        assert found[f"decode over dense, 2048 tokens: {name}"].value > 0
