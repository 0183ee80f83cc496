"""RULER's niah_multiquery: several needles, asked for one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf_training.tasks.needle import NeedleTask


@dataclass(frozen=True, kw_only=True)
class MultiQueryNeedleTask(NeedleTask):
    """`NeedleTask` with four questions: a sample counts when all of them are answered."""

    name: ClassVar[str] = "niah_multiquery"
    summary: ClassVar[str] = "the numbers of several names, one after the other"

    num_questions: int = 4
    """Questions at the end, about distinct names."""
