"""Data sets: items depend on seed and index alone, losses lie where they should, mixtures keep their ratios."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sparse_hf_training.data import (
    IGNORE_INDEX,
    Document,
    MixedDataset,
    PackedTextDataset,
    RecallDataset,
    collate,
    pack_documents,
)
from sparse_hf_training.tasks import ChainTask, KeyValueTask, NeedleTask

SEQ_LEN = 700


@pytest.fixture
def make_recall(filler, tokenizer):
    def make(**options) -> RecallDataset:
        defaults = {"tasks": [NeedleTask(num_needles=2), ChainTask()], "seq_len": SEQ_LEN, "seed": 1, "length": 40}
        return RecallDataset(filler=filler, tokenizer=tokenizer, **(defaults | options))

    return make


class Numbers(Dataset):
    """Items that say where they come from."""

    def __init__(self, source: int, length: int) -> None:
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.source, index])}


def test_packed_text() -> None:
    rows, _ = pack_documents([Document(input_ids=list(range(9)), labels=list(range(9)))], 4)
    dataset = PackedTextDataset(rows)
    assert len(dataset) == 2
    assert {key: value.tolist() for key, value in dataset[1].items()} == {
        "input_ids": [4, 5, 6, 7],
        "labels": [-100, 5, 6, 7],
        "position_ids": [0, 1, 2, 3],
    }
    assert all(value.dtype == torch.int64 for value in dataset[0].values())
    assert len(list(dataset)) == 2


@pytest.mark.parametrize("question_loss", [True, False])
def test_recall_labels(make_recall, question_loss: bool) -> None:
    dataset = make_recall(tasks=[KeyValueTask(num_pairs=4, num_questions=2)], question_loss=question_loss)
    row, sample = dataset[5], dataset.sample(5)
    assert row["input_ids"].tolist() == list(sample.input_ids)
    assert row["position_ids"].tolist() == list(range(SEQ_LEN))
    spans = sample.question_spans if question_loss else sample.answer_spans
    trained = {t for start, end in spans for t in range(start, end)}
    assert len(spans) == 2
    expected = [token if t in trained else IGNORE_INDEX for t, token in enumerate(sample.input_ids)]
    assert row["labels"].tolist() == expected


def test_recall_items_depend_on_seed_and_index_alone(make_recall) -> None:
    forward, backward = make_recall(), make_recall(length=400)
    wanted = [forward[i]["input_ids"] for i in range(10)]
    for i in reversed(range(10)):
        assert torch.equal(backward[i]["input_ids"], wanted[i])
    assert not torch.equal(make_recall(seed=2)[0]["input_ids"], wanted[0])
    assert len({tuple(ids.tolist()) for ids in wanted}) == 10
    assert {forward.sample(i).task for i in range(40)} == {"needle", "chain"}


def test_recall_seeds_do_not_depend_on_the_process() -> None:
    # PYTHONHASHSEED changes hash(); the draw must not follow it.
    code = (
        "import random, numpy as np; from sparse_hf_training.data import MixedDataset;"
        "m = MixedDataset([range(5), range(5)], [1, 2], seed=3, length=20);"
        "print([m.source_of(i) for i in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_recall_errors(make_recall) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        make_recall(tasks=[])
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        make_recall(length=0)
    with pytest.raises(ValueError, match=r"task 'needle' needs seq_len >= \d+ .*got seq_len=50"):
        make_recall(seq_len=50)
    dataset = make_recall(length=3)
    with pytest.raises(IndexError, match="index 3 is out of range for 3 items"):
        dataset[3]
    assert torch.equal(dataset[-1]["input_ids"], dataset[2]["input_ids"])
    assert len(list(dataset)) == 3


def test_mixture_keeps_ratios_and_reads_each_source_in_order() -> None:
    mixed = MixedDataset([Numbers(0, 50), Numbers(1, 10_000)], [3, 1], seed=0, length=4000)
    assert mixed.ratios == (0.75, 0.25)
    items = [tuple(mixed[i]["input_ids"].tolist()) for i in range(len(mixed))]
    counts = [sum(source == s for source, _ in items) for s in (0, 1)]
    assert counts[0] == pytest.approx(3000, abs=120)
    # Source 0 starts again after its 50 rows, source 1 never repeats.
    assert [index for source, index in items if source == 0] == [i % 50 for i in range(counts[0])]
    assert [index for source, index in items if source == 1] == list(range(counts[1]))
    # Sources alternate everywhere, not in blocks.
    assert all(len({source for source, _ in items[i : i + 40]}) == 2 for i in range(0, 4000, 40))


def test_mixture_is_deterministic_and_a_longer_one_begins_alike() -> None:
    sources = [Numbers(0, 7), Numbers(1, 9)]
    short, long, other = (
        MixedDataset(sources, [1, 1], seed=seed, length=length) for seed, length in ((5, 100), (5, 300), (6, 100))
    )
    draws = [[mixed.source_of(i) for i in range(100)] for mixed in (short, long, other)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("sizes", "ratios", "message"),
    [
        ([3, 3], [1], "2 data sets and 1 ratios"),
        ([], [], "0 data sets and 0 ratios"),
        ([3, 3], [1, 0], "positive and finite"),
        ([3, 3], [1, -2], "positive and finite"),
        ([3, 3], [1, float("nan")], "positive and finite"),
        ([3, 3], [1, float("inf")], "positive and finite"),
        ([3, 0], [1, 1], "data set 1 of the mixture is empty"),
    ],
)
def test_mixture_errors(sizes, ratios, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedDataset([Numbers(s, size) for s, size in enumerate(sizes)], ratios, seed=0, length=4)


def test_a_loader_that_resumes_sees_what_it_would_have_seen(make_recall) -> None:
    rows, _ = pack_documents([Document(input_ids=[1] * 3 * SEQ_LEN, labels=[1] * 3 * SEQ_LEN)], SEQ_LEN)

    def make() -> MixedDataset:
        return MixedDataset([PackedTextDataset(rows), make_recall()], [1, 1], seed=9, length=12)

    whole = list(DataLoader(make(), batch_size=4, collate_fn=collate))
    resumed = next(iter(DataLoader(make(), batch_sampler=[[8, 9, 10, 11]], collate_fn=collate)))
    assert all(torch.equal(whole[2][key], resumed[key]) for key in ("input_ids", "labels", "position_ids"))
