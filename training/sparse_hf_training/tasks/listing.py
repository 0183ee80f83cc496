"""Contexts that are a list of lines and nothing else: the keys not asked about are the haystack."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from sparse_hf_training.tasks.base import (
    Composition,
    Question,
    RecallTask,
    Span,
    check_depth,
    check_range,
    encode,
    encode_questions,
    num_question_tokens,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler

_LINES_AT_ONCE = 64

Entry = tuple[str, str]
"""A key and its value."""


@dataclass(frozen=True, kw_only=True)
class ListTask(RecallTask):
    """As many lines as fit. A few tokens of text stand before them, less than a line, so that the length is exact.

    `fact_spans` of its samples are the lines that are asked about.

    Raises:
        ValueError: the depth or a count is out of range.
    """

    num_questions: int = 1
    """Questions at the end, about distinct keys."""
    depth: float | None = None
    """Where the lines asked about stand, 0 the first and 1 the last of the list; null for anywhere."""

    def __post_init__(self) -> None:
        check_range(self.name, "num_questions", self.num_questions, 1, 64)
        check_depth(self.name, self.depth)

    @abstractmethod
    def entries(self, rng: random.Random) -> Iterator[Entry]:
        """Keys and values at random, all distinct, as many as the task has."""

    @abstractmethod
    def line(self, entry: Entry) -> str:
        """The line that states an entry."""

    @abstractmethod
    def question(self, entry: Entry) -> Question:
        """The question for an entry's value."""

    def compose(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Composition:
        """Lines up to `seq_len` tokens, then the questions.

        Raises:
            ValueError: `seq_len` has no room for the questions, their lines and one more.
        """
        entries = self.entries(rng)
        asked = list(islice(entries, self.num_questions))
        questions = encode_questions(tokenizer, [self.question(entry) for entry in asked])
        own = encode(tokenizer, [self.line(entry) for entry in asked])
        room = seq_len - num_question_tokens(questions) - sum(map(len, own))
        others, left = self._fill(entries, tokenizer, room)
        if not others:
            need = seq_len - room + len(encode(tokenizer, [self.line(next(self.entries(rng)))])[0])
            raise self.too_short(seq_len, need, f"{len(asked)} questions, their lines and another one")
        context: list[int] = filler.take(rng, left).tolist()
        spans: list[Span] = []
        done = 0
        for line, place in zip(own, self._places(rng, len(others)), strict=True):
            context += [token for other in others[done:place] for token in other]
            spans.append((len(context), len(context) + len(line)))
            context += line
            done = place
        context += [token for other in others[done:] for token in other]
        return Composition(context=context, fact_spans=spans, questions=questions)

    def _places(self, rng: random.Random, num_lines: int) -> list[int]:
        if self.depth is not None:
            return [round(self.depth * num_lines)] * self.num_questions
        return sorted(rng.randint(0, num_lines) for _ in range(self.num_questions))

    def _fill(
        self, entries: Iterator[Entry], tokenizer: PreTrainedTokenizerBase, room: int
    ) -> tuple[list[list[int]], int]:
        """Lines in turn until one does not fit, and the tokens that are left."""
        lines: list[list[int]] = []
        while texts := [self.line(entry) for entry in islice(entries, _LINES_AT_ONCE)]:
            for ids in encode(tokenizer, texts):
                if len(ids) > room:
                    return lines, max(room, 0)
                lines.append(ids)
                room -= len(ids)
        return lines, max(room, 0)
