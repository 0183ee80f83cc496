"""Layers compiled one by one: the losses and gradients of eager layers, one graph for layers that read alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.compile_layers import CompileConfig, compile_layers
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig
from sparse_hf_training.peft import LoraConfig, add_lora
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.typed_config import build

AOT = CompileConfig(backend="aot_eager")
IDS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)  # packed: two documents a row


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


def tiny_model(
    num_layers: int = 2, sparse: SparseConfig | None = None, lora: bool = False, length: int = 64
) -> tuple[PreTrainedModel, MaskLearning]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=length,
    )
    model = AutoModelForCausalLM.from_config(config)
    sparsify(model, sparse or SparseConfig(sparse=Streaming(num_sink_tokens=1, window_size=4), head_masks="all_full"))
    if lora:
        add_lora(model, LoraConfig(rank=2))
    learning = prepare_stage(model, "masks_and_weights", MaskLearningConfig(init_log_alpha=0.5))
    assert learning is not None
    return model.train(), learning


def step(model: PreTrainedModel, learning: MaskLearning, **inputs: Any) -> dict[str, Tensor]:
    """Loss and every gradient of one step with its own draw."""
    model.zero_grad()
    learning.zero_grad()
    learning.begin_step(1, 10)
    inputs = {"input_ids": IDS, "position_ids": POSITIONS, "labels": IDS, "use_cache": False, **inputs}
    loss = model(**inputs).loss
    (loss + learning.penalty()).backward()
    named = {**dict(model.named_parameters()), **{f"gates.{n}": p for n, p in learning.named_parameters()}}
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_and_weights_have_eager_gradients(checkpointing: bool, lora: bool) -> None:
    model, learning = tiny_model(lora=lora)
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = step(model, learning)
    assert any("gates" in name for name in expected) and any("lora_B" in name for name in expected) == lora
    compiled = compile_layers(model, AOT)
    assert compiled.fullgraph
    assert_same(step(model, learning), expected)
    compiled.undo()
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert_same(step(model, learning), expected)


def test_layers_share_a_graph() -> None:
    model, learning = tiny_model(num_layers=4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_layers(model, CompileConfig(backend=counter))
    for _ in range(3):
        step(model, learning)
    assert counter.frame_count == 1


def test_frozen_masks_and_evaluation() -> None:
    """Layers with other layouts get graphs of their own; evaluation and generation stay out of them."""
    sparse = SparseConfig(sparse=Streaming(num_sink_tokens=1, window_size=4), head_masks=((1, 0), (0, 0)))
    model, _ = tiny_model()
    from sparse_hf import unsparsify
    from sparse_hf_training.masks import detach_mask_learning

    detach_mask_learning(model)
    sparsify(unsparsify(model), sparse)
    inputs: dict[str, Any] = {"input_ids": IDS, "position_ids": POSITIONS, "labels": IDS, "use_cache": False}
    found = []
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        if compiled:
            compile_layers(model, CompileConfig(backend=counter))
        model.train().zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same(found[1], found[0])
    assert counter.frame_count == 2
    model.eval()
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        model.train()(**inputs)
    assert counter.frame_count == 2


def test_heads_that_select_break_the_graph() -> None:
    sparse = {"sparse": {"method": "xattention", "block_size": 64, "stride": 16}, "head_masks": "all_full"}
    model, learning = tiny_model(sparse=SparseConfig.from_dict(sparse), length=256)
    ids = torch.randint(0, 97, (1, 200))
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(200)[None]}
    expected = step(model, learning, **inputs)
    compiled = compile_layers(model, AOT)
    assert not compiled.fullgraph
    assert_same(step(model, learning, **inputs), expected)
    compiled.undo()
    with pytest.raises(ValueError, match="select keys by q and k"):
        compile_layers(model, CompileConfig(fullgraph=True))


def test_inductor() -> None:
    model, learning = tiny_model()
    expected = step(model, learning)
    compile_layers(model, CompileConfig())
    assert_same(step(model, learning), expected)


def test_run_with_compiled_layers(run_values: Any, tmp_path: Path) -> None:
    """A whole run: schedule, checkpoints, judging between the steps."""
    from sparse_hf_training.config import RunConfig
    from sparse_hf_training.run import run_training

    outcomes = []
    for name, changes in (("eager", {}), ("compiled", {"compile": {"backend": "aot_eager"}})):
        trainer = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2}
        values = run_values(output_dir=str(tmp_path / name), trainer=trainer, **changes)
        outcomes.append(run_training(build(RunConfig, values)))
    eager, compiled = outcomes
    torch.testing.assert_close(compiled.scores, eager.scores, rtol=1e-4, atol=1e-4)
    losses = [[row["loss"] for row in outcome.history if "loss" in row] for outcome in outcomes]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert any("forward" in module.__dict__ for module in compiled.model.modules())
