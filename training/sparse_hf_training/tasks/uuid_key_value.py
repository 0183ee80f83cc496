"""RULER's niah_multikey_3: key-value recall where keys and values are UUIDs and pairs are the haystack."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question
from sparse_hf_training.tasks.listing import Entry, ListTask

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class UuidKeyValueTask(ListTask):
    """A list of UUIDs with a UUID each; a question gives a key and asks for its value."""

    name: ClassVar[str] = "niah_multikey_3"
    summary: ClassVar[str] = "the UUID of one UUID among as many as fit"

    def entries(self, rng: random.Random) -> Iterator[Entry]:
        while True:  # of 2**122 none comes twice
            yield _uuid(rng), _uuid(rng)

    def line(self, entry: Entry) -> str:
        return f" One of the special magic uuids for {entry[0]} is: {entry[1]}. "

    def question(self, entry: Entry) -> Question:
        key, value = entry
        return Question(
            prompt=f"\nWhat is the special magic uuid for {key} mentioned in the provided text? "
            f"The special magic uuid for {key} mentioned in the provided text is",
            answer=f" {value}",
            end=".",
        )


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
