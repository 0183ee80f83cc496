"""Short dense calls by PyTorch's own attention: the same numbers and caches as the long way, and only where it may."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sparse_hf import (
    SparseCache,
    SparseConfig,
    Streaming,
    Triangle,
    XAttention,
    attention,
    attention_at_once,
    cached_attention,
    capture,
    sparsify,
)
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import get_layer_state
from sparse_hf_kernels.dispatch import BACKEND_VARIABLE

VOCAB = 97
NUM_LAYERS = 3
DENSE_ROWS = 40
CONFIGS = {
    "streaming": SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=5), min_seq_len=DENSE_ROWS),
    "mixed": SparseConfig(
        sparse=Streaming(num_sink_tokens=2, window_size=5),
        head_masks=((1, 0), (0, 0), (0, 1)),
        min_seq_len=DENSE_ROWS,
    ),
    "triangle": SparseConfig(
        sparse=Triangle(num_sink_tokens=2, window_size=5, num_last_tokens=3), min_seq_len=DENSE_ROWS
    ),
    "xattention": SparseConfig(sparse=XAttention(block_size=64), min_seq_len=DENSE_ROWS),
}


def make_model(config: SparseConfig | None = None, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(**{
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 300,
    } | changes)  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    return model if config is None else sparsify(model, config)  # type: ignore[return-value]


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


class Counts:
    """Calls by either way; `reset` starts anew."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.long, self.asked = 0, 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """What it returns, calls of layers that went the long way, and how often was asked."""
        self.reset()
        with torch.no_grad():
            out = run()
        return out, self.long, self.asked


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA serves short calls on this device, as it does where its break-even length is measured."""
    module = importlib.import_module("sparse_hf_kernels.sparse_attention.sdpa")
    monkeypatch.setattr(module, "_is_chosen", lambda shape, dtype, device, forced: forced is None)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


@pytest.fixture
def counts(served: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    found = Counts()
    takes = attention_at_once.takes_at_once

    def counting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count_long(*args: Any, **options: Any) -> Tensor:
            found.long += 1
            return function(*args, **options)

        return count_long

    def count_asked(*args: Any) -> bool:
        found.asked += 1
        return takes(*args)

    for module, name in ((attention, "attend"), (cached_attention, "attend"), (cached_attention, "_attend_groups")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    monkeypatch.setattr(attention_at_once, "takes_at_once", count_asked)
    yield found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 7, DENSE_ROWS])
def test_short_calls_are_the_stock_models(counts: Counts, name: str, length: int) -> None:
    ids = tokens(length)
    with torch.no_grad():
        expected = make_model()(ids, use_cache=False).logits
    model = make_model(CONFIGS[name])
    out, long, asked = counts(lambda: model(ids, use_cache=False).logits)
    assert torch.equal(out, expected), "the same operator on the same numbers"
    assert (long, asked) == (0, 1), "asked once per forward pass"
    out, long, _ = counts(lambda: model(tokens(DENSE_ROWS + 8), use_cache=False).logits)
    with torch.no_grad():
        expected = make_model()(tokens(DENSE_ROWS + 8), use_cache=False).logits
    assert long == NUM_LAYERS
    assert torch.allclose(out, expected, atol=1e-4) == (name == "xattention"), "128 tokens are its forced blocks"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked_later", [False, True])
def test_a_first_chunk_and_what_follows(counts: Counts, name: str, masked_later: bool) -> None:
    """The same numbers, caches and memory as by the long way, before, at and after the length at which heads part."""
    ids = tokens(DENSE_ROWS + 12)
    first = DENSE_ROWS - 6

    def steps(model: LlamaForCausalLM, cache: Any) -> tuple[Tensor, list[int]]:
        out = [model(ids[:, :first], past_key_values=cache).logits]
        sizes = [cache.kv_bytes()]
        for n in range(first, ids.shape[1]):
            # A mask of ones is no padding, but has to be looked at.
            mask = torch.ones(2, n + 1, dtype=torch.int64) if masked_later and n > first + 2 else None
            out.append(model(ids[:, n : n + 1], past_key_values=cache, attention_mask=mask).logits)
            sizes.append(cache.kv_bytes())
        return torch.cat(out, 1), sizes

    model = make_model(CONFIGS[name])
    cache = SparseCache.for_model(model)
    (out, sizes), long, asked = counts(lambda: steps(model, cache))
    # Without a GPU, tokens after others go the long way.
    assert asked == 1 and long == NUM_LAYERS * (ids.shape[1] - first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_attention, "attend_at_once", lambda *args: None)
        by_hand = SparseCache.for_model(model)
        (expected, expected_sizes), long, asked = counts(lambda: steps(model, by_hand))
    assert asked == 0 and long == NUM_LAYERS * (ids.shape[1] - first + 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert sizes == expected_sizes, "memory is freed at the same tokens"
    for one, other in zip(cache._sparse_layers, by_hand._sparse_layers, strict=True):
        mine, theirs = one.storage, other.storage
        assert mine is not None and theirs is not None
        assert one.num_tokens == other.num_tokens and torch.equal(mine.state, theirs.state)
        assert mine.layout == theirs.layout == one.plan.storage, "heads have parted"
        for group in mine.layout.groups:
            filled = (0, min(one.num_tokens, group.slots(mine.capacity)))
            torch.testing.assert_close(mine.read(group, filled), theirs.read(group, filled), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_single_tokens_are_fused_on_a_gpu(counts: Counts, name: str) -> None:
    """Neither way of whole sequences: one launch for all heads, before, at and after the length at which they part."""
    ids, first = tokens(DENSE_ROWS + 12).cuda(), DENSE_ROWS - 6
    dense_dtype = {"device": "cuda", "dtype": torch.float32}
    model, stock = make_model(CONFIGS[name]).to(**dense_dtype), make_model().to(**dense_dtype)

    def steps(cache: Any) -> Tensor:
        ends = [0, first, *range(first + 1, ids.shape[1] + 1)]
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(ends)], 1)

    out, long, _ = counts(lambda: steps(SparseCache.for_model(model)))
    assert long == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, "reference")
        expected, long, _ = counts(lambda: steps(SparseCache.for_model(model)))
    assert long == NUM_LAYERS * (ids.shape[1] - first + 1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(out[:, :DENSE_ROWS], stock(ids[:, :DENSE_ROWS]).logits, atol=1e-4, rtol=1e-4)


def test_generate_and_beams(counts: Counts) -> None:
    """The prompt is short; beam search reorders what the cache holds; chunks after the first go the long way."""
    ids, model = tokens(9), make_model(CONFIGS["mixed"])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    stock = make_model()
    for beams in (1, 3):
        out, long, asked = counts(lambda beams=beams: model.generate(ids, num_beams=beams, **options))
        assert (long, asked) == (NUM_LAYERS * 11, 1)
        assert torch.equal(out, stock.generate(ids, num_beams=beams, **options))
    cache, stock_cache = SparseCache.for_model(model), DynamicCache(config=stock.config)
    for number, part in enumerate((ids[:, :4], ids[:, 4:5], ids[:, 5:8], ids[:, 8:9])):
        out, long, asked = counts(lambda part=part: model(part, past_key_values=cache).logits)
        assert (long, asked) == ((NUM_LAYERS, 0) if number else (0, 1))
        with torch.no_grad():
            expected = stock(part, past_key_values=stock_cache).logits
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_the_long_way_stays_where_it_must(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model(CONFIGS["mixed"]), tokens(12)

    def is_long(**inputs: Any) -> bool:
        _, long, _ = counts(lambda: model(ids, use_cache=False, **inputs).logits)
        assert long in (0, NUM_LAYERS)
        return long > 0

    assert not is_long() and not is_long(attention_mask=torch.ones_like(ids))
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    assert is_long(attention_mask=padded)
    assert is_long(position_ids=torch.tensor([[*range(7), *range(5)]] * 2))
    with capture(model):
        assert is_long()
    with monkeypatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, "reference")
        assert is_long()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_long()
    torch.use_deterministic_algorithms(True)
    try:
        assert is_long()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not is_long()
    too_long = tokens(301)
    for config in (CONFIGS["mixed"], SparseConfig(min_seq_len=4096)):
        with pytest.raises(ValueError, match=r"the sequence has 301 tokens, the model was made for 300"):
            make_model(config)(too_long, use_cache=False)


def test_gradients_are_those_of_the_stock_model(counts: Counts) -> None:
    ids = tokens(12)
    grads = []
    for model in (make_model(), make_model(CONFIGS["streaming"])):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert counts.long == 0
    torch.testing.assert_close(grads[0], grads[1])


class Flash:
    """Stands for the flash kernel: what was asked about it, and the lengths of its calls."""

    def __init__(self) -> None:
        self.asked: list[SDPAParams] = []
        self.lengths: list[int] = []

    def may(self, params: SDPAParams) -> bool:
        self.asked.append(params)
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float) -> list[Tensor]:
        assert dropout == 0
        self.lengths.append(q.shape[2])
        return [F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)]


@pytest.fixture
def flash(served: None, monkeypatch: pytest.MonkeyPatch) -> Flash:
    """The flash kernel serves this device."""
    found = Flash()
    monkeypatch.setattr(attention_at_once, "can_use_flash_attention", found.may)
    monkeypatch.setattr(torch, "_scaled_dot_product_flash_attention", found)
    return found


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_flash_is_asked_about_once_per_forward_pass(flash: Flash, cached: bool, kv_heads: int) -> None:
    ids, stock = tokens(12), make_model(num_key_value_heads=kv_heads)
    model = make_model(CONFIGS["streaming"], num_key_value_heads=kv_heads)
    for number in (1, 2):
        cache = SparseCache.for_model(model) if cached else None
        out = model(ids, past_key_values=cache, use_cache=cached).logits
        torch.testing.assert_close(out, stock(ids, use_cache=False).logits)
        assert len(flash.asked) == number and flash.lengths == [12] * NUM_LAYERS * number
    params = flash.asked[0]
    assert params.query.shape == (2, 4, 12, 16) and params.key.shape == params.value.shape == (2, kv_heads, 12, 16)
    assert (params.attn_mask, params.dropout, params.is_causal, params.enable_gqa) == (None, 0.0, True, kv_heads == 2)


@torch.no_grad()
def test_flash_takes_short_calls(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens of all rows, and only where SDPA is what serves."""
    monkeypatch.setattr(attention_at_once, "FLASH_TOKENS", 24)
    model = make_model(CONFIGS["streaming"])

    def is_flash(ids: Tensor, **inputs: Any) -> bool:
        flash.asked.clear()
        flash.lengths.clear()
        model(ids, use_cache=False, **inputs)
        assert (len(flash.asked), flash.lengths) in ((0, []), (1, [ids.shape[1]] * NUM_LAYERS))
        return bool(flash.lengths)

    assert is_flash(tokens(24, batch=1)) and not is_flash(tokens(25, batch=1))
    assert is_flash(tokens(12)) and not is_flash(tokens(13))
    mask = torch.ones_like(tokens(12))
    assert is_flash(tokens(12), attention_mask=mask)
    mask[0, :3] = 0
    assert not is_flash(tokens(12), attention_mask=mask)
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_flash(tokens(12))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(attention_at_once, "can_use_flash_attention", lambda params: False)
    assert not is_flash(tokens(12))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_no_flash(served: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own answer; the kernel would raise here."""
    answers: list[bool] = []
    ask = attention_at_once.can_use_flash_attention
    monkeypatch.setattr(
        attention_at_once, "can_use_flash_attention", lambda params: answers.append(ask(params)) or answers[-1]
    )
    model, stock = make_model(CONFIGS["streaming"]).to(dtype), make_model().to(dtype)
    assert torch.equal(model(tokens(12), use_cache=False).logits, stock(tokens(12), use_cache=False).logits)
    assert answers == [False]


def test_graphs_leave_the_choice_to_torch(flash: Flash) -> None:
    """Where a layer is compiled after one that was not: the kernel by name cannot be traced."""
    state = get_layer_state(make_model(CONFIGS["streaming"]).model.layers[0].self_attn)
    assert state is not None
    q, k, v = (torch.randn(1, heads, 12, 16) for heads in (4, 2, 2))
    plan = ForwardPlan(q_len=12, kv_len=12, q_offset=0, kv_offset=0, padding_mask=None, device=q.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        return attention_at_once.attend_at_once(state, q, k, v, plan, None, 0.25)

    expected = run(q, k, v)
    out = torch.compile(run, backend="eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, expected)
    assert plan.flash and len(flash.asked) == len(flash.lengths) == 1
