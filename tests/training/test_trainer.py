"""`SparseTrainer` on a real Trainer: losses, groups, logs, divergence, composition with other trainers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.callbacks import MaskLearningCallback
from sparse_hf_training.checkpoint import is_complete, last_complete_checkpoint
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.objectives import ObjectiveConfig, distillation_loss, label_positions, language_modeling_loss
from sparse_hf_training.optimizer import MASK_GROUP, parameter_groups
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


def tiny_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
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
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ("sparse_hf_masks" not in name), name


def test_masks_and_weights_moves_both(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "masks_and_weights")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(not torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())


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


def test_parameter_groups_keep_masks_apart() -> None:
    model = tiny_model()
    learning = prepare_stage(model, "masks_and_weights", MASKS)
    assert learning is not None
    groups = parameter_groups(model, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    masks = [group for group in groups if group.get(MASK_GROUP)]
    assert [group["lr"] for group in masks] == [0.3, 0.1]
    assert all(group["weight_decay"] == 0.0 for group in masks)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed and all(p.ndim >= 2 for p in decayed)
    assert not any(p is learning.gates.log_alpha for p in decayed)


def test_schedule_of_the_weights_leaves_the_masks_alone(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "masks_and_weights", lr_scheduler_type="linear", warmup_steps=2)
    rates: list[dict[str, float]] = []

    class Watch(MaskLearningCallback):
        def __init__(self) -> None: ...

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None: ...

        def on_log(self, *args: Any, **kwargs: Any) -> None: ...

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None: ...

        def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            groups = trainer.optimizer.param_groups
            rates.append(
                {
                    "weights": next(g["lr"] for g in groups if not g.get(MASK_GROUP)),
                    "masks": next(g["lr"] for g in groups if g.get(MASK_GROUP)),
                }
            )

    trainer.add_callback(Watch())
    trainer.train()
    assert [rate["masks"] for rate in rates] == [0.3] * 6
    weights = [rate["weights"] for rate in rates]
    assert weights[0] == 0.0 and weights[2] == pytest.approx(1e-2) and weights[-1] < weights[2]


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
    assert resumed.state.log_history[5]["loss/kl"] == whole.state.log_history[5]["loss/kl"]


def test_other_trainers_learn_the_same_masks_through_the_callback(tmp_path: Path) -> None:
    """transformers' own Trainer with the callback equals SparseTrainer on the same objective."""
    ours = trainer_for(tmp_path / "ours", objective=ObjectiveConfig(lm=1.0, kl=0.0), gradient_accumulation_steps=2)
    ours.train()
    model = tiny_model()
    learning = prepare_stage(model, "masks", MASKS)
    assert learning is not None
    args = arguments(tmp_path / "theirs", gradient_accumulation_steps=2, lr_scheduler_type="constant")
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    theirs = InOrder(
        model,
        args,
        train_dataset=Rows(64),
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[MaskLearningCallback(learning)],
    )
    theirs.train()
    expected = get_mask_learning(ours.model)
    torch.testing.assert_close(learning.gates.log_alpha, expected.gates.log_alpha)
    torch.testing.assert_close(learning.lagrangian.linear, expected.lagrangian.linear)
    assert "sparsity/target" in theirs.state.log_history[0]


def test_callback_notices_a_penalty_that_is_lost(tmp_path: Path) -> None:
    model = tiny_model()
    learning = attach_mask_learning(model, MASKS)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Rows(8),
        data_collator=collate,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().mean(),
        callbacks=[MaskLearningCallback(learning)],
    )
    with pytest.raises(ValueError, match="did not reach the loss"):
        trainer.train()


def test_wandb_offline_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = trainer_for(tmp_path / "run", max_steps=2, report_to=["wandb"])
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/sparsity/target"] == pytest.approx(0.25)
    assert {"train/loss/kl", "train/lagrangian/linear"} <= set(summary)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_tensorboard_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer_for(tmp_path / "run", max_steps=2, report_to=["tensorboard"]).train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/sparsity/target", "train/loss/kl"} <= set(events.Tags()["scalars"])


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label smoothing"):
        trainer_for(tmp_path, label_smoothing_factor=0.1)


def test_trainer_state_is_json(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=6).train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
