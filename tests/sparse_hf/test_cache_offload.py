"""`SparseCache(offload=True)`: what a cache on the device answers, to the bit, with full heads in host memory."""

import copy
import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf_kernels.kv_cache import KVDtype, KVStorage, OffloadedStorage, Stage
from sparse_hf_kernels.kv_cache.naive import decode_naive

SLOT = 2 * 16 * 4  # bytes of one token's key and value in one head
# One with full heads alone, and one with none; of the others an odd number, so that each takes either buffer in turn.
MASKS = ((1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (0, 1))
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "fixed": {"max_length": 320},
    "growing int8": {"kv_dtype": "int8"},
    "fixed fp8": {"max_length": 320, "kv_dtype": "fp8"},
}


@pytest.fixture(params=[0, 50], ids=["plain", "dense rows"])
def model(request: pytest.FixtureRequest) -> Any:
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=len(MASKS), num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=320, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    for parameter in dense.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    sparse = Streaming(num_sink_tokens=3, window_size=12)
    return sparsify(dense, SparseConfig(sparse=sparse, head_masks=MASKS, min_seq_len=request.param))


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a buffer held before is gone, even where the next layer brings nothing."""
    fill = OffloadedStorage.fill

    def poisoned(self: OffloadedStorage, memory: Tensor, number: int) -> None:
        memory.fill_(255)  # NaN in every float
        fill(self, memory, number)

    monkeypatch.setattr(OffloadedStorage, "fill", poisoned)


@pytest.fixture(params=[False, True], ids=["chunks", "decode steps"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Single tokens as chunks, as on a CPU, or as on a GPU, with the plain form in the fused kernel's place."""
    if request.param:

        def decode(q: Tensor, k: Tensor, v: Tensor, storage: KVStorage, work: Any, scale: float, valid: Any) -> Any:
            return decode_naive(q, k, v, storage, scale=scale, valid=valid, dtype=torch.float32).transpose(1, 2), None

        monkeypatch.setattr("sparse_hf.cache_layer.kernels_refuse", lambda *args: None)
        monkeypatch.setattr("sparse_hf.cache_layer._decode_fused", lambda: decode)
    return request.param


@torch.no_grad()
def feed(model: Any, cache: SparseCache, ids: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(ends)], 1)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(1, 99, (batch, length))


def offloaded(cache: SparseCache) -> list[OffloadedStorage]:
    return [storage for storage in cache.storages() if isinstance(storage, OffloadedStorage)]


def stage_of(cache: SparseCache) -> Stage:
    (stage,) = cache._stages.values()
    return stage


def assert_answers_alike(model: Any, kind: str, run: Callable[[SparseCache], Tensor]) -> None:
    """To the bit, whether or not a cache of this kind is offloaded."""
    plain, cache = (SparseCache.for_model(model, **CACHES[kind], offload=offload) for offload in (False, True))
    expected, found = run(plain), run(cache)
    assert found.isfinite().all() and torch.equal(found, expected)
    assert len(offloaded(cache)) >= 5 and cache.kv_bytes() == plain.kv_bytes()


def ragged(pad: Callable) -> Any:
    return pad([torch.randint(1, 99, (length,)) for length in (300, 5, 275, 64)], "left")


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("chunk", [37, 64, 300])
def test_a_ragged_batch_in_chunks(model: Any, pad: Callable, kind: str, chunk: int) -> None:
    batch = ragged(pad)
    borders = range(chunk, 300, chunk)
    assert_answers_alike(model, kind, lambda cache: torch.cat(batch.real(batch.run(model, cache, borders))))


@pytest.mark.parametrize("kind", CACHES)
def test_a_ragged_batch_token_by_token(model: Any, pad: Callable, fused: bool, kind: str) -> None:
    """Where some rows' heads have parted, or may part, and others have hardly begun."""
    batch = ragged(pad)
    borders = [*range(42, 60), *range(290, 296)]
    assert_answers_alike(model, kind, lambda cache: torch.cat(batch.real(batch.run(model, cache, borders))))


@pytest.mark.parametrize("kind", CACHES)
def test_a_plain_batch(model: Any, fused: bool, kind: str) -> None:
    """Chunks and single tokens, over two steps of growth."""
    ids, ends = ids_of(2, 150), [0, 9, 30, *range(31, 36), 90, *range(91, 99), 120, 121, 150]
    assert_answers_alike(model, kind, lambda cache: feed(model, cache, ids, ends))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_three_turns(model: Any, pad: Callable, kind: str) -> None:
    batch = pad([torch.randint(1, 99, (length,)) for length in (40, 23)], "left")
    cache = SparseCache.for_model(model, **CACHES[kind], offload=True)
    ids, mask = batch.input_ids, batch.attention_mask
    for _ in range(3):
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
        answer = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(answer, model.generate(ids, use_cache=False, **options))
        ids = torch.cat([answer, ids_of(2, 20)], 1)
        mask = torch.cat([mask, torch.ones(2, 29, dtype=torch.long)], 1)
    assert cache.host_bytes() > 0


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_beams(model: Any, pad: Callable, kind: str) -> None:
    batch = pad([torch.randint(1, 99, (length,)) for length in (90, 33)], "left")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 14, "do_sample": False, "num_beams": 3}
    cache = SparseCache.for_model(model, **CACHES[kind], offload=True)
    found = model.generate(batch.input_ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(batch.input_ids, use_cache=False, **options))
    assert cache.host_bytes() > 0


@pytest.mark.parametrize("kind", ["growing", "growing int8"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), 3),
        (lambda cache: cache.batch_repeat_interleave(2), 6),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_batch_changes(model: Any, fused: bool, kind: str, change: Callable, rows: int) -> None:
    ids, follow = ids_of(3, 90), ids_of(rows, 30)

    def run(cache: SparseCache) -> Tensor:
        feed(model, cache, ids, [0, 45, 90])
        change(cache)
        return feed(model, cache, follow, [0, 1, 20, 21, 30])

    assert_answers_alike(model, kind, run)


@pytest.mark.parametrize("kind", ["fixed", "growing int8"])
@pytest.mark.parametrize("start", [46, 50])
def test_a_copy_goes_its_own_way(model: Any, fused: bool, kind: str, start: int) -> None:
    """Of a cache whose heads will part, and of one where they have just done so."""
    ids, ends = ids_of(2, 70), [start, 56, *range(57, 71)]
    plain, cache = (SparseCache.for_model(model, **CACHES[kind], offload=offload) for offload in (False, True))
    for each in (plain, cache):
        feed(model, each, ids, [0, 44, *range(45, start + 1)])
    other = copy.deepcopy(cache)
    assert stage_of(other) is not stage_of(cache)
    assert sorted(stage_of(other).members.values(), key=id) == sorted(offloaded(other), key=id)
    # Turn by turn, so that one's buffers would show in the other.
    strayed, straight = [], []
    for step in pairwise(ends):
        strayed.append(feed(model, other, ids.flip(1), list(step)))
        straight.append(feed(model, cache, ids, list(step)))
    expected = [feed(model, copy.deepcopy(plain), x, ends) for x in (ids.flip(1), ids)]
    assert torch.equal(torch.cat(strayed, 1), expected[0]) and torch.equal(torch.cat(straight, 1), expected[1])


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_where_bytes_lie(model: Any, kv_dtype: KVDtype | None) -> None:
    cache = SparseCache.for_model(model, max_length=200, kv_dtype=kv_dtype, offload=True)
    assert cache.allocated_bytes() == cache.host_bytes() == 0
    feed(model, cache, ids_of(2, 200), [0, 40, 150, 200])
    slot = SLOT if kv_dtype is None else SLOT // 4 + 8
    full, ring = 2 * 200 * slot, 2 * 14 * slot  # of both rows; 3 sinks and 11 earlier tokens
    assert cache.host_bytes() == 6 * full
    buffers = stage_of(cache).allocated_bytes()
    assert cache.allocated_bytes() == cache.host_bytes() + 6 * ring + buffers
    # Either is as large as the layer of two full heads.
    assert 0 <= buffers - 2 * 2 * full < 8 * 256
    assert cache.kv_bytes() == 6 * full + 6 * ring
    cache.reset()
    assert cache.allocated_bytes() == cache.host_bytes() == 0


def test_a_layer_is_in_a_buffer_or_unreadable(model: Any) -> None:
    cache = SparseCache.for_model(model, offload=True)
    feed(model, cache, ids_of(1, 80), [0, 70, *range(71, 81)])
    stage, found = stage_of(cache), offloaded(cache)
    here = [storage for storage in found if storage.buffer is not None]
    assert sorted(storage.buffer or 0 for storage in here) == [0, 1]
    memory = [x.data_ptr() for x in stage.buffers if x is not None]
    assert [storage.keys.data_ptr() for storage in sorted(here, key=lambda x: x.buffer or 0)] == memory
    for storage in found:
        assert storage.keys.shape == (1, storage.layout.row_slots(storage.capacity), 16)
        if storage not in here:
            assert storage.keys.is_meta and storage.values.is_meta
            with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
                storage.keys.sum().item()


def test_the_next_layer_is_there_before_it_is_asked_for(
    model: Any, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token no layer is waited for, the first one neither."""
    cache = SparseCache.for_model(model, max_length=320, offload=True)
    ids = ids_of(1, 90)
    feed(model, cache, ids, [0, 69, 70])
    late, bring = [], Stage.bring

    def noting(self: Stage, storage: OffloadedStorage) -> None:
        late.append(storage.buffer is None)
        bring(self, storage)

    monkeypatch.setattr(Stage, "bring", noting)
    feed(model, cache, ids, list(range(70, 90)))
    assert len(late) >= 19 * 5 and not any(late)
    monkeypatch.setattr(Stage, "prefetch_after", lambda *args: None)
    late.clear()
    feed(model, cache, ids, [89, 90])
    assert sum(late) >= 4, "nothing but prefetching brings layers in time"


def test_memory_is_free_when_a_cache_is_dropped(model: Any) -> None:
    """Without the garbage collector, which knows nothing of a GPU's memory."""
    cache = SparseCache.for_model(model, offload=True)
    feed(model, cache, ids_of(1, 80), [0, 70, 71, 80])
    kept = [weakref.ref(x) for storage in offloaded(cache) for x in (*storage.host, *storage.rings)]
    kept += [weakref.ref(x) for x in stage_of(cache).buffers if x is not None]
    assert len(kept) == 5 * 4 + 2
    gc.disable()
    try:
        del cache
        assert not any(reference() is not None for reference in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("ends", [[0, 30], [30, 31], [30, 40]], ids=str)
def test_graph_capture_is_refused(
    model: Any, fused: bool, monkeypatch: pytest.MonkeyPatch, kind: str, ends: list[int]
) -> None:
    cache = SparseCache.for_model(model, **CACHES[kind], offload=True)
    if ends[0]:
        feed(model, cache, ids_of(1, 30), [0, 30])
    for module in ("sparse_hf.cache_layer", "sparse_hf_kernels.kv_cache.offload"):
        monkeypatch.setattr(f"{module}.is_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"captured CUDA graph, .* make the cache without offload=True"):
        feed(model, cache, ids_of(1, 40), ends)


@pytest.mark.parametrize("ends", [[0, 20, 21], [0, 10, 25]], ids=str)
def test_a_token_too_many(model: Any, fused: bool, ends: list[int]) -> None:
    """A decode step too: the host counts with it, as nothing is captured."""
    cache, ids = SparseCache.for_model(model, max_length=20, offload=True), ids_of(1, 25)
    feed(model, cache, ids, ends[:-1])
    with pytest.raises(ValueError, match=rf"made for 20 tokens and would hold {ends[-1]}; .* larger max_length"):
        feed(model, cache, ids, ends[-2:])
