"""The fused decode step and the storing kernel on a GPU, against the words of `HeadStorage`."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels.kv_cache import (
    HeadStorage,
    KVDtype,
    KVStorage,
    StorageLayout,
    decode_attention,
    kernels_refuse,
    launch,
    store_tokens,
)
from sparse_hf_kernels.kv_cache.decode_kernel import _decode_kernel
from sparse_hf_kernels.kv_cache.naive import decode_naive
from sparse_hf_kernels.testing import assert_close_to_truth, parts_left

pytestmark = pytest.mark.gpu

EPS = {torch.float32: 5e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}
RING = HeadStorage(recent=1023, num_sink_tokens=64)
MIXED = StorageLayout(heads=(HeadStorage(), RING, HeadStorage(window=300, num_sink_tokens=70), RING))
LAYOUTS = {
    "mixed": MIXED,
    "small rings": StorageLayout(
        heads=(
            HeadStorage(recent=5, num_sink_tokens=2),
            HeadStorage(recent=0),
            HeadStorage(recent=0, num_sink_tokens=3),
        )
    ),
    "dense rows": StorageLayout(heads=(HeadStorage(window=300, num_sink_tokens=4), HeadStorage()), num_dense_rows=2048),
    "native window": StorageLayout(heads=(HeadStorage(), HeadStorage(recent=255, num_sink_tokens=4)), max_distance=512),
}
RAGGED = [(0, 1, 63), (64, 65, 4097), (1086, 1087, 1088, 5000), (131072, 0)]
CHUNK = 16384


class Case:
    """A filled storage, poisoned wherever nothing is held, and its history."""

    def __init__(
        self,
        layout: StorageLayout,
        lengths: tuple[int, ...],
        group: int,
        dim: int,
        dtype: torch.dtype,
        kv_dtype: KVDtype | None,
        history: Any,
        new_tokens: Callable[..., list[Tensor]],
        room: int = 8,
    ) -> None:
        self.batch, self.num_heads, self.scale = len(lengths), len(layout.heads), dim**-0.5
        self.shape, self.dtype, self._new = (group, dim), dtype, new_tokens
        self.storage = KVStorage(
            layout, batch=self.batch, head_dim=dim, value_dim=dim, dtype=dtype, device=torch.device("cuda"),
            capacity=max(lengths) + room, kv_dtype=kv_dtype,
        )  # fmt: skip
        self.parts: list[int] = []  # that were merged for each row, in the last step
        assert kernels_refuse(self.storage, self.storage.keys.device) is None
        for x in self.storage.tensors():
            if x.is_floating_point() and x.element_size() > 1:
                x.fill_(float("nan"))
        self.history = history(layout, self.batch, kv_dtype)
        ends = torch.tensor(lengths, device="cuda")[:, None]
        for begin in range(0, max(1, *lengths), CHUNK):
            positions = torch.arange(begin, min(begin + CHUNK, max(1, *lengths)), device="cuda")
            real = positions < ends
            k, v = self.new(len(positions))[1:]
            store_tokens(self.storage, k, v, positions=torch.where(real, positions, -1))
            self.history.add(k, v, real)

    def new(self, length: int = 1) -> list[Tensor]:
        group, dim = self.shape
        return self._new(self.batch, self.num_heads, length, dim, self.dtype, group, "cuda")

    def valid(self, step: int) -> Tensor | None:
        return None if step % 2 else torch.rand(self.batch, device="cuda") > 0.3

    def check(self, steps: int = 4) -> None:
        """Steps by the kernel against fp64, beside the same computed in the tested precision."""
        work = None
        for step in range(steps):
            (q, k, v), valid = self.new(), self.valid(step)
            rows = torch.ones(self.batch, dtype=torch.bool, device="cuda") if valid is None else valid
            truth, same = (
                self.history.attend(q, k, v, rows, self.scale, dtype) for dtype in (torch.float64, self.dtype)
            )
            out, work = decode_attention(q, k, v, self.storage, scale=self.scale, valid=valid, work=work)
            assert out.dtype == self.dtype and work is not None
            self.parts = parts_left(work.counters)
            assert out.isfinite().all() and not out[~rows].any()
            assert_close_to_truth(out, same, truth, eps=EPS[self.dtype], name=f"step {step}")
            self.history.add(k, v, rows[:, None])
            assert self.storage.lengths.tolist() == self.history.lengths()


@pytest.fixture
def make_case(kv_history: Any, new_tokens: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)

    def make(
        layout: StorageLayout = MIXED,
        lengths: tuple[int, ...] = (64, 65, 4097),
        group: int = 4,
        dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: KVDtype | None = None,
        room: int = 8,
    ) -> Case:
        if kv_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("8-bit floats need compute capability 8.9")
        return Case(layout, lengths, group, dim, dtype, kv_dtype, kv_history, new_tokens, room)

    return make


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_ragged_lengths(make_case: Callable, lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    make_case(lengths=lengths, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("lengths", RAGGED[:3], ids=str)
def test_layouts(make_case: Callable, name: str, lengths: tuple[int, ...]) -> None:
    make_case(LAYOUTS[name], lengths).check()


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_groups_and_dims(make_case: Callable, group: int, dim: int) -> None:
    make_case(lengths=(65, 4097), group=group, dim=dim).check()


@pytest.mark.parametrize("dim", [80, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dims_in_other_precisions(make_case: Callable, dim: int, dtype: torch.dtype) -> None:
    make_case(lengths=(65, 4097), dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize(("group", "dim"), [(4, 128), (7, 80), (1, 64), (8, 256)])
def test_eight_bits(make_case: Callable, kv_dtype: KVDtype, lengths: tuple[int, ...], group: int, dim: int) -> None:
    """Against the same tokens after 8 bits and back: what the kernel adds is the precision's."""
    make_case(lengths=lengths, group=group, dim=dim, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_the_kernels_store_what_plain_torch_does(make_case: Callable, kv_dtype: KVDtype | None) -> None:
    """Prefill by the kernel or not, and then steps of either: the same tokens in the same slots."""
    case = make_case(lengths=(1087, 1500, 40), kv_dtype=kv_dtype)
    plain = copy.deepcopy(case.storage)
    work = None
    for step in range(3):
        (q, k, v), valid = case.new(), case.valid(step)
        _, work = decode_attention(q, k, v, case.storage, scale=case.scale, valid=valid, work=work)
        decode_naive(q, k, v, plain, scale=case.scale, valid=valid, dtype=torch.float32)
    assert torch.equal(case.storage.state, plain.state)
    for group in plain.layout.groups:
        everything = (0, group.slots(plain.capacity))
        for one, other in zip(case.storage.read(group, everything), plain.read(group, everything), strict=True):
            mine, theirs = one[0].nan_to_num(0.0).float(), other[0].nan_to_num(0.0).float()
            # A division that rounds in another way moves a number by a step of its 8 bits.
            allowed = 0.0 if kv_dtype is None else 1e-3 * theirs.norm()
            assert theirs.any() and (mine - theirs).norm() <= allowed


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("length", [0, 129, 1000, 3300, 32768])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (8, 256)])
def test_heads_that_many_programs_share(make_case: Callable, heads: int, length: int, group: int, dim: int) -> None:
    """In fp32, where a part that was read too early, or left out, shows; from one part to rounds of them."""
    layout = StorageLayout(heads=(HeadStorage(),) * heads)
    case = make_case(layout, (length,), group=group, dim=dim, dtype=torch.float32)
    case.check(3)
    if length == 32768:
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        assert min(case.parts) >= processors // heads


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_bits_repeat(make_case: Callable, kv_dtype: KVDtype | None) -> None:
    """Programs merge in whatever order they arrive, and sum in a fixed one."""
    case = make_case(lengths=(5000, 131, 20000), kv_dtype=kv_dtype, room=64)
    tokens = [(*case.new(), case.valid(step)) for step in range(50)]
    runs = []
    for storage in (case.storage, copy.deepcopy(case.storage)):
        work, outs = None, []
        for q, k, v, valid in tokens:
            out, work = decode_attention(q, k, v, storage, scale=case.scale, valid=valid, work=work)
            outs.append(out)
        runs.append((torch.stack(outs), storage))
    (first, one), (second, other) = runs
    assert first.isfinite().all() and torch.equal(first, second)
    for a, b in zip((*one.tensors(), one.state), (*other.tensors(), other.state), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("with_valid", [False, True])
def test_one_graph_replays_step_after_step(make_case: Callable, kv_dtype: KVDtype | None, with_valid: bool) -> None:
    """The lengths are counted on the device: over the turns of rings, the replayed steps are the eager ones."""
    case = make_case(lengths=(1080, 63), kv_dtype=kv_dtype, room=48)
    eager = copy.deepcopy(case.storage)
    static = [*case.new(), torch.ones(2, dtype=torch.bool, device="cuda")]

    def step(storage: KVStorage, tensors: list[Tensor], work: Any) -> Any:
        q, k, v, valid = tensors
        return decode_attention(q, k, v, storage, scale=case.scale, valid=valid if with_valid else None, work=work)

    warmed = copy.deepcopy(case.storage)
    _, work = step(warmed, static, None)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step(case.storage, static, work)
    other_work = None
    for number in range(40):
        fresh = [*case.new(), torch.rand(2, device="cuda") > 0.3]
        for x, new in zip(static, fresh, strict=True):
            x.copy_(new)
        graph.replay()
        expected, other_work = step(eager, fresh, other_work)
        assert torch.equal(out, expected), f"step {number}"
        assert torch.equal(case.storage.state, eager.state) and parts_left(work.counters)
    assert int(eager.state[0]) == 1080 + 40


@pytest.mark.parametrize("length", [20, 5000])
def test_a_linear_head_without_room(make_case: Callable, length: int) -> None:
    """No silent number, and nothing beyond the head's slots: for a head in one program, and for one that is merged."""
    layout = StorageLayout(heads=(HeadStorage(recent=63, num_sink_tokens=4), HeadStorage(), HeadStorage()))
    case = make_case(layout, (length, 7), group=4, room=1)
    storage, work, rings = case.storage, None, layout.ring_slots
    for x in (storage.keys, storage.values):
        x.nan_to_num_(0.0)
    valid = torch.tensor([True, False], device="cuda")
    for step in range(5):
        before = storage.keys.clone()
        q, k, v = case.new()
        out, work = decode_attention(q, k, v, storage, scale=case.scale, valid=valid, work=work)
        assert out[0, 0, :4].isfinite().all() and not out[1].any(), "rings go on"
        # The first token takes the last slot; the second finds none, and reads all that came before.
        assert out[0, 0, 4:].isnan().all() if step >= 2 else out.isfinite().all()
        changed = (storage.keys != before).any(-1)
        assert not changed[1].any(), "another row's memory"
        written = changed[0, rings:].nonzero()[:, 0].tolist()
        assert written == ([length, 2 * length + 1] if step == 0 else [])
    assert storage.lengths.tolist() == [length + 5, 7]
    assert (max(parts_left(work.counters)) > 1) == (length == 5000)


def test_graphs_and_eager_steps_take_turns(make_case: Callable) -> None:
    """Thousands of launches on one set of counters, whoever launches them, and however often in a row."""
    steps = 3000
    case = make_case(lengths=(1500, 63), room=steps + 8)
    eager = copy.deepcopy(case.storage)
    static, valid = case.new(), torch.tensor([True, True], device="cuda")
    warmed = copy.deepcopy(case.storage)
    _, work = decode_attention(*static, warmed, scale=case.scale, valid=valid)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, _ = decode_attention(*static, case.storage, scale=case.scale, valid=valid, work=work)
    other_work, done = None, 0
    while done < steps:
        for x, new in zip(static, case.new(), strict=True):
            x.copy_(new)
        run = int(torch.randint(1, 8, ()))
        for _ in range(run):
            expected, other_work = decode_attention(*static, eager, scale=case.scale, valid=valid, work=other_work)
        if run % 2:
            for _ in range(run):
                graph.replay()
            out = replayed
        else:
            for _ in range(run):
                out, _ = decode_attention(*static, case.storage, scale=case.scale, valid=valid, work=work)
        done += run
        assert torch.equal(out, expected), f"after {done} steps"
    assert torch.equal(case.storage.state, eager.state)
    assert parts_left(work.counters) == parts_left(other_work.counters)


def test_a_launch_that_begins_while_the_one_before_ends(make_case: Callable) -> None:
    """Each step reads the lengths and the token that the step before wrote, and has the bits of steps far apart."""
    steps = 500
    case = make_case(lengths=(1500, 63), room=steps + 8)
    apart = copy.deepcopy(case.storage)
    tokens = [(*case.new(), case.valid(step)) for step in range(steps)]
    work = other_work = None
    outs = []
    for q, k, v, valid in tokens:
        out, work = decode_attention(q, k, v, case.storage, scale=case.scale, valid=valid, work=work)
        outs.append(out)
    for step, (q, k, v, valid) in enumerate(tokens):
        torch.cuda.synchronize()
        out, other_work = decode_attention(q, k, v, apart, scale=case.scale, valid=valid, work=other_work)
        assert torch.equal(out, outs[step]), f"step {step}"
    assert torch.equal(case.storage.state, apart.state) and case.storage.lengths.min() > 63 + steps // 3


def test_two_caches_on_two_streams() -> None:
    """Launches whose programs wait for each other, both at once: a hang is the worker's, which is ended."""
    worker = Path(__file__).parent / "workers" / "decode_streams.py"
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["4000", "steps"]


@pytest.mark.parametrize("group", [1, 4])
def test_a_launch_of_more_programs_than_fit_is_refused(make_case: Callable, group: int) -> None:
    """By the driver, instead of programs that wait for one which never comes; and one of as many is not."""
    case = make_case(lengths=(5000,), group=group)
    q, k, v = case.new()
    _, work = decode_attention(q, k, v, case.storage, scale=case.scale)
    assert work is not None
    out = torch.empty_like(q)
    heads = k.shape[1]
    arguments = launch.decode_arguments(q, k, v, out, case.storage, work, case.scale, None)
    options = launch.decode_options(heads * group, heads, q.shape[3], 1, q.dtype, case.storage, False)
    kernel = _decode_kernel.warmup(*arguments, grid=(1,), **options)
    fit = launch.resident_programs(kernel, q.device)
    constants = [options[name] for name in _decode_kernel.arg_names[len(arguments) :]]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with pytest.raises(RuntimeError, match="cooperative"):
        kernel[(processors * fit + 1, 1, 1)](*arguments, *constants)
    assert case.storage.state.tolist() == [5001, 5001]
    if fit <= launch.decode_config(q.shape[3], case.storage.keys.element_size()).programs:  # for which there is scratch
        kernel[(processors * fit, 1, 1)](*arguments, *constants)
        assert case.storage.state.tolist() == [5002, 5002] and out.isfinite().all()


@pytest.mark.parametrize("scarce", [False, True])
def test_growth_leaves_no_blocks_behind(scarce: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with two and with three linear heads, where memory is scarce; elsewhere torch keeps them for later."""
    device, mib, ring = torch.device("cuda", torch.cuda.current_device()), 2**20, HeadStorage(recent=63)
    _, total = torch.cuda.mem_get_info(device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (0 if scarce else total, total))
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    options: dict[str, Any] = {"batch": 1, "head_dim": 128, "value_dim": 128, "dtype": torch.bfloat16, "device": device}
    storages = [
        KVStorage(StorageLayout(heads=(HeadStorage(),) * linear + (ring,)), capacity=65536, **options)
        for linear in (2, 3, 2, 3, 3, 2)
    ]
    for tokens in range(65536, 131072, 8192):
        for storage in storages:
            storage.grow(tokens + 8192)
    left = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - unused
    # The last storage to grow leaves its old tensors, each tensor what its size was rounded up by, and small ones share
    # a block.
    assert (left <= (2 * 62 + 12 * 2 + 2) * mib) == scarce, f"{left / mib:.0f} MiB"
