"""Mask learning inside any trainer that follows transformers' callbacks (Trainer, TRL's SFTTrainer, ...)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf_training.masks import MaskLearning


class MaskStepCallback(TrainerCallback):
    """Tells the gates which step it is and bounds them after each update; keeps the step's metrics."""

    def __init__(self, learning: MaskLearning) -> None:
        self.learning = learning
        self.metrics: dict[str, float] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.learning.begin_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.metrics = self.learning.metrics()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.learning.after_step()


class MaskLearningCallback(MaskStepCallback):
    """For trainers other than `SparseTrainer`: also adds the penalty to the loss that the model returns.

    Use it with an optimizer over `parameter_groups(model)`:

        learning = attach_mask_learning(model, MaskLearningConfig(...))
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5)
        trainer = SFTTrainer(model, ..., optimizers=(optimizer, None), callbacks=[MaskLearningCallback(learning)])

    Raises:
        ValueError: in the first step, if the trainer does not use the model's own loss and the penalty is lost.
    """

    def __init__(self, learning: MaskLearning) -> None:
        super().__init__(learning)
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        def add_penalty(model: nn.Module, positional: Any, keywords: dict[str, Any], output: Any) -> Any:
            if not model.training or getattr(output, "loss", None) is None:
                return output
            scale = 1.0
            if keywords.get("num_items_in_batch") is not None:
                # The trainer then sums micro-batches and multiplies by the number of processes.
                scale /= args.gradient_accumulation_steps
                scale /= args.world_size if args.average_tokens_across_devices else 1
            output.loss = output.loss + scale * self.learning.penalty()
            return output

        self._hook = kwargs["model"].register_forward_hook(add_penalty, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self.learning.lagrangian.linear.grad is None:
            raise ValueError(
                "the sparsity penalty did not reach the loss: this trainer computes its own loss from the logits "
                "(label smoothing, compute_loss_func); use SparseTrainer, or add learning.penalty() to that loss"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self.metrics)
            if state.log_history:
                state.log_history[-1].update(self.metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
