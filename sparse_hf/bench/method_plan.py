"""The methods that are compared, each on all heads with its defaults, and at which lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from sparse_hf.bench.plan import K, RunOptions, require_known, require_positive
from sparse_hf.bench.workload import BLOCK_SIZE, Shape
from sparse_hf.methods import Dilated, Explicit, Method, MInference, available_methods


def compared_methods() -> dict[str, Method]:
    """By name: every method that has defaults, and some variants.

    NAME-128 is a static method in blocks of 128 tokens, the tiles of Hopper's kernels, where 64 is the default.
    `explicit` has no defaults: it reads what it is given.
    """
    found: dict[str, Method] = {}
    for name, cls in available_methods().items():
        if name == Explicit.name:
            continue
        found[name] = cls()
        if cls.is_static and any(field.name == "block_size" for field in fields(cls)):
            found[f"{name}-{BLOCK_SIZE}"] = cls(block_size=BLOCK_SIZE)  # type: ignore[call-arg]
    return {
        **found,
        "longnet": Dilated.longnet(),
        "minference-adaptive": MInference(adaptive_budget=0.2),
        "minference-block-sparse": MInference(kind="block_sparse"),
        "minference-a-shape": MInference(kind="a_shape"),
    }


METHODS: Mapping[str, Method] = compared_methods()
"""By the name that `--methods` takes."""

LENGTHS, QUICK_LENGTHS = (8 * K, 32 * K, 128 * K), (8 * K, 32 * K)


@dataclass(frozen=True, kw_only=True)
class MethodOptions(RunOptions):
    """What a user chooses of the benchmark of methods. The default shape is that of Llama 3.1 8B's attention.

    Args:
        methods: names of `METHODS`; empty for all.
        head_dim: of all heads.
    """

    methods: tuple[str, ...] = ()
    head_dim: int = 128

    def __post_init__(self) -> None:
        require_known("methods", self.methods, tuple(METHODS))
        require_positive((self.head_dim,))
        super().__post_init__()

    def chosen(self) -> dict[str, Method]:
        return {name: METHODS[name] for name in self.methods or METHODS}

    def lengths(self) -> tuple[int, ...]:
        return self.seq_lens or (QUICK_LENGTHS if self.quick else LENGTHS)

    def shape(self, seq_len: int) -> Shape:
        return Shape(seq_len=seq_len, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def command(self) -> str:
        return self._command(
            "methods",
            ("methods", self.methods),
            ("seq-lens", self.seq_lens),
            ("head-dim", () if self.head_dim == 128 else (self.head_dim,)),
        )
