"""Contexts that are a list of words whose counts are asked about."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_hf_training.tasks.base import (
    Composition,
    Question,
    RecallTask,
    Span,
    encode,
    encode_questions,
    num_question_tokens,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.tasks.filler import Filler


@dataclass(frozen=True, kw_only=True)
class WordListTask(RecallTask):
    """Words in random order, as many as fit. A few tokens of text stand before the list, so that the length is exact.

    `fact_spans` of its samples are the words that are the answer, each time they stand in the list.
    """

    header: ClassVar[str]
    """The text that introduces the list."""

    @abstractmethod
    def vocabulary(self, rng: random.Random, room: int) -> list[str]:
        """Distinct words, the answer's first; `room` tokens will hold the list."""

    @abstractmethod
    def counts(self, lengths: Sequence[int], room: int) -> list[int]:
        """How often each word stands in the list.

        Args:
            lengths: tokens of each word of the vocabulary.
            room: tokens for all.

        Returns:
            Counts, 0 for words that are left out; empty where the room does not do.
        """

    @abstractmethod
    def question(self, listed: Sequence[str]) -> Question:
        """The question about the words `listed`, which stand there in this order."""

    def compose(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Composition:
        """The list, then the question.

        Raises:
            ValueError: `seq_len` has no room for a list whose answer is certain.
        """
        (header,) = encode(tokenizer, [self.header])
        words = self.vocabulary(rng, seq_len)
        ids = encode(tokenizer, [f" {word}" for word in words])
        # Any order of the answer's words takes as many tokens, as each is tokenised by itself.
        room = seq_len - len(header) - num_question_tokens(encode_questions(tokenizer, [self.question(words)]))
        counts = self.counts([len(word) for word in ids], room)
        if not counts:
            raise ValueError(f"task {self.name!r} needs a longer seq_len than {seq_len} for its list; raise seq_len")
        order = [number for number, count in enumerate(counts) for _ in range(count)]
        rng.shuffle(order)
        question = self.question([words[number] for number in order])
        questions, asked = encode_questions(tokenizer, [question]), set(question.answer.split())
        used = sum(len(ids[number]) for number in order) + len(header) + num_question_tokens(questions)
        context: list[int] = filler.take(rng, seq_len - used).tolist() + header
        spans: list[Span] = []
        for number in order:
            if words[number] in asked:
                spans.append((len(context), len(context) + len(ids[number])))
            context += ids[number]
        return Composition(context=context, fact_spans=spans, questions=questions)
