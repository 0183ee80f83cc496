"""Two turns over one shared context, which is read and compressed before any question is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf_training.tasks.needle import NeedleTask


@dataclass(frozen=True, kw_only=True)
class TwoTurnsTask(NeedleTask):
    """Needles in a context that goes through the model first; then two questions, each a call with the same cache.

    What a cache has evicted by then it cannot answer (SCBench, arXiv 2412.10319).
    """

    name: ClassVar[str] = "two_turns"
    summary: ClassVar[str] = "two questions after the context was read and compressed"
    context_first: ClassVar[bool] = True

    num_questions: int = 2
    """Turns, about distinct names."""
