"""`tune_break_even`: from which length on a method's attention takes no longer than dense attention on this GPU.

All methods are timed side by side, beside the same dense attentions, from the longest length down. A method that is
slower than dense somewhere is left out of the shorter lengths, whose outcome could not change its length any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_hf.bench.method_plan import METHODS
from sparse_hf.bench.peers import CUDNN, FLASH
from sparse_hf.bench.planted import MIN_HEAD_DIM, planted_inputs
from sparse_hf.bench.session import Session
from sparse_hf.bench.timing import CudaClock
from sparse_hf.bench.workload import Shape, make_inputs
from sparse_hf.break_even import ALWAYS_DENSE, architecture_name, break_even_tokens, checked_entry
from sparse_hf.methods import Dense, DynamicMethod, Method, available_methods, method_from_dict
from sparse_hf.tune.ratios import CASE, Job, dense_len, time_ratios
from sparse_hf.tune.table import merge_entries, provenance
from sparse_hf_kernels.tuned import DTYPES

LENGTHS = tuple(256 << power for power in range(8))
UNIT = 128
"""Lengths are multiples of it, so that the dense prefix cuts no block of a list."""
CHAIN_CALLS = 10
ALL = "all"
DEPLOYED_LIMIT = 1.02
"""With the queries before a method's break-even length dense, a layer may take so many times a dense layer's time: the
fastest one's, or ours where that is slower, since more dense rows of ours cannot mend it."""
OWN_DENSE = "our dense"

Progress = Callable[[str], object]
Ratios = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class BreakEvenOptions:
    """What is measured.

    Args:
        methods: each by itself on every head; by default all that need no parameters of the user's. Attention is
            measured on inputs with the structure that dynamic ones look for.
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
    budget_ms: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", self.methods or measurable_methods())
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not self.lengths or any(length < UNIT or length % UNIT for length in self.lengths):
            raise ValueError(f"lengths must be positive multiples of {UNIT}, got {list(self.lengths)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self.shape(self.lengths[0])
        for method in self.methods:
            if isinstance(method, Dense):
                raise ValueError("dense has no break-even length: it is what others are compared with")
            if isinstance(method, DynamicMethod):
                method.check_heads(self.num_heads)
            dense_len(method, self.num_kv_heads)

    def shape(self, seq_len: int) -> Shape:
        return Shape(
            seq_len=seq_len,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
        )

    @property
    def labels(self) -> dict[str, Method]:
        """The methods by their names, and their parameters where several have one name."""
        names = [method.name for method in self.methods]
        return {
            method.name if names.count(method.name) == 1 else json.dumps(method.to_dict()): method
            for method in self.methods
        }

    @property
    def num_steps(self) -> int:
        """About how often `tune_break_even` calls `progress`: the end depends on what it finds."""
        return len(self.lengths) + 6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method's break-even length.

    Args:
        method: with its parameters.
        arch: such as "sm_90".
        tokens: see `BreakEven`.
        ratios: time of the sparse operator, selection included, over that of the best dense one, by length; of the
            lengths at which it is sparse, from the longest down to the first at which it is slower.
        deployed_ratios: the same of a layer, attention and matrix products, with the queries below `tokens` dense, as
            `min_seq_len: auto` runs: at the shortest length, where sparsity begins, just after it, and up to twice as
            long.
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
        return max(self.deployed_ratios or self.ratios, key=lambda pair: pair[1])

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
    """The methods that need no parameters of the user's, static and dynamic."""
    found = []
    for cls in available_methods().values():
        if cls is Dense:
            continue
        try:
            found.append(cls())
        except ValueError:  # it asks for parameters
            continue
    return tuple(found)


def method_of(text: str) -> Method:
    """A method by its name, by that of a variant as `sparse-hf bench methods` has them, or by JSON such as
    `{"method": "streaming", "window_size": 4096}`.

    Raises:
        ValueError: if it is none of them.
    """
    if not text.lstrip().startswith("{"):
        return METHODS[text] if text in METHODS else method_from_dict(text)
    try:
        return method_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"--method takes a name or a JSON object, got {text!r} ({error})") from error


def methods_of(texts: Sequence[str]) -> tuple[Method, ...]:
    """Methods as `method_of` reads them, "all" being `measurable_methods`; each once.

    Raises:
        ValueError: as `method_of`.
    """
    found = [method for text in texts for method in (measurable_methods() if text == ALL else (method_of(text),))]
    return tuple(dict.fromkeys(found))


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
        peers=(CUDNN, FLASH),
        budget_ms=options.budget_ms,
        inputs=planted_inputs if options.head_dim >= MIN_HEAD_DIM else make_inputs,
    )


@dataclass(kw_only=True)
class _Search:
    """What is known of one method."""

    label: str
    method: Method
    always_dense: int
    ratios: dict[int, float] = field(default_factory=dict)
    deployed: dict[int, float] = field(default_factory=dict)
    own_dense: dict[int, float] = field(default_factory=dict)
    tokens: int | None = None
    failed: bool = False

    @property
    def num_dense_rows(self) -> int:
        return ALWAYS_DENSE if self.tokens is None else self.tokens

    @property
    def start(self) -> int:
        """Tokens of the longest sequence that is dense as a whole, if any is sparse."""
        return max(self.tokens or 0, self.always_dense)

    def note(self, ratios: dict[int, float], length: int, found: Mapping[str, float]) -> None:
        if self.label in found:
            ratios[length] = found[self.label]
        else:
            self.failed = True

    def is_open(self) -> bool:
        """It ran, and was no slower, at every length yet."""
        return not self.failed and all(ratio <= 1 for ratio in self.ratios.values())

    def probes(self, lengths: Sequence[int]) -> list[int]:
        """Where what is deployed is measured: around the length from which on it is sparse, and far from it."""
        wanted = {lengths[0], lengths[-1]}
        if self.tokens is not None:
            wanted = {lengths[0], *(-(-tokens // UNIT) * UNIT for tokens in self._around())}
        return [length for length in sorted(wanted) if lengths[0] <= length <= lengths[-1]]

    def _around(self) -> tuple[int, ...]:
        return self.start, self.start + 1, self.start * 3 // 2, 2 * self.start

    @property
    def suspect(self) -> list[int]:
        """Lengths beyond its start at which what is deployed seems to take too long."""
        if self.tokens is None:
            return []
        return [length for length, ratio in self.deployed.items() if length > self.start and ratio > DEPLOYED_LIMIT]

    @property
    def slow(self) -> list[int]:
        """Those of them at which it does, where our dense attention is no slower than the peers'."""
        return [n for n in self.suspect if self.deployed[n] > DEPLOYED_LIMIT * max(1.0, self.own_dense.get(n, 1.0))]

    def settle(self, lengths: Sequence[int]) -> bool:
        """Whether what is deployed is fast enough; else it starts at the next length."""
        if not self.slow:
            return True
        self.tokens = next((length for length in lengths if length > self.start), None)
        self.deployed = {}
        return False


def tune_break_even(
    options: BreakEvenOptions, session: Session, *, progress: Progress = lambda text: None
) -> Iterator[Measured]:
    """Every method's break-even length, in the order of the options.

    A method that cannot run at some length is left out; the session's absences say why.

    Args:
        options: what is measured.
        session: where; its peers are the dense attentions that ours has to beat besides itself.
        progress: called with a line before each measurement.

    Raises:
        ValueError: if no method or no dense attention could run.
    """
    searches = [
        _Search(label=label, method=method, always_dense=dense_len(method, options.num_kv_heads))
        for label, method in options.labels.items()
    ]
    for length in reversed(options.lengths):
        # Where a method reads every key it is no slower than dense, being dense.
        open_ones = [search for search in searches if search.is_open() and length > search.always_dense]
        if open_ones:
            progress(f"{options.head_dim}, {length} tokens, {len(open_ones)} methods")
            jobs = {search.label: (search.method, 0) for search in open_ones}
            found = time_ratios(session, options.shape(length), jobs)
            for search in open_ones:
                search.note(search.ratios, length, found)
    for search in searches:
        if not search.failed and not search.ratios:
            session.miss(CASE, search.label, f"reads every key of up to {search.always_dense} tokens")
        search.tokens = break_even_tokens(list(search.ratios.items()))
    done = [search for search in searches if search.ratios and not search.failed]
    _deploy(done, options, session, progress)
    done = [search for search in done if not search.failed]
    if not done:
        reasons = "; ".join(f"{absence.contender}: {absence.reason}" for absence in session.absences[-3:])
        raise ValueError(f"no method could be measured ({reasons}); `sparse-hf env` shows why")
    for search in done:
        yield Measured(
            method=search.method,
            arch=architecture_name(session.device),
            tokens=search.tokens,
            ratios=tuple(sorted(search.ratios.items())),
            deployed_ratios=tuple(sorted(search.deployed.items())),
            options=options,
        )


def _deploy(searches: Sequence[_Search], options: BreakEvenOptions, session: Session, progress: Progress) -> None:
    """Measures what is deployed, and raises the lengths until it is fast enough."""
    unsettled = list(searches)
    while unsettled:
        _probe(unsettled, lambda search: search.probes(options.lengths), options, session, progress)
        # Clocks sink under load: what seems too slow is measured again, and the better time counts.
        _probe([search for search in unsettled if not search.failed], lambda s: s.suspect, options, session, progress)
        unsettled = [search for search in unsettled if not search.failed and not search.settle(options.lengths)]


def _probe(
    searches: Sequence[_Search],
    lengths: Callable[[_Search], Sequence[int]],
    options: BreakEvenOptions,
    session: Session,
    progress: Progress,
) -> None:
    """Measures what is deployed at the lengths of each; beside an earlier measurement the better counts."""
    wanted = {search.label: lengths(search) for search in searches}
    for length in sorted({length for found in wanted.values() for length in found}):
        here = [search for search in searches if length in wanted[search.label]]
        progress(f"{options.head_dim}, {length} tokens, {len(here)} methods as deployed")
        jobs: dict[str, Job] = {search.label: (search.method, search.num_dense_rows) for search in here}
        jobs[OWN_DENSE] = (Dense(), 0)
        found = time_ratios(session, options.shape(length), jobs, in_layer=True)
        for search in here:
            # Of ours the better time counts too: a slow call of it must not widen the limit.
            search.own_dense[length] = min(search.own_dense.get(length, math.inf), found.get(OWN_DENSE, 1.0))
            earlier = search.deployed.get(length, math.inf)
            search.note(search.deployed, length, found)
            search.deployed[length] = min(search.deployed.get(length, math.inf), earlier)


def write_break_even_table(path: Path, results: Sequence[Measured]) -> None:
    """Writes lengths into a file that `SPARSE_HF_BREAK_EVEN` can name, beside its other entries.

    Raises:
        ValueError: if the file holds something else.
    """
    identity = ("arch", "method", "parameters", "head_dim")
    merge_entries(path, [result.entry() for result in results], identity=identity, check=checked_entry)
