"""Packing: every token is in one row or counted as dropped; documents keep apart."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparse_hf_training.data import IGNORE_INDEX, Document, PackingReport, pack_documents


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


def _check_rows(documents, rows, report, seq_len: int, pad: int) -> dict[int, list[tuple[int, int, int]]]:
    """Checks every token of every row from the definition; returns each document's pieces (row, first, length)."""
    origin = {token: (d, at) for d, doc in enumerate(documents) for at, token in enumerate(doc.input_ids)}
    label_of = {token: label for doc in documents for token, label in zip(doc.input_ids, doc.labels, strict=True)}
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    padding = 0
    for r in range(len(rows)):
        row = {key: value.tolist() for key, value in rows.row(r).items()}
        assert all(len(values) == seq_len for values in row.values())
        assert any(label != IGNORE_INDEX for label in row["labels"])
        t = 0
        while t < seq_len and row["input_ids"][t] != pad:
            document, first = origin[row["input_ids"][t]]
            n = 0
            while t + n < seq_len and origin.get(row["input_ids"][t + n]) == (document, first + n):
                token = row["input_ids"][t + n]
                assert row["position_ids"][t + n] == n
                assert row["labels"][t + n] == (label_of[token] if n else IGNORE_INDEX)
                n += 1
            pieces.setdefault(document, []).append((r, first, n))
            t += n
        assert row["position_ids"][t:] == list(range(seq_len - t)) and set(row["labels"][t:]) <= {IGNORE_INDEX}
        assert set(row["input_ids"][t:]) <= {pad}
        padding += seq_len - t
    assert padding == report.tokens_padding and report.rows == len(rows)
    placed = sum(n for where in pieces.values() for _, _, n in where)
    assert report.tokens == len(origin) == placed + report.tokens_dropped
    assert report.tokens == report.rows * seq_len - report.tokens_padding + report.tokens_dropped
    filled = sum(bool(doc.input_ids) for doc in documents)
    assert filled == len(pieces) + sum(report.documents_dropped.values())
    assert report.documents_split == sum(len(where) > 1 for where in pieces.values())
    assert (report.documents, report.documents_empty) == (len(documents), len(documents) - filled)
    return pieces


@pytest.mark.parametrize("long_documents", ["split", "truncate", "drop"])
@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
@pytest.mark.parametrize(("seed", "seq_len"), [(0, 16), (1, 16), (2, 9), (3, 41), (4, 2)])
def test_every_token_of_every_option(seed: int, seq_len: int, packing, long_documents) -> None:
    documents = _documents(seed, 40)
    rows, report = pack_documents(
        documents, seq_len, packing=packing, long_documents=long_documents, pad_token_id=99_999
    )
    pieces = _check_rows(documents, rows, report, seq_len, 99_999)
    long = [d for d, doc in enumerate(documents) if len(doc.input_ids) > seq_len]
    cut = sum(len(documents[d].input_ids) for d in long)
    reasons = report.tokens_dropped_for
    if long_documents == "split":
        assert not {"truncated", "too_long"} & set(reasons) and not report.documents_truncated
    if long_documents == "truncate":
        assert report.documents_truncated == len(long)
        assert reasons.get("truncated", 0) == cut - seq_len * len(long)
        assert all(first + n <= seq_len for where in pieces.values() for _, first, n in where)
    if long_documents == "drop":
        assert reasons.get("too_long", 0) == cut and not set(long) & set(pieces)
        assert report.documents_dropped.get("too_long", 0) == len(long)
    if packing == "best_fit":
        assert "incomplete_row" not in reasons
        whole = {d for d, doc in enumerate(documents) if len(doc.input_ids) <= seq_len} & set(pieces)
        assert all(len(pieces[d]) == 1 for d in whole), "no document that fits is cut"
    else:
        assert report.tokens_padding == 0 and reasons.get("incomplete_row", 0) < seq_len


def _fill_by_definition(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, the slow way."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_best_fit_is_best_fit_decreasing(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(2, 30) for _ in range(60)]
    rows, report = pack_documents(_whole(*sizes), 30, packing="best_fit")
    lengths = np.split(rows.plan.lengths, rows.plan.row_offsets[1:-1])
    wanted = sorted(sorted(row) for row in _fill_by_definition(sizes, 30))
    assert sorted(sorted(row.tolist()) for row in lengths) == wanted
    assert report.tokens_padding == 30 * len(wanted) - sum(sizes) and report.tokens_dropped == 0
    # Rows come in the order of their first document.
    firsts = [int(part.min()) for part in np.split(rows.plan.documents, rows.plan.row_offsets[1:-1])]
    assert firsts == sorted(firsts)


def test_long_documents_are_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 documents are longer than seq_len=8 \(the longest has 9 tokens\)"):
        pack_documents(_whole(8, 9), 8, long_documents="refuse")
    assert pack_documents(_whole(8, 7), 8, long_documents="refuse")[1].rows == 1


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match=r"packing must be one of \['in_order', 'best_fit'\], got 'tight'"):
        pack_documents(_whole(9), 4, packing="tight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"long_documents must be one of .* got 'cut'"):
        pack_documents(_whole(9), 4, long_documents="cut")  # type: ignore[arg-type]


def test_nothing_left_after_dropping() -> None:
    with pytest.raises(ValueError, match="hold 18 tokens, 0 of them after long_documents, fewer than one row"):
        pack_documents(_whole(9, 9), 4, long_documents="drop")


def test_reports_add_up() -> None:
    one = PackingReport(documents=2, tokens=9, tokens_dropped_for={"truncated": 3})
    two = PackingReport(documents=1, tokens=4, tokens_dropped_for={"truncated": 1, "no_label": 2})
    both = one + two
    assert (both.documents, both.tokens, both.tokens_dropped) == (3, 13, 6)
    assert both.tokens_dropped_for == {"truncated": 4, "no_label": 2}
