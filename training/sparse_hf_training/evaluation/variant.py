"""What is measured of one variant of a model, dense or under some head masks: tasks, losses, footprint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparse_hf_training.evaluation.footprint import Footprint
from sparse_hf_training.evaluation.losses import TextLoss


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """One cell: a task, sample by sample.

    Args:
        task: its label.
        exact: whether each sample was answered word for word.
        depths: where the first fact of each sample begins, as a share of the context.
        answer_losses: nats per answer token of the first samples, given the text before.
        seconds: how long it took.
        num_checked: samples that were answered by `generate` too, where a forward pass answered them all.
        num_differing: those of them whose outcome was another.
    """

    task: str
    exact: tuple[bool, ...]
    depths: tuple[float, ...]
    answer_losses: tuple[float, ...]
    seconds: float
    num_checked: int = 0
    num_differing: int = 0

    @property
    def num_exact(self) -> int:
        return sum(self.exact)

    @property
    def share(self) -> float:
        return self.num_exact / len(self.exact)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskOutcome:
        lists = ("exact", "depths", "answer_losses")
        return cls(**{**values, **{name: tuple(values[name]) for name in lists}})


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """All cells of one variant."""

    name: str
    tasks: tuple[TaskOutcome, ...]
    text: TextLoss
    footprint: Footprint

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tasks": [task.to_dict() for task in self.tasks],
            "text": self.text.to_dict(),
            "footprint": self.footprint.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VariantResult:
        return cls(
            name=values["name"],
            tasks=tuple(TaskOutcome.from_dict(task) for task in values["tasks"]),
            text=TextLoss.from_dict(values["text"]),
            footprint=Footprint.from_dict(values["footprint"]),
        )
