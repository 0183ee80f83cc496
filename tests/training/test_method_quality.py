"""Judging methods: rows hold one document, densities and intervals by hand, the model is left as it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparse_hf import BigBird, Dense, Streaming, XAttention, is_sparsified
from sparse_hf.methods import HeadPlace
from sparse_hf_kernels import AttentionLayout
from sparse_hf_training.evaluation import Judge, evaluate_recall, evaluate_text_loss
from sparse_hf_training.evaluation.method_quality import (
    judge_methods,
    quality_figures,
    whole_rows,
)
from sparse_hf_training.evaluation.statistics import wilson_interval
from sparse_hf_training.tasks import Filler, NeedleTask

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 640


@pytest.fixture
def model(model_folder: Path) -> Any:
    """Its attention is sharpened, or every block would be kept."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 8
    return model


@pytest.fixture
def judge(filler: Filler, story: str, tokenizer: PreTrainedTokenizerFast) -> Judge:
    rows = whole_rows([story], tokenizer, SEQ_LEN, 2)
    return Judge(
        tokenizer=tokenizer,
        tasks=[NeedleTask(num_needles=2)],
        filler=filler,
        rows=rows,
        seq_len=SEQ_LEN,
        num_samples=2,
        num_rows=2,
    )


def test_rows_hold_one_document_each(tokenizer: PreTrainedTokenizerFast, story: str) -> None:
    texts = ["short", story, "short again", story[::-1]]
    rows = whole_rows(texts, tokenizer, 200, 10**6)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in (texts[1], texts[3])]
    expected = [one[start : start + 200] for one in ids for start in range(0, len(one) - 199, 200)]
    assert [rows[i]["input_ids"].tolist() for i in range(len(rows))] == expected  # type: ignore[arg-type]
    assert all(torch.equal(rows[i]["position_ids"], torch.arange(200)) for i in range(len(expected)))
    few = whole_rows(texts, tokenizer, 200, 3)
    chosen = [expected.index(few[i]["input_ids"].tolist()) for i in range(3)]
    third = len(expected) / 3
    assert chosen[0] == 0 and chosen == sorted(chosen) and all(abs(c - n * third) < 1 for n, c in enumerate(chosen))
    with pytest.raises(ValueError, match="no document holds 1000000 tokens"):
        whole_rows(texts, tokenizer, 10**6, 3)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        whole_rows(texts, tokenizer, 200, 0)


@pytest.mark.parametrize(("exact", "count"), [(0, 50), (50, 50), (47, 50), (1, 3), (96, 200)])
def test_the_interval_holds_the_shares_that_a_score_test_accepts(exact: int, count: int) -> None:
    low, high = wilson_interval(exact, count)
    assert 0 <= low <= exact / count <= high + 1e-12 and high <= 1
    shares = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    deviation = (exact / count - shares).abs() / (shares * (1 - shares) / count).sqrt()
    accepted = shares[deviation <= math.sqrt(2) * torch.erfinv(torch.tensor(0.95, dtype=torch.float64)).item()]
    assert (low, high) == pytest.approx((accepted.min().item(), accepted.max().item()), abs=2e-5)
    with pytest.raises(ValueError, match="needs samples"):
        wilson_interval(0, 0)


def test_the_density_is_what_was_selected(model: Any, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted pair by pair from what `select` returns while the model is judged: 4 sequences, 2 layers."""
    kept: list[float] = []
    select = XAttention.select

    def counted(self: XAttention, q: torch.Tensor, k: torch.Tensor, **options: Any) -> Any:
        found = select(self, q, k, **options)
        keeps = found.keeps(slice(0, SEQ_LEN), 0, SEQ_LEN).tril()
        kept.append(keeps.double().mean().item() * SEQ_LEN * 2 / (SEQ_LEN + 1))
        return found

    monkeypatch.setattr(XAttention, "select", counted)
    (found,) = judge_methods(model, {"xattention": XAttention(stride=4, threshold=0.3)}, judge)
    assert len(kept) == 8 and found.density == pytest.approx(sum(kept) / 8, rel=1e-9)
    assert 0.3 < found.density < 0.95 and not is_sparsified(model)


def test_each_method_is_judged_as_it_would_be_alone(model: Any, judge: Judge) -> None:
    from sparse_hf import SparseConfig, sparsify, unsparsify

    methods = {"dense": Dense(), "streaming": Streaming(num_sink_tokens=4, window_size=32), "bigbird": BigBird()}
    seen: list[str] = []
    found = {each.name: each for each in judge_methods(model, methods, judge, progress=seen.append)}
    assert seen == [name for name in methods for _ in range(2)] and not is_sparsified(model)
    assert found["dense"].density == 1.0
    assert found["dense"].judgement.text_loss == evaluate_text_loss(model, judge.rows)
    i, j = torch.arange(SEQ_LEN)[:, None], torch.arange(SEQ_LEN)
    pairs = SEQ_LEN * (SEQ_LEN + 1) / 2
    streaming = ((j < 4) | (i - j < 32)) & (j <= i)
    assert found["streaming"].density == pytest.approx(streaming.sum().item() / pairs, rel=1e-9)
    blocks = []
    for layer in range(2):
        for head in range(2):
            place = HeadPlace(layer=layer, kv_head=head, num_layers=2, num_kv_heads=2)
            layout = AttentionLayout(patterns=(BigBird().pattern(place),))
            blocks.append((layout.allowed(layout.patterns[0], i, j, SEQ_LEN - 1) & (j <= i)).sum().item() / pairs)
    assert found["bigbird"].density == pytest.approx(sum(blocks) / 4, rel=1e-9)
    sparsify(model, SparseConfig(sparse=methods["streaming"]))
    assert found["streaming"].judgement.text_loss == evaluate_text_loss(model, judge.rows)
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "num_samples": 2}
    alone = evaluate_recall(model, judge.tasks, judge.filler, judge.tokenizer, **options)
    assert list(found["streaming"].judgement.recall) == alone
    unsparsify(model)
    assert found["streaming"].judgement.text_loss != found["dense"].judgement.text_loss
    figures = {figure.case: figure for figure in quality_figures(list(found.values()), SEQ_LEN)}
    title = f"quality at {SEQ_LEN} tokens, streaming"
    loss = figures[f"{title}: loss on held text"]
    assert (loss.value, loss.baseline) == tuple(found[n].judgement.text_loss for n in ("streaming", "dense"))
    assert figures[f"{title}: recall needle (95% high)"].value == wilson_interval(alone[0].num_exact, 2)[1]
    assert figures[f"{title}: density"].value == 100 * found["streaming"].density


def test_batches_change_no_figure(model: Any, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither shares nor densities; and there are batches: 5 samples in passes of 2, 2 and 1."""
    methods = {"streaming": Streaming(num_sink_tokens=4, window_size=32), "xattention": XAttention(threshold=0.3)}
    sizes: list[int] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(type(model), "forward", spy)
    found = [list(judge_methods(model, methods, replace(judge, num_samples=5, batch_size=size))) for size in (1, 2)]
    assert sizes == [1] * 2 * 7 + [1, 1, 2, 2, 1] * 2
    for alone, batched in zip(*found, strict=True):
        assert alone.judgement == batched.judgement
        assert batched.density == pytest.approx(alone.density, rel=1e-6)


def test_a_model_that_fails_is_left_dense(model: Any, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Judge, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Judge, "__call__", broken)
    with pytest.raises(RuntimeError, match="broken"):
        list(judge_methods(model, {"streaming": Streaming()}, judge))
    assert not is_sparsified(model)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_script_leaves_what_the_table_shows(
    load: Load,
    model_folder: Path,
    story: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure_keys: set[str],
    suffix: str,
) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    data = tmp_path / f"held{suffix}"
    data.write_text(story if suffix == ".txt" else json.dumps({"text": story}) + "\n", encoding="utf-8")
    random.seed(1)
    line = f"--model {model_folder} --data {data} --seq-len 640 --samples 2 --rows 1 --methods dense,xattention"
    load("method_quality").main([*line.split(), "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "method_quality.json").read_text())
    assert all(set(row) == figure_keys for row in rows) and len(rows) == 2 * (2 + 3 * 3)
    assert rows[0]["command"] == (
        f"python scripts/method_quality.py --model tiny --data held{suffix} --seq-len 640 --samples 2 --rows 1 "
        "--methods dense,xattention --out out"
    )
    text = load("make_tables").render(
        "<!-- grid: method_quality / quality at 640 tokens -->\n<!-- end -->", tmp_path / "out"
    )
    columns = "density, % | loss on held text, nats/token | recall needle, share | recall key_value, share"
    assert text.splitlines()[1] == f"| | {columns} | recall chain, share |"
    assert text.count("0.000 [0.00, 0.66]") == 6 and "| dense | 100.00 | " in text


@pytest.mark.parametrize(
    ("line", "words"),
    [("--methods none", "unknown methods none; known: dense"), ("--data missing.txt", "no such file or folder")],
)
def test_what_is_unknown_is_refused(load: Load, model_folder: Path, tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load("method_quality").main([*line.split(), "--model", str(model_folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_documents_table_needs_nothing_but_the_figures(load: Load, tmp_path: Path) -> None:
    """Every marker of docs/methods.md is one that the two programs fill."""
    source = {"hardware": "h", "software": "s", "commit": "c", "command": "x", "must": None, "baseline": None}
    titles = {
        "methods": [f"prefill of {n} tokens, streaming: time" for n in (8192, 32768, 131072)],
        "method_quality": ["quality at 8192 tokens, streaming: density"],
    }
    for name, cases in titles.items():
        rows = [{"case": case, "value": 1.0, "unit": "ms", **source} for case in cases]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    text = load("make_tables").render((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), tmp_path)
    assert text.count("| streaming | 1.000 |") == 4 and text.count("h; s; commit c; `x`") == 2
