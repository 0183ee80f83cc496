"""Packing documents of any length into rows of one length, with nothing lost unseen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparse_hf_training.data.documents import IGNORE_INDEX, Document


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows for training, each array int32 of shape [num_rows, seq_len]."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """Unshifted; -100 where no loss is taken, always so at the first token of a document."""
    position_ids: NDArray[np.int32]
    """Restart at 0 with each document: where they do, attention must not look further back."""

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What happened to the tokens: `tokens == rows * seq_len + tokens_dropped`."""

    documents: int
    documents_empty: int
    """Documents without a token; they leave no trace in the rows."""
    documents_split: int
    """Documents that lie in more than one row; each piece counts as a document of its own for attention."""
    tokens: int
    rows: int
    rows_without_loss: int
    """Full rows that were left out because every label was -100; their tokens are in `tokens_dropped`."""
    tokens_dropped: int
    """Tokens of the incomplete last row and of the rows without loss."""


def pack_documents(documents: Iterable[Document], seq_len: int) -> tuple[PackedRows, PackingReport]:
    """Concatenate `documents` in order and cut the result every `seq_len` tokens.

    Raises:
        ValueError: `seq_len` is below 2, the documents do not fill one row, or no row has a label.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be >= 2, got {seq_len}")
    lengths, ids, labels = _concatenate(documents)
    tokens = int(ids.size)
    full_rows = tokens // seq_len
    if full_rows == 0:
        raise ValueError(
            f"{len(lengths)} documents hold {tokens} tokens, fewer than one row of seq_len={seq_len}; "
            "add text or lower seq_len"
        )
    kept = full_rows * seq_len
    # A piece starts where its document starts or, for one that was cut, at the start of the row.
    document_starts = np.cumsum(lengths) - lengths
    nonempty_starts = document_starts[lengths > 0]
    row_starts = np.arange(full_rows, dtype=np.int64) * seq_len
    piece_starts = np.union1d(nonempty_starts[nonempty_starts < kept], row_starts)
    piece_lengths = np.diff(piece_starts, append=kept)
    positions = np.arange(kept) - np.repeat(piece_starts, piece_lengths)
    # The first token of a piece has nothing before it to be predicted from.
    labels[piece_starts] = IGNORE_INDEX

    shape = (full_rows, seq_len)
    label_rows = labels[:kept].reshape(shape)
    has_loss = (label_rows != IGNORE_INDEX).any(axis=1)
    rows = int(has_loss.sum())
    if rows == 0:
        raise ValueError(f"none of the {tokens} tokens has a label to learn from; check the column and the roles")
    report = PackingReport(
        documents=len(lengths),
        documents_empty=int((lengths == 0).sum()),
        documents_split=_count_split(document_starts, lengths, seq_len, has_loss),
        tokens=tokens,
        rows=rows,
        rows_without_loss=full_rows - rows,
        tokens_dropped=tokens - rows * seq_len,
    )
    packed = PackedRows(
        input_ids=ids[:kept].reshape(shape)[has_loss],
        labels=label_rows[has_loss],
        position_ids=positions.astype(np.int32).reshape(shape)[has_loss],
    )
    return packed, report


def _concatenate(documents: Iterable[Document]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Lengths [num_documents], then input ids and labels of all documents, [num_tokens] each."""
    empty = np.empty(0, dtype=np.int32)
    ids, labels = [empty], [empty]
    for document in documents:
        ids.append(np.asarray(document.input_ids, dtype=np.int32))
        labels.append(np.asarray(document.labels, dtype=np.int32))
    lengths = np.array([piece.size for piece in ids[1:]], dtype=np.int64)
    return lengths, np.concatenate(ids), np.concatenate(labels)


def _count_split(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], seq_len: int, has_loss: NDArray[np.bool_]
) -> int:
    """Documents with tokens in at least two of the rows that are kept."""
    kept_before = np.concatenate([[0], np.cumsum(has_loss)])
    filled = lengths > 0
    first_row = np.minimum(starts[filled] // seq_len, len(has_loss))
    end_row = np.minimum((starts[filled] + lengths[filled] - 1) // seq_len + 1, len(has_loss))
    return int((kept_before[end_row] - kept_before[first_row] >= 2).sum())
