"""Long-range recall tasks: synthetic questions whose answers lie far back in the text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sparse_hf_training.tasks.base import Question, RecallSample, RecallTask
from sparse_hf_training.tasks.chain import ChainTask
from sparse_hf_training.tasks.filler import Filler
from sparse_hf_training.tasks.key_value import KeyValueTask
from sparse_hf_training.tasks.needle import NeedleTask

_TASKS: dict[str, type[RecallTask]] = {task.name: task for task in (NeedleTask, KeyValueTask, ChainTask)}


def available_tasks() -> tuple[str, ...]:
    """The names `make_task` knows, sorted."""
    return tuple(sorted(_TASKS))


def make_task(name: str, **kwargs: Any) -> RecallTask:
    """The task called `name`, with its options as keywords.

    Raises:
        ValueError: unknown name, unknown option, or an option out of range.
    """
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(available_tasks())}")
    known = [field.name for field in fields(_TASKS[name])]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no option {', '.join(unknown)}; known options: {', '.join(known)}")
    return _TASKS[name](**kwargs)


__all__ = [
    "ChainTask",
    "Filler",
    "KeyValueTask",
    "NeedleTask",
    "Question",
    "RecallSample",
    "RecallTask",
    "available_tasks",
    "make_task",
]
