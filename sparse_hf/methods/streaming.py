"""`streaming`: attention sinks and a window; what a head needs that does not retrieve."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method, require_positive
from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class Streaming(Method):
    """Keys with j < num_sink_tokens or 0 <= i - j < window_size.

    Args:
        num_sink_tokens: first tokens of the sequence that are always read.
        window_size: tokens, the query's own included.
    """

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "the first num_sink_tokens and the last window_size keys"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, section 3.2; DuoAttention, arXiv 2410.10819"

    num_sink_tokens: int = 64
    window_size: int = 1024

    def __post_init__(self) -> None:
        require_positive(self, "num_sink_tokens", "window_size")

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern(window=self.window_size, num_sink_tokens=self.num_sink_tokens)
