"""CUDA graphs of a sparsified model and of the operator: captured after a warm-up, replayed on other inputs."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf_kernels import AttentionLayout, HeadPattern, positions_as_data, sparse_attention
from sparse_hf_kernels.kv_cache import KVDtype

pytestmark = pytest.mark.gpu

LENGTH, VOCAB = 512, 128
MIXED = AttentionLayout(patterns=(HeadPattern(window=256, num_sink_tokens=16), HeadPattern()))


@pytest.fixture(scope="module")
def model() -> Any:
    """Two layers with head_dim 64, one KV head each of dense and streaming."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=2048,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    sparse = SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=64), head_masks=((1, 0), (0, 1)))
    return sparsify(dense, sparse)


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `run` after one call on a side stream, and what it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), device="cuda")


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_prefill(model: Any, use_cache: bool, batch: int) -> None:
    """Plain sequences need nothing but the warm-up: the same kernels, and the same bits."""
    static = tokens(batch)
    graph, out = captured(lambda: model(static, use_cache=use_cache).logits)
    for _ in range(3):
        static.copy_(tokens(batch))
        graph.replay()
        assert torch.equal(out, model(static, use_cache=use_cache).logits)


@torch.no_grad()
def test_prefill_with_given_position_ids(model: Any) -> None:
    static, ids = tokens(), torch.arange(LENGTH, device="cuda")[None].clone()
    graph, out = captured(lambda: model(static, position_ids=ids, use_cache=False).logits)
    static.copy_(tokens())
    ids.add_(7)
    graph.replay()
    assert torch.equal(out, model(static, position_ids=ids, use_cache=False).logits)


def padded(lengths: list[int]) -> dict[str, Tensor]:
    mask = torch.arange(LENGTH, device="cuda") >= LENGTH - torch.tensor(lengths, device="cuda")[:, None]
    ids = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": tokens(len(lengths)), "attention_mask": mask.long(), "position_ids": ids}


def packed(lengths: list[int]) -> dict[str, Tensor]:
    ids = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    return {"input_ids": tokens(), "position_ids": ids}


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "contents"),
    [
        (padded, [[512, 300], [100, 512], [512, 512], [1, 77]]),
        (packed, [[512], [200, 312], [1, 510, 1], [128, 128, 128, 128]]),
    ],
    ids=["padded", "packed"],
)
def test_prefill_with_positions_as_data(model: Any, make: Callable, contents: list[list[int]]) -> None:
    """Each replay may be padded or packed in another way."""
    static = make(contents[0])
    with positions_as_data():
        graph, out = captured(lambda: model(**static, use_cache=False).logits)
    for lengths in contents[1:]:
        fresh = make(lengths)
        for name, x in static.items():
            x.copy_(fresh[name])
        graph.replay()
        expected = model(**fresh, use_cache=False).logits
        real = fresh.get("attention_mask", torch.ones_like(fresh["input_ids"])).bool()
        # Other kernels served the eager call.
        assert (out[real] - expected[real]).norm() <= 0.02 * expected[real].norm()


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_steps_with_a_sparse_cache(model: Any, batch: int, kv_dtype: KVDtype | None) -> None:
    """The cache counts on the device: one graph serves step after step, over a window that turns several times."""
    ids, first = tokens(batch, 400), 200
    cache = SparseCache.for_model(model, max_length=400, kv_dtype=kv_dtype)
    model(ids[:, :first], past_key_values=cache)
    eager, growing = copy.deepcopy(cache), SparseCache.for_model(model, kv_dtype=kv_dtype)
    model(ids[:, :first], past_key_values=growing)
    static = ids[:, first : first + 1].clone()
    graph, out = captured(lambda: model(static, past_key_values=cache).logits)
    for each in (eager, growing):
        model(static, past_key_values=each)  # as the call before the capture did
    for step in range(first + 1, 400):
        static.copy_(ids[:, step : step + 1])
        graph.replay()
        assert torch.equal(out, model(static, past_key_values=eager).logits), f"token {step}"
        expected = model(static, past_key_values=growing).logits
        assert (out - expected).norm() <= 0.02 * expected.norm(), f"token {step}"
    assert int(cache.get_seq_length()) == int(eager.get_seq_length()) == growing.get_seq_length() == 400
    for one, other in zip(cache._sparse_layers, eager._sparse_layers, strict=True):
        assert one.storage is not None and other.storage is not None
        for mine, theirs in zip(one.storage.tensors(), other.storage.tensors(), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@torch.no_grad()
def test_decode_steps_with_a_static_cache(model: Any) -> None:
    """The length is data: one graph serves step after step."""
    ids = tokens(1, 140)
    expected = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=256)
    model(ids[:, :128], past_key_values=cache)
    static, ids_now = ids[:, 128:129].clone(), torch.tensor([[128]], device="cuda")
    state = copy.deepcopy(cache)
    with positions_as_data():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(static, position_ids=ids_now, past_key_values=state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static, position_ids=ids_now, past_key_values=cache).logits
    for step in range(128, 140):
        static.copy_(ids[:, step : step + 1])
        ids_now.fill_(step)
        graph.replay()
        assert (out[:, 0] - expected[:, step]).norm() <= 0.03 * expected[:, step].norm()


def heads(num: int, length: int, dim: int) -> Tensor:
    return torch.randn(1, length, num, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", [MIXED, AttentionLayout.dense(2)], ids=["mixed", "dense"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(4096, 4096), (1000, 1000), (1, 4096)])
def test_the_operator(layout: AttentionLayout, q_len: int, kv_len: int, dim: int) -> None:
    """Prefill by our kernels, short dense calls by PyTorch's, and a decode step."""
    static = [heads(8, q_len, dim), heads(2, kv_len, dim), heads(2, kv_len, dim)]
    graph, out = captured(lambda: sparse_attention(*static, layout))
    for _ in range(2):
        for x in static:
            x.normal_()
        graph.replay()
        assert torch.equal(out, sparse_attention(*static, layout))


@pytest.mark.parametrize("where", [nullcontext, positions_as_data])
def test_eager_calls_are_not_held_back(model: Any, where: Callable[[], AbstractContextManager[None]]) -> None:
    """Gradients too: outside a capture `positions_as_data` changes the speed, not the result."""
    fresh = packed([200, 312])
    model.zero_grad()
    with where():
        model(**fresh, labels=fresh["input_ids"], use_cache=False).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(**fresh, labels=fresh["input_ids"], use_cache=False).loss.backward()
    for a, parameter in zip(found, model.parameters(), strict=True):
        assert (a - parameter.grad).norm() <= 0.03 * parameter.grad.norm() + 1e-6
