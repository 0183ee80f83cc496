"""`SparseCache` over long lives: growing, of a fixed length, in 8 bits, copied, over turns and ragged batches."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf.cache_layer import GROWTH, MIN_GROWTH
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.patching import get_handle
from sparse_hf_kernels import AttentionLayout, HeadPattern
from sparse_hf_kernels.kv_cache import KVDtype

STREAMING = Streaming(num_sink_tokens=3, window_size=24)
CACHES: dict[str, dict[str, Any]] = {"growing": {}, "fixed": {"max_length": 320}}


@pytest.fixture(params=[0, 100], ids=["plain", "dense rows"])
def model(request: pytest.FixtureRequest, make_model: Callable) -> Any:
    """Two layers, one full head and one with sinks and a window in each, for 320 tokens."""
    dense = make_model("llama")
    dense.config.max_position_embeddings = 320
    return sparsify(dense, SparseConfig(sparse=STREAMING, head_masks=((1, 0), (0, 1)), min_seq_len=request.param))


@torch.no_grad()
def alone(model: Any, tokens: Tensor) -> Tensor:
    """Logits of one sequence without any cache."""
    return model(tokens[None], use_cache=False).logits[0]


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(ends)], 1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(1, 99, (batch, length))


def test_growth_by_steps(model: Any) -> None:
    """Token after token: spare room is bounded, moves are few, and they change nothing that is stored."""
    ids, cache = ids_of(2, 300), SparseCache.for_model(model)
    logits, moves, last = [feed(model, cache, ids, [0, 5])], 0, [layer.storage for layer in cache._sparse_layers]
    assert [storage.capacity for storage in last] == [5, 5], "the first tokens get the room that they need"
    for end in range(6, 301):
        before = [(layer.storage, layer.storage.keys.clone()) for layer in cache._sparse_layers]
        logits.append(feed(model, cache, ids, [end - 1, end]))
        for layer, (storage, keys) in zip(cache._sparse_layers, before, strict=True):
            now, capacity = layer.storage, layer.storage.capacity
            assert end <= capacity <= end + max(MIN_GROWTH, end // GROWTH)
            if now is not storage:
                continue  # heads have parted: no query reads every key any more
            (linear,) = (group for group in now.layout.groups if group.ring is None)
            old_capacity = (keys.shape[1] - now.layout.ring_slots) // now.layout.num_linear
            old = keys[:, now.layout.ring_slots :].unflatten(1, (len(linear.heads), old_capacity))
            kept = now.view(now.keys, linear)
            assert torch.equal(kept[:, :, : end - 1], old[:, :, : end - 1])
            moves += capacity != old_capacity
    assert 2 <= moves / 2 <= 300 / MIN_GROWTH + 1
    for row, tokens in zip(torch.cat(logits, 1), ids, strict=True):
        close(row, alone(model, tokens))


@pytest.mark.parametrize("expected", [0, 30000])
def test_growth_of_long_caches(expected: int) -> None:
    """A 128th is spare, unless more tokens are expected."""
    layout = AttentionLayout(patterns=(HeadPattern(), HeadPattern(window=65, num_sink_tokens=4)))
    cache = SparseCache([layout])
    layer, seen = cache._sparse_layers[0], 0
    for new in (20000, 1, 100, 100, 5000):
        if seen:
            cache.expect(expected)
        keys = torch.randn(1, 2, new, 4)
        plan = ForwardPlan(q_len=new, kv_len=seen + new, q_offset=seen, kv_offset=0, padding_mask=None,
                           device=keys.device)  # fmt: skip
        layer.update(keys, keys)
        capacity = 0 if layer.storage is None else layer.storage.capacity
        layer.store(keys, keys, plan, None)
        seen += new
        assert layer.storage is not None
        if expected and seen > 20000:
            assert layer.storage.capacity == 30000
        elif seen > capacity:
            assert layer.storage.capacity == seen + (seen // GROWTH if capacity else 0)
        else:
            assert layer.storage.capacity == capacity
        slots = layer.storage.capacity + 68
        assert cache.allocated_bytes() == slots * 2 * 4 * 4 and cache.kv_bytes() == (seen + 68) * 2 * 4 * 4
    assert layer.lengths is not None and layer.lengths.tolist() == [25201]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_a_ragged_batch_in_chunks(model: Any, pad: Callable, kind: str, chunk: int) -> None:
    sequences = [torch.randint(1, 99, (length,)) for length in (300, 5, 121, 64)]
    batch = pad(sequences, "left")
    # Token by token over the window's turns and over the last dense row.
    borders = range(60, 140) if chunk == 1 else range(chunk, 300, chunk)
    logits = batch.run(model, SparseCache.for_model(model, **CACHES[kind]), borders)
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        close(row, alone(model, tokens))


def test_a_fixed_length(model: Any) -> None:
    """All memory is there from the first token on and stays where it is; the length is a tensor."""
    ids, cache = ids_of(2, 160), SparseCache.for_model(model, max_length=160)
    assert cache.get_seq_length() == 0 and cache._sparse_layers[0].get_max_length() == 160
    parts = [feed(model, cache, ids, [0, 90])]
    allocated = cache.allocated_bytes()
    for end in range(91, 161):
        parts.append(feed(model, cache, ids, [end - 1, end]))
        length = cache.get_seq_length()
        assert isinstance(length, Tensor) and int(length) == end
        assert cache.allocated_bytes() <= allocated, "heads may part, and nothing grows"
    for row, tokens in zip(torch.cat(parts, 1), ids, strict=True):
        close(row, alone(model, tokens))
    growing = SparseCache.for_model(model)
    feed(model, growing, ids, [0, 160])
    assert cache.kv_bytes() == growing.kv_bytes()


@pytest.mark.parametrize("ends", [[0, 20, 21], [0, 10, 25], [0, 21]], ids=str)
def test_a_token_too_many(model: Any, ends: list[int]) -> None:
    ids, cache = ids_of(1, 25), SparseCache.for_model(model, max_length=20)
    fits = ends[:-1]
    if len(fits) > 1:
        feed(model, cache, ids, fits)
    with pytest.raises(ValueError, match=rf"made for 20 tokens and would hold {ends[-1]}; .* larger max_length"):
        feed(model, cache, ids, ends[-2:])
    assert int(cache.get_seq_length()) == fits[-1]
    if fits[-1] < 20:
        rest = feed(model, cache, ids, [fits[-1], 20])
        close(rest[0], alone(model, ids[0, :20])[fits[-1] :])


@pytest.mark.parametrize("max_length", [0, -3])
def test_no_length_is_refused(model: Any, max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length must be positive, got {max_length}"):
        SparseCache.for_model(model, max_length=max_length)
    with pytest.raises(ValueError, match='kv_dtype must be "int8", "fp8" or None, got \'int4\''):
        SparseCache.for_model(model, kv_dtype="int4")


@pytest.mark.parametrize("kind", CACHES)
def test_three_turns(model: Any, pad: Callable, kind: str) -> None:
    """Each turn's answer is the one from scratch."""
    batch = pad([torch.randint(1, 99, (length,)) for length in (40, 23)], "left")
    cache = SparseCache.for_model(model, **CACHES[kind])
    ids, mask = batch.input_ids, batch.attention_mask
    for turn in range(3):
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
        answer = model.generate(ids, past_key_values=cache, **options)
        assert answer.shape[1] == ids.shape[1] + 9 and int(cache.get_seq_length()) == answer.shape[1] - 1, turn
        assert torch.equal(answer, model.generate(ids, use_cache=False, **options))
        ids = torch.cat([answer, ids_of(2, 20)], 1)
        mask = torch.cat([mask, torch.ones(2, 29, dtype=torch.long)], 1)


def test_beams_in_a_fixed_length(model: Any, pad: Callable) -> None:
    """Rows of the storage change places under launches that are bound to it."""
    batch = pad([torch.randint(1, 99, (length,)) for length in (90, 33)], "left")
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 14, "do_sample": False, "num_beams": 3}
    cache = SparseCache.for_model(model, max_length=320)
    found = model.generate(batch.input_ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(batch.input_ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_copy_goes_its_own_way(model: Any, kind: str, kv_dtype: KVDtype | None) -> None:
    ids = ids_of(2, 150)
    cache = SparseCache.for_model(model, **CACHES[kind], kv_dtype=kv_dtype)
    feed(model, cache, ids, [0, 50, 51])
    other = copy.deepcopy(cache)
    ends = [51, 60, *range(61, 151)]
    strayed = feed(model, other, ids.flip(1), ends)
    first = feed(model, cache, ids, ends)
    again = SparseCache.for_model(model, **CACHES[kind], kv_dtype=kv_dtype)
    feed(model, again, ids, [0, 50, 51])
    expected = feed(model, copy.deepcopy(again), ids, ends)
    assert torch.equal(first, expected) and not torch.equal(strayed, first)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_eight_bits(model: Any, pad: Callable, kv_dtype: KVDtype) -> None:
    """Logits near those of full precision, over chunks, padding and single tokens; one scale for each 16 numbers."""
    sequences = [torch.randint(1, 99, (length,)) for length in (160, 70)]
    batch, borders = pad(sequences, "left"), [50, 57, *range(100, 160)]
    plain, cache = SparseCache.for_model(model), SparseCache.for_model(model, kv_dtype=kv_dtype)
    expected, found = (batch.real(batch.run(model, each, borders)) for each in (plain, cache))
    for truth, row in zip(expected, found, strict=True):
        error = (row - truth).norm() / truth.norm()
        assert 0 < error < (0.02 if kv_dtype == "int8" else 0.08)
    assert cache.kv_bytes() * 64 == plain.kv_bytes() * (16 + 4)


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("max_length", [None, 128])
def test_eight_bits_of_a_trained_model(demo_model: Path, kv_dtype: KVDtype, max_length: int | None) -> None:
    """The same text as with transformers' own cache, in half the memory."""
    dense = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    heads = dense.config.num_key_value_heads
    masks = tuple(tuple((layer + head) % 2 for head in range(heads)) for layer in range(dense.config.num_hidden_layers))
    model = sparsify(dense, SparseConfig(sparse=STREAMING, head_masks=masks))
    prompt = "Once upon a time there was a little girl who lived with her mother in a small house near the forest."
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options).sequences
    cache = SparseCache.for_model(model, max_length=max_length, kv_dtype=kv_dtype)
    found = model.generate(**inputs, past_key_values=cache, **options)
    assert found.past_key_values is cache and torch.equal(found.sequences, expected)
    plain = SparseCache.for_model(model)
    model(expected[:, :-1], past_key_values=plain)
    dim = model.config.head_dim
    assert cache.kv_bytes() * 2 * dim == plain.kv_bytes() * (dim + 4) and cache.kv_bytes() < 0.6 * plain.kv_bytes()


def test_gradients_of_the_first_chunk(model: Any) -> None:
    """Exact, as nothing was read from the cache; through what was, a backward pass raises instead of losing some."""
    ids, weights = ids_of(2, 50), torch.randn(2, 40, 99)
    grads = []
    for cache in (None, SparseCache.for_model(model)):
        model.zero_grad()
        given = {"use_cache": False} if cache is None else {"past_key_values": cache}
        (model(ids[:, :40], **given).logits * weights).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(grad.any() for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])
    for start, end in ((40, 45), (45, 46)):
        logits = model(ids[:, start:end], past_key_values=cache).logits
        close(logits[0].detach(), alone(model, ids[0, :end])[start:])
        with pytest.raises(ValueError, match=r"without their gradients; pass use_cache=False or a DynamicCache"):
            logits.sum().backward()


def test_a_copy_takes_the_short_way_too(model: Any) -> None:
    """It was made for an equal layout, which is looked at once."""
    cache = SparseCache.for_model(model)
    feed(model, cache, ids_of(1, 20), [0, 20])
    states, layers = get_handle(model).states, copy.deepcopy(cache)._sparse_layers
    assert all(layer.layout is not state.layout for layer, state in zip(layers, states, strict=True))
    assert all(layer.fits(state.layout) for layer, state in zip(layers, states, strict=True))
    assert all(layer.layout is state.layout for layer, state in zip(layers, states, strict=True))
    assert not layers[0].fits(AttentionLayout.dense(2))


def test_room_for_what_is_expected_waits_until_heads_have_parted(make_case: Callable) -> None:
    """Before, every head would get it: a sparse cache would for a moment take what a dense one does."""
    case = make_case("llama", "min_seq_len")  # dense up to 16 tokens
    ids, cache = torch.randint(1, 99, (1, 40)), SparseCache.for_model(case.model)
    cache.expect(1000)
    token = 2 * 16 * 4 * sum(len(layer.layout.patterns) for layer in cache.layers)
    with torch.no_grad():
        case.model(ids[:, :10], past_key_values=cache)
        assert 10 * token <= cache.allocated_bytes() < 20 * token
        case.model(ids[:, 10:20], past_key_values=cache)
    assert all(layer.storage.capacity == 1000 for layer in cache.layers)
    held = sum(layer.storage.layout.row_slots(1000) for layer in cache.layers) * 2 * 16 * 4
    assert held <= cache.allocated_bytes() < held + 1000
