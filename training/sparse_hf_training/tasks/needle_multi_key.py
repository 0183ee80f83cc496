"""RULER's niah_multikey_2: the haystack is needles too, and one key of them is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question
from sparse_hf_training.tasks.listing import Entry, ListTask
from sparse_hf_training.tasks.needle import draw_numbers, needle_fact, needle_question
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class MultiKeyNeedleTask(ListTask):
    """Every sentence gives a name its number. There are 2925 names; a longer context begins with running text."""

    name: ClassVar[str] = "niah_multikey_2"
    summary: ClassVar[str] = "one needle in a haystack of needles"

    def entries(self, rng: random.Random) -> Iterator[Entry]:
        return zip(draw_names(rng, NUM_NAMES), map(str, draw_numbers(rng, NUM_NAMES)), strict=True)

    def line(self, entry: Entry) -> str:
        return needle_fact(*entry)

    def question(self, entry: Entry) -> Question:
        return needle_question(*entry)
