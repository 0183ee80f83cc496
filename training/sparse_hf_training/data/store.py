"""Tokenised documents in flat arrays: in memory, or Arrow files on disk that are mapped rather than read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparse_hf_training.data.documents import IGNORE_INDEX, Document, read_documents
from sparse_hf_training.data.text import TextSource, load_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
"""Raised when the tokenised form of a document changes, so that files of an older form are not used."""


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Documents in flat arrays; offsets have shape [documents + 1]."""

    offsets: NDArray[np.integer]
    ids: NDArray[np.int32]
    loss_offsets: NDArray[np.integer]
    loss: Any
    """Booleans, a NumPy or Arrow array; a document without one takes the loss everywhere."""


class DocumentStore:
    """Token documents by number, with any slice of one at the cost of the slice."""

    def __init__(self, chunks: Sequence[_Chunk]) -> None:
        self._chunks = tuple(chunks)
        self._firsts = np.cumsum([0] + [len(chunk.offsets) - 1 for chunk in self._chunks])

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> DocumentStore:
        """Documents held in memory, as arrays."""
        ids, loss = [np.empty(0, np.int32)], [np.empty(0, np.bool_)]
        for document in documents:
            ids.append(np.asarray(document.input_ids, dtype=np.int32))
            mask = np.asarray(document.labels, dtype=np.int64) != IGNORE_INDEX
            loss.append(mask[:0] if mask.all() else mask)
        chunk = _Chunk(
            offsets=np.cumsum([piece.size for piece in ids]),
            ids=np.concatenate(ids),
            loss_offsets=np.cumsum([piece.size for piece in loss]),
            loss=np.concatenate(loss),
        )
        return cls([chunk])

    @classmethod
    def from_arrow(cls, dataset: Dataset) -> DocumentStore:
        """Documents of a data set with the columns `input_ids` and `loss`, as `tokenize_source` makes them."""
        columns = [dataset.data.column(name).chunks for name in ("input_ids", "loss")]
        return cls(
            [
                _Chunk(
                    offsets=ids.offsets.to_numpy(),
                    ids=ids.values.to_numpy(zero_copy_only=True),
                    loss_offsets=loss.offsets.to_numpy(),
                    loss=loss.values,
                )
                for ids, loss in zip(*columns, strict=True)
            ]
        )

    @classmethod
    def concatenate(cls, stores: Iterable[DocumentStore]) -> DocumentStore:
        """The documents of all stores, in turn."""
        return cls([chunk for store in stores for chunk in store._chunks])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, shape [documents]."""
        return self._per_document(lambda chunk: np.diff(chunk.offsets).astype(np.int64), np.int64)

    @cached_property
    def partial(self) -> NDArray[np.bool_]:
        """Documents with tokens that take no loss, shape [documents]."""
        return self._per_document(lambda chunk: np.diff(chunk.loss_offsets) > 0, np.bool_)

    def _per_document(self, of: Any, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *map(of, self._chunks)])

    def _locate(self, document: int) -> tuple[_Chunk, int]:
        chunk = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return self._chunks[chunk], document - int(self._firsts[chunk])

    def ids(self, document: int, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids [start, stop) of a document; a view, not to be written to."""
        chunk, index = self._locate(document)
        first = int(chunk.offsets[index])
        return chunk.ids[first + start : first + stop]

    def loss(self, document: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) of a document take the loss."""
        chunk, index = self._locate(document)
        first, end = int(chunk.loss_offsets[index]), int(chunk.loss_offsets[index + 1])
        if first == end:
            return np.ones(stop - start, np.bool_)
        flags = chunk.loss[first + start : first + stop]
        return np.asarray(flags if isinstance(flags, np.ndarray) else flags.to_numpy(zero_copy_only=False))

    def running_text(self, limit: int) -> NDArray[np.int32]:
        """The first `limit` tokens of all documents in turn."""
        parts, left = [np.empty(0, np.int32)], limit
        for chunk in self._chunks:
            first = int(chunk.offsets[0])
            parts.append(chunk.ids[first : min(int(chunk.offsets[-1]), first + left)])
            left -= parts[-1].size
        return np.concatenate(parts)


def tokenize_source(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None
) -> DocumentStore:
    """All documents of a source, tokenised once into an Arrow file of the `datasets` cache and mapped from there.

    Args:
        source: what to read; a streamed one needs `max_documents`.
        tokenizer: of the model; another one, or other options of the source, give another file.
        num_proc: processes that tokenise.

    Raises:
        ValueError: as `load_text` and `read_documents`, or for a stream without an end.
    """
    if source.streaming and source.max_documents is None:
        raise ValueError(f"{source.path!r} is streamed, but all of it is needed here; set max_documents")
    import datasets

    rows = load_text(source)
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "loss": datasets.List(datasets.Value("bool"))}
    )
    if isinstance(rows, datasets.IterableDataset):
        # A limited part of a Hub data set: kept for this run alone, since a stream has no fingerprint.
        return DocumentStore.from_documents(read_documents(rows, source, tokenizer))
    fingerprint = _fingerprint(rows, source, tokenizer)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "sparse_hf"
    folder.mkdir(parents=True, exist_ok=True)
    tokenized = rows.map(
        _tokenize_batch,
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs={"source": source, "tokenizer": tokenizer},
        features=features,
        num_proc=None if num_proc is None or len(rows) < num_proc else num_proc,
        load_from_cache_file=True,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc=f"tokenising {source.path}",
    )
    return DocumentStore.from_arrow(tokenized)


def _tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], *, source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    rows: Iterator[dict[str, Any]] = (
        dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
    )
    documents = list(read_documents(rows, source, tokenizer, first_row=indices[0]))
    masks = [np.asarray(document.labels, dtype=np.int64) != IGNORE_INDEX for document in documents]
    return {
        "input_ids": [np.asarray(document.input_ids, dtype=np.int32) for document in documents],
        "loss": [mask[:0] if mask.all() else mask for mask in masks],
    }


def _fingerprint(rows: Dataset, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the rows, of how they become documents, and of the tokenizer."""
    if tokenizer.is_fast:
        # Calls with truncation or padding leave those settings behind; documents are tokenised without.
        state = {
            key: value
            for key, value in json.loads(tokenizer.backend_tokenizer.to_str()).items()
            if key not in ("truncation", "padding")
        }
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "options": repr(tokenizer)}
    parts = [_FORMAT, rows._fingerprint, source.kind, source.columns, source.loss]
    parts += [state, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
