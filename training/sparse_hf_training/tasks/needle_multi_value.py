"""RULER's niah_multivalue: one name has several numbers, and all of them are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.hidden import HiddenFactsTask
from sparse_hf_training.tasks.needle import draw_numbers, needle_fact
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class MultiValueNeedleTask(HiddenFactsTask):
    """The numbers of one name in the order of the text, among needles of other names.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "niah_multivalue"
    summary: ClassVar[str] = "all numbers of one name, in the order of the text"

    num_values: int = 4
    """Numbers of the name that is asked about."""
    num_others: int = 4
    """Needles of other names."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_values", self.num_values, 2, 64)
        check_range(self.name, "num_others", self.num_others, 0, NUM_NAMES - 1)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        key, *others = draw_names(rng, 1 + self.num_others)
        keys = [key] * self.num_values + others
        rng.shuffle(keys)
        pairs = list(zip(keys, draw_numbers(rng, len(keys)), strict=True))
        question = Question(
            prompt=f"\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
            f"The special magic numbers for {key} mentioned in the provided text are",
            answer=",".join(f" {value}" for name, value in pairs if name == key),
            end=".",
        )
        return [needle_fact(*pair) for pair in pairs], [question]
