"""Packing documents of any length into rows of one length, with nothing lost unseen."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparse_hf_training.data.documents import IGNORE_INDEX, Document
from sparse_hf_training.data.store import DocumentStore

Packing = Literal["in_order", "best_fit"]
"""`in_order` joins all documents and cuts every `seq_len` tokens: no padding, documents cut where rows end.
`best_fit` puts each document, the longest first, into the fullest row that still holds it whole (best-fit decreasing):
no document of up to `seq_len` tokens is cut, rows end in padding."""

LongDocuments = Literal["split", "truncate", "drop", "refuse"]
"""What becomes of a document longer than a row: cut into pieces, cut to its first `seq_len` tokens, left out, or a
ValueError."""


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Which piece of which document lies where: pieces in the order of rows, `row_offsets` of shape [rows + 1]."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    """First token of the piece within its document."""
    lengths: NDArray[np.int64]
    row_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each piece."""
        return np.repeat(np.arange(len(self)), np.diff(self.row_offsets))

    def select(self, keep: NDArray[np.bool_]) -> RowPlan:
        """The plan of the rows where `keep`, of shape [rows], is true."""
        pieces = np.repeat(keep, np.diff(self.row_offsets))
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.row_offsets)[keep])])
        return RowPlan(
            documents=self.documents[pieces],
            starts=self.starts[pieces],
            lengths=self.lengths[pieces],
            row_offsets=offsets,
        )


class PackedRows:
    """Rows for training, made from their documents when they are asked for.

    The first token of a document, or of a piece of one, has label -100: nothing before it predicts it. Where
    `position_ids` restart at 0, attention must not look further back. Padding at the end of a row has labels -100 and
    positions of its own, like a document.
    """

    def __init__(self, store: DocumentStore, plan: RowPlan, seq_len: int, pad_token_id: int = 0) -> None:
        self.store, self.plan, self.seq_len, self.pad_token_id = store, plan, seq_len, pad_token_id

    def __len__(self) -> int:
        return len(self.plan)

    def row(self, index: int) -> dict[str, NDArray[np.int32]]:
        """`input_ids`, `labels` (unshifted) and `position_ids`, int32 arrays of shape [seq_len]."""
        plan = self.plan
        ids = np.full(self.seq_len, self.pad_token_id, np.int32)
        labels = np.full(self.seq_len, IGNORE_INDEX, np.int32)
        positions = np.empty(self.seq_len, np.int32)
        at = 0
        for piece in range(int(plan.row_offsets[index]), int(plan.row_offsets[index + 1])):
            document, start, length = int(plan.documents[piece]), int(plan.starts[piece]), int(plan.lengths[piece])
            stop = at + length
            ids[at:stop] = self.store.ids(document, start, start + length)
            has_loss = self.store.loss(document, start, start + length)
            labels[at + 1 : stop] = np.where(has_loss[1:], ids[at + 1 : stop], IGNORE_INDEX)
            positions[at:stop] = np.arange(length)
            at = stop
        positions[at:] = np.arange(self.seq_len - at)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _all(self, key: str) -> NDArray[np.int32]:
        return np.stack([self.row(index)[key] for index in range(len(self))])

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """Of all rows, shape [rows, seq_len]; made anew at each call, as the next two are."""
        return self._all("input_ids")

    @property
    def labels(self) -> NDArray[np.int32]:
        return self._all("labels")

    @property
    def position_ids(self) -> NDArray[np.int32]:
        return self._all("position_ids")


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What happened to the tokens: `tokens == rows * seq_len - tokens_padding + tokens_dropped`."""

    documents: int = 0
    documents_empty: int = 0
    """Documents without a token; they leave no trace in the rows."""
    documents_split: int = 0
    """Documents that lie in more than one row; each piece counts as a document of its own for attention."""
    documents_truncated: int = 0
    documents_dropped: dict[str, int] = field(default_factory=dict)
    """Documents with no token in any row, by reason."""
    tokens: int = 0
    rows: int = 0
    rows_without_loss: int = 0
    """Rows that were left out because every label was -100; their tokens are in `tokens_dropped`."""
    tokens_padding: int = 0
    tokens_dropped_for: dict[str, int] = field(default_factory=dict)
    """Tokens in no row, by reason: `truncated`, `too_long`, `no_label` (rows without loss), `incomplete_row` (the last
    one of `in_order`)."""

    @property
    def tokens_dropped(self) -> int:
        return sum(self.tokens_dropped_for.values())

    def __add__(self, other: PackingReport) -> PackingReport:
        return PackingReport(**{f.name: _sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


def _sum(one: Any, two: Any) -> Any:
    if isinstance(one, dict):
        return {reason: one.get(reason, 0) + two.get(reason, 0) for reason in {**one, **two}}
    return one + two


def pack_documents(
    documents: Iterable[Document] | DocumentStore,
    seq_len: int,
    *,
    packing: Packing = "in_order",
    long_documents: LongDocuments = "split",
    pad_token_id: int = 0,
) -> tuple[PackedRows, PackingReport]:
    """Pack `documents` into rows of `seq_len` tokens.

    Raises:
        ValueError: `seq_len` is below 2, an unknown option, a long document that is refused, documents that do not
            fill one row, or no row with a label.
    """
    check_packing(seq_len, packing, long_documents)
    store = documents if isinstance(documents, DocumentStore) else DocumentStore.from_documents(documents)
    lengths = limit_lengths(store.lengths, seq_len, long_documents)
    tokens = int(store.lengths.sum())
    if int(lengths.sum()) < (seq_len if packing == "in_order" else 1):
        removed = "" if lengths.sum() == tokens else f", {int(lengths.sum())} of them after long_documents"
        raise ValueError(
            f"{len(store)} documents hold {tokens} tokens{removed}, fewer than one row of seq_len={seq_len}; "
            "add text or lower seq_len"
        )
    whole = plan_rows(lengths, seq_len, packing)
    has_loss = rows_with_loss(store, whole)
    if not has_loss.any():
        raise ValueError(f"none of the {tokens} tokens has a label to learn from; check the column and the roles")
    plan = whole.select(has_loss)
    return PackedRows(store, plan, seq_len, pad_token_id), _report(store, lengths, whole, plan, seq_len)


def check_packing(seq_len: int, packing: str, long_documents: str) -> None:
    """Raises ValueError for options that packing does not know."""
    if seq_len < 2:
        raise ValueError(f"seq_len must be >= 2, got {seq_len}")
    for name, value, known in (("packing", packing, Packing), ("long_documents", long_documents, LongDocuments)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {list(get_args(known))}, got {value!r}")


def limit_lengths(lengths: NDArray[np.int64], seq_len: int, long_documents: LongDocuments) -> NDArray[np.int64]:
    """Tokens of each document that are to be packed, shape [documents].

    Raises:
        ValueError: for a document that is refused.
    """
    too_long = lengths > seq_len
    if long_documents == "refuse" and too_long.any():
        raise ValueError(
            f"{int(too_long.sum())} of {len(lengths)} documents are longer than seq_len={seq_len} (the longest has "
            f"{int(lengths.max())} tokens); raise seq_len, or set long_documents to split, truncate or drop"
        )
    if long_documents == "truncate":
        return np.minimum(lengths, seq_len)
    return np.where(too_long, 0, lengths) if long_documents == "drop" else lengths


def plan_rows(lengths: NDArray[np.int64], seq_len: int, packing: Packing) -> RowPlan:
    """The rows that documents of these lengths make; what does not fill the last row of `in_order` is in none."""
    return _plan_in_order(lengths, seq_len) if packing == "in_order" else _plan_best_fit(lengths, seq_len)


def _plan_in_order(lengths: NDArray[np.int64], seq_len: int) -> RowPlan:
    filled = np.flatnonzero(lengths)
    document_starts = (np.cumsum(lengths) - lengths)[filled]
    num_rows = int(lengths.sum()) // seq_len
    # A piece starts where its document starts or, for one that was cut, at the start of the row.
    row_starts = np.arange(num_rows, dtype=np.int64) * seq_len
    piece_starts = np.union1d(document_starts[document_starts < num_rows * seq_len], row_starts)
    owner = np.searchsorted(document_starts, piece_starts, side="right") - 1
    return RowPlan(
        documents=filled[owner],
        starts=piece_starts - document_starts[owner],
        lengths=np.diff(piece_starts, append=num_rows * seq_len),
        row_offsets=np.append(np.searchsorted(piece_starts, row_starts), len(piece_starts)),
    )


def _plan_best_fit(lengths: NDArray[np.int64], seq_len: int) -> RowPlan:
    pieces = -(-lengths // seq_len)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = number * seq_len
    sizes = np.minimum(lengths[documents] - starts, seq_len)
    rows = _best_fit_decreasing(sizes, seq_len)
    order = np.argsort(rows, kind="stable")
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    return RowPlan(
        documents=documents[order],
        starts=starts[order],
        lengths=sizes[order],
        row_offsets=np.searchsorted(rows[order], np.arange(num_rows + 1)),
    )


def _best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece; rows are numbered by their first piece, and of rows as full the oldest is taken."""
    rows = np.empty(len(sizes), np.int64)
    spaces: list[int] = []  # distinct free spaces, ascending
    having: dict[int, deque[int]] = {}  # free space -> rows that have it
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect_left(spaces, size)
        if at == len(spaces):
            row, space, num_rows = num_rows, capacity, num_rows + 1
        else:
            space = spaces[at]
            row = having[space].popleft()
            if not having[space]:
                del having[space], spaces[at]
        rows[piece] = row
        if left := space - size:
            if left not in having:
                having[left] = deque()
                insort(spaces, left)
            having[left].append(row)
    first = np.full(num_rows, len(sizes), np.int64)
    np.minimum.at(first, rows, np.arange(len(sizes)))
    return np.argsort(np.argsort(first))[rows]


def rows_with_loss(store: DocumentStore, plan: RowPlan) -> NDArray[np.bool_]:
    """Rows with at least one label, shape [rows]."""
    has_loss = plan.lengths > 1
    for piece in np.flatnonzero(has_loss & store.partial[plan.documents]).tolist():
        start, length = int(plan.starts[piece]), int(plan.lengths[piece])
        has_loss[piece] = store.loss(int(plan.documents[piece]), start + 1, start + length).any()
    return np.bincount(plan.rows[has_loss], minlength=len(plan)) > 0


def _report(
    store: DocumentStore, lengths: NDArray[np.int64], whole: RowPlan, kept: RowPlan, seq_len: int
) -> PackingReport:
    taken = int(whole.lengths.sum())
    dropped = {
        "truncated": int((store.lengths - lengths)[lengths > 0].sum()),
        "too_long": int(store.lengths[lengths == 0].sum()),
        "no_label": taken - int(kept.lengths.sum()),
        "incomplete_row": int(lengths.sum()) - taken,
    }
    pieces = np.bincount(kept.documents, minlength=len(store))
    planned = np.bincount(whole.documents, minlength=len(store)) > 0
    lost = {
        "too_long": int(((lengths == 0) & (store.lengths > 0)).sum()),
        "no_label": int((planned & (pieces == 0)).sum()),
        "incomplete_row": int(((lengths > 0) & ~planned).sum()),
    }
    return PackingReport(
        documents=len(store),
        documents_empty=int((store.lengths == 0).sum()),
        documents_split=int((pieces > 1).sum()),
        documents_truncated=int(((lengths > 0) & (lengths < store.lengths)).sum()),
        documents_dropped={reason: count for reason, count in lost.items() if count},
        tokens=int(store.lengths.sum()),
        rows=len(kept),
        rows_without_loss=len(whole) - len(kept),
        tokens_padding=len(kept) * seq_len - int(kept.lengths.sum()),
        tokens_dropped_for={reason: count for reason, count in dropped.items() if count},
    )
