"""`capture` on a GPU: the CPU's figures, and no waiting while the model runs."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import FlexPrefill, MInference, SparseConfig, Streaming, XAttention, capture, sparsify

pytestmark = pytest.mark.gpu

STREAMING = Streaming(num_sink_tokens=4, window_size=200)
CONFIGS = {
    "streaming": SparseConfig(sparse=STREAMING, head_masks=((1, 0), (0, 1))),
    "xattention": SparseConfig(full=XAttention(threshold=0.6), sparse=STREAMING, head_masks=((1, 0), (0, 1))),
    "flexprefill": SparseConfig(sparse=FlexPrefill(gamma=0.5, tau=0.3, min_budget=256)),
    "minference": SparseConfig(
        sparse=MInference(vertical_size=100, slash_size=200, top_k=4, heads=({}, {"kind": "block_sparse"}, {}, {}))
    ),
}


@pytest.fixture
def waiting_fails() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def tiny_llama(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, vocab_size=128, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    return sparsify(model, CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_recording_does_not_wait(name: str, waiting_fails: None) -> None:
    """Beyond the one look at position_ids that a pass takes anyway, which the base model is spared here."""
    model, ids = tiny_llama(name), torch.randint(1, 128, (2, 2000), device="cuda")
    attention = model.model.layers[0].self_attn
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(2000, device="cuda")[None])
    call = {"hidden_states": hidden, "position_embeddings": rotary, "attention_mask": None}
    with torch.no_grad(), capture(model) as stats:
        attention(**call)  # compiles kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        attention(**call)
        torch.cuda.set_sync_debug_mode("default")
    first, second = stats
    assert len(stats) == 2 and torch.equal(first.density[0], second.density[0])
    assert (first.density[0] > 0).all() and first.density[0].mean() < 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [0, 700])
def test_counts_are_those_of_the_masks(name: str, padding: int) -> None:
    model, ids = tiny_llama(name), torch.randint(1, 128, (2, 2000), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.no_grad(), capture(model, masks=True) as stats:
        model(ids, attention_mask=mask, use_cache=False)
    for layer in stats.layers:
        for head in layer.heads:
            assert head.branches[0].kept_pairs == int(stats.mask(layer.layer)[:, head.head].sum())
            assert head.causal_pairs == sum(n * (n + 1) // 2 for n in (2000, 2000 - padding))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_count_once(use_reentrant: bool) -> None:
    """The backward of CUDA tensors, and with it the recomputation, runs in a thread of its own."""
    model, ids = tiny_llama("xattention").train(), torch.randint(1, 128, (2, 2000), device="cuda")
    with capture(model) as plain:
        model(ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    with capture(model) as stats:
        model(ids, use_cache=False).logits.sum().backward()
    assert len(calls) == 2, "nothing was recomputed: the test could not fail"
    assert len(stats) == 1 and torch.equal(stats.density, plain.density)
