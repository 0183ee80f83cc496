"""Facts hidden in running text, or in whatever else a task calls its haystack."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_hf_training.tasks.base import (
    SPACE_MARKS,
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

# How tokenizers mark a token that begins a new word: a space, or a newline, byte-level or as it is.
_WORD_START_MARKS = (*SPACE_MARKS, "Ċ", "\n")
# How far a fact may be moved to reach a word's start; a longer run without one is not prose (base64, CJK).
_MAX_WORD_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class HiddenFactsTask(RecallTask):
    """A task says which facts and questions (`draw`); they are hidden here."""

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[list[str], list[Question]]:
        """Random facts, in the order the text states them, and the questions about them."""

    def haystack(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, num_tokens: int
    ) -> list[int]:
        """The `num_tokens` tokens that facts are hidden in: by default running text."""
        tokens: list[int] = filler.take(rng, num_tokens).tolist()
        return tokens

    def places(self, rng: random.Random, num_facts: int, num_tokens: int) -> list[int]:
        """Before which tokens of the haystack the facts stand, ascending: by default anywhere."""
        return sorted(rng.randint(0, num_tokens) for _ in range(num_facts))

    def compose(
        self, rng: random.Random, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Composition:
        """Facts hidden in the haystack, so that context and questions are `seq_len` tokens.

        Raises:
            ValueError: `seq_len` has no room for the facts and the questions.
        """
        facts, asked = self.draw(rng)
        fact_ids, questions = encode(tokenizer, facts), encode_questions(tokenizer, asked)
        room = seq_len - sum(map(len, fact_ids)) - num_question_tokens(questions)
        if room < 0:
            raise self.too_short(seq_len, seq_len - room, f"{len(facts)} facts and {len(questions)} questions")
        text = self.haystack(rng, filler, tokenizer, room)
        context, spans = hide(fact_ids, text, self.places(rng, len(facts), room), tokenizer)
        return Composition(context=context, fact_spans=spans, questions=questions)


def hide(
    facts: Sequence[list[int]], text: Sequence[int], places: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """`text` with the facts inserted, in order, each at the first word start from its place on; and their spans."""
    tokens = list(text)
    out: list[int] = []
    spans: list[Span] = []
    done = 0
    for fact, place in zip(facts, places, strict=True):
        # Rounding up to a word start keeps the order of the places, as they all round up the same way.
        cut = _next_word_start(tokens, place, tokenizer)
        out += tokens[done:cut]
        spans.append((len(out), len(out) + len(fact)))
        out += fact
        done = cut
    return out + tokens[done:], spans


def _next_word_start(tokens: list[int], cut: int, tokenizer: PreTrainedTokenizerBase) -> int:
    window = tokenizer.convert_ids_to_tokens(tokens[cut : cut + _MAX_WORD_TOKENS])
    for offset, token in enumerate(window):
        if token.startswith(_WORD_START_MARKS):
            return cut + offset
    return cut
