"""The benchmark of patterns: each beside dense attention, `torch.sparse` and FlexAttention, from 1K to 128K tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sparse_hf.bench.cases import CHECK_LEN
from sparse_hf.bench.contenders import Contender
from sparse_hf.bench.pattern_plan import Pattern, PatternOptions
from sparse_hf.bench.peers import CUDNN, FLASH, Flex
from sparse_hf.bench.report import plot_speedups
from sparse_hf.bench.runner import Benchmark, Result, Step
from sparse_hf.bench.session import Entry, Measurement, Session
from sparse_hf.bench.torch_sparse import TorchSparse
from sparse_hf.bench.workload import Direction, Shape
from sparse_hf.break_even import break_even_tokens
from sparse_hf.figures import Figure
from sparse_hf_kernels import AttentionLayout

NAME = "patterns"
SAME_TIME = 1.02
"""Ratio of two times that counts as no slower: the very kernel of a rival can serve short sequences."""

_DIRECTIONS: dict[Direction, str] = {"forward": "forward", "both": "forward + backward"}

Peers = Callable[[PatternOptions, Direction], Sequence[Contender]]


def pattern_peers(options: PatternOptions, direction: Direction) -> tuple[Contender, ...]:
    """Whom ours is compared with; `torch.sparse` has no backward here."""
    peers: tuple[Contender, ...] = (CUDNN, FLASH, Flex(options.flex_lengths(direction)))
    return (*peers, TorchSparse(options.torch_sparse_gib)) if direction == "forward" else peers


def pattern_benchmark(options: PatternOptions, peers: Peers = pattern_peers) -> Benchmark:
    """The benchmark of these options."""

    def steps(session: Session) -> list[Step]:
        def run(direction: Direction, seq_len: int) -> list[Figure]:
            session.peers = peers(options, direction)
            return measure_patterns(session, options, options.shape(seq_len), direction)

        measured = [
            Step(
                case=f"{NAME}-{direction}",
                what=f"{seq_len} tokens",
                run=partial(run, direction=direction, seq_len=seq_len),
            )
            for direction, seq_len in options.steps()
        ]
        concluded = Step(case="break-even", what="all lengths", run=lambda: break_even_figures(session, options))
        return [*measured, concluded]

    return Benchmark(name=NAME, options=options, steps=steps, plots=write_plots)


def measure_patterns(session: Session, options: PatternOptions, shape: Shape, direction: Direction) -> list[Figure]:
    """All patterns beside dense attention at one length, and their figures.

    `torch.sparse` takes its turns alone: a call of it can take as long as a thousand of the others.
    """
    dense = AttentionLayout.dense(shape.num_kv_heads)
    alone = [peer for peer in session.peers if peer.name == TorchSparse.name]
    beside = [peer for peer in session.peers if peer not in alone]
    together = [
        Entry(contender=peer, shape=shape, layout=dense) for peer in beside if peer.name in (CUDNN.name, FLASH.name)
    ]
    apart = []
    for pattern in options.chosen():
        layout = pattern.layout(shape.num_kv_heads, shape.seq_len)
        ours = Entry(
            contender=session.ours(),
            shape=shape,
            layout=layout,
            work=pattern.title,
            check=_check_problem(pattern, shape, layout),
        )
        others = [peer for peer in beside if peer.name not in (CUDNN.name, FLASH.name)]
        together += [ours, *(replace(ours, contender=peer, check=None) for peer in others)]
        apart += [replace(ours, contender=peer, check=None) for peer in alone]
    case = f"{NAME}-{direction}"
    found = [*session.measure(case, together, direction).values(), *session.measure(case, apart, direction).values()]
    rivals = [m for m in found if m.work == "dense"]
    title = _title("dense causal", direction, shape)
    figures = [*(_time_figure(title, m) for m in rivals), *_memory_figures(title, rivals)]
    for pattern in options.chosen():
        same = [m for m in found if m.work == pattern.title]
        must = options.must(pattern, direction, shape.seq_len)
        figures += _pattern_figures(_title(pattern.title, direction, shape), same, rivals, must)
    return figures


def _check_problem(pattern: Pattern, shape: Shape, layout: AttentionLayout) -> tuple[Shape, AttentionLayout]:
    """A short problem for the backward, on which the pattern leaves something out."""
    seq_len = min(shape.seq_len, layout.dense_len + CHECK_LEN)
    return replace(shape, seq_len=seq_len), pattern.layout(shape.num_kv_heads, seq_len)


def _title(what: str, direction: Direction, shape: Shape) -> str:
    return f"{what} {_DIRECTIONS[direction]}, {shape.seq_len} tokens"


def _pattern_figures(
    title: str, found: Sequence[Measurement], dense: Sequence[Measurement], must: float | None
) -> list[Figure]:
    """Density, times, the speed-up over cuDNN and memory."""
    if not found:
        return []
    own = next((m.ms for m in found if m.is_ours), None)
    cudnn = next((m.ms for m in dense if m.contender == CUDNN.name), None)
    figures = [Figure(case=f"{title}: density", value=100 * found[0].density, unit="%", lower_is_better=True)]
    figures += [_time_figure(title, m, cudnn if m.is_ours else None) for m in found]
    if own is not None and cudnn is not None:
        name = f"{title}: speed-up over {CUDNN.name}"
        figures.append(Figure(case=name, value=cudnn / own, unit="ratio", lower_is_better=False, must=must))
    return [*figures, *_memory_figures(title, found)]


def _time_figure(title: str, m: Measurement, baseline: float | None = None) -> Figure:
    return Figure(case=f"{title}: {m.contender}", value=m.ms, unit="ms", lower_is_better=True, baseline=baseline)


def _memory_figures(title: str, found: Sequence[Measurement]) -> list[Figure]:
    """Memory beyond the inputs, where the device counts it."""
    return [
        Figure(case=f"{title}: memory of {m.contender}", value=m.peak_mib, unit="MiB", lower_is_better=True)
        for m in found
        if m.peak_mib is not None
    ]


def break_even_figures(session: Session, options: PatternOptions) -> list[Figure]:
    """Per pattern and direction the shortest length from which ours is never slower than the best dense attention.

    Of the lengths measured, and within `SAME_TIME`. A pattern that is slower at the longest one is noted as absent.
    """
    figures = []
    for direction, words in _DIRECTIONS.items():
        ms = [m for m in session.measurements if m.case == f"{NAME}-{direction}"]
        rivals = [m for m in ms if m.work == "dense"]
        names = ", ".join(dict.fromkeys(m.contender for m in rivals))
        for pattern in options.chosen():
            ratios = [
                (m.shape.seq_len, m.ms / min(rival.ms for rival in rivals if rival.shape == m.shape))
                for m in ms
                if m.is_ours and m.work == pattern.title and any(rival.shape == m.shape for rival in rivals)
            ]
            if not ratios:
                continue
            tokens = break_even_tokens(ratios, SAME_TIME)
            if tokens is None:
                session.miss(
                    "break-even", f"{pattern.title} {words}", "slower than dense at the longest length measured"
                )
                continue
            title = f"{pattern.title} {words}: break-even length against the best of {names}"
            value = float(tokens or min(seq_len for seq_len, _ in ratios))
            figures.append(Figure(case=title, value=value, unit="tokens", lower_is_better=True))
    return figures


def write_plots(result: Result, path: Path) -> list[Path]:
    """Writes the speed-up over cuDNN by length, if there is any."""
    written = plot_speedups(path.with_name(f"{path.name}_speedup.png"), result.session.measurements, CUDNN.name)
    return [written] if written else []
