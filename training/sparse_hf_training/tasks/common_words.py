"""RULER's cwe: which words of a list are the common ones?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.word_list import WordListTask
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class CommonWordsTask(WordListTask):
    """A few words stand in the list often, all others seldom; the question asks for the few, in the list's order.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "cwe"
    summary: ClassVar[str] = "the common words of a list, in the order of their first appearance"
    header: ClassVar[str] = "\nBelow is a list of words, of which some stand in it more often than others:"

    num_common: int = 5
    """Words that are asked for."""
    common_count: int = 20
    """How often each of them stands in the list."""
    rare_count: int = 2
    """How often each other word does."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_common", self.num_common, 1, 64)
        check_range(self.name, "rare_count", self.rare_count, 1, 1000)
        check_range(self.name, "common_count", self.common_count, self.rare_count + 1, 10_000)

    def vocabulary(self, rng: random.Random, room: int) -> list[str]:
        return draw_names(rng, min(NUM_NAMES, self.num_common + room // self.rare_count))

    def counts(self, lengths: Sequence[int], room: int) -> list[int]:
        counts = [self.common_count] * self.num_common
        room -= sum(lengths[: self.num_common]) * self.common_count
        for length in lengths[self.num_common :]:
            room -= length * self.rare_count
            if room < 0:
                break
            counts.append(self.rare_count)
        return counts if len(counts) > self.num_common else []

    def question(self, listed: Sequence[str]) -> Question:
        counted = Counter(listed)  # in the order of first appearance
        common = {word for word, _ in counted.most_common(self.num_common)}
        return Question(
            prompt=f"\nWhat are the {self.num_common} most common words in the list above, in the order in which they "
            "first appear? The most common words are:",
            answer="".join(f" {word}" for word in counted if word in common),
            end=".",
        )
