"""The training benchmark without a GPU: its arithmetic, its rows, and the figures that it makes of measured steps."""

import pytest
import torch

from sparse_hf_training.bench.plan import TrainingPlan, all_figures
from sparse_hf_training.bench.steps import Steps, TrainingCase
from sparse_hf_training.bench.workload import (
    NUM_SINK_TOKENS,
    WINDOW,
    RandomRows,
    llama_8b_config,
    step_work,
    streaming_masks,
)

RATE = 1e12


def steps_at_equal_rates(case: TrainingCase) -> Steps:
    seconds = case.work.total / RATE / case.seq_parallel_size
    shares = {"exchange_seconds": seconds / 20, "waiting_seconds": seconds / 10}
    return Steps(case=case, seconds=(seconds, seconds), peak_bytes=2**30, **shares)


def brute_force_pairs(seq_len: int, document_len: int, windowed: bool) -> int:
    row = torch.arange(seq_len)
    query, key = row[:, None], row[None]
    read = (query >= key) & (query // document_len == key // document_len)
    if windowed:
        read &= (query - key < WINDOW) | (key % document_len < NUM_SINK_TOKENS)
    return int(read.sum())


@pytest.mark.parametrize(("seq_len", "document_len"), [(2048, 2048), (2560, 1280), (1024, 256)])
@pytest.mark.parametrize("head_sparsity", [0.0, 1.0])
def test_attention_work_counts_pairs(seq_len: int, document_len: int, head_sparsity: float) -> None:
    config = llama_8b_config(4)
    work = step_work(
        config, seq_len=seq_len, document_len=document_len, head_sparsity=head_sparsity, train_weights=True
    )
    pairs = brute_force_pairs(seq_len, document_len, head_sparsity > 0)
    assert work.attention == pytest.approx(4 * 128 * 32 * 4 * 4.5 * pairs)


def test_products_are_those_of_the_weights() -> None:
    config = llama_8b_config(32)
    work = step_work(config, seq_len=1, document_len=1, head_sparsity=0, train_weights=True)
    assert work.products == pytest.approx(2 * 4 * (8.03e9 - config.vocab_size * 4096), rel=0.01)


def test_rows_are_fixed_and_packed() -> None:
    rows = RandomRows(seq_len=12, document_len=4, vocab_size=50, length=3)
    row = rows[1]
    assert torch.equal(row["input_ids"], rows[1]["input_ids"])
    assert not torch.equal(row["input_ids"], rows[2]["input_ids"])
    assert row["position_ids"].tolist() == [0, 1, 2, 3] * 3
    assert (row["labels"] == -100).nonzero().flatten().tolist() == [0, 4, 8]
    with pytest.raises(ValueError, match="no whole number"):
        RandomRows(seq_len=12, document_len=5, vocab_size=50, length=3)


def test_masks_have_the_sparsity_that_was_asked_for() -> None:
    assert (streaming_masks(4, 8, 0.7) == 0).sum() == round(0.7 * 32)


def test_figures_of_one_gpu() -> None:
    written = []
    found = all_figures(TrainingPlan(), steps_at_equal_rates, lambda figures: written.append(len(figures)))
    assert written == sorted(written) and written[-1] == len(found)
    by_case = {figure.case: figure for figure in found}
    speedup = by_case["131072 tokens, 4 layers, 1 GPU, SP 1, 70% streaming heads: throughput of dense training"]
    assert (speedup.must, speedup.goal) == (1.8, 2.1) and speedup.value > 1.8
    distance = by_case[
        "131072 tokens, 4 layers, 1 GPU, SP 1, 70% streaming heads: distance of that from its arithmetic"
    ]
    assert distance.value == pytest.approx(0, abs=1e-9)
    steps = [figure for figure in found if figure.case.endswith("time of a dense fine-tuning step")]
    assert len(steps) == 6 and all(figure.must == 1.15 for figure in steps)
    # No weight learns in the first, and both branches cost what dense attention does.
    assert steps[0].value < 1 and steps[1].value == pytest.approx(1)


def test_figures_of_several_gpus() -> None:
    found = {f.case: f for f in all_figures(TrainingPlan(num_gpus=4), steps_at_equal_rates, lambda figures: None)}
    title = "131072 tokens in documents of 32768, 4 layers, 4 GPUs, SP 4, 70% streaming heads"
    assert found[f"{title}: efficiency against SP 1"].value == pytest.approx(1)
    assert found[f"{title}: exchanges of heads"].value == pytest.approx(0.05)
    assert found[f"{title}: longest wait for exchanges and late ranks"].value == pytest.approx(0.1)
    alone = found["32768 tokens, 4 layers, 4 GPUs, SP 1, 70% streaming heads: throughput"]
    shared = found[f"{title}: throughput"]
    assert shared.value == pytest.approx(alone.value) and shared.baseline == alone.value
    assert any("32 layers, 4 GPUs, SP 4, masks alone" in case for case in found)
