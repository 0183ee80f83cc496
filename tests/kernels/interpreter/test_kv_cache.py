"""The KV cache's kernels against the words of `HeadStorage`, and their storage against the plain one, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import BACKEND_VARIABLE
from sparse_hf_kernels.kv_cache import (
    HeadStorage,
    KVDtype,
    KVStorage,
    OffloadedStorage,
    Stage,
    StorageLayout,
    decode_attention,
    kernels_refuse,
    launch,
    store_tokens,
)
from sparse_hf_kernels.kv_cache.parts import FEW, MANY
from sparse_hf_kernels.testing import parts_left

CPU = torch.device("cpu")
HEADS = (
    HeadStorage(),
    HeadStorage(recent=5, num_sink_tokens=2),
    HeadStorage(recent=0),
    HeadStorage(window=20, num_sink_tokens=3),
    HeadStorage(recent=40, num_sink_tokens=2),
    HeadStorage(recent=0, num_sink_tokens=3),
)
MIXED = StorageLayout(heads=HEADS)
DENSE_ROWS = StorageLayout(heads=HEADS, num_dense_rows=80)
NATIVE = StorageLayout(heads=tuple(head for head in HEADS if head.recent != 40), max_distance=30)
# A window that starts behind blocks of sinks, over blocks of 128 slots; and many blocks for three programs to share.
FAR = StorageLayout(heads=(HeadStorage(window=50, num_sink_tokens=140), HeadStorage(recent=300, num_sink_tokens=4)))


class Twins:
    """The same tokens to a storage by the kernels, to one in plain torch, and to the words."""

    def __init__(
        self,
        layout: StorageLayout,
        batch: int,
        dim: int,
        dtype: torch.dtype,
        kv_dtype: KVDtype | None,
        history: Any,
        capacity: int = 620,
    ) -> None:
        shape = {"batch": batch, "head_dim": dim, "value_dim": dim, "dtype": dtype, "device": CPU, "capacity": capacity}
        self.fused, self.plain = (KVStorage(layout, **shape, kv_dtype=kv_dtype) for _ in range(2))  # type: ignore[arg-type]
        self.history = history(layout, batch, kv_dtype)
        self.work: Any = None
        self.parts: list[int] = []  # of each row, in the last step
        assert kernels_refuse(self.fused, CPU) is None

    @staticmethod
    def in_torch(run: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(BACKEND_VARIABLE, "reference")
            return run()

    def store(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        given: dict[str, Any] = {"seen": int(self.fused.state[0])}
        if real is not None:
            positions = self.fused.lengths[:, None] + real.cumsum(-1) - 1
            given = {"positions": positions.masked_fill(~real, -1)}
        store_tokens(self.fused, k, v, **given)
        self.in_torch(lambda: store_tokens(self.plain, k, v, **given))
        self.history.add(k, v, torch.ones(len(k), k.shape[2], dtype=torch.bool) if real is None else real)

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """Output and the truth."""
        rows = torch.ones(len(q), dtype=torch.bool) if valid is None else valid
        expected = self.history.attend(q, k, v, rows, scale)
        out, self.work = decode_attention(q, k, v, self.fused, scale=scale, valid=valid, work=self.work)
        self.in_torch(lambda: decode_attention(q, k, v, self.plain, scale=scale, valid=valid))
        self.history.add(k, v, rows[:, None])
        self.parts = parts_left(self.work.counters)
        return out, expected

    def assert_same_storage(self) -> None:
        """Slots that nobody wrote hold the same NaN, or what memory held in integers: those are not compared."""
        assert torch.equal(self.fused.state, self.plain.state)
        assert self.fused.lengths.tolist() == self.history.lengths()
        if self.fused.kv_dtype is None:
            pairs = zip(self.fused.tensors()[:2], self.plain.tensors()[:2], strict=True)
            assert all(torch.equal(a.nan_to_num(7777.0), b.nan_to_num(7777.0)) for a, b in pairs)
            return
        for stored, scales in ((0, 2), (1, 3)):
            (a, b), (s, t) = ([x.tensors()[n] for x in (self.fused, self.plain)] for n in (stored, scales))
            assert torch.equal(s.nan_to_num(-1.0), t.nan_to_num(-1.0))
            written = ~s.isnan()
            assert written.any() and torch.equal(a[written].float(), b[written].float())


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("layout", "dtype", "dim", "group", "batch", "length", "kv_dtype"),
    [
        (MIXED, torch.float32, 24, 1, 3, 0, None),
        (MIXED, torch.float32, 24, 3, 2, 150, None),
        (MIXED, torch.float16, 64, 4, 3, 97, None),
        (DENSE_ROWS, torch.float32, 24, 3, 1, 80, None),
        (NATIVE, torch.float32, 64, 1, 1, 30, None),
        (NATIVE, torch.float32, 24, 1, 2, 97, None),
        (FAR, torch.float32, 64, 4, 2, 600, None),
        (FAR, torch.float16, 24, 1, 1, 300, None),
        (MIXED, torch.float32, 24, 3, 2, 97, "int8"),
        (FAR, torch.float32, 64, 4, 2, 310, "int8"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, StorageLayout) else f"{len(value.heads)} heads",
)
def test_prefill_and_steps(
    layout: StorageLayout,
    dtype: torch.dtype,
    dim: int,
    group: int,
    batch: int,
    length: int,
    kv_dtype: KVDtype | None,
    kv_history: Any,
    new_tokens: Callable,
) -> None:
    """Padding in the prefill, rows without a new token, and NaN in every slot that holds nothing."""
    twins = Twins(layout, batch, dim, dtype, kv_dtype, kv_history)
    heads = len(layout.heads)
    real = torch.rand(batch, length) > 0.2
    real[0] = True  # so that the first step is at the position that cases name
    twins.store(*new_tokens(batch, heads, length, dim, dtype), real)
    if length:
        twins.assert_same_storage()
    for step in range(5):
        valid = None if step % 3 == 0 else torch.rand(batch) > 0.3
        out, expected = twins.step(*new_tokens(batch, heads, 1, dim, dtype, group), valid, dim**-0.5)
        tolerance = 3e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        twins.assert_same_storage()


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_chunks(kv_dtype: KVDtype | None, kv_history: Any, new_tokens: Callable) -> None:
    """All rows alike, by their common length; of one token, of whole tiles of them, and far more than rings hold."""
    twins = Twins(MIXED, 2, 24, torch.float32, kv_dtype, kv_history)
    for length in (1, 32, 33, 100, 1, 7):
        twins.store(*new_tokens(2, len(HEADS), length, 24, torch.float32))
        twins.assert_same_storage()
    assert twins.fused.state.tolist() == [174] * 3


def test_a_linear_head_without_room(new_tokens: Callable) -> None:
    """The token that finds none is attended, and those after it give NaN; rings go on, and nothing else is written."""
    layout = StorageLayout(heads=(HeadStorage(recent=5, num_sink_tokens=2), HeadStorage(), HeadStorage()))
    storage = KVStorage(
        layout, batch=2, head_dim=16, value_dim=16, dtype=torch.float32, device=CPU, capacity=20, kv_dtype=None
    )
    store_tokens(storage, *new_tokens(2, 3, 19, 16, torch.float32), seen=0)
    for step in range(4):
        linear = storage.keys[:, layout.ring_slots :].clone()
        q, k, v = new_tokens(2, 3, 1, 16, torch.float32, 2)
        out, _ = decode_attention(q, k, v, storage, scale=0.25)
        assert not out[:, :, :2].isnan().any()
        assert out[:, :, 2:].isnan().all() if step >= 2 else not out.isnan().any()
        kept = storage.keys[:, layout.ring_slots :]
        assert torch.equal(kept, linear) == (step >= 1), "slots of other heads and rows stay what they are"
    assert storage.state.tolist() == [23] * 3


SHARED = [
    (1, {}, 3, 24, None),
    (8, {}, 1, 24, None),
    (13, {"head_cost": 3}, 4, 64, "int8"),
    (37, {"head_cost": 0, "min_share": 2}, 8, 128, None),
    (37, {"head_cost": 1}, 8, 64, None),
    (90, {}, 3, 24, None),
    (90, {"head_cost": 0}, 1, 128, "int8"),
]
"""Programs, how work is cut up, query heads per KV head, dimensions and how keys are stored."""


def spread(
    monkeypatch: pytest.MonkeyPatch, programs: int, config: dict[str, int], layout: StorageLayout, length: int,
    group: int, dim: int, kv_dtype: KVDtype | None, history: Any, new_tokens: Callable,
) -> Twins:  # fmt: skip
    """Two ragged rows of up to `length` tokens, for so many programs."""
    monkeypatch.setattr(launch, "num_programs", lambda *_: programs)
    monkeypatch.setattr(launch, "decode_config", lambda *_: launch.DecodeConfig(block=16, **config))
    twins = Twins(layout, 2, dim, torch.float32, kv_dtype, history, length + 10)
    real = torch.rand(2, length) > 0.2
    real[0] = True
    twins.store(*new_tokens(2, len(layout.heads), length, dim, torch.float32), real)
    return twins


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("programs", "config", "group", "dim", "kv_dtype"), SHARED, ids=str)
def test_shares_of_any_size(
    programs: int, config: dict[str, int], group: int, dim: int, kv_dtype: KVDtype | None,
    monkeypatch: pytest.MonkeyPatch, kv_history: Any, new_tokens: Callable,
) -> None:  # fmt: skip
    """Heads spread over many programs, whose shares end anywhere; programs without work."""
    twins = spread(monkeypatch, programs, config, FAR, 610, group, dim, kv_dtype, kv_history, new_tokens)
    for step in range(2):
        valid = None if step == 0 else torch.tensor([True, False])
        out, expected = twins.step(*new_tokens(2, 2, 1, dim, torch.float32, group), valid, dim**-0.5)
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
        twins.assert_same_storage()
        assert (max(twins.parts) > 1) == (programs > 1)


@pytest.mark.usefixtures("poison_empty")
def test_more_parts_than_are_read_at_once(
    monkeypatch: pytest.MonkeyPatch, kv_history: Any, new_tokens: Callable
) -> None:
    layout, group, dim = StorageLayout(heads=(HeadStorage(),)), 3, 80
    twins = spread(monkeypatch, 280, {}, layout, 16 * (MANY.value + 9), group, dim, None, kv_history, new_tokens)
    out, expected = twins.step(*new_tokens(2, 1, 1, dim, torch.float32, group), None, dim**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=3e-6)
    assert FEW.value < min(twins.parts) < MANY.value < max(twins.parts)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_offloaded_storages_take_turns(kv_dtype: KVDtype | None, new_tokens: Callable) -> None:
    """Three layers in two buffers, over growth: the bits of storages that lie where they are."""
    shape: dict[str, Any] = {"batch": 2, "head_dim": 16, "value_dim": 16, "dtype": torch.float32, "device": CPU}
    few, stage = HEADS[:3], Stage(CPU)
    layouts = [StorageLayout(heads=few, num_dense_rows=rows) for rows in (0, 80, 0)]
    plain = [KVStorage(layout, **shape, capacity=60, kv_dtype=kv_dtype) for layout in layouts]
    moving = [
        OffloadedStorage(layout, stage=stage, number=number, **shape, capacity=60, kv_dtype=kv_dtype)
        for number, layout in enumerate(layouts)
    ]
    seen, work = 0, None
    for num_new in (59, 1, 1, 1):
        for one, other in zip(plain, moving, strict=True):
            q, k, v = new_tokens(2, len(few), num_new, 16, torch.float32, 2)
            if seen + num_new > 60:
                one.grow(70)
                other.grow(70)
            other.bring()
            if seen:
                other.prefetch_next()
            outs = []
            for storage in (one, other):
                if num_new > 1:
                    store_tokens(storage, k, v, seen=seen)
                else:
                    out, work = decode_attention(q, k, v, storage, scale=0.25, work=work)
                    outs.append(out)
            assert not outs or (torch.equal(*outs) and outs[0].isfinite().all())
            other.write_back([seen] * 2, num_new)
        seen += num_new
    assert seen == 62 and all(storage.state.tolist() == [62] * 3 for storage in (*plain, *moving))
