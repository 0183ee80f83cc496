"""`tune_break_even`: from which length on a method's attention takes no longer than dense attention on this GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_hf.bench.contenders import Contender
from sparse_hf.bench.peers import Sdpa
from sparse_hf.bench.session import Entry, Session
from sparse_hf.bench.timing import CudaClock
from sparse_hf.bench.workload import Shape
from sparse_hf.break_even import ALWAYS_DENSE, architecture_name, break_even_tokens, checked_entry
from sparse_hf.config import SparseConfig
from sparse_hf.methods import Dense, Method, available_methods, method_from_dict
from sparse_hf.patching import head_layout
from sparse_hf.tune.table import merge_entries, provenance
from sparse_hf_kernels import UNBOUNDED, AttentionLayout
from sparse_hf_kernels.tuned import DTYPES

LENGTHS = tuple(256 << power for power in range(8))
UNIT = 128
"""Lengths are multiples of it, so that the dense prefix cuts no block of a list."""
CHAIN_CALLS = 10
CASE = "break-even"

Progress = Callable[[str], object]
Ratios = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class BreakEvenOptions:
    """What is measured.

    Args:
        methods: each by itself on every head; by default all that need no parameters of the user's.
        lengths: tokens, multiples of 128.
        num_heads, num_kv_heads, head_dim: of the model.
        dtype: of q, k and v.
    """

    methods: tuple[Method, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    budget_ms: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", self.methods or measurable_methods())
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not self.lengths or any(length < UNIT or length % UNIT for length in self.lengths):
            raise ValueError(f"lengths must be positive multiples of {UNIT}, got {list(self.lengths)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self.shape(self.lengths[0])
        for method in self.methods:
            if isinstance(method, Dense) or not method.is_static:
                raise ValueError(
                    f"{method.name} has no break-even length here: methods that are sparse by shape alone have one "
                    f"({', '.join(each.name for each in measurable_methods())})"
                )
            _layout(method, self.num_kv_heads, 0)

    def shape(self, seq_len: int) -> Shape:
        return Shape(
            seq_len=seq_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
        )

    @property
    def num_steps(self) -> int:
        """How often `tune_break_even` calls `progress`."""
        return 2 * len(self.methods) * len(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's break-even length.

    Args:
        method: with its parameters.
        arch: such as "sm_90".
        tokens: see `BreakEven`.
        ratios: time of the sparse operator over that of the best dense one, by length.
        deployed_ratios: the same with the queries below `tokens` dense, as `min_seq_len: auto` runs.
        options: what was measured.
    """

    method: Method
    arch: str
    tokens: int | None
    ratios: Ratios
    deployed_ratios: Ratios
    options: BreakEvenOptions

    @property
    def worst(self) -> tuple[int, float]:
        """The length at which the deployed operator is slowest against dense, and its ratio."""
        return max(self.deployed_ratios, key=lambda pair: pair[1])

    def entry(self) -> dict[str, Any]:
        """As the table's file has it."""
        parameters = {name: value for name, value in self.method.to_dict().items() if name != "method"}
        return {
            "arch": self.arch,
            "method": self.method.name,
            "parameters": parameters,
            "head_dim": self.options.head_dim,
            "tokens": self.tokens,
            "longest": self.options.lengths[-1],
            "num_heads": self.options.num_heads,
            "num_kv_heads": self.options.num_kv_heads,
            "dtype": self.options.dtype,
            "ratios": {str(length): round(ratio, 4) for length, ratio in self.ratios},
            "deployed_ratios": {str(length): round(ratio, 4) for length, ratio in self.deployed_ratios},
            **provenance(),
        }


def measurable_methods() -> tuple[Method, ...]:
    """The methods that are sparse by shape alone and need no parameters of the user's."""
    found = []
    for cls in available_methods().values():
        if cls is Dense or not cls.is_static:
            continue
        try:
            found.append(cls())
        except ValueError:  # it asks for parameters
            continue
    return tuple(found)


def method_of(text: str) -> Method:
    """A method by its name, or by JSON such as `{"method": "streaming", "window_size": 4096}`.

    Raises:
        ValueError: if it is neither.
    """
    if not text.lstrip().startswith("{"):
        return method_from_dict(text)
    try:
        return method_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"--method takes a name or a JSON object, got {text!r} ({error})") from error


def break_even_session(options: BreakEvenOptions) -> Session:
    """A session on the current CUDA device: dense causal SDPA of both kinds beside our operators.

    Raises:
        ValueError: if there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError("break-even lengths are measured on a CUDA device and torch sees none; see `sparse-hf env`")
    device = torch.device("cuda", torch.cuda.current_device())
    return Session(
        device=device,
        clock=CudaClock(device),
        chain_clock=CudaClock(device, calls=CHAIN_CALLS, flush=False),
        peers=(Sdpa("SDPA cuDNN", "CUDNN_ATTENTION"), Sdpa("SDPA flash", "FLASH_ATTENTION")),
        budget_ms=options.budget_ms,
    )


def tune_break_even(
    options: BreakEvenOptions, session: Session, *, progress: Progress = lambda text: None
) -> Iterator[Measured]:
    """Each method's break-even length, as soon as it is known.

    Args:
        options: what is measured.
        session: where; its peers are the dense attentions that ours has to beat besides itself.
        progress: called with a line before each measurement.

    Raises:
        ValueError: if the sparse operator or every dense one failed at a length.
    """
    for method in options.methods:

        def at_all_lengths(num_dense_rows: int, what: str, method: Method = method) -> Ratios:
            ratios = []
            for length in options.lengths:
                progress(f"{method.name}, {length} tokens{what}")
                layout = _layout(method, options.num_kv_heads, num_dense_rows)
                ratios.append((length, time_ratio(session, options.shape(length), layout)))
            return tuple(ratios)

        ratios = at_all_lengths(0, "")
        tokens = break_even_tokens(ratios)
        rows = ALWAYS_DENSE if tokens is None else tokens
        yield Measured(
            method=method,
            arch=architecture_name(session.device),
            tokens=tokens,
            ratios=ratios,
            deployed_ratios=at_all_lengths(rows, ", as deployed") if rows else ratios,
            options=options,
        )


def time_ratio(session: Session, shape: Shape, layout: AttentionLayout) -> float:
    """Time of the sparse forward over that of the fastest dense one.

    Measured twice, and the worse counts: single calls with a cold cache, and calls in a row, host time included.

    Raises:
        ValueError: if the sparse operator or every dense one failed.
    """
    dense = AttentionLayout.dense(shape.num_kv_heads)
    contenders: Sequence[Contender] = (session.ours(), *session.peers)
    entries = [
        Entry(contender=session.ours(), shape=shape, layout=layout, work="sparse"),
        *(Entry(contender=contender, shape=shape, layout=dense) for contender in contenders),
    ]
    worst = 0.0
    for clock in (session.clock, session.chain_clock):
        found = session.measure(CASE, entries, "forward", clock=clock)
        ours = next((m for m in found.values() if m.work == "sparse"), None)
        rivals = [m.ms for m in found.values() if m.work == "dense"]
        if ours is None or not rivals:
            reasons = "; ".join(f"{absence.contender}: {absence.reason}" for absence in session.absences[-3:])
            raise ValueError(f"nothing to compare at {shape.seq_len} tokens ({reasons}); `sparse-hf env` shows why")
        worst = max(worst, ours.ms / min(rivals))
    return worst


def write_break_even_table(path: Path, results: Sequence[Measured]) -> None:
    """Writes lengths into a file that `SPARSE_HF_BREAK_EVEN` can name, beside its other entries.

    Raises:
        ValueError: if the file holds something else.
    """
    identity = ("arch", "method", "parameters", "head_dim")
    merge_entries(path, [result.entry() for result in results], identity=identity, check=checked_entry)


def _layout(method: Method, num_kv_heads: int, num_dense_rows: int) -> AttentionLayout:
    """The method on every head."""
    config = SparseConfig(sparse=method, min_seq_len=num_dense_rows)
    return head_layout([method] * num_kv_heads, config, UNBOUNDED)
