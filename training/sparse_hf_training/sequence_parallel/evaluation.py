"""Evaluation over slices, as a base of `SparseTrainer`: the ranks of a group share its rows as they do in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from sparse_hf_training.sequence_parallel.collectives import all_gather
from sparse_hf_training.sequence_parallel.enable import get_sequence_group, sequence_parallel_disabled
from sparse_hf_training.sequence_parallel.groups import SequenceGroup
from sparse_hf_training.sequence_parallel.loading import eval_dataloader


class SlicedEvaluation(Trainer):
    """Losses of an evaluation come from slices where the model's rows are shared; figures of whole rows do not."""

    _slices: SequenceGroup | None = None
    """The ranks that share rows, while an evaluation runs over slices."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        # Predictions are of whole rows; and DeepSpeed, which has no such group, exchanges in training alone.
        group = None if self.compute_metrics is not None else get_sequence_group(model)
        with sequence_parallel_disabled(model) if group is None else self._sliced(group):
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        with sequence_parallel_disabled(self.accelerator.unwrap_model(self.model)):
            return super().predict(*args, **kwargs)

    @contextmanager
    def _sliced(self, group: SequenceGroup) -> Iterator[None]:
        before = self._slices, self.gather_function
        self._slices, self.gather_function = group, rows_of_groups(self, group)
        try:
            yield
        finally:
            self._slices, self.gather_function = before

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        if self._slices is None:
            return super().get_eval_dataloader(eval_dataset)
        several: Any = self.eval_dataset
        found: Any = several if eval_dataset is None else eval_dataset
        found = several[found] if isinstance(found, str) else found
        if found is None:
            raise ValueError("evaluation needs an eval_dataset")
        return eval_dataloader(self, self._slices, found)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if self._slices is None:
            found: tuple[Tensor | None, Any, Any] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            return found
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None


def mean_loss(total: Tensor, num_labels: int, group: SequenceGroup) -> Tensor:
    """Loss per label token of whole rows, the same on all ranks of the group.

    Args:
        total: scalar, the sum over the labels of this rank's slices.
        num_labels: those labels.
        group: the ranks that share the rows.
    """
    own = torch.stack([total.double(), total.new_tensor(num_labels).double()])
    loss, count = all_gather(own, group.size, group.name).sum(0)
    return (loss / count.clamp(min=1)).to(total.dtype)


def rows_of_groups(trainer: Trainer, group: SequenceGroup) -> Callable[[Tensor], Tensor]:
    """What gathers one value per row of an evaluation, `[rows]` of each rank, in the order of the rows.

    accelerate's own would take each row as often as a group has ranks, and where the last batch was filled up it would
    drop the wrong ones.
    """
    accelerator = trainer.accelerator

    def gather(values: Tensor) -> Tensor:
        every: Tensor = accelerator.gather(values)
        rows = every.unflatten(0, (group.data_size, group.size, -1))[:, 0].flatten()
        last, remainder = accelerator.gradient_state.end_of_dataloader, accelerator.gradient_state.remainder
        return rows[:remainder] if last and remainder > 0 else rows

    return gather
