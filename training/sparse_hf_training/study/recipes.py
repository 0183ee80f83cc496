"""Recipes that rank heads: those that are shipped, those that are published, and the baselines that each must beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from sparse_hf.calibrate.framework import Target
from sparse_hf.calibrate.scores import ScoresCalibrator, ScoresOptions
from sparse_hf.head_masks import round_scores
from sparse_hf.methods import Streaming
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf_training.attribution import AttributionConfig, attribution_scores
from sparse_hf_training.elimination import EliminationConfig, MaskedLoss, eliminate, elimination_scores, tokens_read
from sparse_hf_training.evaluation.losses import answer_losses, mean
from sparse_hf_training.evaluation.recall import recall_samples
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig
from sparse_hf_training.objectives import LossHead, ObjectiveConfig
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.ranking import Ranking
from sparse_hf_training.tasks import NeedleTask

DUO_PASSKEYS = 10
NUM_CALIBRATION_SEQUENCES = 8
ABLATION_SAMPLES = 8
ELIMINATION_END = 0.9375
"""Share of sparse heads at which elimination ends. Later rounds only add to a ranking, so that one serves all
sparsities; the few heads that are full still are told apart by the last round's losses."""
PRULONG_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to rank heads.

    Args:
        name: in tables.
        summary: what it does, in one line.
        rank: the heads of a model, for a head sparsity.
        per_sparsity: it learns anew for each sparsity; others rank once.
        draws: how many seeds it is worth, or None for the study's.
    """

    name: str
    summary: str
    rank: Callable[[Bench, PreTrainedModel, float], Ranking]
    per_sparsity: bool = False
    draws: int | None = None

    def masks(self, bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Tensor:
        """Head masks with that share of sparse heads: the lowest scores."""
        return round_scores(self.rank(bench, model, head_sparsity).scores, head_sparsity)


def gates(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """Hard-concrete gates, distilled from the dense model on the tokens that need recall; the shipped defaults."""
    config = MaskLearningConfig(end_head_sparsity=head_sparsity, seed=bench.seed)
    return _learned(bench, bench.train(model, "masks", bench.recall_rows(), ObjectiveConfig(kl=3.0), config))


def elimination(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """Heads taken away round by round, those first that answers and text miss least, by forward passes alone."""
    candidates, num_kinds = torch.ones_like(get_handle(model).head_masks), len(bench.tasks) + 1
    # One head stays full, also of those few that a tiny model has.
    end = min(ELIMINATION_END, 1 - 1 / candidates.numel())
    config = EliminationConfig(end_head_sparsity=end, batch_size=bench.batch_size)
    # No more rows pass the model than in the training of others, which passes them backward too.
    config = config.within(bench.max_steps * bench.batch_size, candidates, num_kinds)
    length = config.num_rows(candidates, num_kinds)
    tasks = [bench.recall_rows([task], question_loss=False, length=length) for task in bench.tasks]
    text = bench.text_rows(length=length)
    with _all_full(model):
        loss = MaskedLoss(model, tasks, text, text_weight=config.text_weight, batch_size=config.batch_size)
        rounds = eliminate(loss, candidates, config, num_kinds=num_kinds)
    return Ranking(scores=elimination_scores(rounds, candidates), tokens=tokens_read(rounds, bench.seq_len))


def attribution(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """Integrated gradients of the loss on answers and text in gates between all sparse and all full."""
    config = AttributionConfig()
    tasks = [bench.recall_rows([task], question_loss=False, length=config.num_rows) for task in bench.tasks]
    scores = attribution_scores(model, tasks, bench.text_rows(length=config.num_rows), config)
    return Ranking(scores=scores, tokens=(len(tasks) + 1) * config.num_rows * bench.seq_len)


def _prulong(bench: Bench, head_sparsity: float, clamp: float | None) -> MaskLearningConfig:
    return MaskLearningConfig(
        end_head_sparsity=head_sparsity,
        sparsity_warmup_ratio=0.8,
        mask_learning_rate=1.0,
        reg_learning_rate=1.0,
        mask_rate_schedule="cosine",
        clamp_log_alpha=clamp,
        clamp_multipliers=clamp,
        seed=bench.seed,
    )


def prulong_mended(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """PruLong's loss and schedules with what is mended here: the closed-form penalty, no decay, bounds, lower rates.

    At the rates as published gates overshoot in the few hundred steps of a study, and end open, all of them.
    """
    shipped = MaskLearningConfig()
    config = replace(
        _prulong(bench, head_sparsity, 10.0),
        mask_learning_rate=shipped.mask_learning_rate,
        reg_learning_rate=shipped.reg_learning_rate,
    )
    objective = ObjectiveConfig(lm=1.0, kl=0.0)
    return _learned(bench, bench.train(model, "masks", bench.text_rows(), objective, config))


def prulong_published(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """PruLong as released: the penalty on sampled gates, and weight decay 0.1 on gates and multipliers.

    Its third defect, a gather that loses the penalty's gradient, needs sequence parallelism and is left out.
    """

    def prepare(learning: MaskLearning) -> Sequence[TrainerCallback]:
        learning.penalty = MethodType(_sampled_penalty, learning)  # type: ignore[method-assign]
        return [_Decay(learning)]

    config, objective = _prulong(bench, head_sparsity, None), ObjectiveConfig(lm=1.0, kl=0.0)
    return _learned(bench, bench.train(model, "masks", bench.text_rows(), objective, config, prepare=prepare))


def _sampled_penalty(learning: MaskLearning) -> Tensor:
    drawn = [learning.layer_gate(layer) for layer in range(learning.budgets.num_layers)]
    if any(z is None for z in drawn):
        raise RuntimeError("the penalty on sampled gates needs a draw, which a forward pass in training makes")
    sparsity = 1 - torch.stack([z for z in drawn if z is not None])
    return learning.regularizer(learning.budgets.per_constraint(sparsity), learning.targets())


class _Decay(TrainerCallback):
    """Decoupled weight decay of gates and multipliers, at their own rates."""

    def __init__(self, learning: MaskLearning) -> None:
        self.learning = learning

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.learning.config
        factor = config.rate_factor(max(state.global_step - 1, 0), state.max_steps)
        for part, rate in (
            (self.learning.gates, config.mask_learning_rate),
            (self.learning.regularizer, config.reg_learning_rate),
        ):
            for parameter in part.parameters():
                parameter.mul_(1 - rate * factor * PRULONG_DECAY)


def duo_attention(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """DuoAttention's optimisation: clamped alpha, L1, distance of final hidden states on hidden passkeys' answers."""
    config = MaskLearningConfig(
        gates="duo",
        init_alpha=1.0,
        regularizer="l1",
        reg_weight=0.05,
        mask_learning_rate=0.02,
        mask_rate_schedule="trapezoid",
        seed=bench.seed,
    )
    tasks = bench.tasks
    if bench.tokenizer is not None:
        tasks = [NeedleTask(num_needles=DUO_PASSKEYS, num_questions=DUO_PASSKEYS)]
    objective = ObjectiveConfig(lm=0.0, kl=0.0, hidden=1.0)
    return _learned(
        bench, bench.train(model, "masks", bench.recall_rows(tasks, question_loss=False), objective, config)
    )


def training_free(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """`sparse-hf calibrate scores`: what windows miss, and what is found again in repeated text."""
    if not isinstance(bench.branch, Streaming):
        raise ValueError(f"training-free scores are of streaming heads, the branch is {bench.branch.name!r}")
    options = ScoresOptions(num_sink_tokens=bench.branch.num_sink_tokens, window_size=bench.branch.window_size)
    dense = bench.load().eval()  # it looks at a dense model
    calibrator = ScoresCalibrator(options, Target.of(dense, bench.seq_len), bench.seed)
    tokens = 0
    for number in range(min(NUM_CALIBRATION_SEQUENCES, len(bench.rows))):  # type: ignore[arg-type]
        ids = bench.rows[number]["input_ids"]
        calibrator.run(dense, ids[None].to(dense.device), number)
        tokens += len(ids) + 2 * (len(ids) // 2)  # the text, and a half of it twice
    scores = calibrator.finish().scores
    assert scores is not None
    return Ranking(scores=scores, tokens=tokens)


def ablation(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """One forward pass a head and sample: how much the loss on answers rises when this head alone is sparse."""
    samples = [
        sample
        for task in bench.tasks
        for sample in recall_samples(
            task,
            bench.filler,
            bench.tokenizer,  # type: ignore[arg-type]
            bench.seq_len,
            ABLATION_SAMPLES,
            bench.seed,
        )
    ]
    head, masks = LossHead(model), torch.ones_like(get_handle(model).head_masks)
    with _all_full(model):

        def loss(masks: Tensor) -> float:
            set_head_masks(model, masks)
            return mean(list(answer_losses(model, head, samples, bench.batch_size)))

        before = loss(masks)
        scores = torch.zeros(masks.shape)
        for layer, number in masks.nonzero().tolist():
            without = masks.clone()
            without[layer, number] = 0
            scores[layer, number] = loss(without) - before
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    return Ranking(scores=scores, tokens=(masks.numel() + 1) * num_tokens)


def random_heads(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """Scores drawn at random."""
    shape = get_handle(model).head_masks.shape
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(bench.seed))
    return Ranking(scores=scores, tokens=0)


def uniform_layers(bench: Bench, model: PreTrainedModel, head_sparsity: float) -> Ranking:
    """Whole layers, at even distances over the depth, stay full; one of them in part where the number asks for it."""
    num_layers, num_heads = get_handle(model).head_masks.shape
    num_full = num_layers * num_heads - round(head_sparsity * num_layers * num_heads)
    count = max(1, -(-num_full // num_heads))
    chosen = [(2 * n + 1) * num_layers // (2 * count) for n in range(count)]
    scores = torch.zeros(num_layers, num_heads)
    for rank, layer in enumerate(chosen):
        scores[layer] = num_layers - rank
    return Ranking(scores=scores, tokens=0)


@contextmanager
def _all_full(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    set_head_masks(model, torch.ones_like(get_handle(model).head_masks))
    try:
        yield
    finally:
        set_head_masks(model, torch.ones_like(get_handle(model).head_masks))
        model.train(was_training)


def _learned(bench: Bench, scores: Tensor | None) -> Ranking:
    assert scores is not None
    return Ranking(scores=scores, tokens=bench.max_steps * bench.batch_size * bench.seq_len)


def _described(name: str, rank: Callable[[Bench, PreTrainedModel, float], Ranking], **more: Any) -> Recipe:
    return Recipe(name=name, summary=(rank.__doc__ or "").strip().splitlines()[0], rank=rank, **more)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _described("gates", gates, per_sparsity=True),
        _described("elimination", elimination),
        _described("attribution", attribution),
        _described("prulong_published", prulong_published, per_sparsity=True),
        _described("prulong_mended", prulong_mended, per_sparsity=True),
        _described("duo_attention", duo_attention),
        _described("training_free", training_free),
        _described("ablation", ablation),
        _described("random", random_heads, draws=5),
        _described("uniform_layers", uniform_layers, draws=1),
    )
}
UNIFORM_WINDOW = "uniform_window"
"""No ranking: every head has the window that holds as many bytes as the masks of the others."""


def uniform_window(branch: Streaming, head_sparsity: float, seq_len: int) -> Streaming:
    """The streaming method that holds, on all heads, the keys that masks of this sparsity hold on average.

    Raises:
        ValueError: if they hold fewer keys than the sinks.
    """
    kept = (1 - head_sparsity) * seq_len + head_sparsity * (branch.num_sink_tokens + branch.window_size - 1)
    return replace(branch, window_size=round(kept) - branch.num_sink_tokens + 1)


# Which layers a planted head is in is drawn at random: whole layers could find it by luck alone.
PLANTED_RECIPES: Sequence[str] = tuple(name for name in RECIPES if name != "uniform_layers")
