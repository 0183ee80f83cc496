"""Which heads must stay full, by integrated gradients: what each head's gate is worth on the way from sparse to full.

All gates are set to the same t between 0, every head sparse, and 1, every head full. A head's score is minus the
derivative of the loss in its gate, averaged over t (Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks,
eq. 1; of attention heads Hao et al. 2021, Self-Attention Attribution). One backward pass asks all heads at once, and
the scores add up to what sparsity costs: the loss with all heads sparse less that with all full. Of two heads that
stand in for each other each gets its share, while neither is missed when it alone is taken away. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from sparse_hf.patching import get_handle
from sparse_hf_training.data import Row
from sparse_hf_training.objectives import LossHead, ObjectiveConfig, label_positions


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """How heads are scored.

    Args:
        num_points: values of t, at even distances.
        rows_per_point: rows of each recall task, and of text, that each of them reads; no two read the same.
        text_weight: of the loss on text beside the loss on answers, as in `EliminationConfig`.
    """

    num_points: int = 16
    rows_per_point: int = 4
    text_weight: float = 3.0

    def __post_init__(self) -> None:
        for name in ("num_points", "rows_per_point"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.text_weight >= 0:
            raise ValueError(f"text_weight must be 0 or more, got {self.text_weight}")

    @property
    def num_rows(self) -> int:
        """Rows of each kind that are read."""
        return self.num_points * self.rows_per_point


def attribution_scores(
    model: PreTrainedModel, tasks: Sequence[Dataset[Row]], text: Dataset[Row], config: AttributionConfig
) -> Tensor:
    """What each KV head is worth, fp32 `[num_layers, num_kv_heads]` in nats per label.

    Args:
        model: sparsified; full and sparse are the branches of its configuration. Its head masks play no part.
        tasks: rows of each recall task, labelled on the answers, `config.num_rows` or more of one length.
        text: rows of text, labelled throughout, as many.
        config: how.

    Raises:
        ValueError: if the model's gates are being learned, or a derivative is not finite.
    """
    kinds = [(task, 1 / len(tasks)) for task in tasks]
    kinds += [(text, config.text_weight)] if config.text_weight else []
    head, scores = LossHead(model), torch.zeros(get_handle(model).head_masks.shape)
    with _same_gates(model) as put:
        for point in range(config.num_points):
            t = (point + 0.5) / config.num_points
            first = point * config.rows_per_point
            for rows, weight in kinds:
                batch = [rows[number] for number in range(first, first + config.rows_per_point)]
                scores -= weight / config.num_points * _derivative(model, head, put(t), batch)
    if not scores.isfinite().all():
        raise ValueError("a derivative in a gate is not finite; check the model's dtype and the rows")
    return scores


def _derivative(model: PreTrainedModel, head: LossHead, gates: Tensor, rows: Sequence[Row]) -> Tensor:
    """Of the mean loss of the rows' labels in each gate."""
    ids, labels, positions = (
        torch.stack([row[name] for row in rows]).to(model.device) for name in ("input_ids", "labels", "position_ids")
    )
    kept, targets = label_positions(labels)
    loss = head.loss(
        lambda: model(input_ids=ids, position_ids=positions, use_cache=False),
        kept,
        targets,
        ObjectiveConfig(lm=1.0, kl=0.0, kernel="torch"),
        scale=1 / len(targets),
    ).loss
    (found,) = torch.autograd.grad(loss, gates)
    return found.cpu()


@contextmanager
def _same_gates(model: PreTrainedModel) -> Iterator[Callable[[float], Tensor]]:
    """Within the block all gates of the model are what was put last; `put` returns them, `[num_layers, num_kv_heads]`.

    Raises:
        ValueError: if the model's gates are being learned.
    """
    handle, was_training = get_handle(model), model.training
    if any(state.gate is not None for state in handle.states):
        raise ValueError("the model's gates are being learned; call detach_mask_learning(model) first")
    gates: list[Tensor] = []

    def put(t: float) -> Tensor:
        gates[:] = [torch.full(handle.head_masks.shape, t, device=model.device, requires_grad=True)]
        return gates[0]

    def gate_of(layer: int) -> Callable[[], Tensor]:
        return lambda: gates[0][layer]

    model.eval()
    for layer, state in enumerate(handle.states):
        state.gate = gate_of(layer)
    try:
        yield put
    finally:
        for state in handle.states:
            state.gate = None
        model.train(was_training)
