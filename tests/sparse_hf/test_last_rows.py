"""`tri_shape` and `triangle` on every path: each call has dense last rows, so the oracle knows where calls end.

Paths of one call are those of test_contract.py; chunks have last rows of their own, and decoded tokens are last rows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_hf import SparseCache


@pytest.fixture(params=["llama", "qwen2_native", "gpt2"])
def last_rows(request: pytest.FixtureRequest, make_case: Callable) -> Any:
    return make_case(request.param, "last_rows")


def test_the_oracle_tells_one_last_row_apart(last_rows: Any) -> None:
    (tokens,) = last_rows.tokens(40)
    before = last_rows.expected(tokens, [20, 40])
    assert (last_rows.expected(tokens, [21, 40]) - before).abs().max() > 0.1


def ends_of(mask: torch.Tensor, ends: list[int]) -> list[int]:
    """How many of a row's real tokens `mask [slots]` each call had seen."""
    return sorted({int(mask[:end].sum()) for end in ends} - {0})


@pytest.mark.parametrize("cache", ["sparse", "dynamic", "static"])
@pytest.mark.parametrize("ends", [[7, 14, 21, 28, 35, 42, 44], [16, 32, 44], [33, *range(34, 45)]])
def test_chunks_and_decoding_after_left_padding(
    last_rows: Any, pad: Callable, cache: str, ends: list[int], new_cache: Callable
) -> None:
    sequences = last_rows.tokens(44, 31, 15)
    batch = pad(sequences, "left")
    logits = batch.run(last_rows.model, new_cache(cache, last_rows.model), ends[:-1])
    for row, tokens, mask in zip(batch.real(logits), sequences, batch.attention_mask, strict=True):
        last_rows.assert_logits(row, last_rows.expected(tokens, ends_of(mask, ends)))


def test_decoding_after_right_padding(last_rows: Any, slots: Callable) -> None:
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 11:30] = False  # 30 and 11 prompt tokens, 10 more each
    sequences = last_rows.tokens(40, 21)
    batch, ends = slots(sequences, mask), [30, *range(31, 41)]
    logits = batch.run(last_rows.model, SparseCache.for_model(last_rows.model), ends[:-1])
    for row, tokens, slots_of_row in zip(batch.real(logits), sequences, mask, strict=True):
        last_rows.assert_logits(row, last_rows.expected(tokens, ends_of(slots_of_row, ends)))


def test_the_cache_keeps_every_key_that_the_model_may_read(last_rows: Any) -> None:
    ids = torch.stack(last_rows.tokens(40))
    cache = SparseCache.for_model(last_rows.model)
    with torch.no_grad():
        last_rows.model(ids, past_key_values=cache)
    layers = [40] * last_rows.num_layers
    if last_rows.family == "qwen2_native":
        layers[1:] = [11, 11]  # layers with the model's own window of 12
    assert cache.kv_bytes() == sum(layers) * last_rows.num_heads * 2 * 16 * 4
