"""Gates on a model: the blend, precision, reproducibility, and what leaves when they are detached."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf import SparseConfig, Streaming, dense, sparsify, unsparsify
from sparse_hf.artefact import save_artefact
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning, detach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.stages import prepare_stage

CONFIG = MaskLearningConfig(end_head_sparsity=0.5, init_log_alpha=0.0)


@pytest.fixture
def model() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    return sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=5), head_masks="all_full"))


def test_gates_at_the_ends_are_the_deployed_masks(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (2, 40))
    learning = attach_mask_learning(model, CONFIG)
    masks = torch.tensor([[1, 0], [0, 0], [1, 1]])
    with torch.no_grad():
        learning.gates.log_alpha.copy_(masks * 60.0 - 30.0)
    model.train()
    trained = model(ids, use_cache=False).logits
    assert torch.equal(get_mask_learning(model).layer_gate(0), torch.tensor([1.0, 0.0]))
    detach_mask_learning(model, head_sparsity=0.5)
    model.eval()
    assert torch.equal(get_handle(model).head_masks, masks)
    torch.testing.assert_close(trained, model(ids, use_cache=False).logits)


def test_training_blends_and_evaluation_reads_the_deployed_masks(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    learning = attach_mask_learning(model, CONFIG)
    model.eval()
    set_head_masks(model, torch.zeros(3, 2))
    sparse = model(ids, use_cache=False).logits
    model.train()
    first, second = model(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert not torch.allclose(first, sparse) and not torch.allclose(first, second)
    with torch.no_grad():
        before = learning.micro_step
        with dense(model):
            model(ids, use_cache=False)
    assert learning.micro_step == before  # a teacher's pass draws nothing
    model.eval()
    assert torch.equal(model(ids, use_cache=False).logits, sparse)


def test_draws_depend_on_seed_step_and_micro_batch_alone(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (1, 30))
    attach_mask_learning(model, CONFIG)
    other = copy.deepcopy(model)
    for one in (model, other):
        one.train()
    torch.manual_seed(11)
    get_mask_learning(model).begin_step(7, 10)
    expected = model(ids, use_cache=False).logits
    torch.manual_seed(99)
    get_mask_learning(other).begin_step(7, 10)
    torch.testing.assert_close(other(ids, use_cache=False).logits, expected)
    get_mask_learning(other).begin_step(8, 10)
    assert not torch.allclose(other(ids, use_cache=False).logits, expected)


def test_gradients_reach_gates_only_in_the_masks_stage(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    learning = prepare_stage(model, "masks", CONFIG)
    assert learning is not None
    model.train()
    (model(ids, labels=ids, use_cache=False).loss + learning.penalty()).backward()
    assert learning.gates.log_alpha.grad is not None and learning.gates.log_alpha.grad.abs().sum() > 0
    others = [p.grad for name, p in model.named_parameters() if "sparse_hf_masks" not in name]
    assert others and all(grad is None for grad in others)


def test_gradient_checkpointing_draws_once(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    learning = prepare_stage(model, "masks_and_weights", CONFIG)
    assert learning is not None
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        learning.begin_step(3, 10)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_gates_stay_fp32(model: PreTrainedModel) -> None:
    learning = attach_mask_learning(model, CONFIG)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in learning.parameters())
    model.train()
    loss = model(torch.randint(0, 97, (1, 20)), use_cache=False).logits.float().mean()
    loss.backward()
    assert learning.gates.log_alpha.grad is not None and learning.gates.log_alpha.grad.dtype == torch.float32


def test_detaching_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    names = set(model.state_dict())
    attach_mask_learning(model, CONFIG)
    assert set(model.state_dict()) - names
    with pytest.raises(ValueError, match="gates already"):
        attach_mask_learning(model, CONFIG)
    masks = detach_mask_learning(model)
    assert set(model.state_dict()) == names
    assert int((masks == 0).sum()) == 3
    with pytest.raises(ValueError, match="no gates"):
        detach_mask_learning(model)
    unsparsify(model)


def test_sft_reads_the_frozen_masks_while_it_trains(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    with pytest.raises(ValueError, match="every head is dense"):
        prepare_stage(model, "sft", CONFIG)
    set_head_masks(model, torch.tensor([[0, 1], [1, 0], [0, 0]]))
    assert prepare_stage(model, "sft", CONFIG) is None
    model.train()
    training = model(ids, use_cache=False).logits
    model.eval()
    torch.testing.assert_close(training, model(ids, use_cache=False).logits)
    with dense(model):
        assert not torch.allclose(training, model(ids, use_cache=False).logits)
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_stage(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"masks_and_weights"):
        prepare_stage(model, "pretrain", CONFIG)  # type: ignore[arg-type]


def test_gates_begin_in_the_order_of_an_artefacts_scores(model: PreTrainedModel, tmp_path: Path) -> None:
    scores = torch.tensor([[0.5, 9.0], [-3.0, 0.6], [0.1, 0.2]])
    model.config._name_or_path = "user/model"
    save_artefact(model, tmp_path / "scores", scores=scores)
    config = replace(CONFIG, init_log_alpha=2.0, init_scores=str(tmp_path / "scores"), init_spread=0.5)
    learning = attach_mask_learning(model, config)
    expected = torch.tensor([[2.1, 2.5], [1.5, 2.3], [1.7, 1.9]])
    torch.testing.assert_close(learning.gates.log_alpha.detach(), expected)
    assert torch.equal(learning.head_masks(), (scores > 0.3).to(learning.head_masks().dtype))


def test_scores_that_are_missing_or_of_another_shape(model: PreTrainedModel, tmp_path: Path) -> None:
    model.config._name_or_path = "user/model"
    save_artefact(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"head scores \[3, 2\], .* has none; sparse-hf calibrate scores"):
        attach_mask_learning(model, replace(CONFIG, init_scores=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="init_spread must be positive"):
        replace(CONFIG, init_spread=0.0)
