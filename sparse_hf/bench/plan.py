"""Which lengths, and which bounds: the figures that the kernels were asked to reach on one H200."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

K = 1024

WINDOWS = (1024, 4096)
KEEPS = (0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Bound:
    """What a ratio must and should reach. At head_dim 64 nine tenths of it suffice."""

    must: float
    goal: float
    lower_is_better: bool = False

    def at(self, head_dim: int) -> Bound | None:
        """The bound at this head size, or None where none was set."""
        if head_dim not in (64, 128):
            return None
        factor = 1.0 if head_dim == 128 else 1 / 0.9 if self.lower_is_better else 0.9
        return replace(self, must=self.must * factor, goal=self.goal * factor)


DENSE_FORWARD = Bound(0.95, 1.03)
DENSE_BACKWARD = Bound(0.85, 1.0)
STREAMING_FORWARD = {1024: Bound(1.0, 0.85, True), 4096: Bound(1.0, 0.92, True)}
STREAMING_BACKWARD = {1024: Bound(1.0, 0.85, True)}
BLOCKS_FORWARD = {0.5: Bound(0.95, 0.98), 0.25: Bound(0.93, 0.96), 0.1: Bound(0.87, 0.92), 0.05: Bound(0.80, 0.88)}
BLOCKS_BACKWARD = {0.5: Bound(0.90, 0.95), 0.25: Bound(0.87, 0.92), 0.1: Bound(0.80, 0.88), 0.05: Bound(0.72, 0.82)}
MIXED_HEADS = Bound(1.02, 0.97, True)
TWO_BRANCH = Bound(1.10, 1.04, True)
XATTENTION = Bound(0.05, 0.035, True)
OVERHEAD = Bound(1.05, 1.0, True)
TRITON = Bound(0.65, 0.75)

BOUND_LENGTHS: dict[str, tuple[int, int]] = {
    "dense-forward": (16 * K, 128 * K),
    "dense-backward": (16 * K, 128 * K),
    "streaming-forward": (128 * K, 128 * K),
    "streaming-backward": (32 * K, 32 * K),
    "blocks-forward": (128 * K, 128 * K),
    "blocks-backward": (128 * K, 128 * K),
    "mixed-heads": (128 * K, 128 * K),
    "two-branch": (16 * K, 128 * K),
    "xattention": (128 * K, 128 * K),
    "overhead": (K, 4 * K),
    "triton-dense": (16 * K, 128 * K),
}
"""First and last length at which a case's bounds hold."""

FULL: Mapping[int, Mapping[str, Sequence[int]]] = {
    128: {
        "dense-forward": (4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K),
        "dense-backward": (4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K),
        "streaming-forward": (128 * K, 256 * K, 1024 * K),
        "streaming-backward": (32 * K,),
        "blocks-forward": (128 * K,),
        "blocks-backward": (128 * K,),
        "mixed-heads": (128 * K,),
        "two-branch": (32 * K,),
        "xattention": (128 * K,),
        "overhead": (K, 2 * K, 4 * K),
        "triton-dense": (16 * K, 64 * K),
    },
    64: {
        "dense-forward": (16 * K, 32 * K, 128 * K),
        "dense-backward": (16 * K, 32 * K, 128 * K),
        "streaming-forward": (128 * K,),
        "streaming-backward": (32 * K,),
        "blocks-forward": (128 * K,),
        "blocks-backward": (128 * K,),
        "mixed-heads": (128 * K,),
        "two-branch": (32 * K,),
        "xattention": (128 * K,),
        "overhead": (K, 4 * K),
    },
}
"""By head_dim and case. Other head sizes take the lengths of 64."""

QUICK: Mapping[int, Mapping[str, Sequence[int]]] = {
    128: {
        "dense-forward": (16 * K, 64 * K),
        "dense-backward": (16 * K,),
        "streaming-forward": (128 * K,),
        "streaming-backward": (32 * K,),
        "blocks-forward": (64 * K,),
        "blocks-backward": (32 * K,),
        "mixed-heads": (64 * K,),
        "two-branch": (16 * K,),
        "xattention": (64 * K,),
        "overhead": (K, 4 * K),
        "triton-dense": (16 * K,),
    },
    64: {"dense-forward": (16 * K,), "dense-backward": (16 * K,), "streaming-forward": (64 * K,)},
}

CASES = tuple(FULL[128])

FLEX_LENGTHS: Mapping[int, tuple[int, ...]] = {128: (32 * K, 128 * K)}
"""Where FlexAttention is compiled, by head_dim; nowhere with --quick."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ABC):
    """What a user chooses of any benchmark.

    Args:
        quick: fewer lengths and a smaller measuring time.
        seq_lens: in place of the planned lengths; bounds stay where they were set.
        num_heads, num_kv_heads: bounds hold for 32 and 8 alone.
    """

    quick: bool = False
    seq_lens: tuple[int, ...] = ()
    num_heads: int = 32
    num_kv_heads: int = 8

    def __post_init__(self) -> None:
        require_positive((*self.seq_lens, self.num_heads, self.num_kv_heads))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"query heads must be a multiple of KV heads, got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def budget_ms(self) -> float:
        """Measuring time per contender."""
        return 80.0 if self.quick else 250.0

    @property
    def has_bounded_heads(self) -> bool:
        return (self.num_heads, self.num_kv_heads) == (32, 8)

    @abstractmethod
    def command(self) -> str:
        """The command line that repeats the run."""

    def _command(self, name: str, *more: tuple[str, Sequence[object]]) -> str:
        """The line of `sparse-hf bench NAME` with these options and `more`, each a name and its values."""
        words = [f"sparse-hf bench {name}"]
        words += ["--quick"] if self.quick else []
        words += [f"--{option} {','.join(map(str, values))}" for option, values in more if values]
        words += [f"--heads {self.num_heads}"] if self.num_heads != 32 else []
        words += [f"--kv-heads {self.num_kv_heads}"] if self.num_kv_heads != 8 else []
        return " ".join(words)


def require_positive(numbers: Sequence[int]) -> None:
    """Raises ValueError unless all are."""
    if bad := [number for number in numbers if number < 1]:
        raise ValueError(f"lengths, head sizes and head counts must be positive, got {bad[0]}")


def require_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError, with what is known, unless all names are."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What a user chooses of the kernel benchmark.

    Args:
        cases: names of `CASES`; empty for all.
        head_dims: head sizes; empty for 128 and 64.
    """

    cases: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_known("cases", self.cases, CASES)
        require_positive(self.head_dims)
        super().__post_init__()
        if self.num_kv_heads % 2:
            raise ValueError(f"KV heads must be even (half of them stream in one case), got {self.num_kv_heads}")

    def lengths(self, case: str, head_dim: int) -> tuple[int, ...]:
        table = QUICK if self.quick else FULL
        planned = table.get(head_dim, table[64]).get(case, ())
        return self.seq_lens if self.seq_lens and planned else tuple(planned)

    def flex_lengths(self, head_dim: int) -> tuple[int, ...] | None:
        """Lengths for FlexAttention; None for every length."""
        if self.quick:
            return ()
        return None if self.seq_lens else FLEX_LENGTHS.get(head_dim, ())

    def bound(self, bound: Bound | None, case: str, seq_len: int, head_dim: int) -> Bound | None:
        """The bound as it holds for this length, these heads and this head size."""
        first, last = BOUND_LENGTHS[case]
        if bound is None or not first <= seq_len <= last or not self.has_bounded_heads:
            return None
        return bound.at(head_dim)

    def steps(self) -> list[tuple[str, int, int]]:
        """Every (case, head_dim, seq_len) in order."""
        return [
            (case, head_dim, seq_len)
            for head_dim in self.head_dims or (128, 64)
            for case in self.cases or CASES
            for seq_len in self.lengths(case, head_dim)
        ]

    def command(self) -> str:
        lists = (("cases", self.cases), ("seq-lens", self.seq_lens), ("head-dim", self.head_dims))
        return self._command("kernels", *lists)
