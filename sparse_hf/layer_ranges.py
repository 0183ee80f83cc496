"""Ranges as users write them: "0-3", "16-", "-2", "0-3,8", "*"."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PART = re.compile(r"(\d*)-(\d*)|(\d+)")


def parse_ranges(text: str, count: int | None, *, what: str = "index") -> list[int]:
    """The sorted numbers that the text names, ends included.

    Args:
        text: parts joined by commas: "5", "0-3", "16-" (to the end), "-2" (from 0), "*" (all).
        count: how many there are; None checks the syntax only and returns an empty list.
        what: how messages call them.

    Raises:
        ValueError: for anything else, a range that falls, or a number that is not below `count`.
    """
    chosen: set[int] = set()
    for part in (piece.strip() for piece in str(text).split(",")):
        match = _PART.fullmatch(part)
        if part == "*":
            first, last = 0, None
        elif match and match[3] is not None:
            first = last = int(match[3])
        elif match and (match[1] or match[2]):
            first, last = int(match[1] or 0), int(match[2]) if match[2] else None
        else:
            raise ValueError(f'{what} range {text!r} is not understood; write "5", "0-3", "16-", "-2", "0-3,8" or "*"')
        if last is not None and last < first:
            raise ValueError(f"{what} range {part!r} falls; write the smaller number first")
        if count is None:
            continue
        last = count - 1 if last is None else last
        if max(first, last) >= count:
            raise ValueError(f"{what} range {part!r} goes beyond the last {what}, {count - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def format_ranges(numbers: Iterable[int]) -> str:
    """The text that `parse_ranges` reads as these numbers: "0-3,8"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
