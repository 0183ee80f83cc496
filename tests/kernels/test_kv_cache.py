"""What a KV cache of unequal heads keeps, and its plain decode step, against the words of `HeadStorage`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels.dispatch import BACKEND_VARIABLE
from sparse_hf_kernels.kv_cache import (
    HeadStorage,
    KVDtype,
    KVStorage,
    StorageLayout,
    decode_attention,
    kernels_refuse,
    slot_positions,
    store_tokens,
)
from sparse_hf_kernels.kv_cache.layout import head_table
from sparse_hf_kernels.kv_cache.storage import quantize

CPU = torch.device("cpu")
LINEAR, WINDOWED = HeadStorage(), HeadStorage(window=20, num_sink_tokens=3)
SMALL, LARGE = HeadStorage(recent=5, num_sink_tokens=2), HeadStorage(recent=40, num_sink_tokens=2)
ITSELF, SINKS = HeadStorage(recent=0), HeadStorage(recent=0, num_sink_tokens=3)
MIXED = StorageLayout(heads=(LINEAR, SMALL, ITSELF, WINDOWED, LARGE, SMALL, SINKS))
LAYOUTS = {
    "mixed": MIXED,
    "dense rows": StorageLayout(heads=(SMALL, WINDOWED, LINEAR), num_dense_rows=70),
    "native window": StorageLayout(heads=(SMALL, WINDOWED, LINEAR, SINKS), max_distance=30),
    "rings alone": StorageLayout(heads=(SMALL, HeadStorage(recent=1), HeadStorage(recent=1, num_sink_tokens=1))),
    "linear alone": StorageLayout(heads=(LINEAR, WINDOWED)),
}
DIM, SCALE = 16, 0.3


def make_storage(
    layout: StorageLayout,
    batch: int = 1,
    *,
    capacity: int = 200,
    dtype: torch.dtype = torch.float32,
    kv_dtype: KVDtype | None = None,
) -> KVStorage:
    return KVStorage(
        layout, batch=batch, head_dim=DIM, value_dim=DIM, dtype=dtype, device=CPU, capacity=capacity, kv_dtype=kv_dtype
    )


def occupants(ring: tuple[int, int] | None, num_slots: int, length: int) -> list[int]:
    """The token in each slot after so many came one by one: each takes a free slot, or the oldest recent one's."""
    slots = [-1] * num_slots
    sinks = num_slots if ring is None else ring[1]
    for token in range(length):
        if -1 in slots:
            slots[slots.index(-1)] = token
        elif num_slots > sinks:
            recent = slots[sinks:]
            slots[sinks + recent.index(min(recent))] = token
    return slots


@pytest.mark.parametrize("ring", [(5, 2), (0, 0), (0, 3), (1, 0), (1, 2), (7, 0), None], ids=str)
def test_slot_positions(ring: tuple[int, int] | None) -> None:
    num_slots = 40 if ring is None else sum(ring)
    lengths = list(range(40))
    found = slot_positions(ring, num_slots, torch.tensor(lengths, dtype=torch.int32))
    assert found.dtype == torch.int64 and found.shape == (40, num_slots)
    assert found.tolist() == [occupants(ring, num_slots, length) for length in lengths]
    filled = num_slots // 2
    assert torch.equal(slot_positions(ring, filled, torch.arange(filled + 1)), found[: filled + 1, :filled])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("capacity", [0, 1, 64])
def test_every_slot_belongs_to_one_head(name: str, capacity: int) -> None:
    layout = LAYOUTS[name]
    taken: list[int] = []
    for number, (head, place) in enumerate(zip(layout.heads, layout.places(), strict=True)):
        first = layout.ring_slots + place * capacity if head.recent is None else place
        taken += range(first, first + (capacity if head.recent is None else head.ring_slots))
        (group,) = (group for group in layout.groups if number in group.heads)
        assert group.ring == head.ring
        assert group.first_slot + group.heads.index(number) * group.slots(capacity) == first
    assert sorted(taken) == list(range(layout.row_slots(capacity)))
    kinds = [group.ring for group in layout.groups]
    assert None not in kinds[:-1], "growing linear heads would move rings"
    assert len(set(kinds)) == len(kinds) and all(list(g.heads) == sorted(g.heads) for g in layout.groups)


def test_what_kernels_read_of_heads() -> None:
    layout = LAYOUTS["native window"]
    assert head_table(layout, CPU).tolist() == [[5, 2, 30, 0], [-1, 3, 20, 0], [-1, 0, 30, 1], [0, 3, 30, 7]]


@pytest.mark.parametrize("recent", [30, 31])
def test_a_ring_wider_than_what_is_read_is_refused(recent: int) -> None:
    StorageLayout(heads=(HeadStorage(recent=29),), max_distance=30)
    with pytest.raises(ValueError, match=rf"fewer than max_distance=30 tokens, got recent={recent}"):
        StorageLayout(heads=(LINEAR, HeadStorage(recent=recent)), max_distance=30)


def assert_holds(storage: KVStorage, history: Any) -> None:
    """Every slot that holds a token holds the one that `occupants` names, to the bit."""
    assert storage.lengths.tolist() == history.lengths()
    for group in storage.layout.groups:
        (keys,), (values,) = storage.read(group, (0, group.slots(storage.capacity)))
        for row, length in enumerate(history.lengths()):
            expected = occupants(group.ring, keys.shape[2], length)
            filled = [slot for slot, token in enumerate(expected) if token >= 0]
            tokens = [expected[slot] for slot in filled]
            for found, kept in zip((keys, values), history.row(row), strict=True):
                assert torch.equal(found[row][:, filled], kept[list(group.heads)][:, tokens].to(found.dtype))


def positions_of(real: Tensor, lengths: Tensor) -> Tensor:
    return (lengths[:, None] + real.cumsum(-1) - 1).masked_fill(~real, -1)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("chunks", [(1,) * 25, (7, 7, 7), (64, 1, 90), (0, 3)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_storing(
    name: str, kv_dtype: KVDtype | None, chunks: tuple[int, ...], padded: bool, kv_history: Any, new_tokens: Callable
) -> None:
    """Chunks of all lengths, over rings that turn many times, with padding anywhere."""
    layout, batch = LAYOUTS[name], 3
    storage, history = make_storage(layout, batch, kv_dtype=kv_dtype), kv_history(layout, batch, kv_dtype)
    for number, length in enumerate(chunks):
        k, v = new_tokens(batch, len(layout.heads), length, DIM, torch.float32)
        real = torch.rand(batch, length) > 0.4 if padded else torch.ones(batch, length, dtype=torch.bool)
        if padded:
            real[0] = number % 2 == 1  # a row without any
            store_tokens(storage, k, v, positions=positions_of(real, storage.lengths))
        else:
            store_tokens(storage, k, v, seen=sum(chunks[:number]))
        history.add(k, v, real)
        assert_holds(storage, history)
    assert storage.state[0] == sum(chunks)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("kv_dtype", "group"), [(None, 1), (None, 3), ("int8", 2), ("fp8", 2)])
@pytest.mark.parametrize("length", [0, 1, 28, 64, 97])
def test_decoding(
    name: str, kv_dtype: KVDtype | None, group: int, length: int, kv_history: Any, new_tokens: Callable
) -> None:
    """Rows that are empty or have no new token, and slots of NaN wherever nothing is held."""
    layout, batch = LAYOUTS[name], 3
    heads = len(layout.heads)
    storage, history = make_storage(layout, batch, kv_dtype=kv_dtype), kv_history(layout, batch, kv_dtype)
    k, v = new_tokens(batch, heads, length, DIM, torch.float32)
    real = torch.rand(batch, length) > torch.tensor([[0.0], [0.3], [2.0]])
    store_tokens(storage, k, v, positions=positions_of(real, storage.lengths))
    history.add(k, v, real)
    for step in range(14):
        q, k, v = new_tokens(batch, heads, 1, DIM, torch.float32, group)
        valid = torch.rand(batch) > 0.2 if step % 3 else torch.ones(batch, dtype=torch.bool)
        given = valid if step % 3 else None
        out, work = decode_attention(q, k, v, storage, scale=SCALE, valid=given)
        expected = history.attend(q, k, v, valid, SCALE)
        torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)
        assert work is None and not out[~valid].any()
        history.add(k, v, valid[:, None])
        assert_holds(storage, history)
    assert storage.state[0] == length + 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_decoding_in_other_precisions(dtype: torch.dtype, kv_history: Any, new_tokens: Callable) -> None:
    """Half precision is computed in fp32, and double precision stays what it is."""
    storage, history = make_storage(MIXED, 2, dtype=dtype), kv_history(MIXED, 2)
    k, v = new_tokens(2, len(MIXED.heads), 60, DIM, dtype)
    store_tokens(storage, k, v, seen=0)
    history.add(k, v, torch.ones(2, 60, dtype=torch.bool))
    q, k, v = new_tokens(2, len(MIXED.heads), 1, DIM, dtype, 2)
    out, _ = decode_attention(q, k, v, storage, scale=SCALE)
    expected = history.attend(q, k, v, torch.ones(2, dtype=torch.bool), SCALE)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=2 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_growth_keeps_what_is_stored(
    name: str, kv_dtype: KVDtype | None, kv_history: Any, new_tokens: Callable
) -> None:
    layout = LAYOUTS[name]
    storage, history = make_storage(layout, 2, capacity=0, kv_dtype=kv_dtype), kv_history(layout, 2, kv_dtype)
    seen = 0
    for capacity, length in ((9, 9), (9, 0), (10, 1), (64, 30), (300, 90)):
        before = storage.keys
        storage.launches["a step"] = "bound to where the tensors lay"
        storage.grow(capacity)
        assert storage.capacity == capacity and storage.keys.shape[1] == layout.row_slots(capacity)
        moved = storage.keys.data_ptr() != before.data_ptr()
        assert not (moved and storage.launches) and moved <= (layout.num_linear > 0)
        if seen:
            assert_holds(storage, history)
        k, v = new_tokens(2, len(layout.heads), length, DIM, torch.float32)
        store_tokens(storage, k, v, seen=seen)
        history.add(k, v, torch.ones(2, length, dtype=torch.bool))
        seen += length
        assert_holds(storage, history)
    keys = storage.keys
    storage.grow(5)
    assert storage.keys is keys and storage.capacity == 300, "nothing shrinks"


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_eight_bits(kv_dtype: KVDtype) -> None:
    """int8 errs by half a step at most; fp8 by 2^-4 of a value, or half of its smallest step; zeros and peaks never."""
    x = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    x[3] = 0
    x[4, 1:] = 0
    x[5, ::2] = 0
    stored, scales = quantize(x, kv_dtype)
    assert stored.element_size() == 1 and scales.shape == (50,) and scales.dtype == torch.float32
    largest, peaks = 127.0 if kv_dtype == "int8" else 448.0, x.abs().amax(-1)
    torch.testing.assert_close(scales, peaks / largest)
    found = stored.float() * scales[:, None]
    steps = scales[:, None].expand_as(x)
    bound = steps / 2 if kv_dtype == "int8" else torch.maximum(x.abs() * 2**-4, steps * 2**-10)
    assert ((found - x).abs() <= bound * (1 + 1e-5)).all()
    assert (found[x == 0] == 0).all()
    torch.testing.assert_close(found.abs().amax(-1), peaks, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_eight_bits_next_to_nothing(kv_dtype: KVDtype) -> None:
    """Scales that fp32 can hardly hold lose at most what is nothing in any dtype of models."""
    x = torch.tensor([[1e-40, -3e-41], [1e-38, 1e-39], [0.0, 0.0]])
    stored, scales = quantize(x, kv_dtype)
    found = stored.float() * scales[:, None]
    assert found.isfinite().all() and ((found - x).abs() <= 1.2e-38).all() and not found[2].any()


def test_bytes(new_tokens: Callable) -> None:
    """Seven heads: two keep all, the others 7, 0, 42, 7 and 3 tokens; 8 bits add a scale each to 16 numbers."""
    token = 2 * DIM * 4
    for kv_dtype, per_token in ((None, token), ("int8", 2 * (DIM + 4)), ("fp8", 2 * (DIM + 4))):
        storage = make_storage(MIXED, 3, capacity=100, kv_dtype=kv_dtype)  # type: ignore[arg-type]
        assert storage.allocated_bytes() == 3 * (200 + 59) * per_token
        assert storage.held_bytes(0) == 0
        assert storage.held_bytes(10) == 3 * (2 * 10 + 7 + 10 + 7 + 3) * per_token
        assert storage.held_bytes(90) == 3 * (2 * 90 + 59) * per_token


def test_spans_of_slots_are_views(new_tokens: Callable) -> None:
    storage = make_storage(MIXED, 2)
    k, v = new_tokens(2, len(MIXED.heads), 30, DIM, torch.float32)
    store_tokens(storage, k, v, seen=0)
    linear = storage.layout.groups[-1]
    (first, second), (values, _) = storage.read(linear, (3, 9), (0, 3))
    heads = list(linear.heads)
    assert torch.equal(first, k[:, heads, 3:9]) and torch.equal(second, k[:, heads, :3])
    assert torch.equal(values, v[:, heads, 3:9])
    assert first.untyped_storage().data_ptr() == storage.keys.untyped_storage().data_ptr()


def test_rows_change_together(kv_history: Any, new_tokens: Callable) -> None:
    """As beams are chosen: lengths and scales go with their rows."""
    storage, history = make_storage(MIXED, 3, kv_dtype="int8"), kv_history(MIXED, 3, "int8")
    k, v = new_tokens(3, len(MIXED.heads), 50, DIM, torch.float32)
    real = torch.rand(3, 50) > 0.4
    store_tokens(storage, k, v, positions=positions_of(real, storage.lengths))
    history.add(k, v, real)
    storage.launches["a step"] = "bound to where the tensors lay"
    storage.apply(lambda x: x[[2, 0, 0, 1]])
    history.tokens = [history.tokens[row] for row in (2, 0, 0, 1)]
    assert storage.batch == 4 and not storage.launches and storage.state[0] == 50
    assert_holds(storage, history)


def test_why_kernels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert kernels_refuse(make_storage(MIXED), CPU) == "need an NVIDIA GPU, got device 'cpu'"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_refuse(make_storage(MIXED), CPU) is None
    shape: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "capacity": 1}
    wide = KVStorage(MIXED, batch=1, head_dim=257, value_dim=257, **shape)
    assert kernels_refuse(wide, CPU) == "serve head_dim up to 256, got 257"
    unequal = KVStorage(MIXED, batch=1, head_dim=16, value_dim=8, **shape)
    assert kernels_refuse(unequal, CPU) == "serve values of the keys' head_dim"
    rows = KVStorage(LAYOUTS["linear alone"], batch=2049, head_dim=16, value_dim=16, **shape)
    assert kernels_refuse(rows, CPU) == "serve up to 4096 KV heads times rows, got 4098"
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert kernels_refuse(make_storage(MIXED), CPU) == "stand back for SPARSE_HF_BACKEND='reference'"


def test_values_of_another_dimension(kv_history: Any, new_tokens: Callable) -> None:
    """The plain form serves them."""
    storage = KVStorage(
        MIXED, batch=1, head_dim=DIM, value_dim=8, dtype=torch.float32, device=CPU, capacity=60, kv_dtype=None
    )
    history, heads = kv_history(MIXED, 1), len(MIXED.heads)
    for start, end in pairwise((0, 20, 50)):
        k, v = new_tokens(1, heads, end - start, DIM, torch.float32)
        store_tokens(storage, k, v[..., :8], seen=start)
        history.add(k, v[..., :8], torch.ones(1, end - start, dtype=torch.bool))
    q, k, v = new_tokens(1, heads, 1, DIM, torch.float32, 2)
    expected = history.attend(q, k, v[..., :8], torch.ones(1, dtype=torch.bool), SCALE)
    out, _ = decode_attention(q, k, v[..., :8], storage, scale=SCALE)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)
