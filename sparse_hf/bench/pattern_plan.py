"""The patterns that are compared with dense attention, at which lengths, and what they were asked to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparse_hf.bench.plan import K, RunOptions, require_known, require_positive
from sparse_hf.bench.workload import Direction, Shape, random_blocks, uniform
from sparse_hf.methods import Dilated, Method, SlidingWindow, Triangle
from sparse_hf_kernels import AttentionLayout

KEEP = 0.03


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One pattern on all heads.

    Args:
        title: what tables call it.
        layout: of so many KV heads at a length.
        must: speed-up over causal cuDNN, forward, at `BOUND_LEN` tokens.
    """

    title: str
    layout: Callable[[int, int], AttentionLayout]
    must: float


def _of_method(method: Method) -> Callable[[int, int], AttentionLayout]:
    return lambda num_kv_heads, seq_len: uniform(method.pattern(), num_kv_heads)


PATTERNS: Mapping[str, Pattern] = {
    "window": Pattern(title="window 4096", layout=_of_method(SlidingWindow(window_size=4096)), must=15),
    "block-sparse": Pattern(
        title=f"random 128-blocks keep {KEEP:.0%}",
        layout=lambda num_kv_heads, seq_len: random_blocks(num_kv_heads, seq_len, KEEP),
        must=22,
    ),
    "dilated": Pattern(title="dilated 128-blocks", layout=_of_method(Dilated(block_size=128)), must=28),
    "triangle": Pattern(title="triangle", layout=_of_method(Triangle()), must=30),
}
"""By the name that `--patterns` takes."""

BOUND_LEN, BOUND_HEAD_DIM = 128 * K, 128

FULL: Mapping[Direction, tuple[int, ...]] = {
    "forward": tuple(K << power for power in range(8)),
    "both": (2 * K, 8 * K, 32 * K, 128 * K),
}
QUICK: Mapping[Direction, tuple[int, ...]] = {"forward": (K, 4 * K, 16 * K, 64 * K), "both": (16 * K,)}

FLEX_LENGTHS: Mapping[Direction, tuple[int, ...]] = {"forward": (32 * K, 128 * K), "both": ()}
"""Where FlexAttention is compiled, which takes longer than to measure it; nowhere with --quick."""

TORCH_SPARSE_GIB = 1.0
"""What torch.sparse may take for indices and values: patterns beyond it take seconds per call."""


@dataclass(frozen=True, kw_only=True)
class PatternOptions(RunOptions):
    """What a user chooses of the benchmark of patterns.

    Args:
        patterns: names of `PATTERNS`; empty for all.
        head_dim: of all heads.
        torch_sparse_gib: see `TorchSparse.budget_gib`.
    """

    patterns: tuple[str, ...] = ()
    head_dim: int = 128
    torch_sparse_gib: float = TORCH_SPARSE_GIB

    def __post_init__(self) -> None:
        require_known("patterns", self.patterns, tuple(PATTERNS))
        require_positive((self.head_dim,))
        super().__post_init__()

    def chosen(self) -> list[Pattern]:
        return [PATTERNS[name] for name in self.patterns or PATTERNS]

    def steps(self) -> list[tuple[Direction, int]]:
        """Every (direction, seq_len) in order."""
        table = QUICK if self.quick else FULL
        return [(direction, seq_len) for direction in table for seq_len in self.seq_lens or table[direction]]

    def shape(self, seq_len: int) -> Shape:
        return Shape(seq_len=seq_len, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def flex_lengths(self, direction: Direction) -> tuple[int, ...] | None:
        """Lengths for FlexAttention; None for every length."""
        if self.quick:
            return ()
        return None if self.seq_lens else FLEX_LENGTHS[direction]

    def must(self, pattern: Pattern, direction: Direction, seq_len: int) -> float | None:
        """The speed-up over cuDNN that was asked for on this problem, if one was."""
        asked = direction == "forward" and seq_len == BOUND_LEN
        return pattern.must if asked and self.has_bounded_heads and self.head_dim == BOUND_HEAD_DIM else None

    def command(self) -> str:
        return self._command(
            "patterns",
            ("patterns", self.patterns),
            ("seq-lens", self.seq_lens),
            ("head-dim", () if self.head_dim == 128 else (self.head_dim,)),
            ("torch-sparse-gib", () if self.torch_sparse_gib == TORCH_SPARSE_GIB else (f"{self.torch_sparse_gib:g}",)),
        )
