"""The cases: who runs against whom, and which figures follow. One function per case and length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from sparse_hf.bench import plan
from sparse_hf.bench.check import MAX_RELATIVE_ERROR, WrongResultError, relative_error
from sparse_hf.bench.peers import FlashAttention4, Sdpa
from sparse_hf.bench.plan import Bound, Options
from sparse_hf.bench.session import Entry, Measurement, Session
from sparse_hf.bench.workload import (
    NUM_SINK_TOKENS,
    Direction,
    Shape,
    make_inputs,
    random_blocks,
    streaming,
    uniform,
)
from sparse_hf.figures import Figure
from sparse_hf_kernels import AttentionLayout, HeadPattern, sparse_attention

Found = dict[str, Measurement]
CHECK_LEN = 1153  # no multiple of any block, and short enough for fp32 scores
XATTENTION_STRIDE, XATTENTION_MASS = 16, 0.9


def ratio_figure(
    title: str, value: float, bound: Bound | None, *, lower_is_better: bool, unit: str = "ratio"
) -> Figure:
    return Figure(
        case=title,
        value=value,
        unit=unit,
        lower_is_better=lower_is_better,
        must=bound.must if bound else None,
        goal=bound.goal if bound else None,
    )


def rate_figures(title: str, ours: Measurement, rivals: Iterable[Measurement], bound: Bound | None) -> list[Figure]:
    """Useful TFLOP/s beside the best rival's, and the ratio of the two; the ratio's title names all rivals."""
    rivals = list(rivals)
    best = max((rival.tflops for rival in rivals), default=None)
    figures = [Figure(case=title, value=ours.tflops, unit="TFLOP/s", lower_is_better=False, baseline=best)]
    if best is not None:
        names = ", ".join(rival.contender for rival in rivals)
        against = f"the best of {names}" if len(rivals) > 1 else names
        figures.append(
            ratio_figure(f"{title}: rate against {against}", ours.tflops / best, bound, lower_is_better=False)
        )
    return figures


def time_figures(
    title: str, value_ms: float, baseline_ms: float, against: str, bound: Bound | None, unit: str = "ratio"
) -> list[Figure]:
    """Milliseconds beside the baseline's, and their ratio."""
    return [
        Figure(case=title, value=value_ms, unit="ms", lower_is_better=True, baseline=baseline_ms),
        ratio_figure(
            f"{title}: time against {against}", value_ms / baseline_ms, bound, lower_is_better=True, unit=unit
        ),
    ]


def _title(what: str, shape: Shape) -> str:
    return f"{what}, {shape.seq_len} tokens, head_dim {shape.head_dim}"


def _ours(found: Found, work: str) -> Measurement | None:
    return next((m for m in found.values() if m.is_ours and m.work == work), None)


def _peers(found: Found, work: str, *names: str) -> list[Measurement]:
    return [m for m in found.values() if not m.is_ours and m.work == work and (not names or m.contender in names)]


def dense(session: Session, options: Options, shape: Shape, direction: Direction) -> list[Figure]:
    """Dense causal attention against every peer; the bound is on the best of cuDNN and flash-attn-4."""
    case = f"dense-{direction}"
    layout = AttentionLayout.dense(shape.num_kv_heads)
    check = (replace(shape, seq_len=min(shape.seq_len, CHECK_LEN)), layout)
    ours = Entry(contender=session.ours(), shape=shape, layout=layout, check=check)
    found = session.measure(case, [ours, *session.peer_entries(shape, layout)], direction)
    if (own := _ours(found, "dense")) is None:
        return []
    bound = plan.DENSE_FORWARD if direction == "forward" else plan.DENSE_BACKWARD
    return rate_figures(
        _title(f"dense causal {direction}", shape),
        own,
        _peers(found, "dense", "SDPA cuDNN", "flash-attn-4"),
        options.bound(bound, case, shape.seq_len, shape.head_dim),
    )


def streaming_heads(session: Session, options: Options, shape: Shape, direction: Direction) -> list[Figure]:
    """Sinks and a window, against FlexAttention with the same keys and flash-attn-4's window without the sinks."""
    case = f"streaming-{direction}"
    bounds = plan.STREAMING_FORWARD if direction == "forward" else plan.STREAMING_BACKWARD
    figures = []
    for window in plan.WINDOWS if direction == "forward" else tuple(bounds):
        work, plain = f"{NUM_SINK_TOKENS} sinks + W={window}", f"W={window}"
        layout = uniform(streaming(window), shape.num_kv_heads)
        check = (replace(shape, seq_len=min(shape.seq_len, window + CHECK_LEN)), layout)
        entries = [
            Entry(contender=session.ours(), shape=shape, layout=layout, work=work, check=check),
            *session.peer_entries(shape, layout, work),
            *session.peer_entries(shape, uniform(HeadPattern(window=window), shape.num_kv_heads), plain),
        ]
        found = session.measure(case, _able(entries, work, plain), direction)
        if (own := _ours(found, work)) is None:
            continue
        title = _title(f"streaming {work} {direction}", shape)
        figures += rate_figures(title, own, _peers(found, work), None)
        for rival in _peers(found, plain, "flash-attn-4"):
            bound = options.bound(bounds[window], case, shape.seq_len, shape.head_dim)
            figures += time_figures(title, own.ms, rival.ms, f"flash-attn-4's {plain} without sinks", bound)
    return figures


def _able(entries: list[Entry], sinks: str, plain: str) -> list[Entry]:
    """Leaves out lines that no one asks for: SDPA has no window, and each other peer serves one of the two."""
    serves = {"FlexAttention": sinks, "flash-attn-4": plain}
    return [
        entry
        for entry in entries
        if entry.is_ours
        or serves.get(entry.contender.name, entry.work if not isinstance(entry.contender, Sdpa) else "") == entry.work
    ]


def blocks(session: Session, options: Options, shape: Shape, direction: Direction) -> list[Figure]:
    """Random 128-blocks, own lists per KV head: the share of our own dense rate that each density keeps."""
    case = f"blocks-{direction}"
    short = replace(shape, seq_len=min(shape.seq_len, CHECK_LEN))
    full = AttentionLayout.dense(shape.num_kv_heads)
    entries = [Entry(contender=session.ours(), shape=shape, layout=full, check=(short, full))]
    for keep in plan.KEEPS:
        layout = random_blocks(shape.num_kv_heads, shape.seq_len, keep)
        check = (short, random_blocks(shape.num_kv_heads, short.seq_len, keep))
        work = f"keep {keep:.0%}"
        entries.append(Entry(contender=session.ours(), shape=shape, layout=layout, work=work, check=check))
        peers = session.peer_entries(shape, layout, work)
        entries += [entry for entry in peers if not isinstance(entry.contender, Sdpa | FlashAttention4)]
    found = session.measure(case, entries, direction)
    own_dense = _ours(found, "dense")
    bounds = plan.BLOCKS_FORWARD if direction == "forward" else plan.BLOCKS_BACKWARD
    figures = []
    for keep in plan.KEEPS:
        work = f"keep {keep:.0%}"
        if (own := _ours(found, work)) is None:
            continue
        title = _title(f"random 128-blocks {work} {direction}", shape)
        figures += rate_figures(title, own, _peers(found, work), None)
        if own_dense is not None:
            bound = options.bound(bounds[keep], case, shape.seq_len, shape.head_dim)
            value = own.tflops / own_dense.tflops
            figures.append(
                ratio_figure(f"{title}: share of own dense rate", value, bound, lower_is_better=False, unit="share")
            )
    return figures


def mixed_heads(session: Session, options: Options, shape: Shape) -> list[Figure]:
    """Half the KV heads dense, half streaming, in one launch, against the sum of its halves run alone."""
    half = shape.num_kv_heads // 2
    part = shape.with_kv_heads(half)
    stream = streaming(plan.WINDOWS[0])
    mixed = AttentionLayout(patterns=(HeadPattern(), stream) * half)
    entries = [
        Entry(contender=session.ours(), shape=shape, layout=mixed, work="half dense, half streaming"),
        Entry(contender=session.ours(), shape=part, layout=AttentionLayout.dense(half), work="its dense heads"),
        Entry(contender=session.ours(), shape=part, layout=uniform(stream, half), work="its streaming heads"),
    ]
    found = session.measure("mixed-heads", entries, "forward")
    if len(found) < len(entries):
        return []
    whole, *parts = (found[entry.label] for entry in entries)
    bound = options.bound(plan.MIXED_HEADS, "mixed-heads", shape.seq_len, shape.head_dim)
    title = _title("half the heads dense, half streaming, forward", shape)
    return time_figures(title, whole.ms, sum(m.ms for m in parts), "the sum of its parts alone", bound)


def two_branch(session: Session, options: Options, shape: Shape) -> list[Figure]:
    """Mask learning, forward and backward, against own dense forward and backward."""
    full = AttentionLayout.dense(shape.num_kv_heads)
    window = plan.WINDOWS[0]
    stream = uniform(streaming(window), shape.num_kv_heads)
    short = replace(shape, seq_len=min(shape.seq_len, window + CHECK_LEN))
    entries = [
        Entry(contender=session.mixed(), shape=shape, layout=stream, work="two branches", check=(short, stream)),
        Entry(contender=session.ours(), shape=shape, layout=full, check=(short, full)),
    ]
    found = session.measure("two-branch", entries, "both")
    if len(found) < len(entries):
        return []
    both, own = (found[entry.label] for entry in entries)
    bound = options.bound(plan.TWO_BRANCH, "two-branch", shape.seq_len, shape.head_dim)
    title = _title(f"two-branch mask learning (W={window}), forward + backward", shape)
    return time_figures(title, both.ms, own.ms, "own dense forward + backward", bound)


def xattention_case(session: Session, options: Options, shape: Shape) -> list[Figure]:
    """XAttention's scores and the selection of blocks, against own dense forward."""
    from sparse_hf_kernels.scoring import select_top_p, xattention_block_mass

    q, k, v = (x.detach() for x in make_inputs(shape, session.device))
    layout = AttentionLayout.dense(shape.num_kv_heads)
    if reason := session.ours().refuses(shape, layout):
        session.miss("xattention", "sparse_hf, dense", reason)
        return []

    def score() -> object:
        mass = xattention_block_mass(q, k, stride=XATTENTION_STRIDE, block_size=128)
        return select_top_p(mass, XATTENTION_MASS)

    def score_checked() -> None:
        x, y = (t[:, :, : CHECK_LEN + 200].contiguous() for t in (q, k))
        truth = xattention_block_mass(x, y, stride=XATTENTION_STRIDE, block_size=128, backend="naive")
        error = relative_error(xattention_block_mass(x, y, stride=XATTENTION_STRIDE, block_size=128), truth)
        if not error <= MAX_RELATIVE_ERROR[shape.dtype]:
            raise WrongResultError(f"wrong: block masses differ by {error:.2e}")

    if not session.attempt("xattention", "scoring + selection", score_checked):
        return []
    calls = {"scoring + selection": score, "sparse_hf, dense": lambda: sparse_attention(q, k, v, layout)}
    samples = session.time("xattention", shape, calls)
    if len(samples) < len(calls):
        return []
    bound = options.bound(plan.XATTENTION, "xattention", shape.seq_len, shape.head_dim)
    title = _title(f"XAttention scoring + selection, stride {XATTENTION_STRIDE}", shape)
    own = samples["sparse_hf, dense"].median
    return time_figures(title, samples["scoring + selection"].median, own, "own dense forward", bound, unit="share")


def overhead(session: Session, options: Options, shape: Shape) -> list[Figure]:
    """Short inputs, calls in a row with the host's time in them: the sparse op with a dense layout against SDPA."""
    layout = AttentionLayout.dense(shape.num_kv_heads)
    entries = [
        Entry(contender=session.ours(), shape=shape, layout=layout),
        Entry(contender=Sdpa("SDPA"), shape=shape, layout=layout),
    ]
    found = session.measure("overhead", entries, "forward", clock=session.chain_clock)
    if len(found) < len(entries):
        return []
    own, sdpa = (found[entry.label] for entry in entries)
    bound = options.bound(plan.OVERHEAD, "overhead", shape.seq_len, shape.head_dim)
    title = _title("sparse op with a dense layout, calls in a row", shape)
    return time_figures(title, own.ms, sdpa.ms, "SDPA as torch chooses", bound)


def triton_dense(session: Session, options: Options, shape: Shape) -> list[Figure]:
    """The portable Triton kernels on this GPU, dense forward, against cuDNN."""
    layout = AttentionLayout.dense(shape.num_kv_heads)
    cudnn = [peer for peer in session.peers if peer.name == "SDPA cuDNN"]
    entries = [Entry(contender=contender, shape=shape, layout=layout) for contender in (session.ours("triton"), *cudnn)]
    found = session.measure("triton-dense", entries, "forward")
    if (own := _ours(found, "dense")) is None:
        return []
    bound = options.bound(plan.TRITON, "triton-dense", shape.seq_len, shape.head_dim)
    title = _title("portable Triton, dense causal forward", shape)
    return rate_figures(title, own, _peers(found, "dense"), bound)


def matmul_ceiling(session: Session) -> list[Figure]:
    """What a plain bf16 product reaches in this run; no attention can do more."""
    size = session.matmul_size
    a, b = (torch.randn(size, size, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    samples = session.time("matmul", None, {"matmul": lambda: a @ b})
    if not samples:
        return []
    session.matmul_tflops = 2 * size**3 / samples["matmul"].median / 1e9
    title = f"matmul {size} x {size} x {size} bf16, the ceiling of this run"
    return [Figure(case=title, value=session.matmul_tflops, unit="TFLOP/s", lower_is_better=False)]


RUN: dict[str, Callable[[Session, Options, Shape], list[Figure]]] = {
    "dense-forward": lambda s, o, shape: dense(s, o, shape, "forward"),
    "dense-backward": lambda s, o, shape: dense(s, o, shape, "backward"),
    "streaming-forward": lambda s, o, shape: streaming_heads(s, o, shape, "forward"),
    "streaming-backward": lambda s, o, shape: streaming_heads(s, o, shape, "backward"),
    "blocks-forward": lambda s, o, shape: blocks(s, o, shape, "forward"),
    "blocks-backward": lambda s, o, shape: blocks(s, o, shape, "backward"),
    "mixed-heads": mixed_heads,
    "two-branch": two_branch,
    "xattention": xattention_case,
    "overhead": overhead,
    "triton-dense": triton_dense,
}
"""By name, in the order of `plan.CASES`."""
