"""Document stores: Arrow files on disk hold what documents in memory hold, and are made once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from sparse_hf_training.data import (
    DocumentStore,
    TextSource,
    load_text,
    pack_documents,
    read_documents,
    tokenize_source,
)

datasets = pytest.importorskip("datasets")
TEXTS = ["The ship sailed.", "", "the harbor at dawn " * 9, "rain", "grey hills and gulls"] * 30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "at dawn"}] for text in TEXTS]
    rows = [{"text": text, "chat": chat} for text, chat in zip(TEXTS, chats, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _read(source: TextSource, tokenizer):
    return list(read_documents(load_text(source), source, tokenizer))


@pytest.mark.parametrize("options", [{}, {"chat_column": "chat"}, {"max_documents": 70}])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_arrow_holds_what_the_documents_hold(corpus: Path, tokenizer, options: dict, num_proc: int | None) -> None:
    source = TextSource(path=str(corpus), **options)
    documents = _read(source, tokenizer)
    stored = tokenize_source(source, tokenizer, num_proc=num_proc)
    assert stored.lengths.tolist() == [len(doc.input_ids) for doc in documents]
    for store in (stored, DocumentStore.from_documents(documents)):
        assert len(store) == len(documents) == options.get("max_documents", len(TEXTS))
        for n, document in enumerate(documents):
            size = len(document.input_ids)
            assert store.ids(n, 0, size).tolist() == list(document.input_ids)
            loss = [label != -100 for label in document.labels]
            assert store.loss(n, 0, size).tolist() == loss
            assert bool(store.partial[n]) == (not all(loss))
            assert store.ids(n, size // 2, size).tolist() == list(document.input_ids[size // 2 :])
            assert store.loss(n, size // 2, size).tolist() == loss[size // 2 :]


def test_rows_from_arrow_equal_rows_from_memory(corpus: Path, tokenizer) -> None:
    source = TextSource(path=str(corpus), chat_column="chat")
    stored, _ = pack_documents(tokenize_source(source, tokenizer), 32)
    memory, _ = pack_documents(_read(source, tokenizer), 32)
    for key in ("input_ids", "labels", "position_ids"):
        np.testing.assert_array_equal(getattr(stored, key), getattr(memory, key))


def test_tokens_are_mapped_from_disk(corpus: Path, tokenizer) -> None:
    store = tokenize_source(TextSource(path=str(corpus)), tokenizer)
    # A view of the mapped file: it owns nothing and cannot be written to.
    assert not store.ids(0, 0, 3).flags.owndata and not store.ids(0, 0, 3).flags.writeable


def test_tokenising_happens_once_for_each_tokenizer_and_reading(
    corpus: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> set[str]:
        return {path.name for path in (tmp_path / "cache" / "sparse_hf").iterdir()}

    source = TextSource(path=str(corpus), chat_column="chat")
    first = tokenize_source(source, tokenizer)
    made = files()
    # A call with truncation leaves its setting in the tokenizer; documents are not truncated by it.
    tokenizer("the ship sailed from", truncation=True, max_length=2)
    with monkeypatch.context() as patch:
        patch.setattr("sparse_hf_training.data.store.read_documents", lambda *a, **k: pytest.fail("tokenised again"))
        again = tokenize_source(source, tokenizer)
    assert files() == made and again.lengths.tolist() == first.lengths.tolist()
    other = copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("<|", "<<|")
    tokenize_source(source, other)
    tokenize_source(TextSource(path=str(corpus), chat_column="chat", loss="all"), tokenizer)
    tokenize_source(TextSource(path=str(corpus)), tokenizer)
    assert len(files()) == len(made) + 3


def test_an_unusable_row_is_named(corpus: Path, tokenizer) -> None:
    rows = corpus.read_text().splitlines()
    rows[100] = json.dumps({"text": None, "chat": None})
    corpus.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"row 100, column 'text': expected text, got NoneType"):
        tokenize_source(TextSource(path=str(corpus)), tokenizer)


def test_streams_need_an_end(corpus: Path, tokenizer) -> None:
    with pytest.raises(ValueError, match="is streamed, but all of it is needed here; set max_documents"):
        tokenize_source(TextSource(path=str(corpus), streaming=True), tokenizer)
    limited = tokenize_source(TextSource(path=str(corpus), streaming=True, max_documents=7), tokenizer)
    assert len(limited) == 7


def test_concatenation_and_running_text(corpus: Path, tokenizer) -> None:
    store = tokenize_source(TextSource(path=str(corpus), max_documents=66), tokenizer)
    documents = _read(TextSource(path=str(corpus), max_documents=4), tokenizer)
    both = DocumentStore.concatenate([store, DocumentStore.from_documents(documents)])
    assert both.lengths.tolist() == store.lengths.tolist() + [len(doc.input_ids) for doc in documents]
    assert both.ids(68, 0, 5).tolist() == list(documents[2].input_ids[:5])
    everything = [token for n in range(len(both)) for token in both.ids(n, 0, int(both.lengths[n])).tolist()]
    for limit in (0, 10, int(store.lengths.sum()) + 3, 10**9):
        assert both.running_text(limit).tolist() == everything[:limit]
