"""Head elimination: rounds on made-up losses whose answer is known, on planted heads, and the loss that is asked."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparse_hf import SparseConfig, Streaming, set_head_masks, sparsify
from sparse_hf.head_masks import round_scores
from sparse_hf_training.data import Document, PackedTextDataset, pack_documents
from sparse_hf_training.data.sources import RecallDataset
from sparse_hf_training.demo.recipe import MODEL
from sparse_hf_training.elimination import (
    EliminationConfig,
    MaskedLoss,
    Round,
    eliminate,
    elimination_masks,
    elimination_scores,
    row_passes,
    tokens_read,
)
from sparse_hf_training.evaluation.losses import answer_losses, mean, text_loss
from sparse_hf_training.objectives import LossHead
from sparse_hf_training.study.planted import planted_filler, planted_llama, planted_rows
from sparse_hf_training.tasks import CopySpanTask, Filler, NeedleTask

FULL = torch.ones(3, 4, dtype=torch.long)
ALONE = torch.tensor([[0.05, 0.0, 0.30, 0.02], [0.20, 0.40, 0.0, 0.06], [0.01, 0.22, 0.04, 0.03]])
"""What each head is worth by itself."""
STANDING_IN, TOGETHER = ((0, 0), (1, 3)), ((0, 1), (1, 2))


def loss(masks: Tensor) -> float:
    """Heads that count alone, two that stand in for each other, and two of which one is worth something with the other
    alone."""
    missed = float((ALONE * (1 - masks)).sum())
    missed += 5.0 * (not any(masks[head] for head in STANDING_IN))
    return missed + 0.15 * (not all(masks[head] for head in TOGETHER))


class Asked:
    """The made-up loss as a measure that notes what it was asked for."""

    def __init__(self, of: Callable[[Tensor], float] = loss) -> None:
        self.of, self.calls = of, list[tuple[int, int, int]]()

    def __call__(self, many: Sequence[Tensor], first: int, count: int) -> list[float]:
        self.calls.append((len(many), first, count))
        return [self.of(masks) for masks in many]


def lowest_loss(num_full: int) -> float:
    """Of all masks with so many full heads."""
    losses = []
    for chosen in combinations(range(FULL.numel()), num_full):
        masks = torch.zeros(FULL.numel(), dtype=torch.long)
        masks[list(chosen)] = 1
        losses.append(loss(masks.view(FULL.shape)))
    return min(losses)


def ablation(end: float) -> Tensor:
    """Masks by what each head alone is missed in the dense model."""
    scores = torch.zeros(FULL.shape)
    for head in FULL.nonzero().tolist():
        without = FULL.clone()
        without[tuple(head)] = 0
        scores[tuple(head)] = loss(without)
    return round_scores(scores, end)


@pytest.mark.parametrize("num_sparse", [7, 8])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.25])
def test_finds_the_best_masks_where_one_head_ablation_does_not(num_sparse: int, drop_ratio: float) -> None:
    config = EliminationConfig(end_head_sparsity=num_sparse / 12, drop_ratio=drop_ratio)
    masks = elimination_masks(eliminate(Asked(), FULL, config, num_kinds=2), FULL)
    lowest = lowest_loss(12 - num_sparse)
    assert int((masks == 0).sum()) == num_sparse and loss(masks) == pytest.approx(lowest)
    assert sum(int(masks[head]) for head in STANDING_IN) == 1, "of two that stand in for each other one stays"
    ablated = ablation(num_sparse / 12)
    assert not any(ablated[head] for head in STANDING_IN) and loss(ablated) > lowest + 4, "ablation takes both away"


def test_heads_of_one_round_are_judged_apart() -> None:
    """What `drop_ratio` costs: two that stand in for each other may go together; one by one, one of them stays."""
    for drop_ratio, stay in ((0.5, 0), (0.0, 1)):
        config = EliminationConfig(end_head_sparsity=0.5, drop_ratio=drop_ratio)
        masks = elimination_masks(eliminate(Asked(), FULL, config, num_kinds=2), FULL)
        assert sum(int(masks[head]) for head in STANDING_IN) == stay


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (32, 8)])
@pytest.mark.parametrize("end", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.25, 0.9])
def test_ends_where_it_should_and_reads_no_row_twice(shape: tuple[int, int], end: float, drop_ratio: float) -> None:
    worth = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    asked = Asked(lambda masks: float((worth * (1 - masks)).sum()))
    candidates, num_heads, kinds = torch.ones(shape, dtype=torch.long), math.prod(shape), 4
    config = EliminationConfig(end_head_sparsity=end, drop_ratio=drop_ratio)
    rounds = eliminate(asked, candidates, config, num_kinds=kinds)
    assert sum(len(past.dropped) for past in rounds) == round(end * num_heads)
    assert torch.equal(elimination_masks(rounds, candidates), round_scores(worth, end)), "worths that add up are ranked"
    left = num_heads
    for past in rounds:
        assert len(past.losses) == left and 1 <= len(past.dropped) <= max(1, drop_ratio * left)
        least = kinds * config.min_rows
        assert past.num_rows == least or left * past.num_rows <= config.row_passes < left * (past.num_rows + kinds)
        left -= len(past.dropped)
    read = [row for _, first, count in asked.calls for row in range(first, first + count)]
    assert read == list(range(config.num_rows(candidates, kinds)))
    assert [(many, count) for many, _, count in asked.calls] == config.plan(candidates, kinds)
    assert row_passes(rounds) == kinds * sum(many * count for many, _, count in asked.calls)
    assert row_passes(rounds) == config.num_row_passes(candidates, kinds)
    assert tokens_read(rounds, 128) == 128 * row_passes(rounds)


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (8, 4)])
def test_all_rounds_stay_within_a_limit(shape: tuple[int, int]) -> None:
    candidates, kinds = torch.ones(shape, dtype=torch.long), 3
    config = EliminationConfig(end_head_sparsity=1 - 1 / math.prod(shape))
    least = replace(config, row_passes=1).num_row_passes(candidates, kinds)
    assert least == config.within(1, candidates, kinds).num_row_passes(candidates, kinds), "of each mask its least"
    for limit in (least - 1, least, 2 * least + 1, 1000, 5000):
        found = config.within(limit, candidates, kinds)
        assert found == replace(config, row_passes=found.row_passes)
        assert found.num_row_passes(candidates, kinds) <= max(limit, least)
        more = replace(config, row_passes=found.row_passes + 1).num_row_passes(candidates, kinds)
        assert found.row_passes == limit or more > limit, "and are as many as fit"


def test_goes_on_from_rounds_that_were_written_down() -> None:
    config = EliminationConfig(end_head_sparsity=0.75, drop_ratio=0.25)
    asked = Asked()
    alone = eliminate(asked, FULL, config, num_kinds=3)
    assert len(alone) >= 3
    for done in range(len(alone) + 1):
        before = [Round.from_dict(json.loads(json.dumps(past.to_dict()))) for past in alone[:done]]
        again, seen = Asked(), list[tuple[int, int]]()
        rounds = eliminate(
            again,
            FULL,
            config,
            num_kinds=3,
            before=before,
            after_round=lambda rounds, left, seen=seen: seen.append((len(rounds), left)),
        )
        assert rounds == alone and again.calls == asked.calls[done:]
        assert [number for number, _ in seen] == list(range(done + 1, len(alone) + 1))
        assert not seen or seen[-1][1] == 3


def test_scores_follow_the_rounds() -> None:
    candidates = FULL.clone()
    candidates[1, 1] = 0
    config = EliminationConfig(end_head_sparsity=0.5, drop_ratio=0.0)
    rounds = eliminate(Asked(), candidates, config, num_kinds=1)
    scores, masks = elimination_scores(rounds, candidates), elimination_masks(rounds, candidates)
    assert scores[1, 1] == 0 and all((1, 1) not in past.losses for past in rounds), "sparse from the beginning"
    assert int((masks == 0).sum()) == 6 and torch.equal(round_scores(scores, 0.5), masks)
    dropped = [head for past in rounds for head in past.dropped]
    stayed = sorted((tuple(head) for head in masks.nonzero().tolist()), key=lambda head: rounds[-1].losses[head])
    by_score = sorted((tuple(head) for head in candidates.nonzero().tolist()), key=lambda head: scores[head].item())
    assert by_score == [*dropped, *stayed]
    assert scores.max() == 1 and len(scores.unique()) == 12


def test_ties_go_to_the_earlier_head() -> None:
    rounds = eliminate(Asked(lambda masks: 1.0), FULL, EliminationConfig(end_head_sparsity=0.5), num_kinds=1)
    assert elimination_masks(rounds, FULL).flatten().tolist() == [0] * 6 + [1] * 6
    assert elimination_scores(rounds, FULL).flatten().tolist() == pytest.approx([n / 12 for n in range(1, 13)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(bad: float) -> None:
    asked = Asked(lambda masks: bad if not masks[1, 1] else loss(masks))
    with pytest.raises(ValueError, match="the loss without some head is not finite; check the model's dtype"):
        eliminate(asked, FULL, EliminationConfig(), num_kinds=1)


def test_what_cannot_be_eliminated() -> None:
    few = FULL.clone()
    few[0], few[1, :2] = 0, 0
    with pytest.raises(ValueError, match=r"6 of 12 KV heads are full at the start, no more than at the end .*=0\.5\)"):
        eliminate(Asked(), few, EliminationConfig(end_head_sparsity=0.5), num_kinds=1)
    for values, message in (
        ({"end_head_sparsity": 1.0}, r"head_elimination\.end_head_sparsity must lie in \(0, 1\), got 1\.0"),
        ({"end_head_sparsity": 0.0}, r"must lie in \(0, 1\)"),
        ({"drop_ratio": 1.0}, r"head_elimination\.drop_ratio must lie in \[0, 1\), got 1\.0"),
        ({"row_passes": 0}, r"head_elimination\.row_passes must be positive, got 0"),
        ({"min_rows": 0}, r"head_elimination\.min_rows must be positive, got 0"),
        ({"batch_size": 0}, r"head_elimination\.batch_size must be positive, got 0"),
        ({"text_weight": -1.0}, r"head_elimination\.text_weight must be 0 or more, got -1\.0"),
        ({"text_weight": math.nan}, "text_weight must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            EliminationConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_planted_heads(seed: int) -> None:
    planted, filler, seq_len = planted_llama(seed, num_layers=3), planted_filler(seed), 192
    model = sparsify(planted.model, SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16)))
    config = EliminationConfig(end_head_sparsity=10 / 12, row_passes=24)
    candidates = torch.ones_like(planted.head_masks)
    length = config.num_rows(candidates, 2)
    rows = RecallDataset(
        tasks=[CopySpanTask(num_tokens=8, cue_tokens=2)],
        filler=filler,
        tokenizer=None,  # type: ignore[arg-type]
        seq_len=seq_len,
        seed=seed,
        length=length,
        question_loss=False,
    )
    text = planted_rows(filler, seq_len, count=length, seed=seed)
    measure = MaskedLoss(model, [rows], text, text_weight=config.text_weight, batch_size=config.batch_size)
    rounds = eliminate(measure, candidates, config, num_kinds=2)
    assert torch.equal(elimination_masks(rounds, candidates), planted.head_masks)


def test_the_loss_is_that_of_answers_and_text(story: str, tokenizer: PreTrainedTokenizerFast, filler: Filler) -> None:
    model = sparsify(
        AutoModelForCausalLM.from_pretrained(MODEL).eval(),
        SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8)),
    )
    tasks = [
        RecallDataset(
            tasks=[task], filler=filler, tokenizer=tokenizer, seq_len=256, seed=3, length=8, question_loss=False
        )
        for task in (NeedleTask(num_needles=2), NeedleTask(num_needles=1))
    ]
    ids = tokenizer(story)["input_ids"]
    documents = [Document(input_ids=part, labels=part) for part in (ids[:150], ids[150:900], ids[900:2400])]
    text = PackedTextDataset(pack_documents(documents, 256)[0])
    first, count, many = 2, 3, [torch.ones(4, 4), torch.eye(4)]
    seen = list[int]()
    measure = MaskedLoss(model, tasks, text, text_weight=2.0, batch_size=4, after_mask=seen.append)
    found = measure(many, first, count)
    assert seen == [9, 9]
    head, answers, whole = LossHead(model), list[float](), list[float]()
    for masks in many:
        set_head_masks(model, masks)
        samples = [task.sample(number) for task in tasks for number in range(first, first + count)]
        answers.append(mean(list(answer_losses(model, head, samples))))
        held = text_loss(model, [text[number] for number in range(first, first + count)], 256).mean
        whole.append(answers[-1] + 2.0 * held)
    assert found == pytest.approx(whole, rel=1e-5) and abs(found[0] - found[1]) > 1e-3
    without_text = MaskedLoss(model, tasks, text, text_weight=0.0, batch_size=4)
    assert without_text(many, first, count) == pytest.approx(answers, rel=1e-5)
