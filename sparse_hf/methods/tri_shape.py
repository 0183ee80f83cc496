"""`tri_shape`: sinks and a window, and the last queries dense, so that a prompt's question sees all of it."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class TriShape(Method):
    """Keys with j < num_sink_tokens or 0 <= i - j < window_size; queries with i >= N - num_last_tokens read all.

    N is the length of a sequence in one call, padding and packing apart: each chunk of a chunked prefill has its own
    last rows, and a decoded token is a last row and reads all, so that the cache keeps every key.

    Args:
        num_sink_tokens: first tokens of the sequence that are always read.
        window_size: tokens, the query's own included.
        num_last_tokens: queries at the end that read every key. Heads of one layer share it.
    """

    name: ClassVar[str] = "tri_shape"
    summary: ClassVar[str] = "sinks and a window; the last num_last_tokens queries read all"
    source: ClassVar[str] = "SCBench, arXiv 2412.10319 (Tri-shape); A-shape of MInference, arXiv 2407.02490"

    num_sink_tokens: int = 128
    window_size: int = 3968
    num_last_tokens: int = 100

    def __post_init__(self) -> None:
        require_positive(self, "num_sink_tokens", "window_size", "num_last_tokens")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(
            window=self.window_size, num_sink_tokens=self.num_sink_tokens, num_last_tokens=self.num_last_tokens
        )
