"""What a run shows while it works: lines in a log file, a bar in a terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from sparse_hf_training.config import RunConfig
from sparse_hf_training.progress import RichProgressCallback, doing
from sparse_hf_training.run import run_training
from sparse_hf_training.typed_config import build


def test_log_file_says_what_is_done_in_order(run_values: Callable[..., dict[str, Any]]) -> None:
    text = io.StringIO()
    values = run_values(trainer={"eval_strategy": "steps", "eval_steps": 2})
    run_training(build(RunConfig, values), console=Console(file=text, width=400))
    lines = text.getvalue().splitlines()
    steps = [line for line in lines if ": step " in line]
    assert [line.split(",")[0] for line in steps] == [f"training (masks): step {n}/4" for n in (1, 2, 3, 4)]
    for part in ("loss ", "kl ", "target 50%", "expected ", " tokens/s"):
        assert part in steps[-1], steps[-1]
    told = [line for line in lines if " rows" in line]
    assert "documents" in told[0] and told[1].startswith("recall: "), "what became of the data"
    others = [line for line in lines if ": step " not in line and line not in told]
    in_loop = ["judging", "judging recall", "saving"]
    assert others == [
        "loading the model",
        "loading data",
        "engine: one process, cpu",
        "judging the dense model",
        "training (masks): 4 steps",
        *in_loop,
        *in_loop,
        "judging sparse heads",
    ]


def test_resumed_run_says_where_it_goes_on(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = run_values(evaluation={})
    run_training(build(RunConfig, values), console=Console(quiet=True))
    (tmp_path / "run" / "checkpoint-4" / "complete.json").unlink()
    text = io.StringIO()
    run_training(build(RunConfig, values), console=Console(file=text))
    assert "training (masks): 4 steps, from step 2 on" in text.getvalue()


def callback(console: Console, tmp_path: Path, main: bool = True) -> tuple[RichProgressCallback, tuple[Any, ...]]:
    shown = RichProgressCallback(console, "training (sft)")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    events = (args, TrainerState(max_steps=10, global_step=0, is_world_process_zero=main), TrainerControl())
    shown.on_train_begin(*events)
    return shown, events


def test_bar_in_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    shown, (args, state, control) = callback(Console(file=text, force_terminal=True, width=200), tmp_path)

    def screen() -> str:
        assert shown._progress is not None
        shown._progress.refresh()
        return text.getvalue().splitlines()[-1]

    state.global_step = 3
    shown.on_step_end(args, state, control)
    assert "training (sft)" in screen() and "3/10" in screen()
    shown.on_log(args, state, control, logs={"loss": 1.2345, "grad_norm": 3.0})
    shown.on_log(args, state, control, logs={"throughput/tokens_per_second": 98765.4})
    # The figures of the two rows of one step stand side by side.
    assert "loss 1.234, 98,765 tokens/s" in screen()
    control.should_save = True
    shown.on_step_end(args, state, control)
    assert "saving" in screen() and "training" not in screen()
    with pytest.raises(ValueError), shown.during("judging recall"):
        assert "judging recall" in screen()
        raise ValueError
    assert "saving" in screen()
    shown.on_step_begin(args, state, control)
    assert "training (sft)" in screen()
    shown.stop()
    shown.stop()
    assert shown._progress is None


def test_other_processes_show_nothing(tmp_path: Path) -> None:
    text = io.StringIO()
    for terminal in (False, True):
        shown, (args, state, control) = callback(Console(file=text, force_terminal=terminal), tmp_path, main=False)
        control.should_save = True
        shown.on_step_end(args, state, control)
        shown.on_log(args, state, control, logs={"loss": 1.0, "throughput/tokens_per_second": 1.0})
        shown.on_train_end(args, state, control)
    assert text.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_doing_tells_and_lets_errors_through(terminal: bool) -> None:
    text = io.StringIO()
    with pytest.raises(ValueError, match="x"), doing(Console(file=text, force_terminal=terminal), "loading data"):
        raise ValueError("x")
    assert "loading data" in text.getvalue()
