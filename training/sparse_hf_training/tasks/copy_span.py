"""A long passage of the text is begun again and has to be gone on with, word for word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import Composition, RecallTask, check_depth, check_range

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler

_MAX_DRAWS = 64


@dataclass(frozen=True, kw_only=True)
class CopySpanTask(RecallTask):
    """Running text, then the first tokens of a passage of it, the cue; the answer is what follows the cue there.

    No words around it: a cue stands in the text once only.

    Raises:
        ValueError: a length or the depth is out of range.
    """

    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = "a passage of the text, word for word, from its first tokens on"

    num_tokens: int = 64
    """Tokens of the answer."""
    cue_tokens: int = 16
    """Tokens that begin the passage again."""
    depth: float | None = None
    """Where the passage stands, 0 the start and 1 the end of the text; null for anywhere."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_tokens", self.num_tokens, 1, 1_000_000)
        check_range(self.name, "cue_tokens", self.cue_tokens, 1, 1_000_000)
        check_depth(self.name, self.depth)

    def compose(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Composition:
        """Text, then the cue and the answer.

        Raises:
            ValueError: `seq_len` has no room for the passage twice, or the text has no passage whose cue is there once.
        """
        size = self.cue_tokens + self.num_tokens
        if seq_len < 2 * size:
            raise self.too_short(seq_len, 2 * size, f"a passage of {size} tokens, twice")
        for _ in range(_MAX_DRAWS):
            text: list[int] = filler.take(rng, seq_len - size).tolist()
            last = len(text) - size
            start = rng.randint(0, last) if self.depth is None else round(self.depth * last)
            passage = text[start : start + size]
            if _occurrences(text, passage[: self.cue_tokens]) == 1:
                question = passage[: self.cue_tokens], passage[self.cue_tokens :], list[int]()
                return Composition(context=text, fact_spans=[(start, start + size)], questions=[question])
        raise ValueError(
            f"task {self.name!r}: no passage of the text begins with {self.cue_tokens} tokens that stand there once; "
            "raise cue_tokens, or give text that repeats itself less"
        )


def _occurrences(text: list[int], cue: list[int]) -> int:
    first = cue[0]
    return sum(token == first and text[n : n + len(cue)] == cue for n, token in enumerate(text))
