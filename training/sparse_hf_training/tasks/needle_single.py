"""RULER's niah_single_2: one needle in running text, at any depth or at a stated one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_depth
from sparse_hf_training.tasks.hidden import HiddenFactsTask
from sparse_hf_training.tasks.needle import draw_numbers, needle_fact, needle_question
from sparse_hf_training.tasks.words import draw_names

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class SingleNeedleTask(HiddenFactsTask):
    """One sentence that gives a name a seven-digit number.

    Raises:
        ValueError: the depth is out of range.
    """

    name: ClassVar[str] = "niah_single_2"
    summary: ClassVar[str] = "one needle in running text"

    depth: float | None = None
    """Where the sentence stands, 0 the start and 1 the end of the text; null for anywhere."""

    def __post_init__(self) -> None:
        check_depth(self.name, self.depth)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        (key,), (value,) = draw_names(rng, 1), draw_numbers(rng, 1)
        return [needle_fact(key, value)], [needle_question(key, value)]

    def places(self, rng: random.Random, num_facts: int, num_tokens: int) -> list[int]:
        if self.depth is None:
            return super().places(rng, num_facts, num_tokens)
        return [round(self.depth * num_tokens)]
