"""The benchmark of methods: the prefill of each beside dense causal attention, what dynamic ones choose included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sparse_hf.bench.contenders import Contender, DynamicHF
from sparse_hf.bench.method_plan import MethodOptions
from sparse_hf.bench.peers import CUDNN, FLASH
from sparse_hf.bench.planted import planted_inputs
from sparse_hf.bench.runner import Benchmark, Step
from sparse_hf.bench.session import Entry, Measurement, Session
from sparse_hf.bench.workload import Shape
from sparse_hf.figures import Figure
from sparse_hf.methods import DynamicMethod, HeadPlace, Method
from sparse_hf_kernels import AttentionLayout

NAME = "methods"


def method_benchmark(options: MethodOptions, peers: Sequence[Contender] = (CUDNN, FLASH)) -> Benchmark:
    """The benchmark of these options, against peers that attend densely."""

    def steps(session: Session) -> list[Step]:
        def run(seq_len: int) -> list[Figure]:
            session.peers, session.inputs = peers, planted_inputs
            return measure_methods(session, options, options.shape(seq_len))

        return [
            Step(case=NAME, what=f"{seq_len} tokens", run=partial(run, seq_len=seq_len))
            for seq_len in options.lengths()
        ]

    return Benchmark(name=NAME, options=options, steps=steps, plots=lambda result, path: [])


def measure_methods(session: Session, options: MethodOptions, shape: Shape) -> list[Figure]:
    """All methods and the peers in turns at one length, the choices of dynamic ones then alone, and their figures."""
    entries = {name: _entry(session, name, method, shape) for name, method in options.chosen().items()}
    rivals = session.peer_entries(shape, AttentionLayout.dense(shape.num_kv_heads))
    found = session.measure(NAME, [*rivals, *entries.values()], "forward")
    choices = _choice_times(session, [entry for entry in entries.values() if entry.label in found])
    title = f"prefill of {shape.seq_len} tokens"
    dense = [found[rival.label] for rival in rivals if rival.label in found]
    cudnn = next((m.ms for m in dense if m.contender == CUDNN.name), None)
    figures = [figure for m in dense for figure in _figures(f"{title}, {m.contender}", m, cudnn, None)]
    for name, entry in entries.items():
        if entry.label in found:
            figures += _figures(f"{title}, {name}", found[entry.label], cudnn, choices.get(name))
    return figures


def _entry(session: Session, name: str, method: Method, shape: Shape) -> Entry:
    places = (HeadPlace(kv_head=head, num_kv_heads=shape.num_kv_heads) for head in range(shape.num_kv_heads))
    layout = AttentionLayout(patterns=tuple(method.pattern(place) for place in places))
    contender = session.ours()
    if isinstance(method, DynamicMethod):
        contender = DynamicHF(method=method, device=session.device.type)
    return Entry(contender=contender, shape=shape, layout=layout, work=name)


def _choice_times(session: Session, entries: Sequence[Entry]) -> dict[str, float]:
    """Milliseconds that dynamic methods take to choose, by the method's name."""
    dynamic = [entry for entry in entries if isinstance(entry.contender, DynamicHF)]
    if not dynamic:
        return {}
    q, k, _ = session.inputs(dynamic[0].shape, session.device)
    calls = {
        entry.work: partial(entry.contender.select, q, k, entry.layout)
        for entry in dynamic
        if isinstance(entry.contender, DynamicHF)
    }
    samples = session.time(f"{NAME}, selection alone", dynamic[0].shape, calls)
    return {name: sample.median for name, sample in samples.items()}


def _figures(title: str, m: Measurement, cudnn: float | None, choice: float | None) -> list[Figure]:
    """Density, time, that of the choice alone, and the speed-up over cuDNN."""
    figures = [
        Figure(case=f"{title}: density", value=100 * m.density, unit="%", lower_is_better=True),
        Figure(case=f"{title}: time", value=m.ms, unit="ms", lower_is_better=True, baseline=cudnn),
    ]
    if choice is not None:
        figures.append(Figure(case=f"{title}: selection alone", value=choice, unit="ms", lower_is_better=True))
    if cudnn is not None:
        name = f"{title}: speed-up over {CUDNN.name}"
        figures.append(Figure(case=name, value=cudnn / m.ms, unit="ratio", lower_is_better=False))
    return figures
