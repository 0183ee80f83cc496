"""`SparseCache`: bytes that are measured, memory that is really freed, and errors where it cannot serve."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf import (
    SparseCache,
    SparseConfig,
    Streaming,
    dense,
    set_head_masks,
    sparsify,
    sparsity_summary,
    unsparsify,
)
from sparse_hf.cache_layer import MIN_GROWTH

HEAD_DIM, ITEM = 16, 4
TOKEN = 2 * HEAD_DIM * ITEM  # bytes of one token's key and value in one head


def feed(model: Any, cache: Any, ids: Tensor, start: int, end: int) -> Tensor:
    with torch.no_grad():
        return model(ids[:, start:end], past_key_values=cache, use_cache=True).logits


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 99, (batch, length))


def test_bytes_equal_the_summary_at_every_length(case: Any) -> None:
    ids = random_ids(2, 60)
    cache = SparseCache.for_model(case.model)
    assert cache.kv_bytes() == 0
    ends = (1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 33, 60)
    for start, end in zip((0, *ends), ends, strict=False):
        feed(case.model, cache, ids, start, end)
        assert cache.get_seq_length() == end
        assert cache.kv_bytes() == sparsity_summary(case.model, end, batch_size=2).kv_bytes, f"after {end} tokens"


@pytest.mark.parametrize(("chunk", "length"), [(60, 60), (16, 60), (7, 42), (1, 30)])
def test_bytes_by_hand(make_case: Callable, chunk: int, length: int) -> None:
    """2 sinks + 5 earlier tokens of the window of 6: the next query brings the sixth itself."""
    for mix, held in (("streaming", lambda n: min(n, 7)), ("sliding_window", lambda n: min(n, 5)), ("dense", int)):
        case = make_case("llama", mix)
        ids, cache = random_ids(3, length), SparseCache.for_model(case.model)
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            feed(case.model, cache, ids, start, end)
            assert cache.kv_bytes() == 3 * 2 * 2 * held(end) * TOKEN  # batch, layers, KV heads


def test_min_seq_len_keeps_everything_until_the_last_dense_row(make_case: Callable) -> None:
    case = make_case("llama", "min_seq_len")
    ids, cache = random_ids(1, 40), SparseCache.for_model(case.model)
    for end in range(1, 41):
        feed(case.model, cache, ids, end - 1, end)
        assert cache.kv_bytes() == 4 * (end if end < 16 else 7) * TOKEN


@pytest.mark.parametrize(
    ("family", "mix", "expected"),
    [
        # Layers with the model's own window of 12 hold 11 earlier tokens, whatever the head would like to read.
        ("mistral_native", "dense", [22, 22]),
        ("mistral_native", "explicit", [22, 22]),
        ("mistral_native", "streaming", [14, 14]),
        ("mistral_native", "sliding_window", [10, 10]),
        ("qwen2_native", "dense", [80, 22, 22]),
        ("qwen2_native", "mixed", [47, 18, 16]),  # 7 + 40; 11 + 7; explicit and a window of 6: 11 + 5
    ],
)
def test_native_window(make_case: Callable, family: str, mix: str, expected: list[int]) -> None:
    case = make_case(family, mix)
    cache = SparseCache.for_model(case.model)
    feed(case.model, cache, random_ids(1, 40), 0, 40)
    summary = sparsity_summary(case.model, 40)
    assert [layer.kv_bytes() // TOKEN for layer in cache.layers] == [row.kv_bytes // TOKEN for row in summary.layers]
    assert [layer.kv_bytes() // TOKEN for layer in cache.layers] == expected


def test_sinks_beyond_the_native_window_are_not_kept(make_model: Callable) -> None:
    model = make_model("mistral_native")
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=50, window_size=6)))
    cache = SparseCache.for_model(model)
    feed(model, cache, random_ids(1, 80), 0, 80)
    assert cache.kv_bytes() == 4 * 11 * TOKEN == sparsity_summary(model, 80).kv_bytes


def test_full_policy_keeps_every_key(make_case: Callable, make_model: Callable, family: str) -> None:
    case = make_case(family, "mixed")
    config = replace(case.config, cache_policy="full")
    model = sparsify(make_model(family), config)
    ids = random_ids(2, 40)
    cache = SparseCache.for_model(model)
    logits = torch.cat([feed(model, cache, ids, a, b) for a, b in ((0, 20), (20, 39), (39, 40))], 1)
    summary = sparsity_summary(model, 40, batch_size=2)
    assert cache.kv_bytes() == summary.kv_bytes == summary.dense_kv_bytes
    for row, tokens in zip(logits, ids, strict=True):
        case.assert_logits(row, case.expected(tokens))


def live_kv_bytes() -> int:
    """Storage of all live tensors whose last dimension is that of keys and values, [..., length, head_dim]."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.ndim > 2 and x.shape[-1] == HEAD_DIM]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("mix", ["streaming", "mixed"])
def test_memory_is_really_freed(make_case: Callable, mix: str) -> None:
    case = make_case("llama", mix)
    ids, cache = random_ids(2, 60), SparseCache.for_model(case.model)
    before = live_kv_bytes()
    feed(case.model, cache, ids, 0, 40)
    old = [weakref.ref(layer.storage.keys) for layer in cache.layers]
    # The first tokens get the room that they need.
    assert live_kv_bytes() - before == cache.allocated_bytes() == cache.kv_bytes()
    for end in range(41, 61):
        feed(case.model, cache, ids, end - 1, end)
    full_heads = sum(layer.storage.layout.num_linear for layer in cache.layers)
    spare = full_heads * 2 * TOKEN * MIN_GROWTH  # of both rows
    assert live_kv_bytes() - before == cache.allocated_bytes() <= cache.kv_bytes() + spare
    # Rings stay where they are, full heads have moved to where there is room.
    assert all((reference() is None) == (layer.storage.layout.num_linear > 0)
               for reference, layer in zip(old, cache.layers, strict=True))  # fmt: skip
    cache.reset()
    assert cache.kv_bytes() == cache.allocated_bytes() == 0 and live_kv_bytes() == before


def test_padding_does_not_grow_the_cache(make_case: Callable, pad: Callable) -> None:
    case = make_case("llama", "streaming")
    batch = pad(case.tokens(60, 3), "left")
    cache = SparseCache.for_model(case.model)
    with torch.no_grad():
        case.model(**batch.inputs, past_key_values=cache)
    assert cache.kv_bytes() == sparsity_summary(case.model, 60, batch_size=2).kv_bytes


@pytest.mark.parametrize("mix", ["mixed", "min_seq_len"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_batch_changes(make_case: Callable, pad: Callable, mix: str, change: Callable, rows: list[int]) -> None:
    case = make_case("llama", mix)
    sequences = case.tokens(25, 14, 9)
    batch = pad(sequences, "left")
    cache = SparseCache.for_model(case.model)
    with torch.no_grad():
        case.model(**batch.inputs, past_key_values=cache)
    change(cache)
    follow = random_ids(len(rows), 8)
    mask = torch.cat([batch.attention_mask[rows], torch.ones_like(follow)], 1)
    positions = mask.cumsum(-1)[:, -8:] - 1
    with torch.no_grad():
        logits = case.model(follow, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, source, new in zip(logits, rows, follow, strict=True):
        case.assert_logits(row, case.expected(torch.cat([sequences[source], new]))[-8:])


def test_reset_starts_anew(make_case: Callable) -> None:
    case = make_case("llama", "mixed")
    cache = SparseCache.for_model(case.model)
    feed(case.model, cache, random_ids(2, 30), 0, 30)
    cache.reset()
    assert cache.get_seq_length() == 0
    (tokens,) = case.tokens(30)
    case.assert_logits(feed(case.model, cache, tokens[None], 0, 30)[0], case.expected(tokens))


def test_crop_is_refused(make_case: Callable) -> None:
    case = make_case("llama", "streaming")
    cache = SparseCache.for_model(case.model)
    feed(case.model, cache, random_ids(1, 10), 0, 10)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(-2)


def test_needs_a_sparsified_model(make_model: Callable) -> None:
    with pytest.raises(ValueError, match="not sparsified"):
        SparseCache.for_model(make_model("llama"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_attention_refuses_it(make_case: Callable, family: str, implementation: str) -> None:
    case = make_case(family, "streaming")
    case.model._sparse_hf_handle.original_attention = implementation
    cache = SparseCache.for_model(case.model)
    with dense(case.model), pytest.raises(AttributeError, match="use DynamicCache"):
        feed(case.model, cache, random_ids(1, 10), 0, 10)
    assert cache.get_seq_length() == 0
    unsparsify(case.model)
    with pytest.raises(AttributeError, match="use DynamicCache"):
        feed(case.model, cache, random_ids(1, 10), 0, 10)


def test_packed_sequences_are_refused(make_case: Callable, pack: Callable, family: str) -> None:
    case = make_case(family, "streaming")
    packed = pack([case.tokens(8, 12)])
    cache = SparseCache.for_model(case.model)
    with pytest.raises(ValueError, match="use_cache=False"):
        case.model(**packed, past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False"):
        case.model(**packed, attention_mask=torch.ones(1, 20), past_key_values=cache)


def test_mask_must_cover_what_was_seen(make_case: Callable) -> None:
    case = make_case("llama", "streaming")
    ids, cache = random_ids(1, 20), SparseCache.for_model(case.model)
    feed(case.model, cache, ids, 0, 10)
    with pytest.raises(ValueError, match="attention_mask covers 10 tokens but 20"):
        case.model(ids[:, 10:], attention_mask=torch.ones(1, 10), past_key_values=cache)


def test_a_wider_mask_is_read_at_the_right_place(make_case: Callable, pad: Callable) -> None:
    """A mask of the whole batch, given with its first chunk already."""
    case = make_case("llama", "mixed")
    sequences = case.tokens(30, 12)
    batch = pad(sequences, "left")
    cache = SparseCache.for_model(case.model)
    parts = []
    for start, end in ((0, 20), (20, 30)):
        arguments = {**batch.upto(end, start), "attention_mask": batch.attention_mask}
        with torch.no_grad():
            parts.append(case.model(**arguments, past_key_values=cache).logits)
    for row, tokens in zip(batch.real(torch.cat(parts, 1)), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


def test_other_head_masks_do_not_fit(make_case: Callable) -> None:
    case = make_case("llama", "streaming")
    ids, cache = random_ids(1, 30), SparseCache.for_model(case.model)
    feed(case.model, cache, ids, 0, 20)
    set_head_masks(case.model, torch.ones(2, 2))
    with pytest.raises(ValueError, match="other head masks"):
        feed(case.model, cache, ids, 20, 21)


def test_an_explicit_pattern_ends_even_where_the_cache_is_short(make_case: Callable) -> None:
    """The native window keeps 11 keys, but the 65th token has no block row."""
    case = make_case("mistral_native", "explicit")
    ids, cache = random_ids(1, 65), SparseCache.for_model(case.model)
    feed(case.model, cache, ids, 0, 40)
    feed(case.model, cache, ids, 40, 64)
    with pytest.raises(ValueError, match="covers 64 tokens, got a sequence of 65"):
        feed(case.model, cache, ids, 64, 65)


def test_gates_that_train_are_refused(make_case: Callable) -> None:
    case = make_case("llama", "streaming")
    for state in case.model._sparse_hf_handle.states:
        state.gate = lambda: torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="deployed masks"):
        feed(case.model, SparseCache.for_model(case.model), random_ids(1, 10), 0, 10)
