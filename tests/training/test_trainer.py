"""`SparseTrainer` on a real Trainer: losses, groups, logs, divergence, composition with other trainers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.callbacks import MaskLearningCallback
from sparse_hf_training.checkpoint import is_complete, last_complete_checkpoint
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.objectives import ObjectiveConfig, distillation_loss, label_positions, language_modeling_loss
from sparse_hf_training.optimizer import MaskOptimizer, parameter_groups
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.trainer import SparseTrainer, TrainingDiverged

MASKS = MaskLearningConfig(end_head_sparsity=0.5, mask_learning_rate=0.3, reg_learning_rate=0.1, init_log_alpha=1.0)


class Rows(Dataset):  # type: ignore[type-arg]
    """Random rows with a loss on their second half, fixed by their number."""

    def __init__(self, length: int, seq_len: int = 24) -> None:
        self.length, self.seq_len = length, seq_len

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 97, (self.seq_len,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: self.seq_len // 2 + index % 3] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(self.seq_len)}


def tiny_model(seed: int = 0, num_hidden_layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    return sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=1, window_size=4), head_masks="all_full"))


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "weight_decay": 0.1,
    }
    return TrainingArguments(**{**values, **overrides})


def trainer_for(folder: Path, stage: str = "masks", objective: ObjectiveConfig | None = None, **overrides: Any) -> Any:
    model = tiny_model()
    prepare_stage(model, stage, MASKS)  # type: ignore[arg-type]
    return SparseTrainer(
        model,
        arguments(folder, **overrides),
        train_dataset=Rows(64),
        eval_dataset=Rows(4),
        data_collator=collate,
        objective=objective or ObjectiveConfig(lm=1.0, kl=0.5),
    )


def test_masks_stage_moves_gates_and_nothing_else(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    learning = get_mask_learning(trainer.model)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    gates = {name: tensor.clone() for name, tensor in learning.state_dict().items()}
    trainer.train()
    assert set(before) == set(trainer.model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert gates and all(not torch.equal(tensor, gates[name]) for name, tensor in learning.state_dict().items())


def test_masks_and_weights_moves_both(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "masks_and_weights")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(not torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())
    assert not torch.equal(get_mask_learning(trainer.model).gates.log_alpha, torch.full((2, 2), 1.0))


def test_logs_carry_all_figures(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    row = trainer.state.log_history[0]
    for name in ("loss/lm", "loss/kl", "loss/penalty", "sparsity/target", "sparsity/expected", "sparsity/realised"):
        assert math.isfinite(row[name]), name
    assert {"lagrangian/linear", "lagrangian/quadratic"} <= set(row)
    targets = [row["sparsity/target"] for row in trainer.state.log_history if "sparsity/target" in row]
    assert targets[0] == 0.0 and targets[-1] == pytest.approx(0.5)


def test_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    expected = row["loss/lm"] + 0.5 * row["loss/kl"] + row["loss/penalty"]
    assert row["loss"] == pytest.approx(expected, abs=2e-4)


def test_objective_terms_match_torch() -> None:
    logits, teacher = torch.randn(2, 7, 11), torch.randn(2, 7, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[0, :4] = -100
    kept, targets = label_positions(labels)
    assert kept.sum() == targets.numel() == 3 + 6
    assert not kept[:, -1].any() and kept[0, 3]  # position 3 predicts label 4
    shifted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(language_modeling_loss(logits[kept], targets), shifted)
    p, q = (teacher[kept] / 2).softmax(-1), (logits[kept] / 2).softmax(-1)
    kl = (p * (p.log() - q.log())).sum() * 4
    torch.testing.assert_close(distillation_loss(logits[kept], teacher[kept], 2.0), kl)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_does_not_change_the_update(tmp_path: Path, accumulation: int) -> None:
    """One step over 4 rows, in one or several micro-batches; gates pinned so that the draws agree."""
    model = tiny_model()
    learning = prepare_stage(model, "masks_and_weights", MaskLearningConfig(init_log_alpha=60.0, clamp_log_alpha=None))
    assert learning is not None
    trainer = SparseTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            optim="sgd",
            weight_decay=0.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=Rows(4),
        data_collator=collate,
        objective=ObjectiveConfig(lm=1.0, kl=0.0),
    )
    trainer.train()
    reference = tiny_model()
    batch = collate([Rows(4)[i] for i in range(4)])
    kept, targets = label_positions(batch.pop("labels"))
    loss = language_modeling_loss(reference(**batch, use_cache=False).logits[kept], targets) / targets.numel()
    loss.backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            model.get_parameter(name), parameter.detach() - 1e-2 * parameter.grad, msg=name, rtol=1e-4, atol=1e-6
        )


def test_parameter_groups_are_the_weights_alone() -> None:
    model = tiny_model()
    assert prepare_stage(model, "masks_and_weights", MASKS) is not None
    groups = parameter_groups(model, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed and all(p.ndim >= 2 for p in decayed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.optim.AdamW(parameter_groups(model)).param_groups[0]["params"] == []


def test_gates_step_as_adamw_without_decay_or_schedule(tmp_path: Path) -> None:
    """Against AdamW written out, on gradients that were recorded; the weights' schedule and clipping stay outside."""
    trainer = trainer_for(tmp_path, "masks_and_weights", lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=1e-3)
    learning, grads, rates = get_mask_learning(trainer.model), [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            grads.append(learning.gates.log_alpha.grad.clone())
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.add_callback(Watch())
    value = learning.gates.log_alpha.detach().clone()
    trainer.train()
    assert rates[0] == 0.0 and rates[2] == pytest.approx(1e-2) and rates[-1] < rates[2]
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step, grad in enumerate(grads, 1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        value -= 0.3 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        value.clamp_(-6, 6)
    torch.testing.assert_close(learning.gates.log_alpha.detach(), value)


def test_mask_optimizer_goes_on_from_its_file(tmp_path: Path) -> None:
    model = tiny_model()
    learning = attach_mask_learning(model, MASKS)

    def steps(optimizer: MaskOptimizer, numbers: range) -> None:
        for number in numbers:
            for parameter in learning.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            optimizer.step()

    start = {name: tensor.clone() for name, tensor in learning.state_dict().items()}
    steps(MaskOptimizer(learning), range(4))
    whole = {name: tensor.clone() for name, tensor in learning.state_dict().items()}
    learning.load_state_dict(start)
    first, second = MaskOptimizer(learning), MaskOptimizer(learning)
    steps(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    steps(second, range(2, 4))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in learning.state_dict().items())
    with pytest.raises(ValueError, match="no such file"):
        second.load(tmp_path / "none")
    other = attach_mask_learning(tiny_model(num_hidden_layers=3), MASKS)
    with pytest.raises(ValueError, match="belongs to other gates"):
        MaskOptimizer(other).load(tmp_path)


def test_evaluation_deploys_the_learned_masks(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    seen = []
    trainer.judge = lambda model: (seen.append(model._sparse_hf_handle.head_masks.clone()), {"recall/x": 0.5})[1]
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_recall/x"] == 0.5 and math.isfinite(metrics["eval_loss"])
    assert torch.equal(seen[0], get_mask_learning(trainer.model).head_masks())
    assert int((seen[0] == 0).sum()) == 2


def test_diverged_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2)
    forward = trainer.model.forward

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if trainer.state.global_step >= 3:
            output.logits = output.logits * float("nan")
        return output

    trainer.model.forward = poisoned
    with pytest.raises(TrainingDiverged, match=r"step 3.*checkpoint-2"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_checkpoints_count_only_when_whole(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    newest = tmp_path / "checkpoint-6"
    assert is_complete(newest) and not (newest / "model.safetensors").exists()
    (newest / "optimizer.pt").write_bytes(b"truncated")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("stage", ["masks", "masks_and_weights"])
def test_resumed_run_ends_as_one_left_alone(tmp_path: Path, stage: str) -> None:
    whole = trainer_for(tmp_path / "whole", stage)
    whole.train()
    trainer_for(tmp_path / "part", stage, save_strategy="steps", save_steps=3).train()
    resumed = trainer_for(tmp_path / "part", stage, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    gates = get_mask_learning(resumed.model).state_dict()
    for name, tensor in get_mask_learning(whole.model).state_dict().items():
        assert torch.equal(tensor, gates[name]), name
    assert resumed.state.log_history[5]["loss/kl"] == whole.state.log_history[5]["loss/kl"]


@pytest.mark.parametrize("last", [6, 4])
def test_finished_run_makes_no_step_more(tmp_path: Path, last: int) -> None:
    whole = trainer_for(tmp_path, "masks_and_weights", save_strategy="steps", save_steps=6)
    whole.train()
    again = trainer_for(tmp_path, "masks_and_weights", save_strategy="steps", save_steps=1, max_steps=last)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 6
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6"]
    for name, tensor in get_mask_learning(whole.model).state_dict().items():
        assert torch.equal(tensor, get_mask_learning(again.model).state_dict()[name]), name
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_other_trainers_learn_the_same_masks_through_the_callback(tmp_path: Path) -> None:
    """transformers' own Trainer with the callback equals SparseTrainer on the same objective."""
    ours = trainer_for(tmp_path / "ours", objective=ObjectiveConfig(lm=1.0, kl=0.0), gradient_accumulation_steps=2)
    ours.train()
    model = tiny_model()
    learning = prepare_stage(model, "masks", MASKS)
    assert learning is not None
    args = arguments(tmp_path / "theirs", gradient_accumulation_steps=2, lr_scheduler_type="constant")

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    theirs = InOrder(
        model,
        args,
        train_dataset=Rows(64),
        data_collator=collate,
        callbacks=[MaskLearningCallback(learning)],
    )
    theirs.train()
    expected = get_mask_learning(ours.model)
    torch.testing.assert_close(learning.gates.log_alpha, expected.gates.log_alpha)
    torch.testing.assert_close(learning.regularizer.linear, expected.regularizer.linear)
    assert "sparsity/target" in theirs.state.log_history[0]


def test_callback_goes_on_from_a_checkpoint_of_another_trainer(tmp_path: Path) -> None:
    def train(resume: str | None = None) -> torch.Tensor:
        model = tiny_model()
        learning = prepare_stage(model, "masks_and_weights", MASKS)
        assert learning is not None
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, seed=3)
        callback = MaskLearningCallback(learning)
        trainer = Trainer(model, args, train_dataset=Rows(64), data_collator=collate, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return learning.gates.log_alpha.detach()

    whole, half = train(), str(tmp_path / "checkpoint-3")
    assert torch.equal(train(half), whole)
    (tmp_path / "checkpoint-3" / "mask_learning.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no such file: .*mask_learning"):
        train(half)


def test_fp16_is_refused_while_masks_are_learned(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match=r"set trainer.bf16=true instead of fp16"):
        trainer.train()


def test_callback_notices_a_loss_without_gates(tmp_path: Path) -> None:
    model = tiny_model()
    learning = attach_mask_learning(model, MASKS)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Rows(8),
        data_collator=collate,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: model.lm_head.weight.mean(),
        callbacks=[MaskLearningCallback(learning)],
    )
    with pytest.raises(ValueError, match="gave the gates no gradient"):
        trainer.train()


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label smoothing"):
        trainer_for(tmp_path, label_smoothing_factor=0.1)


def test_a_batch_size_found_by_trial_is_refused(tmp_path: Path) -> None:
    """transformers' loop would begin anew after it ran out of memory, with gates that have moved."""
    with pytest.raises(ValueError, match="set per_device_train_batch_size"):
        trainer_for(tmp_path, auto_find_batch_size=True)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}])
def test_reentrant_checkpointing_is_refused(tmp_path: Path, options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="reentrant checkpointing"):
        trainer_for(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)


def test_trainer_state_is_json(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=6).train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
