"""Names of needles: enough of them and distinct."""

from __future__ import annotations

import random

from sparse_hf_training.tasks.words import ADJECTIVES, NOUNS, NUM_NAMES, draw_names


def test_lists_hold_distinct_lowercase_words() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(words) >= 40
        assert len(set(words)) == len(words)
        assert all(word.isalpha() and word.islower() for word in words)


def test_all_names_can_be_drawn_once() -> None:
    names = draw_names(random.Random(0), NUM_NAMES)
    assert set(names) == {f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS}
