"""Progress of a training run, with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.progress import progress_bar

SHOWN = {
    "loss/kl": "kl {:.3f}",
    "loss/lm": "lm {:.3f}",
    "sparsity/target": "target {:.0%}",
    "sparsity/expected": "expected {:.0%}",
}


class RichProgressCallback(TrainerCallback):
    """A bar over the optimizer steps with the latest logged figures; the main process alone shows it."""

    def __init__(self, console: Console, description: str) -> None:
        self.console, self.description = console, description
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._progress = progress_bar(self.console)
            self._task = self._progress.add_task(
                self.description, total=state.max_steps, completed=state.global_step, figures=""
            )
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = [text.format(logs[name]) for name, text in SHOWN.items() if logs and name in logs]
        if self._progress is not None and figures:
            self._progress.update(self._task, figures=", ".join(figures))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar down, also after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
