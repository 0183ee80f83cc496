"""TRL's `SFTTrainer` learns masks through `MaskLearningCallback`, over whole weights and over LoRA."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sparse_hf import AutoSparseModelForCausalLM, SparseConfig, Streaming, save_artefact, sparsify
from sparse_hf.lora import adapter_targets
from sparse_hf_training.callbacks import MaskLearningCallback
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig, attach_mask_learning, detach_mask_learning

STEPS = 4


class Watched(MaskLearningCallback):
    """Keeps what each step's loss gives the gates, and what they have once the penalty is added."""

    def __init__(self, learning: MaskLearning) -> None:
        super().__init__(learning)
        self.of_loss: list[torch.Tensor] = []
        self.of_both: list[torch.Tensor] = []
        self.of_penalty: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        (gate,) = self.learning.gates.parameters()
        assert gate.grad is not None
        self.of_loss.append(gate.grad.clone())
        self.of_penalty.append(torch.autograd.grad(self.learning.penalty(), gate)[0])
        super().on_pre_optimizer_step(*args, **kwargs)
        self.of_both.append(gate.grad.clone())


def sft_trainer(
    folder: Path, model_folder: Path, tokenizer: PreTrainedTokenizerFast, story: str, lora: bool, **changes: Any
) -> tuple[SFTTrainer, MaskLearning, Watched]:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks="all_full"))
    config = MaskLearningConfig(
        end_head_sparsity=0.5, mask_learning_rate=0.3, reg_learning_rate=0.1, init_log_alpha=1.0
    )
    learning = attach_mask_learning(model, config)
    callback = Watched(learning)
    tokenizer.pad_token = tokenizer.eos_token
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataset_num_proc": None,
        **changes,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**values),
        train_dataset=Dataset.from_dict({"text": [story[n * 200 : n * 200 + 200] for n in range(16)]}),
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    return trainer, learning, callback


@pytest.mark.parametrize("lora", [False, True])
def test_masks_are_learned(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerFast, story: str, lora: bool
) -> None:
    trainer, learning, callback = sft_trainer(tmp_path / "run", model_folder, tokenizer, story, lora)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    gates = learning.gates.log_alpha.detach().clone()  # type: ignore[operator, union-attr]
    trainer.train()
    assert len(callback.of_loss) == STEPS and all(bool(gradient.any()) for gradient in callback.of_loss)
    assert not callback.of_penalty[0].any() and callback.of_penalty[-1].any()  # multipliers begin at 0
    for both, loss, penalty in zip(callback.of_both, callback.of_loss, callback.of_penalty, strict=True):
        torch.testing.assert_close(both, loss + penalty)
    assert bool((learning.gates.log_alpha != gates).all())  # type: ignore[union-attr, arg-type]
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == (trained if lora else set(before)) and all("lora_" in name for name in trained) == lora
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS and all({"sparsity/expected", "loss/penalty"} <= set(row) for row in rows)

    # The gates were drawn once a step, though PeftModel passes the inner model by.
    assert learning.micro_step == 1
    masks = detach_mask_learning(trainer.model)
    assert 0 < int((masks == 0).sum()) < masks.numel()
    folder = save_artefact(trainer.model, tmp_path / "artefact", save_weights=True)
    ids = torch.arange(1, 49)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids, use_cache=False).logits
        again = AutoSparseModelForCausalLM.from_pretrained(folder).eval()(ids, use_cache=False).logits
    assert torch.equal(again, expected)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_resume(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerFast, story: str, lora: bool
) -> None:
    whole, learning, _ = sft_trainer(tmp_path / "run", model_folder, tokenizer, story, lora)
    whole.train()
    again, resumed, _ = sft_trainer(tmp_path / "run", model_folder, tokenizer, story, lora)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in learning.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)
    if lora:
        for name, parameter in adapter_targets(whole.model).items():
            torch.testing.assert_close(adapter_targets(again.model)[name], parameter)
