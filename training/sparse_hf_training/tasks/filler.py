"""Running text, as tokens, that recall tasks hide their facts in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase


class Filler:
    """A stretch of running text to cut random slices from.

    Args:
        tokens: token ids of the text, shape [num_tokens], not empty.

    Raises:
        ValueError: `tokens` is empty or not one-dimensional.
    """

    def __init__(self, tokens: NDArray[np.integer]) -> None:
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(
                f"filler tokens must have shape [num_tokens] with num_tokens >= 1, got {list(tokens.shape)}; "
                "give it a text that is not empty"
            )
        self.tokens: NDArray[np.int32] = tokens.astype(np.int32)

    def __len__(self) -> int:
        return int(self.tokens.size)

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Filler:
        """Tokenise `texts`, without special tokens, and join them in order.

        Raises:
            ValueError: the texts hold no token at all.
        """
        # verbose=False: whole books exceed model_max_length by design, only slices of them are ever fed to a model.
        texts = list(texts)
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        pieces = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        return cls(np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32))

    def take(self, rng: random.Random, n: int) -> NDArray[np.int32]:
        """A random contiguous slice, shape [n]; a text shorter than `n` goes round and starts again.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} filler tokens; ask for 0 or more")
        if n <= len(self):
            start = rng.randint(0, len(self) - n)
            return self.tokens[start : start + n].copy()
        start = rng.randrange(len(self))
        return np.take(self.tokens, np.arange(start, start + n), mode="wrap")
