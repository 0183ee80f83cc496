"""Which models are compared end to end, and at which lengths."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from sparse_hf.bench.plan import K, RunOptions, require_known, require_positive
from sparse_hf.config import AUTO, SparseConfig
from sparse_hf.methods import Dense, Method, Streaming, Triangle, XAttention

SPARSE_SHARE = 0.7
"""Of the KV heads, those that stream beside full ones."""


def streaming_heads(
    num_layers: int, num_kv_heads: int, *, share: float = SPARSE_SHARE, full: Method | None = None
) -> SparseConfig:
    """A random choice of heads streams, as a learned one would; the others are dense, or as `full` says."""
    total = num_layers * num_kv_heads
    masks = torch.ones(total, dtype=torch.int64)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    masks[order[: round(share * total)]] = 0
    rows = tuple(tuple(row) for row in masks.view(num_layers, num_kv_heads).tolist())
    return SparseConfig(full=full or Dense(), sparse=Streaming(), head_masks=rows, min_seq_len=AUTO)


METHODS: Mapping[str, Callable[[int, int], SparseConfig]] = {
    f"streaming {SPARSE_SHARE:.0%}": streaming_heads,
    "triangle": lambda num_layers, num_kv_heads: SparseConfig(sparse=Triangle(), min_seq_len=AUTO),
    "xattention": lambda num_layers, num_kv_heads: SparseConfig(sparse=XAttention(), min_seq_len=AUTO),
}
"""What makes a configuration for `num_layers` layers of `num_kv_heads` KV heads, by the name that `--methods` takes."""

Case = Literal["prefill", "cached prefill", "decode"]
CASES: tuple[Case, ...] = ("prefill", "cached prefill", "decode")

LENGTHS = tuple(128 << power for power in range(9))
QUICK_LENGTHS = (128, 512, 2 * K, 8 * K)
DECODE_LENGTHS = (2 * K,)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunOptions):
    """What a user chooses of any benchmark of a whole model. The default one has the shape of Llama 3.1 8B.

    Args:
        num_layers, head_dim, hidden_size, intermediate_size, vocab_size: of the model.
        dtype: of its weights.
    """

    num_layers: int = 32
    head_dim: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 14336
    vocab_size: int = 128256
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        require_positive((self.num_layers, self.head_dim, self.hidden_size, self.intermediate_size, self.vocab_size))
        super().__post_init__()

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest sequence, with room for what is decoded."""

    @abstractmethod
    def configs(self) -> dict[str, SparseConfig]:
        """How the model is made sparse, by name."""


@dataclass(frozen=True, kw_only=True)
class EndToEndOptions(ModelOptions):
    """What a user chooses of the end-to-end benchmark.

    Args:
        cases: names of `CASES`; empty for all.
        methods: names of `METHODS`; empty for all.
    """

    cases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_known("cases", self.cases, CASES)
        require_known("methods", self.methods, tuple(METHODS))
        super().__post_init__()

    @property
    def budget_ms(self) -> float:
        return 500.0 if self.quick else 1000.0

    def configs(self) -> dict[str, SparseConfig]:
        return {name: METHODS[name](self.num_layers, self.num_kv_heads) for name in self.methods or METHODS}

    def steps(self) -> list[tuple[str, int]]:
        """Every (case, tokens) in order; a decode step follows so many tokens."""
        prefill = self.seq_lens or (QUICK_LENGTHS if self.quick else LENGTHS)
        lengths = {case: DECODE_LENGTHS if case == "decode" else prefill for case in CASES}
        return [(case, length) for case in self.cases or CASES for length in lengths[case]]  # type: ignore[index]

    @property
    def longest(self) -> int:
        return max(length for _, length in self.steps()) + K

    def command(self) -> str:
        return self._command(
            "end-to-end",
            ("cases", quoted(self.cases)),
            ("methods", quoted(self.methods)),
            ("seq-lens", self.seq_lens),
            ("layers", () if self.num_layers == 32 else (self.num_layers,)),
        )


def quoted(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as a shell takes them."""
    return tuple(f'"{name}"' if " " in name else name for name in names)
