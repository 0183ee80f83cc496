"""Instruction retention: what the first lines ask for must still be done at the end of a long context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question
from sparse_hf_training.tasks.hidden import HiddenFactsTask
from sparse_hf_training.tasks.needle import draw_numbers, needle_fact, needle_question
from sparse_hf_training.tasks.words import draw_names

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class InstructionTask(HiddenFactsTask):
    """At its first whole word the text has an instruction to end answers with a code word; the end asks for a needle.

    Eviction that keeps what questions need may lose what a system prompt asks (arXiv 2510.00231).
    """

    name: ClassVar[str] = "instruction"
    summary: ClassVar[str] = "a needle, answered as the first lines of the text ask for"

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        word, key = draw_names(rng, 2)
        (value,) = draw_numbers(rng, 1)
        instruction = (
            "Follow this instruction to the end of the text: whenever you are asked for a special magic number, say "
            f"it, a comma, and then the code word {word}. "
        )
        return [instruction, needle_fact(key, value)], [needle_question(key, f"{value}, {word}")]

    def places(self, rng: random.Random, num_facts: int, num_tokens: int) -> list[int]:
        return [0, rng.randint(0, num_tokens)]
