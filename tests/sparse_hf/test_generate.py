"""`generate` on a sparsified model, without any other change to the call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparse_hf import SparseCache, dense, unsparsify

NEW = 12


def generate(model: Any, batch: Any, **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(batch.input_ids, attention_mask=batch.attention_mask, **kwargs)


def assert_greedy(case: Any, batch: Any, output: torch.Tensor) -> None:
    """Every generated token is the oracle's best for the row's real tokens before it."""
    prompt = batch.input_ids.shape[1]
    assert output.shape[1] > prompt
    for row, mask in zip(output, batch.attention_mask.bool(), strict=True):
        tokens = torch.cat([row[:prompt][mask], row[prompt:]])
        new = output.shape[1] - prompt
        assert case.expected(tokens)[-new - 1 : -1].argmax(-1).tolist() == row[prompt:].tolist()


def test_greedy(case: Any, pad: Callable) -> None:
    batch = pad(case.tokens(30, 19, 5), "left")
    result = generate(case.model, batch, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, SparseCache)
    assert_greedy(case, batch, result.sequences)
    if case.mix == "mixed":
        assert torch.equal(generate(case.model, batch, use_cache=False), result.sequences)


@pytest.mark.parametrize("mix", ["mixed"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_greedy_with_transformers_caches(case: Any, pad: Callable, mix: str, kind: str) -> None:
    batch = pad(case.tokens(30, 19, 5), "left")
    config = case.model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=30 + NEW)
    assert_greedy(case, batch, generate(case.model, batch, past_key_values=cache))


@pytest.mark.parametrize("mix", ["mixed"])
def test_chunked_prefill(case: Any, pad: Callable, mix: str) -> None:
    batch = pad(case.tokens(30, 19, 5), "left")
    assert_greedy(case, batch, generate(case.model, batch, prefill_chunk_size=7))


@pytest.mark.parametrize("mix", ["mixed", "min_seq_len"])
def test_beam_search(case: Any, pad: Callable, mix: str) -> None:
    batch = pad(case.tokens(30, 12), "left")
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached = generate(case.model, batch, **options)
    assert isinstance(cached.past_key_values, SparseCache)
    plain = generate(case.model, batch, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=1e-5, atol=1e-5)
    assert len({tuple(row.tolist()) for row in cached.sequences[:3]}) == 3, "the beams are one and the same"


def test_sampled_sequences_share_the_prompt(make_case: Callable, pad: Callable) -> None:
    case = make_case("llama", "mixed")
    batch = pad(case.tokens(30, 12), "left")
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(case.model, batch, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*results)


@pytest.mark.parametrize("mix", ["mixed", "streaming", "min_seq_len"])
def test_second_turn_equals_one_from_scratch(case: Any, pad: Callable, mix: str) -> None:
    batch = pad(case.tokens(20, 11), "left")
    cache = SparseCache.for_model(case.model)
    first = generate(case.model, batch, past_key_values=cache, max_new_tokens=6)
    follow = torch.cat([first, torch.stack(case.tokens(9, 9))], 1)
    mask = torch.cat([batch.attention_mask, torch.ones(2, 15, dtype=torch.long)], 1)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    second = case.model.generate(follow, past_key_values=cache, **options)
    assert cache.get_seq_length() == second.shape[1] - 1
    assert torch.equal(second, case.model.generate(follow, **options))
    assert torch.equal(second, case.model.generate(follow, use_cache=False, **options))


@pytest.mark.parametrize("mix", ["mixed"])
def test_dense_and_unsparsified_generate_as_before(case: Any, make_model: Callable, pad: Callable, mix: str) -> None:
    batch = pad(case.tokens(30, 19), "left")
    expected = generate(make_model(case.family), batch)
    sparse = generate(case.model, batch)
    with dense(case.model):
        result = generate(case.model, batch, return_dict_in_generate=True)
        assert torch.equal(
            generate(case.model, batch, num_beams=2), generate(make_model(case.family), batch, num_beams=2)
        )
    assert type(result.past_key_values) is DynamicCache
    assert torch.equal(result.sequences, expected)
    assert not torch.equal(sparse, expected), "the model's sparsity changes nothing, so this test shows nothing"
    assert torch.equal(generate(case.model, batch), sparse)
    assert torch.equal(generate(unsparsify(case.model), batch), expected)


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_other_cache_implementations_are_refused(make_case: Callable, pad: Callable, implementation: str) -> None:
    case = make_case("llama", "streaming")
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(case.model, pad(case.tokens(10), "left"), cache_implementation=implementation)


def test_assisted_decoding_is_refused(make_case: Callable, make_model: Callable, pad: Callable) -> None:
    case = make_case("llama", "streaming")
    batch = pad(case.tokens(20), "left")
    with pytest.raises(ValueError, match=r"cannot be rolled back|assist"):
        generate(case.model, batch, assistant_model=make_model("llama"))
    with pytest.raises(ValueError, match=r"cannot be rolled back|assist"):
        generate(case.model, batch, prompt_lookup_num_tokens=2)


def test_sparse_model_may_assist_a_dense_one_only_without_rollback(make_case: Callable, pad: Callable) -> None:
    case = make_case("llama", "dense")
    with pytest.raises(ValueError, match=r"cannot be rolled back|assist"):
        generate(case.oracle, pad(case.tokens(20), "left"), assistant_model=case.model)
