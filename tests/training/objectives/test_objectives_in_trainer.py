"""`SparseTrainer` with each objective: one optimizer step against the definition, and what it accepts as labels."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.patching import dense
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig, label_positions, outside_zero3
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.trainer import SparseTrainer

RATE, VOCAB, SEQ_LEN = 0.5, 61, 24
SUM = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, temperature=2.0, chunk_tokens=5)


class Rows(Dataset):  # type: ignore[type-arg]
    """Random rows with ragged labels; row 1 has none."""

    def __init__(self, shifted: bool = False) -> None:
        self.shifted = shifted

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: SEQ_LEN if index == 1 else 5 * index + 2] = -100
        row = {"input_ids": ids, "position_ids": torch.arange(SEQ_LEN)}
        if not self.shifted:
            return {**row, "labels": labels}
        # Wrong labels beside the right shifted ones: the latter count.
        return {**row, "labels": ids, "shift_labels": F.pad(labels[1:], (0, 1), value=-100)}


def tiny_model(seed: int = 0, stage: str = "sft") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config)
    masks = "all_sparse" if stage == "sft" else "all_full"
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=1, window_size=4), head_masks=masks))
    prepare_stage(model, stage, MaskLearningConfig(init_log_alpha=0.0))  # type: ignore[arg-type]
    return model


def trained(folder: Path, model: PreTrainedModel, objective: ObjectiveConfig, **options: Any) -> SparseTrainer:
    """One step of plain gradient descent over the four rows."""
    rows, teacher = options.pop("rows", Rows()), options.pop("teacher", None)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": RATE,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        **options,
    }
    trainer = SparseTrainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        objective=objective,
        teacher=teacher,
    )
    trainer.train()
    return trainer


def truth(model: PreTrainedModel, teacher: PreTrainedModel | None, objective: ObjectiveConfig) -> tuple[Tensor, float]:
    """The loss from all logits, and the number of label tokens."""
    data = collate([Rows()[i] for i in range(4)])
    kept, targets = label_positions(data.pop("labels"))
    with torch.no_grad():
        if teacher is None:
            with dense(model):
                reference = model(**data, use_cache=False, output_hidden_states=True)
        else:
            reference = teacher(**data, use_cache=False, output_hidden_states=True)
    output = model(**data, use_cache=False, output_hidden_states=True)
    logits = output.logits[kept]
    log_q = (logits / objective.temperature).log_softmax(-1)
    log_p = (reference.logits[kept] / objective.temperature).log_softmax(-1)
    distance = (output.hidden_states[-1][kept] - reference.hidden_states[-1][kept]).square().mean(-1)
    terms = {
        "lm": F.cross_entropy(logits, targets),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean() * objective.temperature**2,
        "hidden": distance.mean(),
    }
    assert all(term > 1e-3 for term in terms.values())
    return torch.stack([getattr(objective, name) * term for name, term in terms.items()]).sum(), targets.numel()


@pytest.mark.parametrize("own", [True, False], ids=["own teacher", "other teacher"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"rows": Rows(shifted=True), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "accumulated", "checkpointed", "shifted"],
)
def test_one_step_is_the_definition(tmp_path: Path, own: bool, options: dict[str, Any]) -> None:
    model = tiny_model()
    teacher = None if own else AutoModelForCausalLM.from_config(tiny_model().config.__class__(**TEACHER)).eval()
    expected = tiny_model()
    loss, _ = truth(expected, teacher, SUM)
    loss.backward()
    trainer = trained(tmp_path, model, SUM, teacher=copy.deepcopy(teacher), **options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-3)
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        torch.testing.assert_close(
            model.get_parameter(name), parameter.detach() - RATE * parameter.grad, rtol=1e-4, atol=2e-5, msg=name
        )


TEACHER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(kl=0.0, hidden=1.0), ObjectiveConfig(lm=1.0, kl=0.0), ObjectiveConfig(kl=1.0)],
    ids=["hidden", "lm", "kl"],
)
def test_masks_learn_from_each_term(tmp_path: Path, objective: ObjectiveConfig) -> None:
    model = tiny_model(stage="masks")
    before = copy.deepcopy(model.state_dict())
    trainer = trained(tmp_path, model, objective)
    row = trainer.state.log_history[0]
    logged = {name for name in row if name.startswith("loss/")}
    assert logged == {"loss/penalty"} | {
        f"loss/{name}" for name in ("lm", "kl", "hidden") if getattr(objective, name) or (name == "lm" and objective.kl)
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("sparse_hf_masks" not in name), name


def test_a_step_without_any_label_changes_nothing(tmp_path: Path) -> None:
    class Bare(Rows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return super().__getitem__(1)

    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = trained(tmp_path, model, SUM, rows=Bare())
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_evaluation_is_the_mean_cross_entropy_and_keeps_logits_where_they_are_asked_for(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trained(tmp_path, model, SUM, learning_rate=0.0, per_device_eval_batch_size=4)
    loss, _ = truth(model, None, ObjectiveConfig(lm=1.0, kl=0.0))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    trainer.args.prediction_loss_only = False
    found = trainer.predict(Rows())  # type: ignore[arg-type]
    assert found.predictions.shape == (4, SEQ_LEN, VOCAB)
    assert found.metrics is not None and found.metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    trainer = trained(tmp_path, tiny_model(), ObjectiveConfig(lm=1.0, kl=0.0))
    with pytest.raises(ValueError, match="training rows need `labels` or `shift_labels`"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})  # type: ignore[arg-type]


def test_teacher_of_a_zero3_run_is_loaded_whole_and_a_split_one_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    keeper = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled() and keeper is not None
    with outside_zero3():
        assert not is_deepspeed_zero3_enabled()
        teacher = tiny_model(seed=1)
    assert is_deepspeed_zero3_enabled()
    del keeper
    assert not is_deepspeed_zero3_enabled()
    with outside_zero3():
        pass
    assert not is_deepspeed_zero3_enabled()
    teacher.lm_head.weight.ds_id = 0  # DeepSpeed's mark of a parameter that it has split
    with pytest.raises(ValueError, match="the teacher's weights are split by ZeRO-3; load it inside"):
        trained(tmp_path, tiny_model(), SUM, teacher=teacher)


def test_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_config(tiny_model().config.__class__(**{**TEACHER, "hidden_size": 48}))
    with pytest.raises(ValueError, match=r"objective\.hidden needs a teacher of the student's hidden_size 32, got 48"):
        trained(tmp_path, tiny_model(), SUM, teacher=teacher)
