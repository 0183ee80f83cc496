"""The documents of a source that is read while training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparse_hf_training.data.documents import Document, read_documents
from sparse_hf_training.data.store import DocumentStore
from sparse_hf_training.data.text import TextSource, load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 32
"""Documents that are read between two states of the stream."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A document of a stream: the `skip`-th after `read` documents of a pass, where the stream has this `state`."""

    epoch: int = 0
    read: int = 0
    state: dict[str, Any] | None = None
    skip: int = 0

    @property
    def document(self) -> tuple[int, int]:
        """Pass and number of the document."""
        return self.epoch, self.read + self.skip


class DocumentStream:
    """The documents of a streamed source, pass after pass, from any place of it.

    Args:
        source: what to read.
        tokenizer: of the model.
        seed: of the shuffling; each pass has an order of its own.
        max_epochs: passes after which there are no more documents, or None.

    Raises:
        ValueError: as `load_text`.
    """

    def __init__(
        self, source: TextSource, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, max_epochs: int | None = None
    ) -> None:
        self.source, self.tokenizer, self.max_epochs = source, tokenizer, max_epochs
        # The limit is kept here: whether it is reached follows from the place alone.
        self._rows: Any = load_text(replace(source, max_documents=None))
        if source.shuffle_buffer:
            self._rows = self._rows.shuffle(seed=seed, buffer_size=source.shuffle_buffer)

    def read(self, place: Place) -> Iterator[tuple[Place, Document]]:
        """Documents from `place` on.

        Raises:
            ValueError: a row cannot be tokenised, or `max_epochs` passes are over.
        """
        while self.max_epochs is None or place.epoch < self.max_epochs:
            yield from self._read_pass(place)
            place = Place(epoch=place.epoch + 1)
        raise ValueError(
            f"{self.source.path!r} is used up after max_epochs={self.max_epochs}; give more text, read fewer rows "
            "of it, or raise max_epochs where it may be read again"
        )

    def first(self, num_tokens: int) -> DocumentStore:
        """The first documents that hold `num_tokens` tokens together, or all of the first pass if they hold fewer."""
        documents: list[Document] = []
        tokens = 0
        for _, document in self._read_pass(Place()):
            documents.append(document)
            tokens += len(document.input_ids)
            if tokens >= num_tokens:
                break
        return DocumentStore.from_documents(documents)

    def _read_pass(self, place: Place) -> Iterator[tuple[Place, Document]]:
        rows = self._rows
        rows.set_epoch(place.epoch)
        rows.load_state_dict(place.state)
        # The state of a shuffled stream lacks its buffer: such a stream is read again, but not tokenised again.
        iterator = iter(rows.skip(place.read) if place.state is None and place.read else rows)
        read, skip, limit = place.read, place.skip, self.source.max_documents
        while True:
            state = rows.state_dict() if read and not self.source.shuffle_buffer else None
            batch = list(islice(iterator, _BATCH if limit is None else min(_BATCH, limit - read)))
            if not batch:
                return
            documents = read_documents(batch[skip:], self.source, self.tokenizer, first_row=read + skip)
            for number, document in enumerate(documents, skip):
                yield Place(epoch=place.epoch, read=read, state=state, skip=number), document
            read, skip = read + len(batch), 0
