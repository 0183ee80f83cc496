"""Filler: contiguous, wrapping, reproducible slices."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparse_hf_training.tasks import Filler


def test_take_is_a_contiguous_slice_and_reaches_both_ends() -> None:
    filler = Filler(np.arange(10))
    rng = random.Random(0)
    slices = [filler.take(rng, 4).tolist() for _ in range(200)]
    assert all(piece == list(range(piece[0], piece[0] + 4)) for piece in slices)
    assert {piece[0] for piece in slices} == set(range(7))


def test_take_wraps_when_the_text_is_shorter() -> None:
    taken = Filler(np.arange(5)).take(random.Random(1), 13).tolist()
    assert len(taken) == 13
    assert taken == [(taken[0] + step) % 5 for step in range(13)]


def test_take_copies() -> None:
    filler = Filler(np.arange(3))
    filler.take(random.Random(0), 3)[:] = 9
    assert filler.tokens.tolist() == [0, 1, 2]


def test_take_nothing_and_less_than_nothing() -> None:
    filler = Filler(np.arange(3))
    assert filler.take(random.Random(0), 0).shape == (0,)
    with pytest.raises(ValueError, match="cannot take -1"):
        filler.take(random.Random(0), -1)


def test_from_texts_joins_in_order(tokenizer) -> None:
    filler = Filler.from_texts(iter(["The ship", " sailed 12"]), tokenizer)
    assert tokenizer.decode(filler.tokens.tolist()) == "The ship sailed 12"


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_text_is_refused(tokenizer, texts) -> None:
    with pytest.raises(ValueError, match=r"got \[0\].*not empty"):
        Filler.from_texts(texts, tokenizer)


def test_tokens_of_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[num_tokens\].*got \[2, 3\]"):
        Filler(np.zeros((2, 3), dtype=np.int32))
