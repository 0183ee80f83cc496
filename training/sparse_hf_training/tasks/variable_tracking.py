"""RULER's vt: chains of assignments of two to eight hops, one of which is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Question, check_range
from sparse_hf_training.tasks.chain import VARIABLES, chain_facts, chain_question
from sparse_hf_training.tasks.hidden import HiddenFactsTask

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, kw_only=True)
class VariableTrackingTask(HiddenFactsTask):
    """A variable gets a value and others copy it, one from the other; the question asks for all of one value.

    Raises:
        ValueError: a count is out of range.
    """

    name: ClassVar[str] = "vt"
    summary: ClassVar[str] = "all variables of one chain of assignments among chains"

    num_hops: int = 4
    """Copies in each chain."""
    num_chains: int = 1
    """Chains; the ones not asked about distract."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_hops", self.num_hops, 2, 8)
        check_range(self.name, "num_chains", self.num_chains, 1, len(VARIABLES) // 9)

    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        size = self.num_hops + 1
        names = rng.sample(VARIABLES, size * self.num_chains)
        values = rng.sample(range(10_000, 100_000), self.num_chains)
        chains = [names[first : first + size] for first in range(0, len(names), size)]
        waiting = [chain_facts(*pair) for pair in zip(chains, values, strict=True)]
        # Interleaved at random, each chain in its order.
        turns = [number for number in range(self.num_chains) for _ in range(size)]
        rng.shuffle(turns)
        return [waiting[number].pop(0) for number in turns], [chain_question(chains[0], values[0])]
