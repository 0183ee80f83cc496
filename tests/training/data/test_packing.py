"""Packing: every token is in one row or counted as dropped; documents keep apart."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparse_hf_training.data import IGNORE_INDEX, Document, pack_documents


def _documents(seed: int, count: int) -> list[Document]:
    """Documents of random lengths, empty ones too; all token ids are distinct."""
    rng = random.Random(seed)
    documents, token = [], 0
    for _ in range(count):
        ids = list(range(token, token + rng.choice([0, 1, 2, 5, 9, 40])))
        token += len(ids)
        labels = [i if rng.random() < 0.6 else IGNORE_INDEX for i in ids]
        documents.append(Document(input_ids=ids, labels=labels))
    return documents


def _whole(*lengths: int) -> list[Document]:
    return [Document(input_ids=list(range(n)), labels=list(range(n))) for n in lengths]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("seq_len", [2, 7, 16])
def test_invariants(seed: int, seq_len: int) -> None:
    documents = _documents(seed, 25)
    rows, report = pack_documents(iter(documents), seq_len)
    # Ids are distinct, so they lead back to their document, index in it, and label.
    origin = {token: (d, at) for d, doc in enumerate(documents) for at, token in enumerate(doc.input_ids)}
    label_of = {token: label for doc in documents for token, label in zip(doc.input_ids, doc.labels, strict=True)}

    flat = rows.input_ids.ravel().tolist()
    assert len(set(flat)) == len(flat)
    assert report.tokens == len(origin) == len(flat) + report.tokens_dropped
    assert report.rows == len(rows) == rows.input_ids.shape[0]
    assert rows.input_ids.shape == rows.labels.shape == rows.position_ids.shape == (len(rows), seq_len)
    assert flat == sorted(flat), "order is kept"
    assert (report.documents, report.documents_empty) == (25, sum(not doc.input_ids for doc in documents))

    rows_of: dict[int, set[int]] = {}
    for r in range(len(rows)):
        for t in range(seq_len):
            token, label, position = (int(a[r, t]) for a in (rows.input_ids, rows.labels, rows.position_ids))
            document, at = origin[token]
            rows_of.setdefault(document, set()).add(r)
            if at == 0 or t == 0:
                assert position == 0 and label == IGNORE_INDEX
            else:
                assert position == rows.position_ids[r, t - 1] + 1
                assert label == label_of[token]
        assert (rows.labels[r] != IGNORE_INDEX).any()
    assert report.documents_split == sum(len(where) > 1 for where in rows_of.values())


def test_hand_made_case() -> None:
    rows, report = pack_documents(_whole(3, 4, 2), 4)
    assert rows.input_ids.tolist() == [[0, 1, 2, 0], [1, 2, 3, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert rows.labels.tolist() == [[-100, 1, 2, -100], [-100, 2, 3, -100]]
    assert rows.input_ids.dtype == rows.labels.dtype == rows.position_ids.dtype == np.int32
    # The last document's second token is the remainder that fills no row: dropped, not split.
    assert (report.tokens, report.rows, report.tokens_dropped, report.documents_split) == (9, 2, 1, 1)


def test_a_document_longer_than_rows_is_split_once() -> None:
    rows, report = pack_documents(_whole(10), 5)
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (report.documents, report.documents_split, report.tokens_dropped) == (1, 1, 0)


def test_rows_without_loss_are_left_out_and_counted() -> None:
    silent = Document(input_ids=[7] * 8, labels=[IGNORE_INDEX] * 8)
    rows, report = pack_documents([*_whole(4), silent, *_whole(4)], 4)
    assert rows.input_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert (report.rows, report.rows_without_loss, report.tokens_dropped, report.documents_split) == (2, 2, 8, 0)


def test_documents_are_not_changed() -> None:
    labels = np.arange(4, dtype=np.int32)
    pack_documents([Document(input_ids=labels, labels=labels)], 4)
    assert labels.tolist() == [0, 1, 2, 3]


def test_less_than_a_row_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="2 documents hold 7 tokens, fewer than one row of seq_len=8"):
        pack_documents(_whole(3, 4), 8)
    with pytest.raises(ValueError, match="0 documents hold 0 tokens"):
        pack_documents([], 8)


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 6 tokens has a label"):
        pack_documents([Document(input_ids=[1] * 6, labels=[IGNORE_INDEX] * 6)], 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seq_len must be >= 2, got 1"):
        pack_documents(_whole(3), 1)
    with pytest.raises(ValueError, match="one label per token, got 1 for 2"):
        Document(input_ids=[1, 2], labels=[1])
