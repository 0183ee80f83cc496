"""Chains: follow assignments from variable to variable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, RecallTask, check_range

if TYPE_CHECKING:
    import random

_NAMES: tuple[str, ...] = tuple(a + b for a in ascii_uppercase for b in ascii_uppercase)


@dataclass(frozen=True, kw_only=True)
class ChainTask(RecallTask):
    """A variable gets a five-digit value and others copy it, in order; the question asks for all of them.

    Raises:
        ValueError: the count is out of range.
    """

    name: ClassVar[str] = "chain"

    num_variables: int = 3
    """Variables in the chain."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_variables", self.num_variables, 2, len(_NAMES))

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        names = rng.sample(_NAMES, self.num_variables)
        value = rng.randint(10_000, 99_999)
        facts = [f" VAR {names[0]} = {value}. "]
        facts += [f" VAR {name} = VAR {source}. " for source, name in pairwise(names)]
        question = Question(
            prompt=f"\nFind all variables that are assigned the value {value}:",
            answer="".join(f" {name}" for name in names),
            end=".",
        )
        return facts, [question]
