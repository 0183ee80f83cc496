"""Dynamic methods on a GPU: the device chooses as the CPU does, nothing waits for it, and attention follows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf import FlexPrefill, MInference, SparseConfig, Streaming, XAttention, prefill, sparsify
from sparse_hf.dynamic import LayerHeads, select_blocks
from sparse_hf.methods import DynamicMethod
from sparse_hf_kernels import AttentionLayout, HeadPattern, TokenPositions, sparse_attention_reference

pytestmark = pytest.mark.gpu

KINDS = ("vertical_slash", "block_sparse", "a_shape", "vertical_slash")
METHODS: dict[str, DynamicMethod] = {
    "xattention": XAttention(stride=8, threshold=0.5),
    "per_head": XAttention(threshold=(0.2, 0.4, 0.6, 0.8)),
    "sparsity_ratio": XAttention(sparsity_ratio=0.7),
    "blocks_of_64": XAttention(threshold=0.5, block_size=64),
    "flexprefill": FlexPrefill(gamma=0.5, tau=0.3, min_budget=256, max_budget=1024),
    "vertical_slash": FlexPrefill(gamma=0.5, tau=0, min_budget=256),
    "minference": MInference(vertical_size=100, slash_size=200),
    "kinds": MInference(
        heads=tuple(
            {"kind": kind, "vertical_size": 60 + 10 * n, "slash_size": 150, "top_k": 4, "n_init": 9, "n_local": 300}
            for n, kind in enumerate(KINDS)
        )
    ),
}


def tensors(q_len: int, kv_len: int, heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Keys of a few directions, so that blocks differ in what they hold."""
    generator = torch.Generator("cuda").manual_seed(q_len)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    topics = torch.randn(8, 128, **options)
    found = []
    for number, length in ((heads, q_len), (2, kv_len), (2, kv_len)):
        topic = torch.randint(8, (2, number, -(-length // 96)), **options).repeat_interleave(96, -1)[..., :length]
        found.append((torch.randn(2, number, length, 128, **options) + 0.7 * topics[topic]).to(dtype))
    return found


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    """Within it, waiting for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(4096, 4096), (3000, 3000), (1024, 4096), (1000, 3333)])
def test_the_device_chooses_as_the_cpu(name: str, q_len: int, kv_len: int) -> None:
    """Rows in which the order of additions decides apart."""
    method = METHODS[name]
    q, k, _ = tensors(q_len, kv_len)
    call: dict[str, Any] = {"scale": 128**-0.5, "q_offset": kv_len - q_len}
    ours, theirs = method.select(q, k, **call), method.select(q.cpu(), k.cpu(), **call)
    blocks = -(-kv_len // method.block_size)
    a, b = ours.block_mask(blocks).cpu(), theirs.block_mask(blocks)
    assert (a == b).all(-1).float().mean() > 0.97 and (a == b).float().mean() > 0.999
    if ours.columns is not None and theirs.columns is not None:
        for x, y in zip(ours.columns.flatten(0, 1).tolist(), theirs.columns.flatten(0, 1).tolist(), strict=True):
            assert len(set(x) & set(y)) >= 0.97 * len(set(y))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(2048, 2048), (1000, 2500)])
def test_attention_follows_the_choice(name: str, q_len: int, kv_len: int) -> None:
    method = METHODS[name]
    q, k, v = (x.requires_grad_() for x in tensors(q_len, kv_len))
    out = prefill(q, k, v, method)
    layout = AttentionLayout(patterns=(HeadPattern(selected=True),) * 2)
    selection = select_blocks(q, k, LayerHeads.of(layout, [method] * 2), scale=128**-0.5)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    truth, _ = sparse_attention_reference(
        *wide, layout, positions=TokenPositions.causal(q_len, kv_len, "cuda"), scale=128**-0.5, selection=selection
    )
    assert (out.float() - truth).norm() / truth.norm() < 0.01
    grad = torch.randn_like(truth)
    ours = torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
    for a, b in zip(ours, torch.autograd.grad(truth, wide, grad), strict=True):
        assert (a.float() - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_device(name: str, no_waiting: Any) -> None:
    q, k, v = tensors(2048, 2048)
    prefill(q, k, v, METHODS[name])  # compiles kernels and copies parameters per head
    torch.cuda.synchronize()
    no_waiting()
    prefill(q, k, v, METHODS[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_sequences(side: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
    sparse = SparseConfig(full=METHODS["xattention"], sparse=Streaming(window_size=200), head_masks=((1, 0), (0, 1)))
    sparsify(model, sparse)
    lengths = (1500, 900, 1500)
    ids, mask = torch.zeros(3, 1500, dtype=torch.long), torch.zeros(3, 1500, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(1500 - length, None) if side == "left" else slice(length)] = True
    ids[mask] = torch.randint(1, 128, (int(mask.sum()),))
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    ids, mask, positions = (x.cuda() for x in (ids, mask, positions))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
        for row in range(3):
            alone = model(ids[row][mask[row]][None], use_cache=False).logits[0]
            assert (logits[row][mask[row]] - alone).norm() / alone.norm() < 1e-2
