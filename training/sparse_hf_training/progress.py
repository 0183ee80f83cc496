"""What a training run is doing, with rich: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.progress import progress_bar

SHOWN = {
    "loss": "loss {:.3f}",
    "loss/kl": "kl {:.3f}",
    "loss/lm": "lm {:.3f}",
    "sparsity/target": "target {:.0%}",
    "sparsity/expected": "expected {:.0%}",
    "throughput/tokens_per_second": "{:,.0f} tokens/s",
    "throughput/mfu": "MFU {:.0%}",
}


@contextmanager
def doing(console: Console, what: str) -> Iterator[None]:
    """Shows what is done while a block runs: a spinner in a terminal, a line elsewhere."""
    if not console.is_terminal:
        console.print(what, highlight=False, markup=False)
        yield
        return
    with console.status(what):
        yield


class WorkProgress:
    """A bar over work that is counted, for a `with` block; where the console is no terminal, each report is a line."""

    def __init__(self, console: Console, description: str, *, total: int, completed: int = 0) -> None:
        self.console, self.description = console, description
        self._bar = progress_bar(console)
        self._task = self._bar.add_task(description, total=total, completed=completed, figures="")

    def __enter__(self) -> WorkProgress:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        self._bar.advance(self._task, amount)

    def report(self, figures: str, *, completed: int) -> None:
        """The latest figures, and how much is done in all."""
        if self.console.is_terminal:
            self._bar.update(self._task, figures=figures, completed=completed)
        else:
            self.console.print(f"{self.description}: {figures}", highlight=False, markup=False, soft_wrap=True)


class RichProgressCallback(TrainerCallback):
    """A bar over the optimizer steps that says what is done and the latest figures; the main process alone shows it.

    Where the console is no terminal, each log is a line instead.
    """

    def __init__(self, console: Console, description: str) -> None:
        self.console, self.description = console, description
        self._progress: Progress | None = None
        self._figures: dict[str, float] = {}
        self._shows, self._saves, self._doing = False, False, description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._shows = state.is_world_process_zero
        if not self._shows:
            return
        if not self.console.is_terminal:
            begun = f", from step {state.global_step} on" if state.global_step else ""
            self._print(f"{self.description}: {state.max_steps} steps{begun}")
            return
        self._progress = progress_bar(self.console)
        self._task = self._progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, figures=""
        )
        self._progress.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._say(self.description)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)
        self._saves = control.should_save
        if control.should_evaluate:
            self._say("judging")
        elif self._saves:
            self._say("saving")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        new = {name: value for name, value in (logs or {}).items() if name in SHOWN}
        if not self._shows or not new:
            return
        self._figures |= new
        shown = ", ".join(text.format(self._figures[name]) for name, text in SHOWN.items() if name in self._figures)
        if self._progress is not None:
            self._progress.update(self._task, figures=shown)
        elif not self.console.is_terminal and "throughput/tokens_per_second" in new:
            self._print(f"{self.description}: step {state.global_step}/{state.max_steps}, {shown}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Shows what is done between two steps, such as a judgement, and then what follows."""
        self._say(what)
        try:
            yield
        finally:
            self._say("saving" if self._saves else self.description)

    def stop(self) -> None:
        """Takes the bar down, also after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._shows = False

    def _say(self, what: str) -> None:
        if what == self._doing:
            return
        self._doing = what
        if self._progress is not None:
            self._progress.update(self._task, description=what)
        elif self._shows and what != self.description:
            self._print(what)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
