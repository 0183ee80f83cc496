"""The rows of a run: shares of tokens, phases of the curriculum, passes, reports, and the same rows when resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from sparse_hf_training.build import build_training_data, filler_of, read_sources
from sparse_hf_training.config import DataConfig
from sparse_hf_training.data import TextSource, collate, load_text, pack_documents, read_documents
from sparse_hf_training.typed_config import build

datasets = pytest.importorskip("datasets")
TASK = {"task": "needle", "num_needles": 1}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpora(tmp_path: Path, story: str) -> dict[str, str]:
    """Three files whose documents begin with another word each."""
    words = story.split()
    paths = {}
    for number, name in enumerate(("ship", "harbor", "rain")):
        texts = [" ".join([name, *words[n : n + 20 + 31 * n % 67]]) for n in range(number, 240, 2)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        paths[name] = str(path)
    return paths


def _config(sources: list[dict], **options) -> DataConfig:
    return build(DataConfig, {"text": sources, "seq_len": 64, "recall": None, **options})


def _tokens(row) -> int:
    """Tokens that are no padding: padding is a last document of end-of-sequence tokens alone."""
    ids = row["input_ids"]
    last = int((row["position_ids"] == 0).nonzero()[-1, 0])
    return last if len(ids) - last > 1 and bool((ids[last:] == 1).all()) else len(ids)


def _equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
@pytest.mark.parametrize("streaming", [False, True])
def test_sources_keep_their_shares_of_tokens(corpora, tokenizer, packing: str, streaming: bool) -> None:
    # Documents of 20 to 86 words: best_fit leaves more padding in rows of one source than of the other.
    (Path(corpora["ship"])).write_text(json.dumps({"text": "ship " * 39}) + "\n" + json.dumps({"text": "ship " * 38}))
    sources = [
        {"path": corpora["ship"], "ratio": 3, "streaming": streaming},
        {"path": corpora["harbor"], "ratio": 1},
    ]
    data = build_training_data(_config(sources, packing=packing), tokenizer, 1200)
    tokens: Counter[int] = Counter()
    mark = set(tokenizer(" ship", add_special_tokens=False)["input_ids"])
    for index in range(len(data.rows)):  # type: ignore[arg-type]
        row = data.rows[index]
        from_ship = sum(token in mark for token in row["input_ids"].tolist()) > 20
        tokens[0 if from_ship else 1] += _tokens(row)
    assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.03)
    ship, harbor = data.report.sources
    assert ship.rows_used + harbor.rows_used == 1200 and ship.streamed == streaming
    if packing == "best_fit":
        assert ship.rows_used / 1200 > 0.78, "rows with padding are drawn more often"


def test_one_pass_holds_every_row_once_and_the_next_has_another_order(corpora, tokenizer) -> None:
    source = TextSource(path=corpora["harbor"])
    packed, report = pack_documents(read_documents(load_text(source), source, tokenizer), 64)
    n = len(packed)
    data = build_training_data(_config([{"path": source.path}], seed=5), tokenizer, 2 * n)
    rows = [tuple(data.rows[index]["input_ids"].tolist()) for index in range(2 * n)]
    wanted = Counter(map(tuple, packed.input_ids.tolist()))
    assert Counter(rows[:n]) == Counter(rows[n:]) == wanted
    assert rows[:n] != rows[n:]
    assert data.packing == report and data.report.sources[0].epochs == 2.0
    # What was trained on before passes had orders of their own: one order of the seed.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5)).tolist()
    assert rows[:n] == [tuple(packed.input_ids[index].tolist()) for index in order]


def test_sources_without_ratios_are_read_in_turn(corpora, tokenizer) -> None:
    config = _config([{"path": corpora["ship"]}, {"path": corpora["rain"]}])
    data = build_training_data(config, tokenizer, 10)
    documents = [
        document for source in config.text for document in read_documents(load_text(source), source, tokenizer)
    ]
    packed, report = pack_documents(documents, 64)
    assert data.report.sources[0].packing == report
    rows = set(map(tuple, packed.input_ids.tolist()))
    assert all(tuple(data.rows[index]["input_ids"].tolist()) in rows for index in range(10))


SCHEDULE = [[0, 32], [5, 64], [8, 48]]


@pytest.mark.parametrize("streaming", [False, True])
def test_lengths_follow_the_schedule_and_batches_have_one(corpora, tokenizer, streaming: bool) -> None:
    sources = [
        {"path": corpora["ship"], "ratio": 1, "streaming": streaming},
        {"path": corpora["rain"], "ratio": 2},
    ]
    config = _config(sources, length_schedule=SCHEDULE)
    data = build_training_data(config, tokenizer, 40, rows_per_step=4)
    loader = DataLoader(data.rows, batch_size=4, collate_fn=collate)
    assert [batch["input_ids"].shape[1] for batch in loader] == [32] * 5 + [64] * 3 + [48] * 2
    report = data.report
    assert [s.seq_len for s in report.sources if not s.streamed] == [32, 64, 48] * (
        1 if streaming else 2
    ) or not streaming
    assert sum(source.rows_used for source in report.sources) == 40
    # A run that ends before the later phases does not pack for them.
    short = build_training_data(config, tokenizer, 12, rows_per_step=4)
    assert {source.seq_len for source in short.report.sources} <= {32, None}


def test_a_stream_goes_on_where_the_phase_before_ended(corpora, tokenizer) -> None:
    source = TextSource(path=corpora["ship"])
    documents = list(read_documents(load_text(source), source, tokenizer))
    config = _config([{"path": source.path, "streaming": True}], seq_len=64, length_schedule=[[0, 32], [6, 64]])
    data = build_training_data(config, tokenizer, 20, rows_per_step=2)
    tokens = torch.cat([data.rows[index]["input_ids"] for index in range(20)]).tolist()
    flat = [token for document in documents for token in document.input_ids]
    assert tokens == flat[: 12 * 32 + 8 * 64]


def test_recall_samples_have_the_length_of_their_phase(corpora, tokenizer) -> None:
    config = _config(
        [{"path": corpora["ship"]}],
        seq_len=256,
        length_schedule=[[0, 192], [10, 256]],
        recall={"ratio": 0.5, "tasks": [TASK]},
    )
    data = build_training_data(config, tokenizer, 40, rows_per_step=2)
    assert [len(data.rows[index]["input_ids"]) for index in range(40)] == [192] * 20 + [256] * 20
    assert 10 < data.recall_rows < 30
    assert data.report.recall_rows + sum(s.rows_used for s in data.report.sources) == 40
    streamed = _config([{"path": corpora["ship"], "streaming": True}], seq_len=192, recall={"tasks": [TASK]})
    rows = build_training_data(streamed, tokenizer, 4)
    assert rows.filler_tokens == data.filler_tokens and len(rows.rows[3]["input_ids"]) == 192


@pytest.mark.parametrize("kind", ["stored", "mixed", "streamed"])
def test_a_resumed_run_sees_the_rows_it_would_have_seen(corpora, tokenizer, tmp_path: Path, kind: str) -> None:
    sources = [
        {"path": corpora["ship"], "ratio": 1, "streaming": kind != "stored"},
        {"path": corpora["rain"], "ratio": 2, "streaming": kind == "streamed"},
    ]
    config = _config(sources, length_schedule=SCHEDULE)

    def rows(state_dir: Path | None = None):
        return build_training_data(config, tokenizer, 2000, rows_per_step=100, state_dir=state_dir).rows

    whole = rows()
    wanted = [whole[index] for index in range(900)]
    first = rows(tmp_path / "data")
    assert all(_equal(first[index], wanted[index]) for index in range(610))
    for state_dir in (tmp_path / "data", None):
        again = rows(state_dir)
        # Of two processes, the second reads every other batch.
        assert all(_equal(again[index], wanted[index]) for index in range(611, 900, 2))
    assert (tmp_path / "data").exists() == (kind != "stored")


def test_report_is_written_and_told(corpora, tokenizer, tmp_path: Path) -> None:
    sources = [
        {"path": corpora["ship"], "ratio": 1, "streaming": True},
        {"path": corpora["rain"], "ratio": 1},
    ]
    with Path(corpora["rain"]).open("a") as file:
        file.write("\n" + json.dumps({"text": "the ship sailed " * 90}))
    recall = {"ratio": 0.2, "tasks": [TASK]}
    config = _config(sources, seq_len=200, packing="best_fit", long_documents="truncate", recall=recall)
    data = build_training_data(config, tokenizer, 60)
    assert data.report.sources[0].packing.documents == 0, "nothing was read yet"
    for index in range(60):
        _ = data.rows[index]
    data.report.write(tmp_path / "data.json")
    written = json.loads((tmp_path / "data.json").read_text())
    assert written["rows"] == 60 and written["recall_rows"] == data.recall_rows > 0
    for source in written["sources"]:
        p = source["packing"]
        assert p["documents"] > 0
        assert p["tokens"] == p["rows"] * 200 - p["tokens_padding"] + source["tokens_dropped"]
    ship, rain, samples = data.report.lines()
    assert "; so far " in ship and "rain.jsonl: " in rain and " rows of 200 tokens of " in rain
    assert "truncated" in rain and "tokens of padding" in rain and "tokens dropped (truncated)" in rain
    assert samples.startswith(f"recall: {data.recall_rows} rows, hidden in ")


def test_max_epochs(corpora, tokenizer) -> None:
    sources = [{"path": corpora["ship"], "ratio": 1}, {"path": corpora["rain"], "ratio": 1}]
    build_training_data(_config(sources, max_epochs=1), tokenizer, 40)
    with pytest.raises(ValueError, match=r"reads '\d: .*jsonl' \d+\.\d\d times, more than max_epochs=2"):
        build_training_data(_config(sources, max_epochs=2), tokenizer, 4000)


def test_filler_is_the_text_of_all_sources(corpora, tokenizer) -> None:
    sources = tuple(TextSource(path=corpora[name]) for name in ("ship", "rain"))
    documents = [d for source in sources for d in read_documents(load_text(source), source, tokenizer)]
    tokens = filler_of(read_sources(sources, tokenizer)).tokens.tolist()
    assert tokens == [token for document in documents for token in document.input_ids]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": [{"path": "a", "ratio": 1}, {"path": "b"}]}, "either all sources have a ratio or none"),
        ({"text": [{"path": "a", "streaming": True}, {"path": "b"}]}, "a streamed source beside others needs ratios"),
        ({"length_schedule": [[5, 64]]}, r"must begin at step 0 and ascend, got the steps \[5\]"),
        ({"length_schedule": [[0, 32], [0, 64]]}, "must begin at step 0 and ascend"),
        ({"length_schedule": [[0, 32], [5, 128]]}, "from 2 to data.seq_len=64, the largest one, got"),
        ({"length_schedule": [[0, 16], [5, 32]]}, "from 2 to data.seq_len=64, the largest one, got"),
        ({"length_schedule": [[0, 1], [5, 64]]}, "from 2 to data.seq_len=64"),
        ({"length_schedule": [[0, 16, 3], [5, 64]]}, "must hold pairs"),
        ({"max_epochs": 0}, "max_epochs must be null or at least 1, got 0"),
        ({"num_proc": 0}, "num_proc must be null or at least 1, got 0"),
        ({"packing": "tight"}, r"packing must be one of \['in_order', 'best_fit'\]"),
        ({"long_documents": "cut"}, "long_documents must be one of"),
    ],
)
def test_bad_configuration(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**{"sources": options.pop("text", [{"path": "a"}]), **options})


def test_a_schedule_needs_the_rows_of_a_step(corpora, tokenizer) -> None:
    config = _config([{"path": corpora["ship"]}], length_schedule=[[0, 32], [5, 64]])
    with pytest.raises(ValueError, match="counts optimizer steps, so rows_per_step is needed"):
        build_training_data(config, tokenizer, 40)
