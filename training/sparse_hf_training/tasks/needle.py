"""Needles: find the number of one name among several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.hidden import HiddenFactsTask
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random


def needle_fact(key: str, value: int | str) -> str:
    """The sentence that gives a name its number."""
    return f" One of the special magic numbers for {key} is: {value}. "


def needle_question(key: str, value: int | str) -> Question:
    """The question for the one number of a name."""
    return Question(
        prompt=f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is",
        answer=f" {value}",
        end=".",
    )


def draw_numbers(rng: random.Random, count: int) -> list[int]:
    """`count` distinct seven-digit numbers."""
    return rng.sample(range(1_000_000, 10_000_000), count)


@dataclass(frozen=True, kw_only=True)
class NeedleTask(HiddenFactsTask):
    """Sentences that give names a seven-digit number each; a question asks for the number of a name.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "the number of one name among several in running text"

    num_needles: int = 8
    """Sentences hidden in the text; the ones not asked about distract."""
    num_questions: int = 1
    """Questions at the end, about distinct names."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_needles", self.num_needles, 1, NUM_NAMES)
        check_range(self.name, "num_questions", self.num_questions, 1, self.num_needles)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        keys = draw_names(rng, self.num_needles)
        pairs = list(zip(keys, draw_numbers(rng, self.num_needles), strict=True))
        facts = [needle_fact(key, value) for key, value in pairs]
        return facts, [needle_question(key, value) for key, value in rng.sample(pairs, self.num_questions)]
