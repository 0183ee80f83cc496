"""`SparseTrainer`: transformers' Trainer with masks to learn, the dense model as a teacher, and whole checkpoints."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from sparse_hf.lora import adapters_disabled, unwrapped
from sparse_hf.patching import dense, dense_heads, get_handle, set_head_masks
from sparse_hf_training.callbacks import MaskStepCallback, refuse_fp16
from sparse_hf_training.checkpoint import last_complete_checkpoint, mark_complete, remove_old_checkpoints, saving
from sparse_hf_training.engines import Engine, all_finite, check_engine, record_engine
from sparse_hf_training.engines.checkpointing import EngineCheckpoints
from sparse_hf_training.engines.unused import add_unused_parameter, touch_unused_parameter
from sparse_hf_training.masks import MaskLearning
from sparse_hf_training.masks.learning import MODULE_NAME
from sparse_hf_training.objectives import (
    LossHead,
    ObjectiveConfig,
    TeacherStates,
    check_teacher,
    label_positions,
    language_modeling_loss,
)
from sparse_hf_training.observe.throughput import ThroughputCallback
from sparse_hf_training.optimizer import parameter_groups, weight_parameters
from sparse_hf_training.peft import base_output_embedding, gates_alone_allowed
from sparse_hf_training.sequence_parallel import (
    enable_deepspeed_sequence_parallel,
    get_sequence_group,
    is_sequence_parallel,
    sequence_parallel_disabled,
)
from sparse_hf_training.sequence_parallel.evaluation import SlicedEvaluation, mean_loss
from sparse_hf_training.sequence_parallel.loading import count_shifted_labels, train_dataloader


class TrainingDiverged(ValueError):
    """The loss, or what is trained, is no longer finite."""


class SparseTrainer(SlicedEvaluation, EngineCheckpoints):
    """Trains the gates and weights that `prepare_stage` left trainable.

    The data's order is the data set's own: item i of a seeded data set is fixed, so a resumed run sees what it would
    have seen. Training rows are `input_ids`, `labels` and `position_ids` of `[seq_len]`; `shift_labels`, aligned with
    the positions that predict them, count before `labels`.

    Args:
        model: a sparsified model after `prepare_stage`.
        objective: the terms of the loss and their weights.
        teacher: what the KL and hidden terms stay close to, a frozen dense model. By default the trained model itself
            with dense attention and without an adapter that trains, which is the base model while the weights are
            frozen, and moves with them when they train.
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
            args.ddp_find_unused_parameters = False  # all are used in each step
        with gates_alone_allowed(model):
            super().__init__(model, args, **kwargs)
        self.engine = Engine.of(self.accelerator)
        check_engine(self.engine)
        self.engine.check(self.accelerator)
        self._weights_train = bool(weight_parameters(model))
        checkpointing: Any = self.args.gradient_checkpointing_kwargs or {}
        # torch's own default is reentrant; transformers' stands in only where no option is given.
        if self.args.gradient_checkpointing and checkpointing and checkpointing.get("use_reentrant", True):
            raise ValueError(
                "gates get no gradient under reentrant checkpointing; "
                "set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label smoothing is not supported; set label_smoothing_factor to 0")
        if self.args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size begins at step 0 again with what the steps before memory ran out have learned; "
                "set per_device_train_batch_size (with gradient_accumulation_steps) instead"
            )
        # The loss below is a sum over label tokens / their number in the whole optimizer step.
        self.model_accepts_loss_kwargs = True
        self.objective: ObjectiveConfig = objective or ObjectiveConfig()
        self.teacher = teacher
        if teacher is not None:
            check_teacher(model, teacher, self.objective)
            frozen: nn.Module = teacher
            frozen.to(self.args.device).eval().requires_grad_(False)
        self._heads: dict[nn.Module, LossHead] = {}
        self.judge = judge
        self.learning: MaskLearning | None = getattr(unwrapped(model), MODULE_NAME, None)
        self._mask_callback: MaskStepCallback | None = None
        if self.learning is not None:
            refuse_fp16(self.args)
            self.learning.to(self.args.device)  # before its optimizer's state is read
            self._mask_callback = MaskStepCallback(self.learning)
            self.add_callback(self._mask_callback)
        self._terms: dict[str, list[Tensor]] = defaultdict(list)  # sums over label tokens
        self._num_labels: list[int] = []
        self._penalties: list[Tensor] = []

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if "labels" not in inputs and "shift_labels" not in inputs:
            raise ValueError("training rows need `labels` or `shift_labels` (-100 where no loss is taken)")
        inputs = {**inputs, "use_cache": False}
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        kept, targets = label_positions(labels if shifted is None else shifted, shifted=shifted is not None)
        num_labels = max(targets.numel(), 1)
        if not model.training:
            return self._evaluation_loss(model, inputs, kept, targets, return_outputs)
        scale: Tensor | float = 1.0 / num_labels
        if num_items_in_batch is not None:
            scale = 1.0 / torch.as_tensor(num_items_in_batch, device=kept.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                # num_items_in_batch counts all processes, and their gradients are averaged.
                scale = scale * self.accelerator.num_processes
        teacher = self._teacher_states(inputs, kept) if self.objective.needs_teacher else None
        head = self._loss_head(self.accelerator.unwrap_model(model))
        value = head.loss(lambda: model(**inputs), kept, targets, self.objective, teacher=teacher, scale=scale)
        loss = value.loss
        for name, term in value.terms.items():
            self._terms[f"loss/{name}"].append(term)
        self._num_labels.append(targets.numel())
        if self.learning is not None:
            penalty = self.learning.penalty()
            self._penalties.append(penalty.detach())
            loss = touch_unused_parameter(model, loss + penalty / self.current_gradient_accumulation_steps)
        return (loss, value.outputs) if return_outputs else loss

    def _evaluation_loss(
        self, model: nn.Module, inputs: dict[str, Any], kept: Tensor, targets: Tensor, return_outputs: bool
    ) -> Any:
        """Mean cross-entropy of the batch; logits are kept only where the caller of `evaluate` gets them."""
        if return_outputs and not self.args.prediction_loss_only:
            outputs = model(**inputs)
            return language_modeling_loss(outputs.logits[kept], targets) / max(targets.numel(), 1), outputs
        objective = replace(self.objective, lm=1.0, kl=0.0, hidden=0.0)
        head = self._loss_head(self.accelerator.unwrap_model(model))
        scale = 1.0 if self._slices is not None else 1.0 / max(targets.numel(), 1)
        value = head.loss(lambda: model(**inputs), kept, targets, objective, scale=scale)
        loss = value.loss if self._slices is None else mean_loss(value.loss, targets.numel(), self._slices)
        return (loss, value.outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, Any], kept: Tensor) -> TeacherStates:
        """The dense model's final hidden states at the label tokens, without dropout."""
        if self.teacher is not None:
            teacher, head = self.teacher, self._loss_head(self.teacher)
            return TeacherStates(states=head.final_states(lambda: teacher(**inputs), kept), project=head.module)
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        try:
            # An adapter that trains is none of the base model's; a frozen one is.
            base = adapters_disabled(model) if self._weights_train else nullcontext()
            # On GPUs our kernels compute dense heads faster than torch's first choice, packed rows above all.
            attention = dense_heads if self.args.device.type == "cuda" else dense
            with attention(model), base:
                states = self._loss_head(model).final_states(lambda: model(**inputs), kept)
            return TeacherStates(states=states, project=base_output_embedding(model) if self._weights_train else None)
        finally:
            model.train()

    def _loss_head(self, model: PreTrainedModel) -> LossHead:
        module: nn.Module = model.get_output_embeddings()
        if module not in self._heads:
            self._heads[module] = LossHead(model)
        return self._heads[module]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.learning is not None:
            gates = torch.cat([parameter.detach().flatten() for parameter in self.learning.parameters()])
            if not bool(gates.isfinite().all()):
                what = f"gates or multipliers are not finite in step {self.state.global_step}"
                raise TrainingDiverged(self._advice(what))
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(self._advice(f"the loss is {loss.item()} in step {self.state.global_step}"))
        for throughput in self._throughput:
            throughput.count(args[1] if len(args) > 1 else kwargs["inputs"])
        return loss

    @property
    def _throughput(self) -> list[ThroughputCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, ThroughputCallback)]

    def _advice(self, what: str) -> str:
        good = last_complete_checkpoint(self._run_folder)
        return f"{what}; last good checkpoint: {good or 'none yet'}. Lower the learning rates and start again"

    # ---- optimization ----

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            if self.engine.is_deepspeed and not self._weights_train:
                add_unused_parameter(target)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = cls(parameter_groups(target, weight_decay=self.args.weight_decay), **kwargs)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> DataLoader[Any]:
        model = self.accelerator.unwrap_model(self.model)
        if self._sp_by_deepspeed > 1 and not is_sequence_parallel(model):
            stage = int(self.engine.name.removeprefix("zero")) if self.engine.is_deepspeed else 0
            enable_deepspeed_sequence_parallel(model, self._sp_by_deepspeed, stage)
        if is_sequence_parallel(model) and not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=false would average over slices of rows, which hold unequal shares of "
                "their labels; leave it out under sequence parallelism"
            )
        group = get_sequence_group(model)
        if group is None:
            return super().get_train_dataloader()
        if self.teacher is not None and not is_sequence_parallel(self.teacher):
            raise ValueError(
                "the teacher would see slices of the rows; call enable_sequence_parallel(teacher, group) as well"
            )
        return train_dataloader(self, group)

    @property
    def _sp_by_deepspeed(self) -> int:
        config = getattr(self.accelerator, "parallelism_config", None)
        return 1 if config is None or config.sp_backend != "deepspeed" else int(config.sp_size)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if batch_samples and "shift_labels" in batch_samples[0] and "labels" not in batch_samples[0]:
            return count_shifted_labels(self, batch_samples, device)
        found: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
        return found

    # ---- evaluation and logs ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        if self.learning is not None:
            set_head_masks(model, self.learning.head_masks())
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.judge is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            with sequence_parallel_disabled(model):
                judged = {f"{prefix}_{name}": value for name, value in self.judge(model).items()}
            self.log(judged)
            metrics.update(judged)
        return metrics

    def _take_terms(self) -> dict[str, float]:
        """Each term per label token of all ranks, which may hold unequal shares of them, and the penalty."""
        found = {}
        if self._num_labels:
            sums = [torch.stack(values).double().sum() for values in self._terms.values()]
            counted = torch.stack([*sums, torch.tensor(sum(self._num_labels), device=sums[0].device).double()])
            *totals, count = self.accelerator.reduce(counted, reduction="sum").tolist()
            found = {name: total / max(count, 1) for name, total in zip(self._terms, totals, strict=True)}
        if self._penalties:
            found["loss/penalty"] = torch.stack(self._penalties).mean().item()
        self._terms.clear()
        self._num_labels.clear()
        self._penalties.clear()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._take_terms())
            if self._mask_callback is not None:
                logs.update(self._mask_callback.metrics)
        super().log(logs, start_time)
        for throughput in self._throughput:
            # A row of its own: those of the losses are the same, bit for bit, in a run that was killed and resumed.
            if figures := throughput.take_figures():
                super().log(figures)

    # ---- checkpoints ----

    def _check_finite(self, model: nn.Module) -> None:
        trained: list[Tensor] = [*weight_parameters(model)]
        trained += [] if self.learning is None else self.learning.parameters()
        if not all_finite(trained):
            raise TrainingDiverged(self._advice(f"weights or gates are not finite after step {self.state.global_step}"))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        model: Any = self.model
        self._check_finite(model)  # the last step has no loss after it, and perhaps no checkpoint
        return super()._finalize_training(*args, **kwargs)

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = self._run_folder / f"checkpoint-{self.state.global_step}"
        self._check_finite(model)
        if self.args.should_save and checkpoint.exists():
            shutil.rmtree(checkpoint)  # a killed run left it, perhaps one of other processes
        self.accelerator.wait_for_everyone()
        # Old checkpoints go only after the new one is marked, so the base class must not remove any.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with saving(checkpoint):
                record_engine(self.engine, checkpoint)
                mark_complete(checkpoint)
            remove_old_checkpoints(self._run_folder, keep)
