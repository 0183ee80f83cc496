"""RULER's niah_single_1: one needle in filler that repeats itself, where scores of blocks tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import encode
from sparse_hf_training.tasks.needle_single import SingleNeedleTask

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler

_SENTENCES = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True, kw_only=True)
class RepetitiveNeedleTask(SingleNeedleTask):
    """One needle among the same five sentences over and over."""

    name: ClassVar[str] = "niah_single_1"
    summary: ClassVar[str] = "one needle in five sentences that repeat"

    def haystack(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, num_tokens: int
    ) -> list[int]:
        (sentences,) = encode(tokenizer, [_SENTENCES])
        return (sentences * (num_tokens // len(sentences) + 1))[:num_tokens]
