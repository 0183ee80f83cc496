"""Which heads must stay full, by taking heads away: a quarter of those left at a time, in the end one by one.

Recursive feature elimination (Guyon et al. 2002, Gene Selection for Cancer Classification using Support Vector
Machines) with heads as features. A round asks of every head that is left what the loss is without it, and makes those
sparse that are missed least. Taking one head from the dense model asks less: of two heads that stand in for each other
neither is missed, and a head that works only with another counts while that one is still there. Heads that go in one
round are judged apart, so of them it asks no more than that. Every round reads as many rows as the others, but for
those that a mask needs at least, so that the last choices, which are the closest, see the most (sequential halving,
Karnin et al. 2013, Almost Optimal Exploration in Multi-Armed Bandits). Nothing is trained: forward passes, no
gradients.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from sparse_hf.patching import set_head_masks
from sparse_hf_training.data import Row
from sparse_hf_training.evaluation.losses import mean, row_losses
from sparse_hf_training.objectives import LossHead

Head = tuple[int, int]
"""Layer and KV head."""


@dataclass(frozen=True, kw_only=True)
class EliminationConfig:
    """How heads are eliminated.

    Args:
        end_head_sparsity: share of sparse KV heads at which it ends.
        drop_ratio: share of the heads left that a round makes sparse; one where that is less than one.
        row_passes: rows that a round reads, over all the masks it compares, which get the same each.
        min_rows: rows of each recall task, and of text, that a mask is judged on at least. Few rows lose a head that
            only some of them need.
        text_weight: of the loss on text beside the loss on answers. A row of text averages thousands of tokens, of
            which few need what is far away.
        start_from: artefact folder or Hub id: heads that are sparse there are from the beginning. Gates that were
            learned may so narrow the choice on models with many heads.
        batch_size: rows of a forward pass.
    """

    end_head_sparsity: float = 0.5
    drop_ratio: float = 0.25
    row_passes: int = 384
    min_rows: int = 2
    text_weight: float = 3.0
    start_from: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.end_head_sparsity < 1:
            raise ValueError(f"head_elimination.end_head_sparsity must lie in (0, 1), got {self.end_head_sparsity}")
        if not 0 <= self.drop_ratio < 1:
            raise ValueError(f"head_elimination.drop_ratio must lie in [0, 1), got {self.drop_ratio}")
        for name in ("row_passes", "min_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"head_elimination.{name} must be positive, got {getattr(self, name)}")
        if not self.text_weight >= 0:
            raise ValueError(f"head_elimination.text_weight must be 0 or more, got {self.text_weight}")

    def num_dropped(self, left: int, num_heads: int) -> int:
        """Heads that a round makes sparse when so many of `num_heads` are left; 0 at the end."""
        end = num_heads - round(self.end_head_sparsity * num_heads)
        return min(max(1, int(self.drop_ratio * left)), max(0, left - end))

    def rows_per_kind(self, left: int, num_kinds: int) -> int:
        """Rows of each recall task, and of text, that a round reads for each of `left` masks."""
        return max(self.min_rows, self.row_passes // (left * num_kinds))

    def plan(self, candidates: Tensor, num_kinds: int) -> list[tuple[int, int]]:
        """Heads left, and rows of each kind for each of their masks, of every round to come.

        Raises:
            ValueError: if no more heads are full at the start than at the end.
        """
        left, rounds = int(candidates.sum()), list[tuple[int, int]]()
        while dropped := self.num_dropped(left, candidates.numel()):
            rounds.append((left, self.rows_per_kind(left, num_kinds)))
            left -= dropped
        if not rounds:
            raise ValueError(
                f"{left} of {candidates.numel()} KV heads are full at the start, no more than at the end "
                f"(end_head_sparsity={self.end_head_sparsity}); start from more, or ask for a higher sparsity"
            )
        return rounds

    def num_rows(self, candidates: Tensor, num_kinds: int) -> int:
        """Rows of each kind that all rounds read together, none twice; errors as `plan`."""
        return sum(count for _, count in self.plan(candidates, num_kinds))

    def num_row_passes(self, candidates: Tensor, num_kinds: int) -> int:
        """Rows that pass the model in all rounds, once for each mask; errors as `plan`."""
        return num_kinds * sum(left * count for left, count in self.plan(candidates, num_kinds))

    def within(self, limit: int, candidates: Tensor, num_kinds: int) -> EliminationConfig:
        """The same with the most `row_passes` of which all rounds together pass no more rows than the limit.

        Where `min_rows` alone come to more, it is those: see `num_row_passes`. Errors as `plan`.
        """

        def total(row_passes: int) -> int:
            return replace(self, row_passes=row_passes).num_row_passes(candidates, num_kinds)

        return replace(self, row_passes=max(1, bisect_right(range(1, limit + 1), limit, key=total)))


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round found.

    Args:
        losses: loss without each head that was left.
        dropped: the heads that became sparse, those missed least first.
        num_rows: rows that each mask was judged on.
    """

    losses: dict[Head, float]
    dropped: tuple[Head, ...]
    num_rows: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "losses": [[*head, loss] for head, loss in self.losses.items()]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Round:
        losses = {(layer, head): loss for layer, head, loss in values["losses"]}
        dropped = tuple((layer, head) for layer, head in values["dropped"])
        return cls(losses=losses, dropped=dropped, num_rows=values["num_rows"])


class MaskedLoss:
    """Loss of a model under head masks: the mean of answers, and of text.

    Args:
        model: sparsified; its head masks are those of the last call afterwards.
        tasks: rows of each recall task, labelled on the answers.
        text: rows of text, labelled throughout.
        text_weight: of the text's loss.
        batch_size: rows of a forward pass.
        after_mask: called with the number of rows when a mask has been measured on them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tasks: Sequence[Dataset[Row]],
        text: Dataset[Row],
        *,
        text_weight: float,
        batch_size: int,
        after_mask: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        self.model, self.tasks, self.text = model, tasks, text
        self.text_weight, self.batch_size, self.after_mask = text_weight, batch_size, after_mask
        self.head = LossHead(model)

    def __call__(self, many: Sequence[Tensor], first: int, count: int) -> list[float]:
        """The loss under each of some head masks on the same rows: `count` of each kind from number `first` on."""
        numbers = range(first, first + count)
        answers = [task[number] for task in self.tasks for number in numbers]
        text = [self.text[number] for number in numbers] if self.text_weight else []
        found = []
        for masks in many:
            set_head_masks(self.model, masks)
            loss = mean(list(row_losses(self.model, self.head, answers, self.batch_size)))
            if text:
                loss += self.text_weight * mean(list(row_losses(self.model, self.head, text, self.batch_size)))
            found.append(loss)
            self.after_mask(len(answers) + len(text))
        return found


Measure = Callable[[Sequence[Tensor], int, int], Sequence[float]]
"""As `MaskedLoss`: losses under some masks on `count` rows of each kind from number `first` on."""


def eliminate(
    measure: Measure,
    candidates: Tensor,
    config: EliminationConfig,
    *,
    num_kinds: int,
    before: Iterable[Round] = (),
    after_round: Callable[[list[Round], int], None] = lambda rounds, left: None,
) -> list[Round]:
    """Takes heads away until the configured share is sparse.

    Args:
        measure: what a mask costs.
        candidates: `[num_layers, num_kv_heads]`, 1 where a head is full at the start.
        config: how.
        num_kinds: kinds of rows that `measure` reads: recall tasks and text.
        before: rounds of a run that was ended, to go on from.
        after_round: called with all rounds so far and the number of heads left.

    Returns:
        The rounds, `before` among them; see `elimination_masks` and `elimination_scores`.

    Raises:
        ValueError: if fewer heads are full at the start than at the end, or a loss is not finite.
    """
    config.plan(candidates, num_kinds)  # raises where nothing is to be done
    rounds = list(before)
    masks = elimination_masks(rounds, candidates)
    first = sum(past.num_rows for past in rounds) // num_kinds
    while True:
        left: list[Head] = [(layer, head) for layer, head in masks.nonzero().tolist()]
        num_dropped = config.num_dropped(len(left), masks.numel())
        if not num_dropped:
            break
        count = config.rows_per_kind(len(left), num_kinds)
        losses = dict(zip(left, measure([_without(masks, head) for head in left], first, count), strict=True))
        if not all(map(math.isfinite, losses.values())):
            raise ValueError("the loss without some head is not finite; check the model's dtype and the rows")
        dropped = tuple(sorted(left, key=losses.__getitem__)[:num_dropped])
        for head in dropped:
            masks[head] = 0
        first += count
        rounds.append(Round(losses=losses, dropped=dropped, num_rows=count * num_kinds))
        after_round(rounds, len(left) - num_dropped)
    return rounds


def _without(masks: Tensor, head: Head) -> Tensor:
    fewer = masks.clone()
    fewer[head] = 0
    return fewer


def elimination_masks(rounds: Sequence[Round], candidates: Tensor) -> Tensor:
    """Head masks after some rounds, int64 `[num_layers, num_kv_heads]`."""
    masks = candidates.clone().long()
    for past in rounds:
        for head in past.dropped:
            masks[head] = 0
    return masks


def elimination_scores(rounds: Sequence[Round], candidates: Tensor) -> Tensor:
    """Head scores in [0, 1], fp32 `[num_layers, num_kv_heads]`: the later a head became sparse, the higher.

    Heads that are full at the end follow by the last round's losses; heads that were sparse at the start have 0.
    """
    order = [head for past in rounds for head in past.dropped]
    last = rounds[-1].losses
    order += sorted((head for head in last if head not in order), key=last.__getitem__)
    scores = torch.zeros(candidates.shape)
    for rank, head in enumerate(order, start=1):
        scores[head] = rank / len(order)
    return scores


def row_passes(rounds: Sequence[Round]) -> int:
    """Rows that passed the model, once for each mask."""
    return sum(len(past.losses) * past.num_rows for past in rounds)


def tokens_read(rounds: Sequence[Round], seq_len: int) -> int:
    """Tokens of all forward passes."""
    return row_passes(rounds) * seq_len
