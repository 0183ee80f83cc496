"""A `SparseCache` whose calls differ in what they are made in: inference mode, autocast, an exception half way."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_hf import SparseCache

KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "fixed": {"max_length": 64},
    "offloaded": {"offload": True},
    "8 bits": {"kv_dtype": "int8"},
}
ENDS = (0, 20, 30, 31, 32, 48)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def feed(model: Any, cache: SparseCache, ids: Tensor, mode: Callable[[int], AbstractContextManager[Any]]) -> Tensor:
    """Logits of all calls; the number of each is given to `mode`, within whose context it is made."""
    parts = []
    for number, (begin, end) in enumerate(pairwise(ENDS)):
        with torch.no_grad(), mode(number):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits.clone())
            cache.reorder_cache(torch.arange(len(ids)))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mix", ["dense", "streaming", "mixed", "min_seq_len"])
@pytest.mark.parametrize("first", [0, 1])
def test_calls_within_inference_mode_and_outside(make_case: Callable, mix: str, first: int, kind: dict) -> None:
    """What a prompt that was read in inference mode left can be gone on with outside of it, and the other way round."""
    case = make_case("llama", mix)
    ids = torch.stack(case.tokens(48, 48))
    plain = feed(case.model, SparseCache.for_model(case.model, **kind), ids, lambda n: torch.no_grad())
    turns = feed(
        case.model, SparseCache.for_model(case.model, **kind), ids, lambda n: torch.inference_mode(n % 2 == first)
    )
    assert torch.equal(turns, plain)


def test_generate_goes_on_after_inference_mode(make_case: Callable, pad: Callable, kind: dict) -> None:
    case = make_case("llama", "mixed")
    batch = pad(case.tokens(40, 22), "left")
    inputs = {"inputs": batch.input_ids, "attention_mask": batch.attention_mask, "max_new_tokens": 6}
    results = []
    for mode in (True, False):
        cache = SparseCache.for_model(case.model, **kind)
        with torch.inference_mode(mode), torch.no_grad():
            case.model(**batch.upto(30), past_key_values=cache)
        results.append(case.model.generate(**inputs, past_key_values=cache, do_sample=False))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("within", [True, False])
def test_autocast_may_begin_or_end_between_calls(make_case: Callable, family: str, within: bool, kind: dict) -> None:
    """What is stored keeps the first tokens' dtype; the output has that of the model's own computation."""
    case = make_case(family, "mixed")
    ids = torch.stack(case.tokens(48, 48))
    cache = SparseCache.for_model(case.model, **kind)
    logits = feed(case.model, cache, ids, lambda n: torch.autocast("cpu", torch.bfloat16, enabled=(n < 2) is within))
    assert {storage.dtype for storage in cache.storages()} == {torch.bfloat16 if within else torch.float32}
    for row, tokens in zip(logits, ids, strict=True):
        expected = case.expected(tokens)
        assert (row - expected).norm() / expected.norm() < 0.1


def interrupted(model: Any, layer: int, **inputs: Any) -> None:
    """A forward pass that ends before this layer."""

    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[layer].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("seen", [0, 30])
@pytest.mark.parametrize("num_new", [1, 5])
def test_an_interrupted_pass_is_not_gone_on_from(make_case: Callable, kind: dict, seen: int, num_new: int) -> None:
    """Its first layers hold tokens that the others lack: to go on would read other keys than the sequence has."""
    case = make_case("llama", "mixed")
    (tokens,) = case.tokens(48)
    cache, model = SparseCache.for_model(case.model, **kind), case.model
    if seen:
        with torch.no_grad():
            model(tokens[None, :seen], past_key_values=cache)
    before = copy.deepcopy(cache)
    new = {"input_ids": tokens[None, seen : seen + num_new]}
    interrupted(model, 1, **new, past_key_values=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"different numbers of tokens.*exception.*new cache"), torch.no_grad():
            model(**new, past_key_values=cache)
    with torch.no_grad():
        logits = model(**new, past_key_values=before).logits[0]
        fresh = SparseCache.for_model(model, **kind)
        whole = [model(tokens[None, a:b], past_key_values=fresh).logits for a, b in ((0, seen), (seen, seen + num_new))
                 if b > a]  # fmt: skip
    assert torch.equal(logits, whole[-1][0])
