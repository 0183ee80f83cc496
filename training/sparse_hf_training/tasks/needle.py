"""Needles: find the number of one name among several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, RecallTask, check_range
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class NeedleTask(RecallTask):
    """Sentences that give names a seven-digit number each; a question asks for the number of a name.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "needle"

    num_needles: int = 8
    """Sentences hidden in the text; the ones not asked about distract."""
    num_questions: int = 1
    """Questions at the end, about distinct names."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_needles", self.num_needles, 1, NUM_NAMES)
        check_range(self.name, "num_questions", self.num_questions, 1, self.num_needles)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        keys = draw_names(rng, self.num_needles)
        values = rng.sample(range(1_000_000, 10_000_000), self.num_needles)
        pairs = list(zip(keys, values, strict=True))
        facts = [f" One of the special magic numbers for {key} is: {value}. " for key, value in pairs]
        questions = [
            Question(
                prompt=f"\nWhat is the special magic number for {key} mentioned in the provided text? "
                f"The special magic number for {key} mentioned in the provided text is",
                answer=f" {value}",
                end=".",
            )
            for key, value in rng.sample(pairs, self.num_questions)
        ]
        return facts, questions
