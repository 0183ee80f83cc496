"""`SparseTrainer`: transformers' Trainer with masks to learn, the dense model as a teacher, and whole checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sparse_hf.patching import dense, get_handle, set_head_masks
from sparse_hf_training.callbacks import MaskStepCallback
from sparse_hf_training.checkpoint import (
    MARKER,
    last_complete_checkpoint,
    load_mask_state,
    mark_complete,
    remove_old_checkpoints,
    save_mask_state,
)
from sparse_hf_training.masks import MaskLearning
from sparse_hf_training.masks.learning import MODULE_NAME
from sparse_hf_training.objectives import (
    ObjectiveConfig,
    distillation_loss,
    label_positions,
    language_modeling_loss,
)
from sparse_hf_training.optimizer import keep_mask_rates_constant, parameter_groups, weight_parameters


class TrainingDiverged(ValueError):
    """The loss, or what is trained, is no longer finite."""


class SparseTrainer(Trainer):
    """Trains the gates and weights that `prepare_stage` left trainable.

    The data's order is the data set's own: item i of a seeded data set is fixed, so a resumed run sees what it would
    have seen. Training rows are `input_ids`, `labels` and `position_ids` of `[seq_len]`.

    Args:
        model: a sparsified model after `prepare_stage`.
        objective: the terms of the loss and their weights.
        teacher: what the KL term stays close to, a frozen dense model. By default the trained model itself with dense
            attention, which is the base model while the weights are frozen, and moves with them when they train.
        judge: called with the model at each evaluation, under the head masks that would be deployed; returns figures
            to log, such as recall.
        args, **kwargs: as `transformers.Trainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        objective: ObjectiveConfig | None = None,
        teacher: PreTrainedModel | None = None,
        judge: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        get_handle(model)
        if args.ddp_find_unused_parameters is None:
            # All are used in each step. Searching the forward pass alone, DDP would miss the multipliers and fail.
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, **kwargs)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "gates get no gradient under reentrant checkpointing; "
                "set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label smoothing is not supported; set label_smoothing_factor to 0")
        # The loss below is a sum over label tokens / their number in the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self.objective: ObjectiveConfig = objective or ObjectiveConfig()
        self.teacher = teacher
        if teacher is not None:
            frozen: nn.Module = teacher
            frozen.to(self.args.device).eval().requires_grad_(False)
        self.judge = judge
        self.learning: MaskLearning | None = getattr(model, MODULE_NAME, None)
        self._mask_callback = MaskStepCallback(self.learning) if self.learning is not None else None
        if self._mask_callback is not None:
            self.add_callback(self._mask_callback)
        self._terms: dict[str, list[Tensor]] = defaultdict(list)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "labels" not in inputs:
            raise ValueError("training rows need `labels` (-100 where no loss is taken)")
        inputs = {**inputs, "use_cache": False}
        kept, targets = label_positions(inputs.pop("labels"))
        teacher = self._teacher_logits(inputs, kept) if model.training and self.objective.kl else None
        outputs = model(**inputs)
        logits = outputs.logits[kept]
        lm = language_modeling_loss(logits, targets)
        if not model.training:
            loss = lm / targets.numel()
            return (loss, outputs) if return_outputs else loss
        terms = {"lm": lm}
        loss = self.objective.lm * lm
        if teacher is not None:
            terms["kl"] = distillation_loss(logits, teacher, self.objective.temperature)
            loss = loss + self.objective.kl * terms["kl"]
        loss = loss / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # num_items_in_batch counts all processes, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        for name, value in terms.items():
            self._terms[f"loss/{name}"].append(value.detach() / targets.numel())
        if self.learning is not None:
            penalty = self.learning.penalty()
            self._terms["loss/penalty"].append(penalty.detach())
            loss = loss + penalty / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any], kept: Tensor) -> Tensor:
        """The dense model's logits `[num_labels, vocab]`, without dropout."""
        if self.teacher is not None:
            return self.teacher(**inputs).logits[kept]
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        try:
            with dense(model):
                return model(**inputs).logits[kept]
        finally:
            model.train()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(self._advice(f"the loss is {loss.item()} in step {self.state.global_step}"))
        return loss

    def _advice(self, what: str) -> str:
        good = last_complete_checkpoint(self._run_folder)
        return f"{what}; last good checkpoint: {good or 'none yet'}. Lower the learning rates and start again"

    # ---- optimization ----

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = cls(parameter_groups(target, weight_decay=self.args.weight_decay), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None and self.learning is not None:
            wrapped: Any = optimizer or self.optimizer
            scheduler = super().create_scheduler(num_training_steps, wrapped)
            inner = getattr(wrapped, "optimizer", wrapped)  # accelerate wraps it
            self.lr_scheduler = keep_mask_rates_constant(scheduler, inner)
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Multipliers and gates would dominate the norm and shrink the weights' gradients.
        weights = weight_parameters(self.accelerator.unwrap_model(model))
        return self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm) if weights else None

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)  # type: ignore[arg-type]

    # ---- evaluation and logs ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        if self.learning is not None:
            set_head_masks(model, self.learning.head_masks())
        metrics = super().evaluate(*args, **kwargs)
        if self.judge is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            judged = {f"{prefix}_{name}": value for name, value in self.judge(model).items()}
            self.log(judged)
            metrics.update(judged)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._terms.items()})
            self._terms.clear()
            if self._mask_callback is not None:
                logs.update(self._mask_callback.metrics)
        super().log(logs, start_time)

    # ---- checkpoints ----

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = self._run_folder / f"checkpoint-{self.state.global_step}"
        trained = [p for p in self.accelerator.unwrap_model(model).parameters() if p.requires_grad]
        if not all(bool(p.isfinite().all()) for p in trained):
            raise TrainingDiverged(self._advice(f"weights or gates are not finite after step {self.state.global_step}"))
        if self.args.should_save:
            # What a killed run left there does not count while it is written again.
            (checkpoint / MARKER).unlink(missing_ok=True)
        # Old checkpoints go only after the new one is marked, so the base class must not remove any.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(checkpoint)
            remove_old_checkpoints(self._run_folder, keep)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = self._run_folder if output_dir is None else Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.learning is not None:
            save_mask_state(self.learning, folder)
        model = self.accelerator.unwrap_model(self.model)
        if weight_parameters(model):
            state_dict = model.state_dict() if state_dict is None else state_dict
            weights = {name: t for name, t in state_dict.items() if MODULE_NAME not in name.split(".")}
            model.save_pretrained(folder, state_dict=weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.learning is not None:
            load_mask_state(self.learning, Path(resume_from_checkpoint))
        own: Any = self.accelerator.unwrap_model(self.model)
        if not weight_parameters(own):
            return
        masks = own._modules.pop(MODULE_NAME, None)  # else the base class warns that they are missing
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            if masks is not None:
                own.add_module(MODULE_NAME, masks)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            # In several processes transformers 5.17 loads to "cpu:0", which torch.load does not know.
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
