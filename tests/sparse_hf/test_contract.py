"""Token-exact is the contract: every path reads the keys that the definition of the method names.

Each path is compared with the oracle of conftest.py, which runs every sequence by itself.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache

from sparse_hf import SparseCache, available_families, available_methods

NATIVE = ("qwen2_native", "mistral_native")
CACHES = ("sparse", "dynamic")


def test_matrix_is_complete(prototypes: dict, make_case: Callable) -> None:
    assert {model.config.model_type for model in prototypes.values()} == set(available_families())
    case = make_case("llama", "mixed")
    mixes = ("dense", "sliding_window", "streaming", "explicit", "block_rules", "local_global", "last_rows")
    used = {
        method.name
        for mix in mixes
        for row in make_case("llama", mix).model._sparse_hf_handle.methods
        for method in row
    }
    assert used == {name for name, cls in available_methods().items() if cls.is_static}
    assert {"dense", "streaming", "explicit"} <= {m.name for row in case.model._sparse_hf_handle.methods for m in row}


@pytest.mark.parametrize("change", ["window", "sinks", "native"])
def test_the_oracle_tells_one_token_apart(make_case: Callable, change: str) -> None:
    """Tolerances are far below what a single key more or less changes."""
    case = make_case("mistral_native", "dense" if change == "native" else "streaming")
    (tokens,) = case.tokens(40)
    before = case.expected(tokens)
    for layer in case.oracle.model.layers:
        rule = layer.self_attn.oracle_rule
        if change == "native":
            rule.native_window += 1
        else:
            window, sinks = (7, 2) if change == "window" else (6, 1)
            rule.keeps = [lambda i, j, w=window, s=sinks: (i - j < w) | (j < s)] * case.num_heads
    assert (case.expected(tokens) - before).abs().max() > 0.1


def test_plain_batch_and_gradients(any_case: Any) -> None:
    sequences = any_case.tokens(40, 40)
    any_case.model.train()
    logits = any_case.model(torch.stack(sequences), use_cache=False).logits
    for row, tokens in zip(logits, sequences, strict=True):
        any_case.assert_logits(row, any_case.expected(tokens))
    any_case.assert_gradients(list(logits), sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_and_gradients(any_case: Any, pad: Callable, side: str) -> None:
    """Last rows are those of each sequence, not of the batch."""
    sequences = any_case.tokens(33, 3, 21)
    batch = pad(sequences, side)
    any_case.model.train()
    logits = any_case.model(**batch.inputs, use_cache=False).logits
    assert logits.isfinite().all()
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        any_case.assert_logits(row, any_case.expected(tokens))
    any_case.assert_gradients(batch.real(logits), sequences)


@pytest.mark.parametrize("family", ["llama", "qwen2_native"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_without_position_ids(make_case: Callable, pad: Callable, family: str, side: str) -> None:
    """Rotary attention sees differences only, so that the model's default position ids serve as well."""
    case = make_case(family, "mixed")
    sequences = case.tokens(33, 7, 21)
    batch = pad(sequences, side)
    logits = case.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        # Rotating by other positions costs more rounding than the rest together.
        torch.testing.assert_close(row, case.expected(tokens), rtol=1e-4, atol=1e-4)


def test_packed_training(any_case: Any, pack: Callable) -> None:
    rows = [any_case.tokens(30, 1, 17), any_case.tokens(9, 39)]
    any_case.model.train()
    logits = any_case.model(**pack(rows), use_cache=False).logits
    documents = [document for row in rows for document in row]
    parts = [part for row, line in zip(rows, logits, strict=True) for part in line.split([len(x) for x in row])]
    for part, tokens in zip(parts, documents, strict=True):
        any_case.assert_logits(part, any_case.expected(tokens))
    any_case.assert_gradients(parts, documents)


@pytest.mark.parametrize("family", ["llama", "mistral_native", "gpt2"])
@pytest.mark.parametrize("mix", ["mixed"])
def test_packed_variants(case: Any, pack: Callable, family: str, mix: str) -> None:
    """One row of position ids for the batch, trailing padding, and inference with the default cache."""
    rows = [case.tokens(20, 28), case.tokens(20, 28)]
    packed = pack(rows)
    packed["position_ids"] = packed["position_ids"][:1]
    for extra in ({}, {"use_cache": False}):
        logits = case.model(**packed, **extra).logits
        for row, line in zip(rows, logits, strict=True):
            for part, tokens in zip(line.split([20, 28]), row, strict=True):
                case.assert_logits(part, case.expected(tokens))
    padded = pack([[*case.tokens(12, 30), torch.zeros(6, dtype=torch.long)]])
    mask = torch.tensor([[1] * 42 + [0] * 6])
    logits = case.model(**padded, attention_mask=mask, use_cache=False).logits[0]
    case.assert_logits(logits[:12], case.expected(padded["input_ids"][0, :12]))
    case.assert_logits(logits[12:42], case.expected(padded["input_ids"][0, 12:42]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_row_may_be_longer_than_an_explicit_pattern(make_case: Callable, pack: Callable, family: str) -> None:
    """The pattern covers 64 tokens of a sequence, not of a row."""
    case = make_case(family, "explicit")
    documents = case.tokens(50, 64, 30)
    logits = case.model(**pack([documents]), use_cache=False).logits[0]
    for part, tokens in zip(logits.split([50, 64, 30]), documents, strict=True):
        case.assert_logits(part, case.expected(tokens))


@pytest.mark.parametrize("cache", CACHES)
def test_chunked_prefill(case: Any, pad: Callable, cache: str, new_cache: Callable) -> None:
    sequences = case.tokens(45, 29)
    batch = pad(sequences, "left")
    for chunk in (7, 16, 45):
        logits = batch.run(case.model, new_cache(cache, case.model), range(chunk, 45, chunk))
        for row, tokens in zip(batch.real(logits), sequences, strict=True):
            case.assert_logits(row, case.expected(tokens), f"chunks of {chunk}")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mix", ["mixed", "min_seq_len"])
def test_chunks_of_one_token(case: Any, pad: Callable, mix: str, cache: str, new_cache: Callable) -> None:
    sequences = case.tokens(33, 20)
    batch = pad(sequences, "left")
    logits = batch.run(case.model, new_cache(cache, case.model), range(1, 33))
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


@pytest.mark.parametrize("cache", CACHES)
def test_cached_decode_after_left_padding(case: Any, pad: Callable, cache: str, new_cache: Callable) -> None:
    sequences = case.tokens(44, 31, 15)
    batch = pad(sequences, "left")
    logits = batch.run(case.model, new_cache(cache, case.model), range(33, 44))
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


@pytest.mark.parametrize("cache", CACHES)
def test_cached_decode_after_right_padding(case: Any, slots: Callable, cache: str, new_cache: Callable) -> None:
    """The gap between a short prompt and its continuation is no border and no distance."""
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 11:30] = False  # 30 and 11 prompt tokens, 10 more each
    sequences = case.tokens(40, 21)
    batch = slots(sequences, mask)
    if cache == "dynamic" and case.family in NATIVE:
        # transformers' sliding layers count the gap as tokens and drop what is still in the window.
        with pytest.raises(ValueError, match="counts padding between tokens"):
            batch.run(case.model, new_cache(cache, case.model), range(30, 40))
        return
    logits = batch.run(case.model, new_cache(cache, case.model), range(30, 40))
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_second_turn_with_padding(
    make_case: Callable, slots: Callable, family: str, cache: str, side: str, new_cache: Callable
) -> None:
    """A second chunk whose padding lies between the row's earlier tokens and its new ones."""
    case = make_case(family, "mixed")
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :8] = False
    mask[1, 20:28] = side == "right"
    mask[1, 32:] = side == "left"
    sequences = case.tokens(40, int(mask[1].sum()))
    batch = slots(sequences, mask)
    logits = batch.run(case.model, new_cache(cache, case.model), [20])
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


def test_a_gap_in_default_position_ids_is_no_border(make_case: Callable, slots: Callable) -> None:
    """Position ids that count padding slots too jump over a gap; only the rotation's distances grow with it."""
    case = make_case("llama", "mixed")
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 15:28] = False
    batch = slots(case.tokens(40, 27), mask)
    cache = SparseCache.for_model(case.model)
    with torch.no_grad():
        whole = case.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        cached = case.model(batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache).logits
        changed = batch.input_ids.clone()
        changed[1, 0] += 1
        other = case.model(changed, attention_mask=batch.attention_mask, use_cache=False).logits
    case.assert_logits(cached, whole)
    assert (other - whole)[1, 28:].abs().max() > 1e-2, "tokens after the gap read nothing before it"
    case.assert_logits(whole[0], case.expected(batch.input_ids[0]))


@pytest.mark.parametrize("mix", ["mixed", "min_seq_len", "explicit"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_static_cache(case: Any, pad: Callable, mix: str, side: str) -> None:
    """transformers' static cache hands out all its slots, most of them empty."""
    sequences = case.tokens(36, 36 if side == "none" else 22)
    batch = pad(sequences, "left")
    cache = StaticCache(config=case.model.config, max_cache_len=64)
    if side == "left":
        logits = batch.run(case.model, cache, range(28, 36))
    else:
        with torch.no_grad():
            steps = [(0, 20), (20, 30), *((n, n + 1) for n in range(30, 36))]
            parts = [
                case.model(batch.input_ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in steps
            ]
        logits = torch.cat(parts, 1)
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        case.assert_logits(row, case.expected(tokens))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mix", ["mixed"])
def test_gradient_checkpointing(case: Any, pad: Callable, use_reentrant: bool, mix: str) -> None:
    sequences = case.tokens(33, 20)
    batch = pad(sequences, "left")
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        case.model.enable_input_require_grads()
    logits = case.model(**batch.inputs, use_cache=False).logits
    case.assert_gradients(batch.real(logits), sequences)


@pytest.mark.parametrize("mix", ["mixed", "streaming"])
def test_autocast(case: Any, mix: str) -> None:
    """bf16 autocast, as Trainer uses it: q and k may come in fp32 while v is bf16."""
    ids = torch.stack(case.tokens(32, 32))
    expected = torch.stack([case.expected(row) for row in ids])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = case.model(ids, use_cache=False).logits
        cache = SparseCache.for_model(case.model)
        parts = [case.model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 25), (25, 32))]
    scale = expected.norm()
    assert (plain - expected).norm() / scale < 0.1
    assert (torch.cat(parts, 1) - expected).norm() / scale < 0.1
