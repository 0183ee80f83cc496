"""`triangle`: TriangleMix's pattern for layers that do without the middle of the attention matrix."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf.methods.tri_shape import TriShape


@dataclass(frozen=True, kw_only=True)
class Triangle(TriShape):
    """`tri_shape` with TriangleMix's sizes. The paper leaves some layers dense: give this to the others by rules.

    The paper's sections Streaming and Last together; its inequalities give one sink, one window token more and one last
    row less than its kernel, which reads exactly these numbers, and so does this.
    """

    name: ClassVar[str] = "triangle"
    summary: ClassVar[str] = "few sinks and a short window; the last num_last_tokens queries read all"
    source: ClassVar[str] = "TriangleMix, arXiv 2507.21526"

    num_sink_tokens: int = 8
    window_size: int = 512
    num_last_tokens: int = 128
