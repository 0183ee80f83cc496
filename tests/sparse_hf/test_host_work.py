"""Short calls take the host no more operations than the stock model does, few more function calls, and wait for the
device no more often."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, capture, set_head_masks, sparsify, unsparsify
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.own_positions import are_own
from sparse_hf_kernels.dispatch import BACKEND_VARIABLE
from sparse_hf_kernels.kv_cache import HeadStorage, KVStorage, StorageLayout, counted_states

NUM_LAYERS = 6
WAIT = "aten::_local_scalar_dense"
NO_LAUNCH = frozenset({"aten::empty", "aten::lift_fresh", "aten::_unsafe_view", WAIT})
PACKED = torch.tensor([[*range(7), *range(5)]])


class Operations(TorchDispatchMode):
    """Names of the operations that a device would be given, and of those that wait for it; views are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        self.waits += schema.name == WAIT
        if not is_view and schema.name not in NO_LAUNCH:
            self.launched.append(schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA serves short calls on this device, as it does where its break-even length is measured."""
    module = importlib.import_module("sparse_hf_kernels.sparse_attention.sdpa")
    monkeypatch.setattr(module, "_is_chosen", lambda shape, dtype, device, forced: forced is None)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def make_stock() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=300,
    )
    return LlamaForCausalLM(shape).eval()


@pytest.fixture
def stock() -> LlamaForCausalLM:
    return make_stock()


@pytest.fixture
def sparse() -> Any:
    masks = ((1, 0), (0, 0), (0, 1)) * 2
    config = SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=5), head_masks=masks, min_seq_len=40)
    return sparsify(make_stock(), config)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))


def counted(run: Callable[[], Any]) -> tuple[Any, Operations]:
    run()  # what is made once for all calls
    with torch.no_grad(), Operations() as operations:
        out = run()
    return out, operations


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_a_prefill_is_no_more_work(stock: Any, sparse: Any, ids: Tensor, cached: bool, masked: bool) -> None:
    mask = torch.ones_like(ids) if masked else None
    given = {"attention_mask": mask, "position_ids": None if mask is None else mask.cumsum(-1) - 1}

    def run(model: Any, make: Callable[[], Any]) -> Tensor:
        return model(ids, past_key_values=make() if cached else None, use_cache=cached, **given).logits

    expected, theirs = counted(lambda: run(stock, lambda: DynamicCache(config=stock.config)))
    out, ours = counted(lambda: run(sparse, lambda: SparseCache.for_model(sparse)))
    assert torch.equal(out, expected)
    # Position ids that a caller gave are looked at, and the counts of a cache's tokens are made, once for all layers.
    once = 4 * masked + cached
    assert len(ours.launched) <= len(theirs.launched) + once, (ours.launched, theirs.launched)
    assert ours.waits <= theirs.waits


def python_calls(run: Callable[[], Any]) -> int:
    """Of functions written in Python, which take as long as what they ask."""
    run()  # what is made once for all calls
    found = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal found
        found += event == "call"

    with torch.no_grad():
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
    return found


def test_a_prefill_is_few_more_calls(stock: Any, sparse: Any, ids: Tensor) -> None:
    theirs = python_calls(lambda: stock(ids, past_key_values=DynamicCache(config=stock.config)))
    ours = python_calls(lambda: sparse(ids, past_key_values=SparseCache.for_model(sparse)))
    # Which spare two tensors a layer, each as long as some ten calls. Per forward pass the plan is made and asked.
    assert ours - theirs <= 8 * NUM_LAYERS + 30


def test_a_cache_is_made_as_fast_as_a_stock_one(stock: Any, sparse: Any) -> None:
    def made() -> SparseCache:
        return SparseCache.for_model(sparse)

    assert python_calls(made) <= python_calls(lambda: DynamicCache(config=stock.config))
    before = [layer.plan for layer in made().layers]
    assert all(layer.plan is plan for layer, plan in zip(made().layers, before, strict=True))
    set_head_masks(sparse, torch.ones(NUM_LAYERS, 2))
    assert all(layer.plan.storage.is_linear for layer in made().layers) and not before[1].storage.is_linear


def test_the_environment_is_asked_once_per_forward_pass(sparse: Any, ids: Tensor, monkeypatch: Any) -> None:
    cache = SparseCache.for_model(sparse)
    with torch.no_grad():
        sparse(ids, past_key_values=cache)
    asked: list[str] = []
    original = os.environ.get

    def get(name: str, default: str | None = None) -> str | None:
        asked.append(name)
        return original(name, default)

    def step() -> list[bool]:
        plan = ForwardPlan(q_len=1, kv_len=13, q_offset=12, kv_offset=0, padding_mask=None, device=ids.device)
        return [layer.decodes(torch.zeros(1, 4, 1, 16), plan) for layer in cache.layers]

    step()  # each storage is looked at
    monkeypatch.setattr(os.environ, "get", get)
    step()
    assert asked == [BACKEND_VARIABLE]
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert not any(step())
    assert asked.count(BACKEND_VARIABLE) > NUM_LAYERS, "another backend makes each storage be looked at again"


def test_position_ids_are_looked_at_unless_the_model_makes_them(sparse: Any, ids: Tensor) -> None:
    def logits(call: Callable[..., Any], **given: Any) -> Tensor:
        with torch.no_grad():
            out = call(ids, use_cache=False, **given)
        return out.last_hidden_state if "last_hidden_state" in out else out.logits

    decoder = sparse.model
    expected = [logits(call, position_ids=PACKED) for call in (sparse, decoder)]
    seen = []
    handle = decoder.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(are_own()))
    plain = logits(sparse)
    assert not torch.allclose(plain, expected[0]), "packing counts"
    for call, want in ((sparse, expected[0]), (decoder, expected[1]), (decoder.forward, expected[1])):
        assert torch.equal(logits(call, position_ids=PACKED), want)
    # By place, behind the token ids, they are somebody's too.
    with torch.no_grad():
        assert torch.equal(decoder(ids, None, PACKED, use_cache=False).last_hidden_state, expected[1])
    assert seen == [True, False, False, False, False]
    handle.remove()


def test_an_exception_leaves_nothing_behind(sparse: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="the sequence has 301 tokens"):
        sparse(torch.zeros(1, 301, dtype=torch.int64), use_cache=False)
    assert not are_own()


def test_a_capture_sees_the_first_tokens_of_a_cache(sparse: Any, ids: Tensor) -> None:
    with torch.no_grad():
        expected = sparse(ids, use_cache=False).logits
        with capture(sparse):
            out = sparse(ids, past_key_values=SparseCache.for_model(sparse)).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_hooks_go_with_the_model(sparse: Any, ids: Tensor) -> None:
    copied = copy.deepcopy(sparse)
    for model in (sparse, copied):
        assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    unsparsify(copied)
    assert not copied.model._forward_pre_hooks and not copied.model._forward_hooks
    assert not copied.model._forward_hooks_always_called
    with torch.no_grad():
        _, operations = counted(lambda: sparse(ids, past_key_values=SparseCache.for_model(sparse)))
    assert operations.waits == 0, "the other's hooks are still there"


@pytest.mark.parametrize("room", [12, 20])
def test_what_is_stored_is_nobody_elses(room: int) -> None:
    """Even where keys and values come just as they are stored."""
    k, v = (torch.randn(2, 3, 12, 8, requires_grad=True) for _ in range(2))
    layout = StorageLayout(heads=(HeadStorage(),) * 3)
    states = counted_states(3, 2, 12, k.device)
    with torch.no_grad():
        storage = KVStorage.of_first(layout, k, v, states[1], room)
    (keys,), (values,) = storage.read(layout.groups[0], (0, 12))
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert not storage.keys.requires_grad and not storage.values.requires_grad
    before = k.detach().clone(), v.detach().clone()
    storage.keys.zero_()
    storage.values.zero_()
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    storage.state.add_(1)
    assert [state.tolist() for state in states] == [[12] * 3, [13] * 3, [12] * 3]
    assert all(state.data_ptr() % 16 == 0 and state.is_contiguous() for state in states)
