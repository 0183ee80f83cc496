"""One judge for all masks of a model: the same samples, the same text, for dense, learned and random heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf_training.data import Row
from sparse_hf_training.evaluation.recall import RecallResult, evaluate_recall
from sparse_hf_training.evaluation.text_loss import evaluate_text_loss
from sparse_hf_training.tasks import Filler, RecallTask


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Figures of one model under one set of masks.

    Args:
        text_loss: nats per token on held text.
        recall: one result per task.
    """

    text_loss: float
    recall: tuple[RecallResult, ...]

    @property
    def worst(self) -> RecallResult:
        """The task with the lowest exact match."""
        return min(self.recall, key=lambda result: result.exact_match)

    def to_dict(self, *, with_samples: bool = False) -> dict[str, Any]:
        """JSON-plain; recall sample by sample on demand."""
        recall = [result.to_dict(with_samples=with_samples) for result in self.recall]
        return {"text_loss": self.text_loss, "recall": recall}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Judgement:
        recall = tuple(RecallResult.from_dict(result) for result in values["recall"])
        return cls(text_loss=values["text_loss"], recall=recall)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What models are judged on.

    Args:
        tokenizer: of the model.
        tasks: recall tasks.
        filler: held text to hide facts in.
        rows: packed held text.
        seq_len: tokens of each recall sample.
        num_samples: recall samples per task.
        num_rows: rows for the loss.
        seed: of the samples.
        batch_size: recall samples per forward pass. Rows for the loss, whose logits are all needed, come one by one.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[RecallTask]
    filler: Filler = field(repr=False)
    rows: Dataset[Row] = field(repr=False)
    seq_len: int
    num_samples: int
    num_rows: int
    seed: int = 0
    batch_size: int = 1

    @property
    def steps(self) -> int:
        """How often `progress` is called by a full judgement."""
        return len(self.tasks) * self.num_samples

    def recall(
        self, model: PreTrainedModel, num_samples: int | None = None, progress: Callable[[], None] | None = None
    ) -> tuple[RecallResult, ...]:
        """Exact match on each task, on the first `num_samples` samples."""
        results = evaluate_recall(
            model,
            self.tasks,
            self.filler,
            self.tokenizer,
            seq_len=self.seq_len,
            num_samples=num_samples or self.num_samples,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=progress,
        )
        return tuple(results)

    def __call__(
        self, model: PreTrainedModel, num_samples: int | None = None, progress: Callable[[], None] | None = None
    ) -> Judgement:
        """Loss and recall of the model as it is configured now."""
        return Judgement(
            text_loss=evaluate_text_loss(model, self.rows, num_rows=self.num_rows),
            recall=self.recall(model, num_samples, progress),
        )
