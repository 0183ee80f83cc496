"""Mask learning inside any trainer that follows transformers' callbacks (Trainer, TRL's SFTTrainer, ...)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf_training.checkpoint import PREFIX, load_mask_state, save_mask_state
from sparse_hf_training.masks import MaskLearning
from sparse_hf_training.optimizer import MaskOptimizer

logger = logging.getLogger(__name__)


def refuse_fp16(args: TrainingArguments) -> None:
    """Raises ValueError for arguments under which gates would get scaled gradients."""
    if args.fp16:
        raise ValueError("fp16 scales the loss, and gates are not unscaled; set trainer.bf16=true instead of fp16")


class MaskStepCallback(TrainerCallback):
    """Steps the gates beside the trainer's own optimizer, in the same way under every engine; keeps the metrics."""

    def __init__(self, learning: MaskLearning) -> None:
        self.learning = learning
        self.optimizer = MaskOptimizer(learning)
        self.metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_fp16(args)
        self.learning.to(args.device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.learning.begin_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.metrics = self.learning.metrics()
        self.optimizer.reduce_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.optimizer.step()
        self.learning.after_step()


class MaskLearningCallback(MaskStepCallback):
    """For trainers other than `SparseTrainer`, whatever loss they compute: also gives the gates the penalty's gradient.

        learning = attach_mask_learning(model, MaskLearningConfig(...))
        trainer = SFTTrainer(model, ...)
        MaskLearningCallback(learning).add_to(trainer)

    The penalty depends on gates and multipliers alone, which no engine holds: its gradient is added once per optimizer
    step, and its value is logged as `loss/penalty` beside the trainer's own `loss`. Gates and multipliers are saved in
    each checkpoint and read back from the one that the trainer resumes from.

    `add_to` puts it before wandb's, tensorboard's and other trackers' callbacks, which send each row as they find it.
    With `callbacks=[MaskLearningCallback(learning)]` it stands after them, and they miss what it logs.

    Raises:
        ValueError: in the first step, if the trainer's loss gives the gates no gradient; at the start of a resumed run,
            if its checkpoint holds no gates.
    """

    def __init__(self, learning: MaskLearning) -> None:
        super().__init__(learning)
        self._before_trackers = False

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a trainer, or moves it to its place."""
        callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._before_trackers = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if args.report_to and not self._before_trackers and state.is_world_process_zero:
            logger.warning(
                "the masks' figures are in log_history, but %s will miss them: call "
                "MaskLearningCallback(learning).add_to(trainer) instead of passing it in `callbacks`",
                ", ".join(args.report_to),
            )
        if state.global_step:
            folder = _checkpoint(args, state)
            load_mask_state(self.learning, folder)
            self.optimizer.load(folder)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if all(parameter.grad is None for parameter in self.learning.gates.parameters()):
            raise ValueError(
                "the loss gave the gates no gradient: the model that trains is not the one that has them, its loss "
                "does not come from its outputs, or checkpointing is reentrant "
                "(set gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        penalty = self.learning.penalty()
        penalty.backward()
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.metrics["loss/penalty"] = penalty.item()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            save_mask_state(self.learning, _checkpoint(args, state))
            self.optimizer.save(_checkpoint(args, state))

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


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX}{state.global_step}"
