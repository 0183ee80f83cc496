"""The one parameter of each method that decides how much it reads, and the search for the value that reads so much."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from sparse_hf.methods import BigBird, FlexPrefill, Method, MInference, Streaming, Triangle, XAttention
from sparse_hf.methods.minference import NUM_NEAR_DIAGONALS

MAX_STEPS = 7
"""Densities that a search asks for at most, besides those of the knob's two ends."""
LEAST_STEP = 0.25
"""A step lies no closer, as a share, to either of the positions between which it is."""
LEAST_WINDOW = 16


@dataclass(frozen=True, kw_only=True)
class Knob:
    """How a method is made to read more or less.

    Args:
        name: of the parameter.
        setting: its value at a position from 0, where the method reads least, to 1.
        method: the method at a setting; its other parameters stay as they are.
    """

    name: str
    setting: Callable[[float], float]
    method: Callable[[float], Method]


def density_knobs(seq_len: int) -> dict[str, Knob]:
    """The methods that have such a parameter, by the names that tables use, for sequences of `seq_len` tokens.

    Positions are so spread that density grows about evenly over them: shares of attention finely near 1, sizes by
    factors. `minference` has columns in proportion to its diagonals, as in its defaults; `flexprefill` keeps no minimum
    but a block, since its default alone is more than 10% of 8K tokens.

    Raises:
        ValueError: if `seq_len` is too short for a range of windows.
    """
    if seq_len < 2 * LEAST_WINDOW:
        raise ValueError(f"densities need sequences of {2 * LEAST_WINDOW} tokens or more, got {seq_len}")
    default = MInference()
    num_blocks = -(-seq_len // default.block_size)

    def diagonals(number: float) -> MInference:
        columns = round(number * default.vertical_size / default.slash_size)
        return MInference(slash_size=int(number), vertical_size=max(1, columns))

    windows = _whole(_by_factors(LEAST_WINDOW, seq_len))
    return {
        "xattention": Knob(name="threshold", setting=_near_one, method=lambda share: XAttention(threshold=share)),
        "flexprefill": Knob(
            name="gamma",
            setting=_near_one,
            method=lambda share: FlexPrefill(gamma=share, min_budget=default.block_size),
        ),
        "minference": Knob(
            name="slash_size",
            # From the diagonals that it keeps in any case to all of them.
            setting=_whole(_by_factors(NUM_NEAR_DIAGONALS, max(seq_len, 2 * NUM_NEAR_DIAGONALS))),
            method=diagonals,
        ),
        "minference-block-sparse": Knob(
            name="top_k",
            setting=_whole(_by_factors(1, num_blocks)),
            method=lambda number: MInference(kind="block_sparse", top_k=int(number)),
        ),
        "streaming": Knob(
            name="window_size", setting=windows, method=lambda number: Streaming(window_size=int(number))
        ),
        "triangle": Knob(name="window_size", setting=windows, method=lambda number: Triangle(window_size=int(number))),
        "bigbird": Knob(
            name="num_random_blocks",
            # Half of the blocks are three quarters of the pairs; drawing them takes time as their square.
            setting=_whole(_by_factors(1, max(2, seq_len // BigBird().block_size // 2))),
            method=lambda number: BigBird(num_random_blocks=int(number)),
        ),
    }


def find_position(
    knob: Knob,
    target: float,
    density: Callable[[float], float],
    known: MutableMapping[float, float],
    *,
    close: float,
) -> float:
    """The position of a knob whose density is nearest to `target`; it may be far from it.

    Between the nearest positions on both sides the next one is where a straight line meets the target, though not
    close to either: bisection that takes fewer steps where density grows evenly.

    Args:
        knob: whose density grows with its position.
        target: share of the causal pairs.
        density: that of a setting. Whole numbers are asked for again where positions lie close.
        known: densities by position; what is measured is added, and another target begins with it.
        close: a density so near to the target ends the search.
    """
    for end in (0.0, 1.0):
        if end not in known:
            known[end] = density(knob.setting(end))

    def nearest() -> float:
        return min(known, key=lambda at: (abs(known[at] - target), at))

    for _ in range(MAX_STEPS):
        below = max((at for at, found in known.items() if found <= target), default=1.0)
        above = min((at for at, found in known.items() if found > target and at > below), default=None)
        if abs(known[nearest()] - target) <= close or above is None:  # an end reads more, or less, than is wanted
            break
        share = (target - known[below]) / (known[above] - known[below])
        step = min(max(share, LEAST_STEP), 1 - LEAST_STEP)
        middle = below + step * (above - below)
        known[middle] = density(knob.setting(middle))
    return nearest()


def _near_one(position: float) -> float:
    """Shares from 0 to 1, half of the positions beyond 0.94: the last of the attention takes most of the keys."""
    return 1 - (1 - position) ** 4


def _by_factors(low: float, high: float) -> Callable[[float], float]:
    return lambda position: low * (high / low) ** position


def _whole(setting: Callable[[float], float]) -> Callable[[float], float]:
    return lambda position: round(setting(position))
