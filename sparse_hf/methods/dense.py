"""`dense`: every earlier key, the attention that the model came with."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_hf.methods.base import FIRST_HEAD, HeadPlace, Method
from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Causal attention over all keys."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "all earlier keys"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762, section 3.2"

    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        return HeadPattern()
