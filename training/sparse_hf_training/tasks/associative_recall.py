"""Multi-query associative recall (Arora et al. 2023, Zoology): many pairs, many queries, gaps by a power law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.hidden import HiddenFactsTask
from sparse_hf_training.tasks.words import NUM_NAMES, draw_names

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class AssociativeRecallTask(HiddenFactsTask):
    """Names that point to names; the distance from the text's end follows a power law, so that few pairs are far.

    Raises:
        ValueError: a number is out of range.
    """

    name: ClassVar[str] = "mqar"
    summary: ClassVar[str] = "what several of many names point to"

    num_pairs: int = 32
    """Pairs hidden in the text."""
    num_questions: int = 8
    """Questions at the end, about distinct names."""
    power: float = 2.0
    """A pair lies u ** power of the text away from its end, u uniform in [0, 1]; 1 spreads pairs evenly."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_pairs", self.num_pairs, 1, NUM_NAMES // 2)
        check_range(self.name, "num_questions", self.num_questions, 1, self.num_pairs)
        if not 0 < self.power <= 16:
            raise ValueError(f"task {self.name!r}: power must lie in (0, 16], got {self.power}")

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        names = draw_names(rng, 2 * self.num_pairs)
        pairs = list(zip(names[::2], names[1::2], strict=True))
        facts = [f" {key} -> {value}. " for key, value in pairs]
        questions = [
            Question(prompt=f"\n{key} ->", answer=f" {value}", end=".")
            for key, value in rng.sample(pairs, self.num_questions)
        ]
        return facts, questions

    def places(self, rng: random.Random, num_facts: int, num_tokens: int) -> list[int]:
        return sorted(round((1 - rng.random() ** self.power) * num_tokens) for _ in range(num_facts))
