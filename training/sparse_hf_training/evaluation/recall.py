"""Exact match on recall tasks.

A sample counts when every token of every answer is the model's first choice given what precedes it. That is exactly
when greedy decoding would write the answers, since all paths of a sparse model read the same keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf_training.tasks import Filler, RecallSample, RecallTask


@dataclass(frozen=True, kw_only=True)
class RecallResult:
    """One task's score.

    Args:
        task: its name.
        num_samples: judged.
        num_exact: samples answered word for word.
        seq_len: tokens of each sample.
        exact: sample by sample; None where the counts alone were kept.
    """

    task: str
    num_samples: int
    num_exact: int
    seq_len: int
    exact: tuple[bool, ...] | None = field(default=None, repr=False)

    @property
    def exact_match(self) -> float:
        return self.num_exact / self.num_samples

    def to_dict(self, *, with_samples: bool = False) -> dict[str, Any]:
        """JSON-plain; the outcomes sample by sample on demand."""
        values = {**asdict(self), "exact_match": self.exact_match}
        return values if with_samples else {name: value for name, value in values.items() if name != "exact"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecallResult:
        counts = {name: values[name] for name in ("task", "num_samples", "num_exact", "seq_len")}
        exact = values.get("exact")
        return cls(**counts, exact=None if exact is None else tuple(exact))


def recall_samples(
    task: RecallTask, filler: Filler, tokenizer: PreTrainedTokenizerBase, seq_len: int, count: int, seed: int
) -> list[RecallSample]:
    """`count` samples that depend on the task's name, the seed and their number alone."""
    return [
        task.sample(random.Random(f"{seed}:{task.name}:{number}"), filler, tokenizer, seq_len)
        for number in range(count)
    ]


@torch.no_grad()
def evaluate_recall(
    model: PreTrainedModel,
    tasks: Sequence[RecallTask],
    filler: Filler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 1,
    progress: Callable[[], None] | None = None,
) -> list[RecallResult]:
    """Exact match of the model, as it is configured now, on each task.

    Args:
        model: dense or sparse; it is judged in evaluation mode.
        tasks: what to ask.
        filler: text to hide the facts in; use text that was not trained on.
        tokenizer: the model's.
        seq_len: tokens of each sample.
        num_samples: of each task.
        seed: samples with the same seed are the same.
        batch_size: samples per forward pass.
        progress: called after each sample.

    Raises:
        ValueError: if `num_samples` is not positive or a task does not fit into `seq_len`.
    """
    if num_samples <= 0:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    was_training = model.training
    model.eval()
    try:
        results = []
        for task in tasks:
            exact: list[bool] = []
            samples = recall_samples(task, filler, tokenizer, seq_len, num_samples, seed)
            for start in range(0, num_samples, batch_size):
                batch = samples[start : start + batch_size]
                exact += answered(model, batch)
                if progress is not None:
                    for _ in batch:
                        progress()
            results.append(
                RecallResult(
                    task=task.name,
                    num_samples=num_samples,
                    num_exact=sum(exact),
                    seq_len=seq_len,
                    exact=tuple(exact),
                )
            )
        return results
    finally:
        model.train(was_training)


@torch.no_grad()
def answered(model: PreTrainedModel, samples: Sequence[RecallSample]) -> list[bool]:
    """Whether each of some samples of one length is answered word for word, by one forward pass over all of them."""
    ids = torch.tensor([sample.input_ids for sample in samples], device=model.device)
    # Logits are formed from just before the first answer on.
    first = min(start for sample in samples for start, _ in sample.answer_spans) - 1
    chosen = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits.argmax(-1)
    return [
        all(torch.equal(row[start - 1 - first : end - 1 - first], own[start:end]) for start, end in sample.answer_spans)
        for sample, row, own in zip(samples, chosen.cpu(), ids.cpu(), strict=True)
    ]
