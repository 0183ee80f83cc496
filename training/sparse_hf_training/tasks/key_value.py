"""Key-value pairs: look up one seven-digit key among several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.hidden import HiddenFactsTask

if TYPE_CHECKING:
    import random

# Keys and values of one text are all distinct seven-digit numbers; this many pairs can be drawn at most.
_MAX_PAIRS = 4_500_000


@dataclass(frozen=True, kw_only=True)
class KeyValueTask(HiddenFactsTask):
    """Pairs of numbers scattered over the text; a question gives a key and asks for its value.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "key_value"
    summary: ClassVar[str] = "the value of one number among pairs of numbers in running text"

    num_pairs: int = 16
    """Pairs hidden in the text; the ones not asked about distract."""
    num_questions: int = 1
    """Questions at the end, about distinct keys."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_pairs", self.num_pairs, 1, _MAX_PAIRS)
        check_range(self.name, "num_questions", self.num_questions, 1, self.num_pairs)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        numbers = rng.sample(range(1_000_000, 10_000_000), 2 * self.num_pairs)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        facts = [f' "{key}": "{value}", ' for key, value in pairs]
        questions = [
            Question(prompt=f'\nLook up "{key}": "', answer=str(value), end='".')
            for key, value in rng.sample(pairs, self.num_questions)
        ]
        return facts, questions
