"""Short dense calls on a GPU: the flash kernel by name, its numbers and gradients, and when another is asked."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, sparsify
from sparse_hf.attention_at_once import FLASH_TOKENS, attend_at_once
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.dispatch import BACKEND_VARIABLE
from sparse_hf_kernels.testing import assert_close_to_truth

pytestmark = pytest.mark.gpu

FLASH, CHOICE = "aten::_scaled_dot_product_flash_attention", "aten::scaled_dot_product_attention"
NUM_LAYERS, VOCAB = 2, 128
SCALE = 0.11
EPS = 1e-3


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA serves short calls, forced where no break-even length is measured."""
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    if torch.cuda.get_device_capability() != (9, 0):
        monkeypatch.setenv(BACKEND_VARIABLE, "sdpa")


def heads_of(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[batch, heads, length, dim]` with the strides of a projection, as transformers gives it."""
    return torch.randn(batch, length, heads, dim, device="cuda").to(dtype).transpose(1, 2).requires_grad_()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By a dense layer."""
    layout = AttentionLayout.dense(k.shape[1])
    state = LayerState(layer_idx=0, layout=layout, full=layout, sparse=layout, max_position=4096)
    length = q.shape[2]
    plan = ForwardPlan(q_len=length, kv_len=length, q_offset=0, kv_offset=0, padding_mask=None, device=q.device)
    out = attend_at_once(state, q, k, v, plan, None, SCALE)
    assert out is not None
    return out


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From the definition, in the precision of what is given."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-1, -2) * SCALE).masked_fill(future, float("-inf")).softmax(-1) @ v


def operators(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What it returns, and how often each of torch's operators ran."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = run()
    return out, Counter(event.name for event in profiler.events())


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (3, 77), (1, FLASH_TOKENS)])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradients(dtype: torch.dtype, dim: int, kv_heads: int, batch: int, length: int) -> None:
    given = [heads_of(batch, heads, length, dim, dtype) for heads in (8, kv_heads, kv_heads)]
    upstream = torch.randn(batch, 8, length, dim, device="cuda").to(dtype)
    out, ran = operators(lambda: attended(*given))
    assert (ran[FLASH], ran[CHOICE]) == (1, 0)
    found = [(out.detach(), *torch.autograd.grad(out, given, upstream))]
    for kind in (dtype, torch.float32):
        same = [x.detach().to(kind).requires_grad_() for x in given]
        by_hand = softmax_attention(*same)
        found.append((by_hand.detach(), *torch.autograd.grad(by_hand, same, upstream.to(kind))))
    for name, tested, reference, truth in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert tested.dtype == dtype and tested.shape == truth.shape
        assert_close_to_truth(tested, reference, truth, eps=EPS, name=name)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_one_token_reads_itself(kv_heads: int) -> None:
    q, k, v = (heads_of(2, heads, 1, 64, torch.bfloat16) for heads in (8, kv_heads, kv_heads))
    out, ran = operators(lambda: attended(q, k, v))
    assert ran[FLASH] == 1
    assert torch.equal(out, v.repeat_interleave(8 // kv_heads, 1))


def test_other_calls_are_left_to_torchs_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer ones, fp32, and all where torch's flash backend is switched off."""

    def asked(batch: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Counter[str]:
        given = [heads_of(batch, heads, length, 64, dtype) for heads in (4, 2, 2)]
        with torch.no_grad():
            return operators(lambda: attended(*given))[1]

    half = FLASH_TOKENS // 2
    assert (asked(2, half)[CHOICE], asked(2, half + 1)[CHOICE]) == (0, 1)
    with sdpa_kernel(SDPBackend.MATH):
        ran = asked(1, 100)
    assert (ran[FLASH], ran[CHOICE]) == (0, 1)
    assert asked(1, 100)[CHOICE] == 0, "the context has ended"
    monkeypatch.setenv(BACKEND_VARIABLE, "sdpa")  # fp32 goes there by force alone
    ran = asked(1, 100, torch.float32)
    assert (ran[FLASH], ran[CHOICE]) == (0, 1)


@pytest.fixture(scope="module", params=[4, 2], ids=["own keys", "grouped"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model with head_dim 64, and its sparse copy, which is dense up to 1024 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=request.param, vocab_size=VOCAB, max_position_embeddings=2048,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    sparse = SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=64), min_seq_len=1024)
    return stock, sparsify(copy.deepcopy(stock), sparse)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), device="cuda")


def logits_of(model: Any, ids: Tensor, cached: bool) -> Tensor:
    cache = SparseCache.for_model(model) if cached else None
    return model(ids, past_key_values=cache, use_cache=cached).logits


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("batch", "length", "by_name"), [(1, 128, True), (2, 256, True), (2, 257, False)])
def test_a_model_is_the_stock_model_with_flash(
    models: tuple[Any, Any], cached: bool, batch: int, length: int, by_name: bool
) -> None:
    """To the bit: the same kernels on the same numbers. Longer calls are those of torch's choice."""
    (stock, sparse), ids = models, tokens(batch, length)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if by_name else nullcontext():
        expected = stock(ids, use_cache=False).logits
    out, ran = operators(lambda: logits_of(sparse, ids, cached))
    assert torch.equal(out, expected)
    assert (ran[CHOICE], not by_name or ran[FLASH] == NUM_LAYERS) == (0 if by_name else NUM_LAYERS, True)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_a_captured_graph(models: tuple[Any, Any], cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured after a warm-up and replayed on other tokens: the same bits."""
    calls: list[int] = []
    flash = torch._scaled_dot_product_flash_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return flash(query, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_dot_product_flash_attention", counted)
    model, static = models[1], tokens(1, 200)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        logits_of(model, static, cached)
    torch.cuda.current_stream().wait_stream(side)
    calls.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = logits_of(model, static, cached)
    assert calls == [200] * NUM_LAYERS
    for _ in range(3):
        static.copy_(tokens(1, 200))
        graph.replay()
        assert torch.equal(out, logits_of(model, static, cached))
