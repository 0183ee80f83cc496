"""`generate` on a sparsified model, without any other change to the call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

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


def test_hidden_states_of_all_tokens(make_case: Callable, pad: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that would be read in chunks unasked is read at once where what every token gives is asked for."""
    monkeypatch.setattr("sparse_hf.chunked_prefill.WHOLE_TOKENS", 100)
    monkeypatch.setattr("sparse_hf.chunked_prefill.CHUNK_TOKENS", 50)
    case = make_case("llama", "streaming")
    batch = pad(case.tokens(150), "left")
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    result = generate(case.model, batch, **options)
    with torch.no_grad():
        whole = case.model(batch.input_ids, output_hidden_states=True).hidden_states
    for found, expected in zip(result.hidden_states[0], whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(result.sequences, generate(case.model, batch, max_new_tokens=2))


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


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_cache_implementations(make_case: Callable, pad: Callable, implementation: str, options: dict) -> None:
    """The same tokens; a static cache has room for exactly what `generate` feeds to the model."""
    case = make_case("llama", "mixed")
    batch = pad(case.tokens(30, 19, 5), "left")
    result = generate(case.model, batch, cache_implementation=implementation, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, generate(case.model, batch, **options))
    cache = result.past_key_values
    assert isinstance(cache, SparseCache)
    assert cache.get_max_length() == (30 + NEW - 1 if "static" in implementation else -1)
    assert int(cache.get_seq_length()) == 30 + NEW - 1
    assert (cache.host_bytes() > 0) == ("offloaded" in implementation)


def test_room_for_later_calls(make_case: Callable, pad: Callable) -> None:
    case = make_case("llama", "mixed")
    batch = pad(case.tokens(30, 19), "left")
    options = {"cache_implementation": "static", "return_dict_in_generate": True}
    for asked, given in ((100, 100), (20, 30 + NEW - 1)):
        result = generate(case.model, batch, max_cache_len=asked, **options)
        assert result.past_key_values.get_max_length() == given
        assert_greedy(case, batch, result.sequences)


def test_static_caches_are_not_compiled(make_case: Callable, pad: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where `generate` compiles the whole forward for caches that allow it."""
    case = make_case("llama", "mixed")
    batch = pad(case.tokens(30, 19), "left")
    compiles = CompileConfig(backend="eager")
    compiles._compile_all_devices = True
    asked: list[CompileConfig] = []

    def compiled(config: CompileConfig) -> Any:
        asked.append(config)
        return case.model.__call__

    monkeypatch.setattr(case.model, "get_compiled_call", compiled)
    found = generate(case.model, batch, cache_implementation="static", compile_config=compiles)
    assert_greedy(case, batch, found)
    assert not asked
    with dense(case.model):
        generate(case.model, batch, cache_implementation="static", compile_config=compiles)
    assert asked, "transformers compiles nothing here, so that this test shows nothing"


@pytest.mark.parametrize("implementation", ["quantized", "sliding_window"])
def test_other_cache_implementations_are_refused(make_case: Callable, pad: Callable, implementation: str) -> None:
    case = make_case("llama", "streaming")
    with pytest.raises(
        ValueError, match=rf"'offloaded_static' on a sparsified model, got '{implementation}'; .*kv_dtype=\"int8\""
    ):
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
