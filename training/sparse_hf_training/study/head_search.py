"""Is there any choice of heads that keeps recall? Every set of full heads of a size that holds given heads, judged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.figures import Figure
from sparse_hf.patching import dense, get_handle, set_head_masks
from sparse_hf_training.evaluation import evaluate_recall
from sparse_hf_training.tasks import Filler, RecallTask, task_label

Head = tuple[int, int]
"""Layer and KV head."""
Shares = Mapping[str, float]
"""Exact match by task."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One set of full heads.

    Args:
        full: the heads.
        shares: what the model answers with them.
        change: of the task that falls furthest below dense on the same samples.
    """

    full: tuple[Head, ...]
    shares: Shares
    change: float


@dataclass(frozen=True, kw_only=True)
class HeadSearch:
    """What sets of heads are judged on.

    Args:
        model: sparsified.
        tokenizer: of the model.
        tasks: recall tasks.
        filler: held text to hide facts in.
        seq_len: tokens of a sample.
        batch_size: samples of a forward pass.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[RecallTask]
    filler: Filler
    seq_len: int
    batch_size: int

    def sets(self, num_full: int, always: Sequence[Head] = ()) -> list[tuple[Head, ...]]:
        """All sets of so many full heads that hold those of `always`.

        Raises:
            ValueError: if `always` holds more, or heads that the model does not have.
        """
        layers, heads = get_handle(self.model).head_masks.shape
        every = list(itertools.product(range(layers), range(heads)))
        if unknown := [head for head in always if head not in every]:
            raise ValueError(f"the model has {layers} layers of {heads} KV heads, not the heads {unknown}")
        if not len(set(always)) <= num_full <= len(every):
            raise ValueError(f"expected {len(set(always))} to {len(every)} full heads, got {num_full}")
        others = [head for head in every if head not in always]
        return [(*always, *chosen) for chosen in itertools.combinations(others, num_full - len(always))]

    def dense(self, num_samples: int, seed: int) -> Shares:
        """What the dense model answers."""
        with dense(self.model):
            return self._shares(num_samples, seed)

    def judge(self, full: tuple[Head, ...], reference: Shares, num_samples: int, seed: int) -> Judged:
        """One set beside what dense answers on the same samples."""
        masks = torch.zeros_like(get_handle(self.model).head_masks)
        for head in full:
            masks[head] = 1
        set_head_masks(self.model, masks)
        shares = self._shares(num_samples, seed)
        return Judged(full=full, shares=shares, change=min(shares[task] - reference[task] for task in shares))

    def best(
        self,
        sets: Sequence[tuple[Head, ...]],
        *,
        screen: int,
        final: int,
        finalists: int,
        progress: Callable[[Judged], None] = lambda judged: None,
    ) -> tuple[Judged, Judged, Shares]:
        """The best set of the finalists, what led when all had been screened, and what dense answers in the final.

        Finalists are judged on other samples than those that chose them, or the best would only be the luckiest.
        """
        reference = self.dense(screen, 0)
        screened = []
        for full in sets:
            screened.append(self.judge(full, reference, screen, 0))
            progress(max(screened, key=_rank))
        screened.sort(key=_rank, reverse=True)
        reference = self.dense(final, 1)
        judged = [self.judge(each.full, reference, final, 1) for each in screened[:finalists]]
        return max(judged, key=_rank), screened[0], reference

    def _shares(self, num_samples: int, seed: int) -> Shares:
        results = evaluate_recall(
            self.model,
            self.tasks,
            self.filler,
            self.tokenizer,
            seq_len=self.seq_len,
            num_samples=num_samples,
            seed=seed,
            batch_size=self.batch_size,
        )
        labels = map(task_label, self.tasks)
        return {label: result.exact_match for label, result in zip(labels, results, strict=True)}


def _rank(judged: Judged) -> tuple[float, float]:
    """By the worst task; then by all of them."""
    return judged.change, sum(judged.shares.values())


def search_figures(
    best: Judged, first: Judged, reference: Shares, *, num_heads: int, num_sets: int, screen: int, final: int
) -> list[Figure]:
    """The best set beside dense, and what the first one reached on the samples that chose it."""
    where = ", ".join(f"{layer}.{head}" for layer, head in sorted(best.full))
    about = f"{1 - len(best.full) / num_heads:.1%} of KV heads sparse, best of {num_sets} sets of full heads"
    figures = []
    for task, share in best.shares.items():
        case = f"recall {task}, {about}"
        figures += [
            Figure(
                case=f"{case}, {final} samples ({where})",
                value=share,
                unit="share",
                lower_is_better=False,
                baseline=reference[task],
            ),
            Figure(
                case=f"{case}, {screen} samples that chose it",
                value=first.shares[task],
                unit="share",
                lower_is_better=False,
            ),
        ]
    if len(best.shares) > 1:
        case = f"worst task, change, {about}, {final} samples ({where})"
        figures.append(Figure(case=case, value=best.change, unit="share", lower_is_better=False, baseline=0.0))
    return figures
