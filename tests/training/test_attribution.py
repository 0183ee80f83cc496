"""Integrated gradients of the gates add up to what sparsity costs and find planted heads; the model stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.head_masks import round_scores
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf_training.attribution import AttributionConfig, attribution_scores
from sparse_hf_training.data import Row
from sparse_hf_training.data.sources import RecallDataset
from sparse_hf_training.elimination import MaskedLoss
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.study.planted import planted_filler, planted_llama, planted_rows
from sparse_hf_training.tasks import CopySpanTask

SEQ_LEN = 192


class Repeated(Dataset[Row]):
    """One row, as often as asked for."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, number: int) -> Row:
        return self.row


def planted(seed: int) -> tuple[PreTrainedModel, Tensor, Callable[[int], tuple[Dataset[Row], Dataset[Row]]]]:
    """A sparsified model, its planted heads, and rows of answers and of text."""
    found, filler = planted_llama(seed, num_layers=3), planted_filler(seed)
    model = sparsify(found.model, SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16)))

    def rows(length: int) -> tuple[Dataset[Row], Dataset[Row]]:
        none: Any = None  # the task needs no tokenizer
        answers = RecallDataset(
            tasks=[CopySpanTask(num_tokens=8, cue_tokens=2)],
            filler=filler,
            tokenizer=none,
            seq_len=SEQ_LEN,
            seed=seed,
            length=length,
            question_loss=False,
        )
        return answers, planted_rows(filler, SEQ_LEN, count=length, seed=seed)

    return model, found.head_masks, rows


@pytest.mark.parametrize("text_weight", [0.0, 3.0])
def test_scores_add_up_to_what_sparsity_costs(text_weight: float) -> None:
    model, _, rows = planted(0)
    answers, text = (Repeated(part[0]) for part in rows(1))
    config = AttributionConfig(num_points=128, rows_per_point=1, text_weight=text_weight)
    scores = attribution_scores(model, [answers], text, config)
    loss = MaskedLoss(model, [answers], text, text_weight=text_weight, batch_size=1)
    full = torch.ones_like(get_handle(model).head_masks)
    sparse_loss, full_loss = loss([0 * full, full], 0, 1)
    assert sparse_loss - full_loss > 0.5
    assert scores.sum().item() == pytest.approx(sparse_loss - full_loss, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_planted_heads(seed: int) -> None:
    model, masks, rows = planted(seed)
    config = AttributionConfig(num_points=4, rows_per_point=2)
    answers, text = rows(config.num_rows)
    scores = attribution_scores(model, [answers], text, config)
    assert scores.dtype == torch.float32 and scores.shape == masks.shape
    assert torch.equal(round_scores(scores, 10 / 12), masks)


def test_the_model_is_left_as_it_was() -> None:
    model, masks, rows = planted(0)
    set_head_masks(model, masks)
    config = AttributionConfig(num_points=1, rows_per_point=1)
    answers, text = rows(1)
    ids = answers[0]["input_ids"][None]
    before = model(ids).logits
    model.train()
    first = attribution_scores(model, [answers], text, config)
    assert model.training and torch.equal(get_handle(model).head_masks, masks)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(ids).logits, before)
    set_head_masks(model, torch.ones_like(masks))
    assert torch.equal(attribution_scores(model, [answers], text, config), first), "head masks play no part"


def test_what_cannot_be_scored() -> None:
    model, _, rows = planted(0)
    answers, text = rows(1)
    config = AttributionConfig(num_points=1, rows_per_point=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = math.nan
    row = {**answers[0], "input_ids": torch.zeros(SEQ_LEN, dtype=torch.long)}
    with pytest.raises(ValueError, match="a derivative in a gate is not finite"):
        attribution_scores(model, [Repeated(row)], text, config)
    assert all(state.gate is None for state in get_handle(model).states)
    attach_mask_learning(model, MaskLearningConfig())
    with pytest.raises(ValueError, match="being learned; call detach_mask_learning"):
        attribution_scores(model, [answers], text, config)
    for values in ({"num_points": 0}, {"rows_per_point": 0}, {"text_weight": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            AttributionConfig(**values)  # type: ignore[arg-type]
