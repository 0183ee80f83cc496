"""What of long-context inference is measured, at which lengths and batches, and what was asked for on one H200."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from sparse_hf.bench.end_to_end_plan import ModelOptions, quoted, streaming_heads
from sparse_hf.bench.plan import Bound, K, require_known, require_positive
from sparse_hf.config import SparseConfig
from sparse_hf.methods import XAttention

HALF, MOST, SELECTING = "streaming 50%", "streaming 70%", "streaming 70% + xattention"
NONE = "dense heads"
VARIANTS: Mapping[str, Callable[[int, int], SparseConfig]] = {
    HALF: partial(streaming_heads, share=0.5),
    MOST: partial(streaming_heads, share=0.7),
    SELECTING: partial(streaming_heads, share=0.7, full=XAttention()),
    NONE: partial(streaming_heads, share=0.0),
}
"""What makes a configuration for `num_layers` layers of `num_kv_heads` KV heads; the last one's other heads select."""

Case = Literal["short prompt", "first token", "prefill", "decode kernel", "decode", "graph decode", "longest context"]
CASES: tuple[Case, ...] = get_args(Case)

Where = tuple[int, int]
"""Tokens and batch."""

FULL: Mapping[Case, tuple[Where, ...]] = {
    "short prompt": ((2 * K, 1),),
    "first token": ((8 * K, 1), (8 * K, 4), (32 * K, 1), (128 * K, 1)),
    "prefill": ((8 * K, 1), (128 * K, 1)),
    "decode kernel": ((32 * K, 1), (128 * K, 1), (128 * K, 4)),
    "decode": ((128 * K, 1), (128 * K, 4)),
    "graph decode": ((128 * K, 1), (128 * K, 4)),
    "longest context": ((0, 1),),
}
QUICK: Mapping[Case, tuple[Where, ...]] = {
    "short prompt": ((2 * K, 1),),
    "first token": ((8 * K, 1), (32 * K, 1)),
    "prefill": ((8 * K, 1),),
    "decode kernel": ((32 * K, 1),),
    "decode": ((32 * K, 1),),
    "graph decode": ((32 * K, 1),),
    "longest context": ((0, 1),),
}
FIXED: tuple[Case, ...] = ("short prompt", "longest context")
"""Cases whose lengths no option changes."""

MIN_ROUNDS: Mapping[Case, int] = {"first token": 2, "prefill": 1, "decode": 3, "graph decode": 3, "short prompt": 11}
"""A round of prefills of 128K tokens takes half a minute; every call has run once before the first round."""

MEMORY, KV_SHARE = "prefill memory", "KV share of dense"
KERNEL_SHARE, KERNEL_TIME = "decode kernel, share of copy bandwidth", "decode kernel time over bytes kept"
BOUNDS: Mapping[tuple[str, str, Where], Bound] = {
    ("first token", MOST, (128 * K, 1)): Bound(1.8, 2.1),
    ("first token", SELECTING, (128 * K, 1)): Bound(2.5, 3.2),
    ("decode", MOST, (128 * K, 1)): Bound(1.0, 1.2),
    ("decode", MOST, (128 * K, 4)): Bound(1.0, 1.2),
    ("graph decode", MOST, (128 * K, 1)): Bound(1.4, 1.5),
    ("graph decode", MOST, (128 * K, 4)): Bound(2.0, 2.25),
    ("longest context", MOST, (0, 1)): Bound(2.5, 3.0),
    (KERNEL_SHARE, NONE, (32 * K, 1)): Bound(0.85, 0.93),
    (KERNEL_SHARE, NONE, (128 * K, 1)): Bound(0.85, 0.93),
    (KERNEL_TIME, MOST, (128 * K, 1)): Bound(1.2, 1.1, True),
    (KERNEL_TIME, MOST, (128 * K, 4)): Bound(1.2, 1.1, True),
    (KV_SHARE, HALF, (128 * K, 1)): Bound(0.51, 0.51, True),
    (KV_SHARE, MOST, (128 * K, 1)): Bound(0.31, 0.31, True),
    (KV_SHARE, SELECTING, (128 * K, 1)): Bound(0.31, 0.31, True),
    **{(MEMORY, name, (128 * K, 1)): Bound(2.0, 1.0, True) for name in VARIANTS if name != NONE},
    **{("short prompt", name, (2 * K, 1)): Bound(1.03, 1.0, True) for name in VARIANTS if name != NONE},
}
"""By figure, variant, tokens and batch. Those of a case are of its ratio to dense."""

NUM_NEW_TOKENS, NUM_DECODED_TOKENS = 32, 16


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ModelOptions):
    """What a user chooses of the benchmark of inference.

    Args:
        cases: names of `CASES`; empty for all.
        variants: names of `VARIANTS`; empty for those of each case.
        batches: sequences, in place of those planned.
        memory_gib: what the longest context may take, weights included; by default all that the GPU has.
        num_new_tokens: after a short prompt.
        num_decoded_tokens: that a call of `generate` decodes after a long context.
    """

    cases: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    memory_gib: float | None = None
    num_new_tokens: int = NUM_NEW_TOKENS
    num_decoded_tokens: int = NUM_DECODED_TOKENS

    def __post_init__(self) -> None:
        require_known("cases", self.cases, CASES)
        require_known("variants", self.variants, tuple(VARIANTS))
        require_positive((*self.batches, self.num_new_tokens, self.num_decoded_tokens))
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"the memory for the longest context must be positive, got {self.memory_gib} GiB")
        super().__post_init__()

    @property
    def budget_ms(self) -> float:
        return 500.0 if self.quick else 3000.0

    @property
    def longest(self) -> int:
        # Every call of `generate` decodes on from the last one.
        return max(2 * K, *(tokens for _, (tokens, _) in self.steps())) + K * self.num_decoded_tokens

    def configs(self) -> dict[str, SparseConfig]:
        return {name: VARIANTS[name](self.num_layers, self.num_kv_heads) for name in self.variants or VARIANTS}

    def steps(self) -> list[tuple[Case, Where]]:
        """Every case with its tokens and batch, in order."""
        table = QUICK if self.quick else FULL
        return [(case, where) for case in CASES if case in (self.cases or CASES) for where in self._wheres(case, table)]

    def _wheres(self, case: Case, table: Mapping[Case, tuple[Where, ...]]) -> list[Where]:
        planned = table[case]
        if case in FIXED or not (self.seq_lens or self.batches):
            return list(planned)
        lengths = self.seq_lens or tuple(dict.fromkeys(tokens for tokens, _ in planned))
        return [(tokens, batch) for tokens in lengths for batch in self.batches or (1,)]

    def chosen(self, case: Case, batch: int) -> tuple[str, ...]:
        """The variants of a case: xattention decodes as dense heads do, and at batch 4 memory is scarce."""
        if self.variants:
            return self.variants
        if case == "decode kernel":
            return (NONE, MOST) if batch == 1 else (MOST,)
        if case in ("decode", "graph decode"):
            return (MOST,) if batch > 1 or case == "graph decode" else (HALF, MOST)
        return (HALF, MOST) if case == "longest context" else (HALF, MOST, SELECTING)

    def bound(self, figure: str, variant: str, where: Where) -> Bound | None:
        """What was asked for, which holds for the default model."""
        asked = (self.num_layers, self.hidden_size, self.head_dim) == (32, 4096, 128) and self.has_bounded_heads
        return BOUNDS.get((figure, variant, where)) if asked else None

    def command(self) -> str:
        return self._command(
            "inference",
            ("cases", quoted(self.cases)),
            ("variants", quoted(self.variants)),
            ("seq-lens", self.seq_lens),
            ("batches", self.batches),
            ("layers", () if self.num_layers == 32 else (self.num_layers,)),
            ("memory-gib", () if self.memory_gib is None else (f"{self.memory_gib:g}",)),
        )
