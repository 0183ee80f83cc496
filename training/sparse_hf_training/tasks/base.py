"""What a recall task is: facts hidden in running text, then questions that only those facts answer.

A subclass says which facts and questions (`draw`); hiding them and keeping exact token spans happens here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler

Span = tuple[int, int]

# How tokenizers mark a token that begins a new word: byte-level space and newline, SentencePiece space.
_WORD_START_MARKS = ("Ġ", "Ċ", "▁", " ", "\n")
# How far a fact may be moved to reach a word's start; a longer run without one is not prose (base64, CJK).
_MAX_WORD_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class RecallSample:
    """One sequence with its questions and answers marked.

    Spans are `[start, end)` token indices into `input_ids`, one pair per question in order of appearance.
    """

    task: str
    """Name of the task that made it."""
    input_ids: tuple[int, ...]
    """Exactly seq_len token ids: text with facts, then the questions with their answers."""
    answer_spans: tuple[Span, ...]
    """The tokens of each answer's value alone."""
    question_spans: tuple[Span, ...]
    """Each question with its answer and the closing punctuation: where the loss is taken."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The three pieces of text of a question: they are tokenised apart, so that the answer's span is exact."""

    prompt: str
    answer: str
    end: str


@dataclass(frozen=True, kw_only=True)
class RecallTask(ABC):
    """Base of the recall tasks; its fields are the knobs of one task, its methods keep no state."""

    name: ClassVar[str]

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        """Random facts, in the order the text states them, and the questions about them."""

    def sample(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> RecallSample:
        """A sequence of exactly `seq_len` tokens, a pure function of the state of `rng`.

        Raises:
            ValueError: `seq_len` has no room for the facts and the questions.
        """
        facts, questions = self.draw(rng)
        fact_ids = _encode(tokenizer, facts)
        question_ids = _encode(tokenizer, [piece for q in questions for piece in (q.prompt, q.answer, q.end)])
        need = sum(map(len, fact_ids)) + sum(map(len, question_ids))
        if seq_len < need:
            raise ValueError(
                f"task {self.name!r} needs seq_len >= {need} tokens for {len(facts)} facts and {len(questions)} "
                f"questions, got seq_len={seq_len}; raise seq_len or ask for fewer facts"
            )
        input_ids = _hide(fact_ids, filler.take(rng, seq_len - need), tokenizer, rng)
        answer_spans: list[Span] = []
        question_spans: list[Span] = []
        for first in range(0, len(question_ids), 3):
            prompt, answer, end = question_ids[first : first + 3]
            start = len(input_ids)
            answer_start = start + len(prompt)
            input_ids += prompt + answer + end
            answer_spans.append((answer_start, answer_start + len(answer)))
            question_spans.append((start, len(input_ids)))
        return RecallSample(
            task=self.name,
            input_ids=tuple(input_ids),
            answer_spans=tuple(answer_spans),
            question_spans=tuple(question_spans),
        )


def check_range(task: str, field: str, value: int, low: int, high: int) -> None:
    """Raise a ValueError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"task {task!r}: {field} must be between {low} and {high}, got {value}")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _hide(
    facts: list[list[int]], text: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[int]:
    """Insert the facts, in order, at random places of `text` [n]."""
    tokens = text.tolist()
    cuts = sorted(rng.randint(0, len(tokens)) for _ in facts)
    out: list[int] = []
    done = 0
    for fact, cut in zip(facts, cuts, strict=True):
        # Rounding up to a word start keeps the order of the cuts, as they all round up the same way.
        cut = _next_word_start(tokens, cut, tokenizer)
        out += tokens[done:cut] + fact
        done = cut
    return out + tokens[done:]


def _next_word_start(tokens: list[int], cut: int, tokenizer: PreTrainedTokenizerBase) -> int:
    window = tokenizer.convert_ids_to_tokens(tokens[cut : cut + _MAX_WORD_TOKENS])
    for offset, token in enumerate(window):
        if token.startswith(_WORD_START_MARKS):
            return cut + offset
    return cut
