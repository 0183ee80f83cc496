"""What a recipe works on: one model, held open for many recipes, and its training and held text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from sparse_hf.config import SparseConfig
from sparse_hf.methods import Method
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf.sparsify import sparsify
from sparse_hf_training.data import MixedDataset, Row, ShuffledDataset, collate
from sparse_hf_training.data.sources import RecallDataset
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig, detach_mask_learning
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.stages import Stage, prepare_stage
from sparse_hf_training.tasks import Filler, RecallTask, task_label
from sparse_hf_training.trainer import SparseTrainer


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model under study and what recipes may use. Held text is none of it.

    Args:
        load: a fresh dense model on its device.
        tokenizer: of the model; None where tasks need none.
        branch: method of sparse heads.
        filler: training text to hide facts in.
        rows: packed training text, for recipes that read plain text.
        tasks: recall tasks to learn from.
        seq_len: tokens of a training row.
        batch_size: rows of a step.
        max_steps: optimizer steps of a recipe that learns.
        seed: of gates, noise and rows.
    """

    load: Callable[[], PreTrainedModel] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    branch: Method
    filler: Filler = field(repr=False)
    rows: Dataset[Row] = field(repr=False)
    tasks: Sequence[RecallTask]
    seq_len: int
    batch_size: int = 1
    max_steps: int = 120
    seed: int = 0

    def with_seed(self, seed: int) -> Bench:
        return replace(self, seed=seed)

    def settings(self, name: str) -> dict[str, Any]:
        """What training on it depends on besides the model, the text and the seed: JSON-plain, named after `name`."""
        return {
            **{f"{name}_{key}": getattr(self, key) for key in ("seq_len", "batch_size", "max_steps")},
            f"{name}_tasks": [task_label(task) for task in self.tasks],
        }

    def model(self) -> PreTrainedModel:
        """A fresh model whose heads are all full, and may be made sparse."""
        return sparsify(self.load(), SparseConfig(sparse=self.branch, head_masks="all_full"))

    def recall_rows(
        self, tasks: Sequence[RecallTask] | None = None, *, question_loss: bool = True, length: int | None = None
    ) -> Dataset[Row]:
        """Rows of recall samples with the loss on questions and answers, or on answers alone; enough for all steps
        unless their number is given."""
        return RecallDataset(
            tasks=tasks or self.tasks,
            filler=self.filler,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            seq_len=self.seq_len,
            seed=self.seed,
            length=length or self.max_steps * self.batch_size,
            question_loss=question_loss,
        )

    def text_rows(self, *, length: int | None = None) -> Dataset[Row]:
        """Rows of packed text, likewise."""
        return ShuffledDataset(self.rows, seed=self.seed, length=length or self.max_steps * self.batch_size)

    def mixed_rows(self, recall_share: float) -> Dataset[Row]:
        """Text, and that share of recall samples."""
        parts = [self.text_rows(), self.recall_rows()]
        ratios = [1 - recall_share, recall_share]
        return MixedDataset(parts, ratios, seed=self.seed, length=self.max_steps * self.batch_size)

    def train(
        self,
        model: PreTrainedModel,
        stage: Stage,
        rows: Dataset[Row],
        objective: ObjectiveConfig,
        masks: MaskLearningConfig | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        learning_rate: float = 1e-4,
        prepare: Callable[[MaskLearning], Sequence[TrainerCallback]] = lambda learning: (),
    ) -> Tensor | None:
        """Trains gates, weights or both in place; returns the gates' scores where there are any.

        Args:
            model: sparsified. Its head masks are all full again after gates trained.
            stage: what trains.
            rows: `max_steps * batch_size` of them.
            objective: the loss.
            masks: how gates are learned.
            teacher: of the objective, where the weights train.
            learning_rate: of the weights.
            prepare: called with the gates before training; callbacks that it returns run in it.
        """
        learning = prepare_stage(model, stage, masks or MaskLearningConfig())
        callbacks = [] if learning is None else list(prepare(learning))
        with tempfile.TemporaryDirectory() as folder:
            trainer = SparseTrainer(
                model,
                self._arguments(folder, learning_rate),
                train_dataset=rows,
                data_collator=partial(collate),
                objective=objective,
                teacher=teacher,
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model.eval()
        if learning is None:
            return None
        scores = learning.gates.scores()
        detach_mask_learning(model)
        set_head_masks(model, torch.ones_like(get_handle(model).head_masks))
        return scores

    def _arguments(self, folder: str, learning_rate: float) -> TrainingArguments:
        on_gpu = torch.cuda.is_available()
        values: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": self.max_steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, self.max_steps // 40),
            "adam_beta2": 0.95,
            "save_strategy": "no",
            "logging_steps": self.max_steps,
            "report_to": "none",
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
            "remove_unused_columns": False,
            "prediction_loss_only": True,
            "disable_tqdm": True,
            "seed": self.seed,
            "dataloader_pin_memory": on_gpu,
        }
        arguments = TrainingArguments(**values)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one GPU studies; torch.nn.DataParallel would copy the model without its gates
        return arguments
