"""Rows that are packed from a stream while training."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from sparse_hf_training.data.documents import Document
from sparse_hf_training.data.packing import (
    LongDocuments,
    PackedRows,
    Packing,
    PackingReport,
    RowPlan,
    check_packing,
    limit_lengths,
    plan_rows,
    rows_with_loss,
)
from sparse_hf_training.data.sources import Row
from sparse_hf_training.data.store import DocumentStore
from sparse_hf_training.data.stream import DocumentStream, Place

WINDOW_ROWS = 16
"""Rows that are packed at a time; `best_fit` fills them from this many rows' worth of documents."""
_JOURNAL_EVERY = 64
"""Rows between two cursors of the journal."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a row begins, and what happened to all that lies before."""

    row: int = 0
    place: Place = field(default_factory=Place)
    offset: int = 0
    """Tokens of the document at `place` that earlier rows hold, or that were dropped with them."""
    pieces: int = 0
    """Pieces of the document at `place` that earlier rows hold."""
    report: PackingReport = field(default_factory=PackingReport)
    phases: tuple[tuple[int, int], ...] = ()
    """First row and tokens per row of the phases up to this row."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cursor:
        """From what `dataclasses.asdict` made."""
        plain: Any = values.get("phases", ())
        phases = tuple((int(first), int(seq_len)) for first, seq_len in plain)
        read = {"place": Place(**values["place"]), "report": PackingReport(**values["report"]), "phases": phases}
        return cls(**{**values, **read})


class Journal:
    """Cursors in a file, one JSON object a line. Each follows from data and configuration: losing some costs time."""

    def __init__(self, path: Path | None, *, write: bool) -> None:
        self.path, self.write = path, write
        self._last = -1 if path is None else max((cursor.row for cursor in self._read()), default=-1)

    def _read(self) -> Iterator[Cursor]:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield Cursor.from_dict(json.loads(line))
            except (json.JSONDecodeError, TypeError, KeyError):
                continue  # empty, or torn when the process was killed

    def before(self, row: int, phases: Sequence[tuple[int, int]]) -> Cursor:
        """The last cursor at or before `row` that was written under these phases.

        Phases are counted in steps, so that another number of processes has others.
        """
        found = (c for c in self._read() if c.row <= row and c.phases == _until(c.row, phases))
        return max(found, key=lambda cursor: cursor.row, default=Cursor())

    def add(self, cursor: Cursor) -> None:
        """Writes the cursor unless one lies close before it."""
        if self.path is None or not self.write or cursor.row < self._last + _JOURNAL_EVERY:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(asdict(cursor)))  # a torn line before it stays by itself
        self._last = cursor.row


def _until(row: int, phases: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(phase for phase in phases if phase[0] <= row)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A document, or what earlier rows left of it."""

    place: Place
    document: Document
    offset: int = 0
    pieces: int = 0
    cut: int = 0
    """Tokens that `long_documents` took away."""

    def rest(self, start: int, stop: int, pieces: int) -> _Read:
        document = Document(input_ids=self.document.input_ids[start:stop], labels=self.document.labels[start:stop])
        return replace(self, document=document, offset=self.offset + start, pieces=pieces)


class StreamedRows(Dataset[Row]):
    """Rows of a stream by number. Row i is fixed by data and options; rows are read in ascending order.

    Going back, or far ahead, reads the stream again from the closest cursor of the journal.

    Args:
        stream: the documents.
        length: number of rows.
        packing, long_documents: as `pack_documents`; `best_fit` fills a window of rows at a time.
        pad_token_id: input id of padding.
        journal: where cursors are kept, for a quick start at any row; by default they are not.

    Raises:
        ValueError: an unknown option; when rows are read, a long document that is refused, a stream without labels,
            or several data loader workers, each of which would read the whole stream.
    """

    def __init__(
        self,
        stream: DocumentStream,
        *,
        length: int,
        packing: Packing = "in_order",
        long_documents: LongDocuments = "split",
        pad_token_id: int = 0,
        journal: Journal | None = None,
    ) -> None:
        self.stream, self.length = stream, length
        self.packing, self.long_documents, self.pad_token_id = packing, long_documents, pad_token_id
        self.journal = journal or Journal(None, write=False)
        self._phases: list[tuple[int, int]] = []
        self._windows: deque[tuple[int, PackedRows]] = deque(maxlen=2)
        self._reader: Iterator[tuple[Place, Document]] | None = None

    def add_phase(self, first_row: int, seq_len: int) -> None:
        """Rows from `first_row` on have `seq_len` tokens; the first phase begins at row 0."""
        check_packing(seq_len, self.packing, self.long_documents)
        if first_row < (self._phases[-1][0] if self._phases else 0) or (not self._phases and first_row):
            raise ValueError(f"phases begin at row 0 and ascend, got row {first_row} after {self._phases}")
        self._phases.append((first_row, seq_len))
        self._reader = None
        self._windows.clear()

    def __len__(self) -> int:
        return self.length

    @property
    def report(self) -> PackingReport:
        """What happened to the documents of the rows that were packed so far."""
        return self._report if self._reader is not None else PackingReport()

    def __getitem__(self, index: int) -> Row:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} items")
        index %= self.length
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"{self.stream.source.path!r} is streamed: each of {worker.num_workers} workers would read all of it; "
                "set trainer.dataloader_num_workers to 0 or 1"
            )
        if (row := self._find(index)) is not None:
            return row
        if self._reader is None or index < self._next or index > self._next + _JOURNAL_EVERY:
            cursor = self.journal.before(index, self._phases)
            if self._reader is None or index < self._next or cursor.row > self._next:
                self._start(cursor)
        while (row := self._find(index)) is None:
            self._fill()
        return row

    def _find(self, index: int) -> Row | None:
        for first, rows in self._windows:
            if first <= index < first + len(rows):
                return {key: torch.from_numpy(array.astype(np.int64)) for key, array in rows.row(index - first).items()}
        return None

    def _phase(self, row: int) -> tuple[int, int | None]:
        """`seq_len` of a row, and the row at which the next phase begins."""
        if not self._phases:
            raise ValueError("streamed rows have no length yet; call add_phase(0, seq_len)")
        number = max(n for n, (first, _) in enumerate(self._phases) if first <= row)
        return self._phases[number][1], self._phases[number + 1][0] if number + 1 < len(self._phases) else None

    def _start(self, cursor: Cursor) -> None:
        self._windows.clear()
        self._reader = self.stream.read(cursor.place)
        self._next, self._report = cursor.row, cursor.report
        self._barren: int | None = None  # the pass since which no row had a label
        self._carry: list[_Read] = []
        self._is_place = True  # what is carried can be read again from its place
        if cursor.offset:
            first = self._read(self._phase(cursor.row)[0])
            self._carry = [first.rest(cursor.offset, len(first.document.input_ids), cursor.pieces)]

    def _read(self, seq_len: int) -> _Read:
        assert self._reader is not None
        place, document = next(self._reader)
        tokens = len(document.input_ids)
        kept = int(limit_lengths(np.array([tokens]), seq_len, self.long_documents)[0])
        return replace(_Read(place=place, document=document).rest(0, kept, 0), cut=tokens - kept)

    def _fill(self) -> None:
        """Packs the next window of rows."""
        seq_len, end = self._phase(self._next)
        left = None if end is None else end - self._next
        reads = self._carry or [self._read(seq_len)]
        if self._is_place:
            first = reads[0]
            self.journal.add(
                Cursor(
                    row=self._next,
                    place=first.place,
                    offset=first.offset,
                    pieces=first.pieces,
                    report=self._report,
                    phases=_until(self._next, self._phases),
                )
            )
        tokens = sum(len(read.document.input_ids) for read in reads)
        while tokens < seq_len * (WINDOW_ROWS if left is None else min(WINDOW_ROWS, left)):
            reads.append(self._read(seq_len))
            tokens += len(reads[-1].document.input_ids)
            if not tokens and reads[-1].place.epoch > reads[0].place.epoch + 1:
                raise self._nothing("token")
        store = DocumentStore.from_documents(read.document for read in reads)
        plan = plan_rows(store.lengths, seq_len, self.packing)
        keep = rows_with_loss(store, plan)
        # Rows of this window: all, or as many as the phase has left.
        used = len(plan) if left is None or keep.sum() <= left else int(np.flatnonzero(keep)[left - 1]) + 1
        keep[used:] = False
        rows = PackedRows(store, plan.select(keep), seq_len, self.pad_token_id)
        self._carry = self._left_over(reads, store, plan, used, rows.plan)
        self._is_place = not self._carry or (
            self.packing == "in_order" and (self.long_documents == "split" or len(rows) != left)
        )
        self._report += self._account(reads, plan.select(np.arange(len(plan)) < used), rows)
        if len(rows):
            self._barren = None
        elif self._barren is None:
            self._barren = reads[0].place.epoch
        elif reads[-1].place.epoch > self._barren + 1:
            raise self._nothing("label to learn from")
        self._windows.append((self._next, rows))
        self._next += len(rows)

    def _left_over(
        self, reads: list[_Read], store: DocumentStore, plan: RowPlan, used: int, kept: RowPlan
    ) -> list[_Read]:
        """What the first `used` rows do not hold, in the order of reading."""
        emitted = np.bincount(kept.documents, minlength=len(reads))
        if self.packing == "best_fit":
            later = plan.select(np.arange(len(plan)) >= used)
            pieces = sorted(zip(*(a.tolist() for a in (later.documents, later.starts, later.lengths)), strict=True))
            return [reads[d].rest(s, s + n, reads[d].pieces + int(emitted[d])) for d, s, n in pieces]
        ends = np.cumsum(store.lengths)
        taken = int(plan.select(np.arange(len(plan)) < used).lengths.sum())
        at = int(np.searchsorted(ends, taken, side="right"))
        if at == len(reads):
            return []
        size = int(store.lengths[at])
        first = reads[at].rest(taken - int(ends[at]) + size, size, reads[at].pieces + int(emitted[at]))
        return [first, *reads[at + 1 :]]

    def _account(self, reads: list[_Read], used: RowPlan, rows: PackedRows) -> PackingReport:
        """Of the rows that were used and the documents that are done with."""
        emitted = np.bincount(rows.plan.documents, minlength=len(reads)).tolist()
        before: dict[tuple[int, int], int] = {}
        now: dict[tuple[int, int], int] = {}
        for read, pieces in zip(reads, emitted, strict=True):
            before[read.place.document] = read.pieces
            now[read.place.document] = now.get(read.place.document, 0) + pieces
        carried = {read.place.document for read in self._carry}
        done = {read.place.document: read for read in reads if read.place.document not in carried}
        pieces_of = {document: before[document] + now[document] for document in done}
        sizes = {document: read.offset + len(read.document.input_ids) for document, read in done.items()}
        tokens_used, tokens_kept = int(used.lengths.sum()), int(rows.plan.lengths.sum())
        gone = [document for document, read in done.items() if read.cut and not sizes[document]]
        cut = [document for document, read in done.items() if read.cut and sizes[document]]
        unseen = sum(bool(sizes[document]) and not pieces_of[document] for document in done)
        lost = {
            "truncated": sum(done[document].cut for document in cut),
            "too_long": sum(done[document].cut for document in gone),
            "no_label": tokens_used - tokens_kept,
        }
        dropped = {"too_long": len(gone), "no_label": unseen}
        return PackingReport(
            documents=len(done),
            documents_empty=sum(not sizes[document] and not read.cut for document, read in done.items()),
            documents_split=sum(pieces > 1 for pieces in pieces_of.values()),
            documents_truncated=len(cut),
            documents_dropped={reason: count for reason, count in dropped.items() if count},
            tokens=tokens_used + lost["truncated"] + lost["too_long"],
            rows=len(rows),
            rows_without_loss=len(used) - len(rows),
            tokens_padding=len(rows) * rows.seq_len - tokens_kept,
            tokens_dropped_for={reason: count for reason, count in lost.items() if count},
        )

    def _nothing(self, what: str) -> ValueError:
        return ValueError(f"{self.stream.source.path!r} gives no {what}; check the column and the roles")
