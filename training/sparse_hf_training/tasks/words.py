"""Adjective-noun names, such as `brave-otter`, that a text is unlikely to hold by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_ADJECTIVES = """
    amber ancient azure bold brave bright calm clever cosmic crimson curious daring eager early fancy fierce
    gentle golden grand happy hidden hollow humble icy jolly keen lively lonely lucky mellow mighty misty noble
    patient polite proud quick quiet rapid rustic silent silver sleepy sober solar steady sunny swift tidy velvet
    vivid warm wild wise witty young zesty
"""
_NOUNS = """
    anchor badger beacon bison canyon cedar comet condor coral cricket dolphin dragon eagle ember falcon fern
    forest galaxy garden glacier harbor hawk heron island jaguar kettle lantern lemon lion lynx maple meadow mirror
    mountain ocean orchid otter owl panda pebble pepper pigeon planet puffin rabbit raven river rocket salmon sparrow
    temple thistle tiger tulip turtle valley violin walrus willow wolf zebra
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
NUM_NAMES = len(ADJECTIVES) * len(NOUNS)


def draw_names(rng: random.Random, count: int) -> list[str]:
    """`count` distinct adjective-noun names, at most `NUM_NAMES`."""
    picks = rng.sample(range(NUM_NAMES), count)
    return [f"{ADJECTIVES[pick // len(NOUNS)]}-{NOUNS[pick % len(NOUNS)]}" for pick in picks]
