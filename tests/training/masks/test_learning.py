"""Gates on a model: the blend, precision, reproducibility, and what leaves when they are detached."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf import SparseConfig, Streaming, dense, sparsify, unsparsify
from sparse_hf.artefact import load_artefact, save_artefact
from sparse_hf.config import LayerRule
from sparse_hf.methods import Triangle
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf_training.checkpoint import load_mask_state, save_mask_state
from sparse_hf_training.masks import (
    LayerBudget,
    MaskLearning,
    MaskLearningConfig,
    attach_mask_learning,
    detach_mask_learning,
)
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.optimizer import MaskOptimizer
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
    third = torch.tensor(1 / 3)
    with torch.no_grad():
        learning.gates.values.fill_(third)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in learning.parameters())
    assert (learning.gates.values == third).all()  # not rounded on the way either
    model.train()
    loss = model(torch.randint(0, 97, (1, 20)), use_cache=False).logits.float().mean()
    loss.backward()
    assert learning.gates.log_alpha.grad is not None and learning.gates.log_alpha.grad.dtype == torch.float32


def test_detaching_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    names = set(model.state_dict())
    attach_mask_learning(model, CONFIG)
    assert set(model.state_dict()) == names and len(list(get_mask_learning(model).parameters())) == 3
    with pytest.raises(ValueError, match="gates already"):
        attach_mask_learning(model, CONFIG)
    masks = detach_mask_learning(model)
    assert set(model.state_dict()) == names
    assert int((masks == 0).sum()) == 3
    with pytest.raises(ValueError, match="no gates"):
        detach_mask_learning(model)
    unsparsify(model)


def test_an_artefact_waits_for_the_learned_masks(model: PreTrainedModel, tmp_path: Path) -> None:
    attach_mask_learning(model, CONFIG)
    with pytest.raises(ValueError, match=r"call detach_mask_learning\(model\) first"):  # else all heads would be full
        save_artefact(model, tmp_path / "artefact", base_model_name_or_path="me/base")
    assert not any(tmp_path.iterdir())
    masks = detach_mask_learning(model)
    folder = save_artefact(model, tmp_path / "artefact", base_model_name_or_path="me/base")
    assert torch.equal(load_artefact(folder).head_masks, masks)


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


KINDS = [
    {"gates": "hard_concrete", "init_log_alpha": 0.5},
    {"gates": "hard_concrete", "granularity": "layer", "regularizer": "abs", "init_log_alpha": 0.5},
    {"gates": "hard_concrete", "layer_budgets": (LayerBudget(layers="0,2", head_sparsity=0.5),)},
    {"gates": "duo", "regularizer": "l1", "mask_rate_schedule": "trapezoid", "mask_learning_rate": 0.02},
    {"gates": "binary_ste", "quadratic_term": False, "init_log_alpha": 0.5},
    {"gates": "binary_ste", "ste_sampling": "threshold", "granularity": "layer", "linear_term": False},
]


def train_gates(model: PreTrainedModel, learning: MaskLearning, optimizer: MaskOptimizer, steps: range) -> None:
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    model.train()
    for step in steps:
        learning.begin_step(step, 6)
        (model(ids, labels=ids, use_cache=False).loss + learning.penalty()).backward()
        optimizer.reduce_gradients()
        optimizer.step()
        learning.after_step()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values())[:40])
def test_every_kind_resumes_as_if_left_alone(model: PreTrainedModel, tmp_path: Path, kind: dict[str, Any]) -> None:
    config = MaskLearningConfig(**kind)
    other = copy.deepcopy(model)
    whole = prepare_stage(model, "masks", config)
    assert whole is not None
    optimizer = MaskOptimizer(whole)
    first = whole.gates.values.detach().clone()
    train_gates(model, whole, optimizer, range(3))
    save_mask_state(whole, tmp_path)
    optimizer.save(tmp_path)
    train_gates(model, whole, optimizer, range(3, 6))
    resumed = prepare_stage(other, "masks", config)
    assert resumed is not None
    again = MaskOptimizer(resumed)
    load_mask_state(resumed, tmp_path)
    again.load(tmp_path)
    train_gates(other, resumed, again, range(3, 6))
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not torch.equal(first, whole.gates.values)
    assert whole.metrics() == resumed.metrics()
    masks = detach_mask_learning(model)
    assert int((masks == 0).sum()) == (4 if kind.get("granularity") == "layer" else 3)


def test_state_of_another_kind_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    save_mask_state(attach_mask_learning(model, CONFIG), tmp_path)
    detach_mask_learning(model)
    duo = attach_mask_learning(model, MaskLearningConfig(gates="duo"))
    with pytest.raises(ValueError, match=r"holds \['gates.log_alpha'.*expected \['gates.alpha'"):
        load_mask_state(duo, tmp_path)


def test_trapezoid_reaches_the_optimizer(model: PreTrainedModel) -> None:
    config = MaskLearningConfig(mask_rate_schedule="trapezoid", mask_learning_rate=0.2, reg_learning_rate=0.1)
    learning = prepare_stage(model, "masks", config)
    assert learning is not None
    optimizer, rates = MaskOptimizer(learning), []
    for step in range(10):
        learning.begin_step(step, 10)
        optimizer.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    expected = [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]  # two steps up, two down
    assert [rate[0] for rate in rates] == pytest.approx([0.2 * x for x in expected])
    assert [rate[1] for rate in rates] == pytest.approx([0.1 * x for x in expected])


def test_gates_begin_at_an_artefacts_masks(model: PreTrainedModel, tmp_path: Path) -> None:
    masks = torch.tensor([[1, 0], [0, 0], [1, 1]])
    model.config._name_or_path = "user/model"
    set_head_masks(model, masks)
    save_artefact(model, tmp_path / "masks")
    for kind, start in (("hard_concrete", 3.0), ("binary_ste", 3.0), ("duo", 0.8)):
        config = MaskLearningConfig(
            gates=kind,  # type: ignore[arg-type]
            init_log_alpha=start,
            init_alpha=start if kind == "duo" else 1.0,
            init_masks=str(tmp_path / "masks"),
        )
        learning = attach_mask_learning(model, config)
        opposite = 1 - start if kind == "duo" else -start
        torch.testing.assert_close(learning.gates.values.detach(), torch.where(masks == 1, start, opposite))
        assert torch.equal(detach_mask_learning(model), masks)


def test_duo_gates_begin_in_the_order_of_scores_within_their_range(model: PreTrainedModel, tmp_path: Path) -> None:
    scores = torch.tensor([[0.5, 9.0], [-3.0, 0.6], [0.1, 0.2]])
    model.config._name_or_path = "user/model"
    save_artefact(model, tmp_path / "scores", scores=scores)
    config = MaskLearningConfig(gates="duo", init_alpha=0.75, init_spread=0.25, init_scores=str(tmp_path / "scores"))
    learning = attach_mask_learning(model, config)
    expected = torch.tensor([[0.8, 1.0], [0.5, 0.9], [0.6, 0.7]])
    torch.testing.assert_close(learning.gates.values.detach(), expected)
    with pytest.raises(ValueError, match=r"duo gates start in \[0, 1\], got 0.0 to 2.0"):
        replace(config, init_alpha=1.0, init_spread=1.0)


def test_only_an_artefacts_sparse_layers_may_become_sparse(model: PreTrainedModel, tmp_path: Path) -> None:
    """Layer 1 by a rule, as layer selection writes it; layer 2 by its head masks; layer 0 is dense."""
    triangle = Triangle(num_sink_tokens=2, window_size=4, num_last_tokens=4)
    chosen = SparseConfig(rules=(LayerRule(layers="1", full=triangle),))
    unsparsify(model)
    model.config._name_or_path = "user/model"
    sparsify(model, chosen, head_masks=torch.tensor([[1, 1], [1, 1], [1, 0]]))
    save_artefact(model, tmp_path / "layers")
    learning = attach_mask_learning(model, MaskLearningConfig(layers_from=str(tmp_path / "layers")))
    assert learning.budgets.held == {0}
    assert detach_mask_learning(model, head_sparsity=0.75).tolist()[0] == [1, 1]
    assert int((get_handle(model).head_masks == 0).sum()) == 3


def test_which_gates_skip_a_branch(model: PreTrainedModel) -> None:
    def skips(**changes: Any) -> list[bool]:
        attach_mask_learning(model, MaskLearningConfig(**changes))
        found = [state.skip_saturated for state in get_handle(model).states]
        detach_mask_learning(model)
        return found

    assert skips() == [True, True, True]
    assert skips(gates="duo", layer_budgets=(LayerBudget(layers="1", head_sparsity=0.0),)) == [False, True, False]
    assert skips(gates="binary_ste") == [False, False, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gates": "soft"}, r"gates must be one of \['hard_concrete', 'duo', 'binary_ste'\], got 'soft'"),
        ({"granularity": "head"}, r"granularity must be one of \['kv_head', 'layer'\]"),
        ({"ste_sampling": "top"}, "ste_sampling must be one of"),
        ({"regularizer": "l2"}, "regularizer must be one of"),
        ({"mask_rate_schedule": "step"}, "mask_rate_schedule must be one of"),
        ({"reg_weight": 0.0}, "reg_weight must be positive"),
        ({"linear_term": False, "quadratic_term": False}, "its linear term, its quadratic term or both"),
        ({"init_scores": "a", "init_masks": "b"}, "not from both"),
        ({"gates": "duo", "init_alpha": 1.5}, r"duo gates start in \[0, 1\]"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate must be positive"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskLearningConfig(**values)
