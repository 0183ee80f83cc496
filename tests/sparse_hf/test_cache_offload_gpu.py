"""Full heads in pinned memory on a GPU: the bits of a cache on the device, in less of its memory, without races."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf_kernels import sparse_attention
from sparse_hf_kernels.kv_cache import OffloadedStorage, Stage
from sparse_hf_kernels.kv_cache.side_stream import SideStream

pytestmark = pytest.mark.gpu

VOCAB, HEAD_DIM, LAYERS = 128, 64, 8
PIECE = 2 * 2**20
SLACK = 8 * 2**20  # the allocator counts blocks, which may be 1 MiB larger than a tensor
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "fixed": {"max_length": 4000},
    "growing int8": {"kv_dtype": "int8"},
    "fixed fp8": {"max_length": 4000, "kv_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    """One layer has no full head; the others are an odd number, so that each takes either buffer in turn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        head_dim=HEAD_DIM, vocab_size=VOCAB, max_position_embeddings=65536, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    masks = tuple(tuple(int((layer + head) % 2 and layer != 3) for head in range(4)) for layer in range(LAYERS))
    return sparsify(dense, SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=64), head_masks=masks))


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), device="cuda")


@torch.no_grad()
def feed(model: Any, cache: SparseCache, ids: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(ends)], 1)


def both(model: Any, kind: str) -> tuple[SparseCache, SparseCache]:
    """Empty caches on the device and offloaded."""
    if CACHES[kind].get("kv_dtype") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit floats need compute capability 8.9")
    plain, cache = (SparseCache.for_model(model, **CACHES[kind], offload=offload) for offload in (False, True))
    return plain, cache


def offloaded(cache: SparseCache) -> list[OffloadedStorage]:
    return [storage for storage in cache.storages() if isinstance(storage, OffloadedStorage)]


def stage_of(cache: SparseCache) -> Stage:
    (stage,) = cache._stages.values()
    return stage


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bits_of_a_plain_batch(model: Any, kind: str, batch: int) -> None:
    """Chunks, several hundred decode steps over growth and the turns of rings, chunks again; and a copy on the way."""
    plain, cache = both(model, kind)
    ids, ends = ids_of(batch, 3600), [0, 2000, 3000, *range(3001, 3300), 3500, *range(3501, 3541)]
    assert torch.equal(feed(model, cache, ids, ends), feed(model, plain, ids, ends))
    storages = offloaded(cache)
    assert len(storages) == LAYERS - 1 and all(x.is_pinned() for storage in storages for x in storage.host)
    # Both buffers have served decode steps by launches that are bound to them.
    assert all(storage.bound[0] and storage.bound[1] for storage in storages)
    other = copy.deepcopy(cache)
    assert all(x.is_pinned() for storage in offloaded(other) for x in storage.host)
    ends = list(range(3540, 3560))
    for each, tokens in ((cache, ids), (other, ids.flip(1))):
        assert torch.equal(feed(model, each, tokens, ends), feed(model, copy.deepcopy(plain), tokens, ends))


@pytest.mark.parametrize("kind", CACHES)
def test_bits_of_a_ragged_batch(model: Any, pad: Callable, kind: str) -> None:
    plain, cache = both(model, kind)
    batch = pad([torch.randint(1, VOCAB, (length,)) for length in (2500, 5, 1700, 300)], "left")
    batch.input_ids, batch.attention_mask, batch.position_ids = (
        x.cuda() for x in (batch.input_ids, batch.attention_mask, batch.position_ids)
    )
    borders = [1000, 2300, *range(2301, 2500)]
    expected, found = (batch.real(batch.run(model, each, borders)) for each in (plain, cache))
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(model: Any, implementation: str, num_beams: int) -> None:
    ids = ids_of(2, 1000)
    mask = torch.ones_like(ids)
    mask[1, :400] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "num_beams": num_beams}
    result = model.generate(ids, **options, cache_implementation=implementation, return_dict_in_generate=True)
    assert result.past_key_values.host_bytes() > 0
    assert torch.equal(result.sequences, model.generate(ids, **options))


@contextmanager
def not_after_current(self: SideStream) -> Iterator[None]:
    with torch.cuda.stream(self.stream):
        yield


@pytest.mark.parametrize(
    ("left_out", "computing", "copying"),
    [
        (None, 1_000_000, 2_000_000),
        (None, 4_000_000, 0),
        # That each wait is needed: without it, delays show. A copy has to take longer than a layer does on a slow host.
        ("join", 0, 50_000_000),
        ("after_current", 4_000_000, 0),
    ],
)
@pytest.mark.parametrize("chunk", [1, 16])
def test_prefetching_does_not_race(
    model: Any, monkeypatch: pytest.MonkeyPatch, left_out: str | None, computing: int, copying: int, chunk: int
) -> None:
    """Buffers are poisoned when another layer comes, copies are held up (cycles), and so is what reads them."""
    plain, cache = both(model, "fixed")
    ids = ids_of(2, 3200)
    for each in (plain, cache):
        feed(model, each, ids, [0, 3000, 3001, 3017, 3018])  # compiles
    ends = list(range(3018, 3018 + 10 * chunk + 1, chunk))
    expected = feed(model, plain, ids, ends)

    fill = OffloadedStorage.fill

    def slow_fill(self: OffloadedStorage, memory: Tensor, number: int) -> None:
        memory.fill_(255)  # NaN in bf16
        torch.cuda._sleep(copying)
        fill(self, memory, number)

    def held_up(function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda._sleep(computing)
            return function(*args, **kwargs)

        return run

    from sparse_hf_kernels.kv_cache.launch import decode_fused

    monkeypatch.setattr(OffloadedStorage, "fill", slow_fill)
    monkeypatch.setattr("sparse_hf.cache_layer._decode_fused", lambda: held_up(decode_fused))
    monkeypatch.setattr("sparse_hf.cached_attention.sparse_attention", held_up(sparse_attention))
    if left_out == "join":
        monkeypatch.setattr(SideStream, "join", lambda self: None)
    elif left_out == "after_current":
        monkeypatch.setattr(SideStream, "after_current", not_after_current)
    found = feed(model, cache, ids, ends)
    torch.cuda.synchronize()
    assert torch.equal(found, expected) == (left_out is None)


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "not shared"])
def test_a_dropped_cache_writes_to_nobody_elses_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    """A prefetch may be on its way when the buffers' memory is given back."""
    if not shares:
        monkeypatch.setattr(SideStream, "share", lambda self, x: x)
    fill = OffloadedStorage.fill

    def slow_fill(self: OffloadedStorage, memory: Tensor, number: int) -> None:
        torch.cuda._sleep(200_000_000)
        fill(self, memory, number)

    cache = SparseCache.for_model(model, max_length=4000, offload=True)
    ids = ids_of(1, 3002)
    feed(model, cache, ids, [0, 3000, 3001])
    torch.cuda.synchronize()
    monkeypatch.setattr(OffloadedStorage, "fill", slow_fill)
    feed(model, cache, ids, [3001, 3002])
    del cache
    # All that the allocator has to give.
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    others = [torch.zeros(PIECE, dtype=torch.uint8, device="cuda") for _ in range(free // PIECE)]
    torch.cuda.synchronize()
    assert any(bool(x.any()) for x in others) == (not shares)


def device_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_device_memory_is_lower_by_the_full_heads(model: Any) -> None:
    """What the allocator counts, of caches of 32768 tokens: all but two layers' worth."""
    ids, ends, taken = ids_of(1, 32768), [0, 8192, 16384, 24576, 32767, 32768], []
    for offload in (False, True, False, True):  # twice, so that what is kept for good is there
        before = device_bytes()
        cache = SparseCache.for_model(model, max_length=32768, offload=offload)
        for step in pairwise(ends):
            feed(model, cache, ids, list(step))
        taken.append(device_bytes() - before)
        if offload:
            full = 2 * (LAYERS - 1) * 32768 * 2 * HEAD_DIM * 2  # two heads a layer
            buffers = stage_of(cache).allocated_bytes()
            assert cache.host_bytes() == full and buffers < 2 * full / (LAYERS - 1) + 2**20
            assert abs(taken[-1] - (cache.allocated_bytes() - cache.host_bytes())) < SLACK
        del cache
    on_device, with_host = taken[2:]
    assert abs(on_device - with_host - (full - buffers)) < SLACK
    assert on_device - with_host > full / 2


def test_graph_capture_is_refused(model: Any) -> None:
    cache = SparseCache.for_model(model, max_length=400, offload=True)
    ids = ids_of(1, 201)
    feed(model, cache, ids, [0, 199, 200])
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match="make the cache without offload=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        feed(model, cache, ids, [200, 201])
