"""Judging the dense model where every process holds a part of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.figures import replace_json
from sparse_hf.patching import dense
from sparse_hf_training.evaluation import Judge, Judgement
from sparse_hf_training.sequence_parallel import sequence_parallel_disabled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_NAME = "dense.json"


class JudgeDenseCallback(TrainerCallback):
    """Judges when the engine has the model ready, by all processes; keeps the outcome for a run that goes on later.

    Args:
        trainer: whose model is judged.
        judge: the same on all processes.
        file: where the judgement is kept; a resumed run, whose weights have moved, reads it.
    """

    def __init__(self, trainer: Trainer, judge: Judge, file: Path) -> None:
        self.trainer, self.judge, self.file = trainer, judge, file
        self.judgement: Judgement | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step and self.file.is_file():
            self.judgement = Judgement.from_dict(json.loads(self.file.read_text(encoding="utf-8")))
            return
        model: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        # Whole rows, each process its own, also where training shares them.
        with sequence_parallel_disabled(model), dense(model):
            self.judgement = self.judge(model)
        model.train(training)
        if args.should_save:
            replace_json(self.file, self.judgement.to_dict())
