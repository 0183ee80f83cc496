"""What a recall task is: a context that holds facts, then questions that only those facts answer.

A subclass composes context and questions as tokens of an exact length; the spans of a sample are kept here, once. A
sample is answered when every token of every answer is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler

Span = tuple[int, int]

SPACE_MARKS = ("Ġ", "▁", " ")
"""How tokenizers mark a token that begins with a space: byte-level, SentencePiece, or as it is."""
_BEFORE = ("\n", ":", "x")
"""What a text is tokenised after where the tokenizer would put a space before it; the first that stays by itself."""


@dataclass(frozen=True, kw_only=True)
class RecallSample:
    """One sequence with its questions and answers marked.

    Spans are `[start, end)` token indices into `input_ids`; of answers and questions one pair per question in order of
    appearance.
    """

    task: str
    """Name of the task that made it."""
    input_ids: tuple[int, ...]
    """Exactly seq_len token ids: text with facts, then the questions with their answers."""
    answer_spans: tuple[Span, ...]
    """The tokens of each answer's value alone."""
    question_spans: tuple[Span, ...]
    """Each question with its answer and the closing punctuation: where the loss is taken."""
    fact_spans: tuple[Span, ...] = ()
    """Each fact, in the order of the text."""

    @property
    def context_length(self) -> int:
        """Tokens before the first question."""
        return self.question_spans[0][0]

    @property
    def depths(self) -> tuple[float, ...]:
        """Where each fact begins, as a share of the context."""
        return tuple(start / max(self.context_length, 1) for start, _ in self.fact_spans)


@dataclass(frozen=True, kw_only=True)
class Question:
    """The three pieces of text of a question: they are tokenised apart, so that the answer's span is exact."""

    prompt: str
    answer: str
    end: str


Pieces = tuple[list[int], list[int], list[int]]
"""A question's prompt, answer and end as tokens."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A sample before its questions are appended: the context's tokens, where facts lie in it, and the questions."""

    context: list[int]
    fact_spans: list[Span]
    questions: list[Pieces]


@dataclass(frozen=True, kw_only=True)
class RecallTask(ABC):
    """Base of the recall tasks; its fields are the knobs of one task, its methods keep no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """What it asks, in one line."""
    context_first: ClassVar[bool] = False
    """The context is read, and compressed, before a question is seen, and questions come one by one."""

    @abstractmethod
    def compose(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Composition:
        """Context and questions of `seq_len` tokens together.

        Raises:
            ValueError: `seq_len` has no room for the facts and the questions.
        """

    def sample(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> RecallSample:
        """A sequence of exactly `seq_len` tokens, a pure function of the state of `rng`.

        Raises:
            ValueError: `seq_len` has no room for the facts and the questions.
        """
        parts = self.compose(rng, filler, tokenizer, seq_len)
        input_ids = parts.context
        answer_spans: list[Span] = []
        question_spans: list[Span] = []
        for prompt, answer, end in parts.questions:
            start = len(input_ids)
            answer_start = start + len(prompt)
            input_ids += prompt + answer + end
            answer_spans.append((answer_start, answer_start + len(answer)))
            question_spans.append((start, len(input_ids)))
        assert len(input_ids) == seq_len
        return RecallSample(
            task=self.name,
            input_ids=tuple(input_ids),
            answer_spans=tuple(answer_spans),
            question_spans=tuple(question_spans),
            fact_spans=tuple(parts.fact_spans),
        )

    def too_short(self, seq_len: int, need: int, what: str) -> ValueError:
        """The error of a length that does not hold the sample."""
        return ValueError(
            f"task {self.name!r} needs seq_len >= {need} tokens for {what}, got seq_len={seq_len}; "
            "raise seq_len or ask for fewer facts"
        )


def check_range(task: str, field: str, value: int, low: int, high: int) -> None:
    """Raise a ValueError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"task {task!r}: {field} must be between {low} and {high}, got {value}")


def check_depth(task: str, depth: float | None) -> None:
    """Raise a ValueError unless the depth is None or lies in [0, 1]."""
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"task {task!r}: depth must be null or lie in [0, 1], got {depth}")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text as it stands within others: no special tokens, and no space that is not in it.

    Tokenizers like those of Llama 2 and Mistral put a space before what they are given. A fact states its value without
    that space, so that a model which recalls the value would never write the answer.

    Raises:
        ValueError: a tokenizer that joins a text with whatever precedes it.
    """
    if not _adds_space(tokenizer):
        return _tokens(tokenizer, texts)
    found: dict[str, list[int]] = {}
    for before in _BEFORE:
        (head,) = _tokens(tokenizer, [before])
        missing = [text for text in texts if text not in found]
        for text, ids in zip(missing, _tokens(tokenizer, [before + text for text in missing]), strict=True):
            if ids[: len(head)] == head:
                found[text] = ids[len(head) :]
    if missing := [text for text in texts if text not in found]:
        raise ValueError(f"the tokenizer joins {missing[0]!r} with what precedes it; recall tasks need another one")
    return [list(found[text]) for text in texts]


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    (ids,) = _tokens(tokenizer, ["x"])
    return bool(tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE_MARKS))


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return ids


def encode_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Pieces]:
    """The pieces of each question, tokenised apart."""
    ids = encode(tokenizer, [piece for q in questions for piece in (q.prompt, q.answer, q.end)])
    return [(ids[n], ids[n + 1], ids[n + 2]) for n in range(0, len(ids), 3)]


def num_question_tokens(questions: Sequence[Pieces]) -> int:
    return sum(len(piece) for question in questions for piece in question)
