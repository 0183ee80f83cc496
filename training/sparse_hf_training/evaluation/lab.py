"""`Lab`: one measurement of a model for dense and every sparse variant, cell by cell, on the same samples and rows."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.patching import dense, get_handle
from sparse_hf.retention import retention_groups
from sparse_hf_training.data import Row
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.footprint import Footprint, measure_footprint
from sparse_hf_training.evaluation.generation import exact_by_generation
from sparse_hf_training.evaluation.losses import TextLoss, answer_losses, text_loss
from sparse_hf_training.evaluation.recall import answered, recall_samples
from sparse_hf_training.evaluation.variant import TaskOutcome, VariantResult
from sparse_hf_training.objectives import LossHead
from sparse_hf_training.tasks import Filler, RecallSample, RecallTask, task_label

DENSE = "dense"
MIN_CONTEXT = 8
"""In contexts shorter than so many times sinks and window, sparse heads read most of what dense ones do."""
TEXT_CELL, FOOTPRINT_CELL = "text loss", "footprint"

Answers = Literal["generate", "forward"]

Progress = Callable[[str, int], None]
"""Called with what is measured and how many units of `Lab.steps` were done."""


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What models are measured on.

    Args:
        tokenizer: of the model.
        tasks: recall tasks.
        filler: held text to hide facts in.
        rows: packed held text of `seq_len` tokens a row.
        seq_len: tokens of each sample and row.
        num_samples: of each task.
        num_rows: rows for the loss.
        num_loss_samples: samples of each task whose answers' loss is taken.
        seed: of the samples.
        batch_size: samples that are answered side by side. It changes no outcome.
        chunk: tokens per forward pass of a prefill; None for all at once.
        num_decoded: tokens that are decoded to measure the footprint, the last of `seq_len`.
        answers: `generate` writes them from the cache; `forward` takes the first choices of one pass over the whole
            sample, in a fraction of the time. They are the same where what a token reads depends on its position
            alone, as with windows: last rows of a prefill (triangle) and dynamic methods read otherwise in one pass.
        num_checked: samples of each task that `generate` answers too, under `forward`: see `TaskOutcome`.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[RecallTask]
    filler: Filler = field(repr=False)
    rows: Dataset[Row] = field(repr=False)
    seq_len: int
    num_samples: int = 200
    num_rows: int = 16
    num_loss_samples: int = 50
    seed: int = 1234
    batch_size: int = 1
    chunk: int | None = None
    num_decoded: int = 32
    answers: Answers = "generate"
    num_checked: int = 20
    _samples: dict[str, list[RecallSample]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.answers not in get_args(Answers):
            raise ValueError(f"answers must be one of {list(get_args(Answers))}, got {self.answers!r}")
        for name in ("num_samples", "num_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        labels = [task_label(task) for task in self.tasks]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"tasks must be one or more, all different, got {labels}")
        if len(self.rows) == 0:  # type: ignore[arg-type]
            raise ValueError(f"the text holds no row of {self.seq_len} tokens; give more text or a shorter --seq-len")

    @property
    def steps(self) -> int:
        """Units of progress of one variant."""
        return len(self.tasks) * (self.num_samples + self._num_losses) + self._rows + 1

    @property
    def _num_losses(self) -> int:
        return min(self.num_loss_samples, self.num_samples)

    @property
    def _rows(self) -> int:
        return min(self.num_rows, len(self.rows))  # type: ignore[arg-type]

    def settings(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the cells of a model depend on besides the head masks: JSON-plain."""
        text = hashlib.sha256(self.filler.tokens.tobytes()).hexdigest()[:16]
        names = ("seq_len", "num_samples", "num_loss_samples", "seed", "chunk", "num_decoded", "answers")
        measured = {name: getattr(self, name) for name in names}
        return {
            "weights": weight_digest(model),
            "text": text,
            "dtype": str(model.dtype),
            "num_rows": self._rows,
            **measured,
        }

    def measure(
        self, model: PreTrainedModel, variant: str, store: CellStore, progress: Progress = lambda what, done: None
    ) -> VariantResult:
        """All cells of a variant, from the store or measured now.

        Args:
            model: sparsified; `DENSE` measures it with the attention it came with.
            variant: its name in the store: `DENSE`, or any other for the model as it is.
            store: where cells are kept.
            progress: called as it goes.

        Raises:
            ValueError: if a task does not fit into `seq_len`.
        """
        was_training = model.training
        model.eval()
        try:
            with dense(model) if variant == DENSE else nullcontext():
                tasks = [self._task(model, variant, task, store, progress) for task in self.tasks]
                text = store.get(variant, TEXT_CELL, lambda: self._text(model).to_dict())
                progress(TEXT_CELL, self._rows)
                footprint = store.get(variant, FOOTPRINT_CELL, lambda: self._footprint(model).to_dict())
                progress(FOOTPRINT_CELL, 1)
        finally:
            model.train(was_training)
        return VariantResult(
            name=variant,
            tasks=tuple(tasks),
            text=TextLoss.from_dict(text),
            footprint=Footprint.from_dict(footprint),
        )

    def complete(self, variant: str, store: CellStore) -> bool:
        """Whether `measure` would find every cell in the store."""
        names = [*(task_label(task) for task in self.tasks), TEXT_CELL, FOOTPRINT_CELL]
        return all(store.has(variant, name) for name in names)

    def _task(
        self, model: PreTrainedModel, variant: str, task: RecallTask, store: CellStore, progress: Progress
    ) -> TaskOutcome:
        label = task_label(task)
        if store.has(variant, label):
            progress(label, self.num_samples + self._num_losses)

        def measure() -> dict[str, Any]:
            start = time.monotonic()
            samples = self._all_samples(task)
            exact = dict[int, bool]()
            written = self._generated if self.answers == "generate" else self._by_forward
            for number, right in written(model, task, samples):
                exact[number] = right
                progress(label, 1)
            checked = samples[: self.num_checked] if self.answers == "forward" else []
            again = dict(self._generated(model, task, checked)) if checked else {}
            losses = list[float]()
            for loss in answer_losses(model, LossHead(model), samples[: self._num_losses], self.batch_size):
                losses.append(loss)
                progress(label, 1)
            return TaskOutcome(
                task=label,
                exact=tuple(exact[n] for n in range(len(samples))),
                depths=tuple(sample.depths[0] for sample in samples),
                answer_losses=tuple(losses),
                seconds=time.monotonic() - start,
                num_checked=len(again),
                num_differing=sum(exact[number] != right for number, right in again.items()),
            ).to_dict()

        return TaskOutcome.from_dict(store.get(variant, label, measure))

    def _all_samples(self, task: RecallTask) -> list[RecallSample]:
        """Made once for all variants: with some tasks that takes longer than answering them."""
        label = task_label(task)
        if label not in self._samples:
            made = recall_samples(task, self.filler, self.tokenizer, self.seq_len, self.num_samples, self.seed)
            self._samples[label] = made
        return self._samples[label]

    def _generated(
        self, model: PreTrainedModel, task: RecallTask, samples: Sequence[RecallSample]
    ) -> Iterator[tuple[int, bool]]:
        return exact_by_generation(
            model, samples, context_first=task.context_first, chunk=self.chunk, batch_size=self.batch_size
        )

    def _by_forward(
        self, model: PreTrainedModel, task: RecallTask, samples: Sequence[RecallSample]
    ) -> Iterator[tuple[int, bool]]:
        for first in range(0, len(samples), self.batch_size):
            yield from enumerate(answered(model, samples[first : first + self.batch_size]), first)

    def _text(self, model: PreTrainedModel) -> TextLoss:
        # At even distances, so that all of the text has its share.
        count = len(self.rows)  # type: ignore[arg-type]
        chosen = [self.rows[n * count // self._rows] for n in range(self._rows)]
        return text_loss(model, chosen, self.seq_len)

    def _footprint(self, model: PreTrainedModel) -> Footprint:
        num_read = max(1, self.seq_len - self.num_decoded)  # a model's context may end at seq_len
        ids = torch.as_tensor(self.filler.tokens[:num_read]).long()[None].to(model.device)
        chunk = self.chunk or max(1, min(512, self.seq_len // 8))
        return measure_footprint(model, ids, chunk=chunk, num_decoded=self.num_decoded, prefill_chunk=self.chunk)


@torch.no_grad()
def weight_digest(model: PreTrainedModel) -> str:
    """Tells weights apart, adapters included: each parameter's norm and mean, rounded so that devices agree."""
    parts = []
    for name, parameter in model.named_parameters():
        total = parameter.sum(dtype=torch.float64).item()
        norm = torch.linalg.vector_norm(parameter, dtype=torch.float64).item() if parameter.is_floating_point() else 1.0
        parts.append(f"{name} {norm:.5e} {total / max(norm, 1e-30):.4f}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def check_length(model: PreTrainedModel, seq_len: int, *, strict: bool = False) -> int:
    """Warns where the context is too short for its sparse heads to be told from dense ones.

    Returns:
        The longest sinks and window of the heads that free keys, 0 if none does.

    Raises:
        ValueError: in place of the warning, with `strict`.
    """
    reaches = [
        retention.num_sink_tokens + retention.recent + 1
        for state in get_handle(model).states
        for retention, _ in retention_groups(state.layout)
        if retention.recent is not None and retention.recent + 1 < state.layout.max_distance
    ]
    reach = max(reaches, default=0)
    if seq_len < MIN_CONTEXT * reach:
        text = (
            f"{seq_len} tokens are less than {MIN_CONTEXT} times sinks and window ({MIN_CONTEXT * reach}): sparse "
            "heads read most of what dense ones do, and scores say little; raise --seq-len"
        )
        if strict:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)
    return reach
