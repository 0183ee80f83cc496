"""Mask learning with any method as the sparse branch and as the full one, against the two branches by themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf import SparseConfig, sparsify
from sparse_hf.methods import BigBird, Dense, Method, Streaming, Triangle, XAttention
from sparse_hf.patching import set_head_masks
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning

LENGTH, LAYERS, KV_HEADS, GROUP, HEAD_DIM = 384, 2, 2, 2, 8
XATTENTION = XAttention(stride=4, block_size=64, threshold=0.4)
SPARSE: dict[str, Method] = {
    "streaming": Streaming(num_sink_tokens=2, window_size=9),
    "triangle": Triangle(num_sink_tokens=3, window_size=10, num_last_tokens=20),
    "bigbird": BigBird(block_size=64, num_window_blocks=1, num_random_blocks=1, num_global_blocks=1),
    "xattention": XATTENTION,
}
PAIRS = [(sparse, full) for sparse in SPARSE for full in ("dense", "xattention") if sparse != full]


def make_model(sparse: Method, full: Method, kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        initializer_range=0.2,  # scores far enough from equal that blocks and gates matter
    )
    model = AutoModelForCausalLM.from_config(config)
    sparsify(model, SparseConfig(full=full, sparse=sparse, head_masks="all_full"))
    attach_mask_learning(model, MaskLearningConfig(gates=kind, ste_sampling="threshold"))  # type: ignore[arg-type]
    return model


@contextmanager
def attention_outputs(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """What the layer's attention gave, `[batch, seq_len, num_heads * head_dim]`, before its output projection."""
    found: list[Tensor] = []
    projection = model.model.layers[layer].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def set_gates(model: PreTrainedModel, values: Tensor) -> None:
    with torch.no_grad():
        get_mask_learning(model).gates.values.copy_(values)


@pytest.mark.parametrize(("sparse", "full"), PAIRS)
@pytest.mark.parametrize("packed", [False, True])
def test_first_layer_blends_its_branches(sparse: str, full: str, packed: bool) -> None:
    """Output z F + (1 - z) S and gradient sum(G (F - S)) per KV head, with F and S deployed alone; z = 1 included."""
    model = make_model(SPARSE[sparse], XATTENTION if full == "xattention" else Dense(), "duo")
    ids = torch.randint(0, 61, (2, LENGTH))
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    if packed:
        positions = torch.cat([torch.arange(300), torch.arange(LENGTH - 300)])[None].expand(2, -1)
    call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    branches = []
    for mask in (1, 0):
        model.eval()
        set_head_masks(model, torch.full((LAYERS, KV_HEADS), mask))
        with torch.no_grad(), attention_outputs(model, 0) as found:
            model(**call)
        branches.append(found[0].unflatten(-1, (KV_HEADS, GROUP * HEAD_DIM)))
    f, s = branches
    assert not torch.allclose(f, s)
    model.train()
    z = torch.tensor([0.3, 1.0])
    set_gates(model, torch.stack([z, torch.tensor([0.6, 0.7])]))
    with attention_outputs(model, 0) as found:
        model(**call)
    out = found[0].unflatten(-1, (KV_HEADS, GROUP * HEAD_DIM))
    torch.testing.assert_close(out, z[:, None] * f + (1 - z[:, None]) * s, rtol=1e-4, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((weight * out).sum(), get_mask_learning(model).gates.values)
    expected = (weight * (f - s)).sum((0, 1, 3))
    torch.testing.assert_close(gradient[0], expected, rtol=1e-3, atol=1e-3)
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize(("sparse", "full"), PAIRS)
def test_gradients_of_gates_against_finite_differences_of_the_loss(sparse: str, full: str) -> None:
    """The gates of the last layer: those below it change what dynamic methods select there, in steps."""
    model = make_model(SPARSE[sparse], XATTENTION if full == "xattention" else Dense(), "duo")
    model.train()
    ids = torch.randint(0, 61, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    at = torch.tensor([[1.0, 0.8], [0.4, 0.7]])

    def loss(values: Tensor) -> Tensor:
        set_gates(model, values)
        value: Tensor = model(ids, labels=ids, use_cache=False).loss
        return value

    (found,) = torch.autograd.grad(loss(at), get_mask_learning(model).gates.values)
    step = 0.05
    with torch.enable_grad():  # without gradients no gate is drawn
        for head in range(KV_HEADS):
            change = torch.zeros_like(at)
            change[-1, head] = step
            values = [loss(at + n * change).item() for n in (-2, -1, 1, 2)]
            slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
            assert found[-1, head].item() == pytest.approx(slope, rel=2e-2, abs=2e-4), (found, slope)


@pytest.mark.parametrize("kind", ["duo", "binary_ste"])
def test_gates_at_the_ends_still_learn(kind: str) -> None:
    """A gate of exactly 1 has the gradient of the branch that it leaves out."""
    model = make_model(SPARSE["triangle"], Dense(), kind)
    model.train()
    ids = torch.randint(0, 61, (1, LENGTH))
    learning = get_mask_learning(model)
    set_gates(model, torch.full((LAYERS, KV_HEADS), 1.0 if kind == "duo" else 30.0))
    loss = model(ids, labels=ids, use_cache=False).loss
    gates = torch.stack([gate for n in range(LAYERS) if (gate := learning.layer_gate(n)) is not None])
    assert torch.equal(gates, torch.ones(LAYERS, KV_HEADS))
    (gradient,) = torch.autograd.grad(loss, learning.gates.values)
    assert (gradient != 0).all()
