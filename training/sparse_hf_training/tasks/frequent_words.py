"""RULER's fwe: the three most frequent words of a list whose counts follow Zipf's law."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.word_list import WordListTask
from sparse_hf_training.tasks.words import draw_names

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_ASKED = 3


@dataclass(frozen=True, kw_only=True)
class FrequentWordsTask(WordListTask):
    """The n-th word stands in the list about n ** -alpha times as often as the first; the first three are asked for.

    Raises:
        ValueError: a number is out of range.
    """

    name: ClassVar[str] = "fwe"
    summary: ClassVar[str] = "the three most frequent words of a list, the most frequent first"
    header: ClassVar[str] = "\nRead the following coded text and keep track of how often each word stands in it:"

    alpha: float = 2.0
    """Exponent of the law."""
    num_words: int = 30
    """Words of the vocabulary; those whose count is below 1 are left out."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_words", self.num_words, _ASKED + 1, 1000)
        if not 1 <= self.alpha <= 4:
            raise ValueError(f"task {self.name!r}: alpha must lie in [1, 4], got {self.alpha}")

    def vocabulary(self, rng: random.Random, room: int) -> list[str]:
        return draw_names(rng, self.num_words)

    def counts(self, lengths: Sequence[int], room: int) -> list[int]:
        def law(first: int) -> list[int]:
            return [int(first / (rank + 1) ** self.alpha) for rank in range(len(lengths))]

        first, last = 0, room  # the largest count of the first word whose list fits
        while first < last:
            middle = (first + last + 1) // 2
            fits = sum(count * length for count, length in zip(law(middle), lengths, strict=True)) <= room
            first, last = (middle, last) if fits else (first, middle - 1)
        counts = law(first)
        top = counts[: _ASKED + 1]
        return counts if all(top[n] > top[n + 1] for n in range(_ASKED)) else []

    def question(self, listed: Sequence[str]) -> Question:
        frequent = Counter(listed).most_common(_ASKED)
        return Question(
            prompt="\nWhat are the three most frequent words in the coded text above, the most frequent first? "
            "The three most frequent words are:",
            answer="".join(f" {word}" for word, _ in frequent),
            end=".",
        )
