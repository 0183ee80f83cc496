"""Long-range recall tasks: synthetic questions whose answers lie far back in the text."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from sparse_hf_training.tasks.associative_recall import AssociativeRecallTask
from sparse_hf_training.tasks.base import Question, RecallSample, RecallTask
from sparse_hf_training.tasks.chain import ChainTask
from sparse_hf_training.tasks.common_words import CommonWordsTask
from sparse_hf_training.tasks.copy_span import CopySpanTask
from sparse_hf_training.tasks.filler import Filler
from sparse_hf_training.tasks.frequent_words import FrequentWordsTask
from sparse_hf_training.tasks.instruction import InstructionTask
from sparse_hf_training.tasks.key_value import KeyValueTask
from sparse_hf_training.tasks.needle import NeedleTask
from sparse_hf_training.tasks.needle_multi_key import MultiKeyNeedleTask
from sparse_hf_training.tasks.needle_multi_query import MultiQueryNeedleTask
from sparse_hf_training.tasks.needle_multi_value import MultiValueNeedleTask
from sparse_hf_training.tasks.needle_repetitive import RepetitiveNeedleTask
from sparse_hf_training.tasks.needle_single import SingleNeedleTask
from sparse_hf_training.tasks.two_turns import TwoTurnsTask
from sparse_hf_training.tasks.uuid_key_value import UuidKeyValueTask
from sparse_hf_training.tasks.variable_tracking import VariableTrackingTask
from sparse_hf_training.typed_config import convert

_CLASSES: tuple[type[RecallTask], ...] = (
    NeedleTask,
    KeyValueTask,
    ChainTask,
    RepetitiveNeedleTask,
    SingleNeedleTask,
    MultiKeyNeedleTask,
    UuidKeyValueTask,
    MultiValueNeedleTask,
    MultiQueryNeedleTask,
    VariableTrackingTask,
    CommonWordsTask,
    FrequentWordsTask,
    CopySpanTask,
    AssociativeRecallTask,
    TwoTurnsTask,
    InstructionTask,
)
_TASKS: dict[str, type[RecallTask]] = {task.name: task for task in _CLASSES}


def available_tasks() -> tuple[str, ...]:
    """The names `make_task` knows, sorted."""
    return tuple(sorted(_TASKS))


def make_task(name: str, **kwargs: Any) -> RecallTask:
    """The task called `name`, with its options as keywords.

    Raises:
        ValueError: unknown name, unknown option, or an option out of range or of another type.
    """
    if name not in available_tasks():
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(available_tasks())}")
    known = [field.name for field in fields(_TASKS[name])]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no option {', '.join(unknown)}; known options: {', '.join(known)}")
    hints = get_type_hints(_TASKS[name])
    values = {option: convert(hints[option], value, f"task {name!r}: {option}") for option, value in kwargs.items()}
    return _TASKS[name](**values)


def task_label(task: RecallTask) -> str:
    """The task's name, with the options that differ from their defaults: `vt(num_hops=8)`."""
    changed = [
        f"{field.name}={getattr(task, field.name)}"
        for field in fields(task)
        if field.default is MISSING or getattr(task, field.name) != field.default
    ]
    return f"{task.name}({', '.join(changed)})" if changed else task.name


__all__ = [
    "AssociativeRecallTask",
    "ChainTask",
    "CommonWordsTask",
    "CopySpanTask",
    "Filler",
    "FrequentWordsTask",
    "InstructionTask",
    "KeyValueTask",
    "MultiKeyNeedleTask",
    "MultiQueryNeedleTask",
    "MultiValueNeedleTask",
    "NeedleTask",
    "Question",
    "RecallSample",
    "RecallTask",
    "RepetitiveNeedleTask",
    "SingleNeedleTask",
    "TwoTurnsTask",
    "UuidKeyValueTask",
    "VariableTrackingTask",
    "available_tasks",
    "make_task",
    "task_label",
]
