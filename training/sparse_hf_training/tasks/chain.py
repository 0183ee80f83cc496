"""Chains: follow assignments from variable to variable."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.hidden import HiddenFactsTask

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

VARIABLES: tuple[str, ...] = tuple(a + b for a in ascii_uppercase for b in ascii_uppercase)


def chain_facts(names: Sequence[str], value: int) -> list[str]:
    """The assignments of one chain, in order."""
    facts = [f" VAR {names[0]} = {value}. "]
    return facts + [f" VAR {name} = VAR {source}. " for source, name in pairwise(names)]


def chain_question(names: Sequence[str], value: int) -> Question:
    """The question for all variables of a chain."""
    return Question(
        prompt=f"\nFind all variables that are assigned the value {value}:",
        answer="".join(f" {name}" for name in names),
        end=".",
    )


@dataclass(frozen=True, kw_only=True)
class ChainTask(HiddenFactsTask):
    """A variable gets a five-digit value and others copy it, in order; the question asks for all of them.

    Raises:
        ValueError: the count is out of range.
    """

    name: ClassVar[str] = "chain"
    summary: ClassVar[str] = "all variables of one chain of assignments in running text"

    num_variables: int = 3
    """Variables in the chain."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_variables", self.num_variables, 2, len(VARIABLES))

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        names = rng.sample(VARIABLES, self.num_variables)
        value = rng.randint(10_000, 99_999)
        return chain_facts(names, value), [chain_question(names, value)]
