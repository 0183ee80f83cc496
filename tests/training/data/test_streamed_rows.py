"""Streamed rows: what packing the whole corpus gives, from any place, with every token accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from sparse_hf_training.data import (
    DocumentStream,
    Journal,
    StreamedRows,
    TextSource,
    collate,
    load_text,
    pack_documents,
    read_documents,
)
from sparse_hf_training.data.stream import Place

datasets = pytest.importorskip("datasets")
SEQ_LEN = 24
NUM_TEXTS = 400


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True, scope="module")
def _no_waiting() -> Iterator[None]:
    """`datasets` sleeps at the end of a shuffled parquet stream, also when the garbage collector ends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, story: str) -> Path:
    """Numbered texts of 0 to 59 words, in two parquet shards; every seventh answer is empty."""
    folder = tmp_path_factory.mktemp("corpus")
    words = story.split()
    rows = []
    for n in range(NUM_TEXTS):
        size = n * 37 % 60
        text = f"{n} " + " ".join(words[n : n + size]) if size else ""
        rows.append({"text": text, "prompt": text, "answer": f" {n}" if n % 7 else ""})
    for shard in range(2):
        part = rows[shard * NUM_TEXTS // 2 : (shard + 1) * NUM_TEXTS // 2]
        datasets.Dataset.from_list(part).to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


@pytest.fixture
def make(corpus: Path, tokenizer):
    def build(phases=((0, SEQ_LEN),), journal: Path | None = None, max_epochs: int | None = None, **options):
        rows_options = {key: options.pop(key) for key in ("packing", "long_documents") if key in options}
        source = TextSource(path=str(corpus), streaming=True, **options)
        stream = DocumentStream(source, tokenizer, seed=3, max_epochs=max_epochs)
        rows = StreamedRows(
            stream, length=10_000, pad_token_id=1, journal=Journal(journal, write=journal is not None), **rows_options
        )
        for first, seq_len in phases:
            rows.add_phase(first, seq_len)
        return rows

    return build


def _documents(corpus: Path, tokenizer, **options):
    source = TextSource(path=str(corpus), **options)
    return list(read_documents(load_text(source), source, tokenizer))


def _equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


PROMPTS = {"prompt_column": "prompt", "completion_column": "answer"}
OPTIONS = [
    {},
    PROMPTS,
    {"long_documents": "truncate"},
    {"long_documents": "drop"},
    {"packing": "best_fit"},
    {"packing": "best_fit", "long_documents": "truncate", **PROMPTS},
    {"shuffle_buffer": 50},
]


@pytest.mark.parametrize("long_documents", ["split", "truncate", "drop"])
@pytest.mark.parametrize("options", [{}, PROMPTS], ids=["text", "prompts"])
def test_rows_equal_packing_the_corpus_twice(corpus: Path, tokenizer, make, options: dict, long_documents: str) -> None:
    documents = _documents(corpus, tokenizer, **options)
    # The stream goes on into its second pass without dropping the end of the first.
    packed, report = pack_documents([*documents, *documents], SEQ_LEN, long_documents=long_documents)
    rows = make(long_documents=long_documents, **options)
    for index in range(len(packed)):
        wanted = {key: torch.from_numpy(value).long() for key, value in packed.row(index).items()}
        assert _equal(rows[index], wanted), index
    assert (rows.report.tokens_padding, rows.report.documents_empty) != (0, 0) or options
    assert report.rows == len(packed) <= rows.report.rows


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_token_is_lost(make, options: dict) -> None:
    phases = ((0, SEQ_LEN), (37, 40), (61, 16))
    rows = make(phases=phases, **options)
    seen = [rows[index] for index in range(150)]
    lengths = [SEQ_LEN] * 37 + [40] * 24 + [16] * 89
    assert [len(row["input_ids"]) for row in seen] == lengths
    report, count = rows.report, rows.report.rows
    # The last window may reach beyond the rows that were asked for.
    lengths += [16] * (count - 150)
    assert count >= 150
    assert report.tokens == sum(lengths) - report.tokens_padding + report.tokens_dropped
    padding = 0
    for index in range(count):
        row = rows[index] if index >= 150 else seen[index]
        assert row["labels"][0] == -100 and (row["labels"] != -100).any()
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        assert starts[0] == 0 and (row["labels"][starts] == -100).all()
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
        # Padding is end-of-sequence tokens without a label, which no document begins with.
        last = starts[-1]
        padding += len(row["input_ids"]) - last if (row["input_ids"][last:] == 1).all() else 0
    if options.get("packing") == "best_fit" and not {"prompt_column"} & set(options):
        assert padding >= report.tokens_padding > 0
    if options.get("packing") != "best_fit":
        assert report.tokens_padding == 0


def test_counts_of_a_pass(corpus: Path, tokenizer, make) -> None:
    lengths = [len(document.input_ids) for document in _documents(corpus, tokenizer)] * 2
    for long_documents in ("split", "truncate", "drop"):
        for packing in ("in_order", "best_fit"):
            rows = make(long_documents=long_documents, packing=packing)
            _ = rows[60]
            report = rows.report
            done = lengths[: report.documents]
            assert report.documents_empty == done.count(0)
            long = [n for n in done if n > SEQ_LEN]
            assert report.documents_truncated == (len(long) if long_documents == "truncate" else 0)
            assert report.documents_dropped.get("too_long", 0) == (len(long) if long_documents == "drop" else 0)
            if packing == "best_fit":
                assert report.documents_split == (len(long) if long_documents == "split" else 0)
                assert report.tokens == sum(done)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumed_rows_are_the_same_rows(make, tmp_path: Path, options: dict) -> None:
    phases = ((0, SEQ_LEN), (60, 40), (150, 16))
    uninterrupted = make(phases=phases, **options)
    wanted = [uninterrupted[index] for index in range(280)]
    journal = tmp_path / "places" / "stream.jsonl"
    first = make(phases=phases, journal=journal, **options)
    assert all(_equal(first[index], wanted[index]) for index in range(230))
    # What a process killed in the middle of a write leaves.
    text = journal.read_text()
    journal.write_text(text + text.splitlines()[-1][:50])
    for start in (230, 90, 3):
        again = make(phases=phases, journal=journal, **options)
        read = _count_reads(again)
        for index in range(start, start + 50):
            assert _equal(again[index], wanted[index]), (start, index)
        if start == 230:
            assert sum(read) < 0.7 * sum(_reads_from_the_start(make, phases, options, 280))
            whole = make(phases=phases, **options)
            _ = whole[279]
            assert asdict(again.report) == asdict(whole.report)


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit"}], ids=str)
def test_places_of_other_phases_are_passed_over(make, tmp_path: Path, options: dict) -> None:
    """As a run of twice as many processes leaves them, whose steps have twice the rows."""
    journal = tmp_path / "stream.jsonl"
    other = make(phases=((0, 16), (120, 40)), journal=journal, **options)
    _ = [other[index] for index in range(250)]
    phases = ((0, 16), (60, 40))
    whole = make(phases=phases, **options)
    wanted = [whole[index] for index in range(160)]
    again = make(phases=phases, journal=journal, **options)
    assert all(_equal(again[index], wanted[index]) for index in range(140, 160))


def _count_reads(rows: StreamedRows) -> list[int]:
    """Grows with every document that is tokenised."""
    count: list[int] = []
    read = rows.stream.read

    def counted(place):
        for item in read(place):
            count.append(1)
            yield item

    rows.stream.read = counted  # type: ignore[method-assign]
    return count


def _reads_from_the_start(make, phases, options: dict, row: int) -> list[int]:
    rows = make(phases=phases, **options)
    count = _count_reads(rows)
    _ = rows[row - 1]
    return count


def test_a_loader_with_a_worker_sees_the_same_rows_and_several_are_refused(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = list(DataLoader(make(), batch_sampler=[[0, 1], [2, 3]], collate_fn=collate))
    worker = list(DataLoader(make(), batch_sampler=[[0, 1], [2, 3]], collate_fn=collate, num_workers=1))
    assert all(_equal(a, b) for a, b in zip(alone, worker, strict=True))
    with pytest.raises(ValueError, match="each of 2 workers would read all of it"):
        monkeypatch.setattr(
            "sparse_hf_training.data.streamed_rows.get_worker_info", lambda: SimpleNamespace(num_workers=2)
        )
        _ = make()[0]


def test_max_documents_and_max_epochs(corpus: Path, tokenizer, make) -> None:
    documents = _documents(corpus, tokenizer, max_documents=45)
    packed, _ = pack_documents(documents * 2, SEQ_LEN)
    rows = make(max_documents=45)
    for index in range(len(packed)):
        assert rows[index]["input_ids"].tolist() == packed.row(index)["input_ids"].tolist()
    limited = make(max_documents=45, max_epochs=2)
    with pytest.raises(ValueError, match="used up after max_epochs=2"):
        for index in range(len(packed) + 1):
            _ = limited[index]


def test_shuffled_passes_differ_and_hold_all(make) -> None:
    stream = make(shuffle_buffer=100).stream
    ids: dict[int, list[str]] = {0: [], 1: []}
    for place, document in stream.read(Place()):
        if place.epoch == 2:
            break
        ids[place.epoch].append(str(list(document.input_ids)))
    assert len(ids[0]) == NUM_TEXTS and sorted(ids[0]) == sorted(ids[1]) and ids[0] != ids[1]


def test_going_back_reads_again(make) -> None:
    rows = make()
    first = rows[0]
    _ = rows[200]
    assert _equal(rows[0], first)
    with pytest.raises(IndexError):
        rows[10_000]


def test_streams_that_teach_nothing(tmp_path: Path, tokenizer) -> None:
    def rows(text: str, answer: str) -> StreamedRows:
        path = tmp_path / "empty.jsonl"
        path.write_text("\n".join([json.dumps({"p": text, "c": answer})] * 3))
        source = TextSource(path=str(path), prompt_column="p", completion_column="c", streaming=True)
        streamed = StreamedRows(DocumentStream(source, tokenizer), length=9, long_documents="truncate")
        streamed.add_phase(0, 4)
        return streamed

    with pytest.raises(ValueError, match="gives no token"):
        rows("", "")[0]
    with pytest.raises(ValueError, match="gives no label to learn from"):
        rows("the ship sailed from the harbor at dawn", "and")[0]


def test_refused_documents_and_bad_phases(make) -> None:
    with pytest.raises(ValueError, match=r"longer than seq_len=24 .*set long_documents"):
        _ = make(long_documents="refuse")[40]
    with pytest.raises(ValueError, match="phases begin at row 0 and ascend, got row 5"):
        make(phases=((5, 24),))
    with pytest.raises(ValueError, match="no length yet"):
        make(phases=())[0]
