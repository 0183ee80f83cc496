"""`sliding_window`: the most recent keys only."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Method):
    """Causal window: a query at i reads keys with 0 <= i - j < window_size.

    Args:
        window_size: tokens, the query's own included.
    """

    name: ClassVar[str] = "sliding_window"
    summary: ClassVar[str] = "the last window_size keys"
    source: ClassVar[str] = "Longformer, arXiv 2004.05150, section 3.1 (causal form)"

    window_size: int = 1024

    def __post_init__(self) -> None:
        require_positive(self, "window_size")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(window=self.window_size)
