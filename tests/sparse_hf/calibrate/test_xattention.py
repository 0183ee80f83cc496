"""XAttention's thresholds: the knapsack against all choices, errors against full attention, targets as deployed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import sparse_hf.dynamic as dynamic
from sparse_hf import Dense, load_artefact, sparsify, unsparsify
from sparse_hf.calibrate.contributions import gram_matrices, sample_rows, selection_errors
from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.knapsack import Knapsack
from sparse_hf.calibrate.probe import LayerCall, observed
from sparse_hf.calibrate.xattention import XAttentionCalibrator, XAttentionOptions
from sparse_hf_kernels import BlockSelection, TokenPositions

BLOCK = 64
OPTIONS = XAttentionOptions(block_size=BLOCK, target_density=0.6, num_steps=6, num_rows=32)


def problem(seed: int, heads: int = 4, settings: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Costs that are whole hundredths, so that nothing is rounded, and errors that need not fall with cost."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, 100, (heads, settings)) / 100, rng.random((heads, settings))


def every_choice(costs: np.ndarray, errors: np.ndarray) -> list[tuple[float, float, tuple[int, ...]]]:
    heads, settings = costs.shape
    return [
        (
            sum(costs[h, c] for h, c in enumerate(choice)) / heads,
            sum(errors[h, c] for h, c in enumerate(choice)),
            choice,
        )
        for choice in itertools.product(range(settings), repeat=heads)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_equals_exhaustive_search(seed: int) -> None:
    costs, errors = problem(seed)
    choices = every_choice(costs, errors)
    for cost in (0.35, 0.5, 0.7, 1.0):
        within = [(error, choice) for total, error, choice in choices if total <= cost + 1e-9]
        if not within:
            with pytest.raises(ValueError, match="cheapest"):
                Knapsack(costs, errors, max_cost=cost).within_cost(cost)
            continue
        knapsack = Knapsack(costs, errors, max_cost=cost)
        found = knapsack.within_cost(cost)
        assert knapsack.error(found) == pytest.approx(min(within)[0]) and knapsack.cost(found) <= cost + 1e-9
    for error in (0.5, 1.0, 1.5):
        within = [(total, choice) for total, e, choice in choices if e <= error]
        found = Knapsack(costs, errors).within_error(error)
        assert (found is None) == (not within)
        if found is not None:
            assert Knapsack(costs, errors).cost(found) == pytest.approx(min(within)[0])


def test_rounded_costs_stay_within_the_target() -> None:
    rng = np.random.default_rng(0)
    costs = np.sort(rng.random((200, 6)) ** 3, 1)
    errors = np.sort(rng.random((200, 6)), 1)[:, ::-1]
    knapsack = Knapsack(costs, errors, max_cost=0.2)
    assert 0.199 < knapsack.cost(knapsack.within_cost(0.2)) <= 0.2


def layer_call(length: int, seed: int = 0) -> LayerCall:
    """4 query and 2 KV heads of 8, and a projection to 12."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, length, 8, generator=generator) * 2 for heads in (4, 2, 2))
    projection = nn.Linear(32, 12, bias=False)
    nn.init.normal_(projection.weight, generator=generator)
    mask = torch.ones(length, length).tril().bool()
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~mask, float("-inf"))
    return LayerCall(
        layer=0,
        q=q,
        k=k,
        v=v,
        out=scores.softmax(-1) @ v.repeat_interleave(2, 1),
        lse=scores.logsumexp(-1),
        scale=0.3,
        positions=TokenPositions.causal(length, length),
        module=SimpleNamespace(o_proj=projection),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("length", [192, 170])
def test_selection_errors_equal_masked_attention(length: int) -> None:
    call = layer_call(length)
    number = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(1)
    blocks = (torch.rand(3, 4, number, number, generator=generator) < 0.5) | torch.eye(number).bool()
    rows = torch.tensor([0, 63, 64, 100, length - 1])
    found = selection_errors(call, rows, blocks[:, :, rows // BLOCK], gram_matrices(call.module, 4), BLOCK)
    weight = call.module.o_proj.weight.detach()
    for choice in range(3):
        for head in range(4):
            scores = call.q[0, head] @ call.k[0, head // 2].T * call.scale
            mask = blocks[choice, head].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:length, :length].tril()
            sparse = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ call.v[0, head // 2]
            change = (sparse - call.out[0, head])[rows] @ weight[:, head * 8 : head * 8 + 8].T
            assert found[choice, head].item() == pytest.approx(change.square().sum().item(), rel=1e-3, abs=1e-4)


def test_sampled_rows_cover_the_sequence() -> None:
    rows = sample_rows(1000, 10, torch.Generator().manual_seed(0))
    assert (rows // 100).tolist() == list(range(10))
    assert sample_rows(5, 10, torch.Generator()).tolist() == [0, 1, 2, 3, 4]


def run(model: PreTrainedModel, sequences: Tensor, options: XAttentionOptions, out: Path) -> XAttentionCalibrator:
    calibrator = XAttentionCalibrator(options, Target.of(model, sequences.shape[1]))
    calibrate(model, sequences, calibrator, out, overwrite=True)
    return calibrator


@pytest.fixture(scope="module")
def measured(
    tiny_model: PreTrainedModel, sequences: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> XAttentionCalibrator:
    return run(tiny_model, sequences, OPTIONS, tmp_path_factory.mktemp("run") / "out")


def solved(measured: XAttentionCalibrator, **options: float) -> tuple[float, float, float]:
    """Density, error and mean threshold of another target."""
    before = measured.options
    measured.options = replace(before, **options)
    values = tuple(figure.value for figure in measured.finish().figures)
    measured.options = before
    return values


def test_densities_equal_the_methods_choice(
    measured: XAttentionCalibrator, tiny_model: PreTrainedModel, sequences: Tensor
) -> None:
    """Counted once more by the method itself, with the thresholds that were found, on the dense model."""
    outcome = measured.finish()
    kept = []

    def count(call: LayerCall) -> None:
        method = outcome.config.resolve(outcome.head_masks.tolist())[call.layer][0]
        kept.append(method.select(call.q, call.k, scale=call.scale, q_offset=0).counts.sum().item())

    with torch.no_grad(), observed(tiny_model, count):
        for row in sequences:
            tiny_model(row[None])
    density = sum(kept) / (len(sequences) * 2 * 4 * 36)  # layers, heads, causal blocks of 8 x 8
    assert density == pytest.approx(outcome.figures[0].value) and 0.58 < density <= 0.6


def test_density_as_deployed(
    measured: XAttentionCalibrator, tiny_model: PreTrainedModel, sequences: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sparse model, whose activations differ, the density is within 0.03 of the target."""
    kept = []
    select = dynamic.select_blocks

    def counting(*args: object, **kwargs: object) -> BlockSelection:
        selection = select(*args, **kwargs)
        kept.append(selection.counts.sum().item())
        return selection

    monkeypatch.setattr(dynamic, "select_blocks", counting)
    sparsify(tiny_model, measured.finish().config, head_masks=torch.ones(2, 2))
    try:
        with torch.no_grad():
            for row in sequences:
                tiny_model(row[None])
    finally:
        unsparsify(tiny_model)
    assert len(kept) == 8 and sum(kept) / (8 * 4 * 36) == pytest.approx(0.6, abs=0.03)


def test_lower_density_lowers_thresholds_and_raises_the_error(measured: XAttentionCalibrator) -> None:
    targets = (0.45, 0.55, 0.65, 0.75, 0.9, 1.0)
    densities, errors, thresholds = zip(*(solved(measured, target_density=x) for x in targets), strict=True)
    assert list(densities) == sorted(densities) and list(thresholds) == sorted(thresholds)
    assert list(errors) == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[0]
    assert all(x - 0.03 < density <= x for x, density in zip(targets[:-1], densities, strict=False))


def test_thresholds_per_head_beat_one_for_all(measured: XAttentionCalibrator) -> None:
    densities = (measured.kept / measured.causal).mean((0, 1))
    errors = (measured.errors / measured.norms[:, None, None]).sum(1).mean(0).sqrt()
    better = 0
    for density, error in zip(densities[1:-1].tolist(), errors[1:-1].tolist(), strict=True):
        # The choice of one threshold for all is one of those that were searched.
        found = solved(measured, target_density=min(density + 0.005, 1.0))
        assert found[1] <= error + 1e-9
        better += found[1] < 0.9 * error
    assert better > 0


def test_max_error_is_kept_at_least_density(measured: XAttentionCalibrator) -> None:
    _, error, _ = solved(measured, target_density=0.6)
    density, reached, _ = solved(measured, max_error=error * 1.0001)
    assert reached <= error * 1.0001 and density <= 0.6 + 0.005
    loose, tight = solved(measured, max_error=2 * error), solved(measured, max_error=error / 2)
    assert loose[0] < density < tight[0] and tight[1] <= error / 2
    assert solved(measured, max_error=0.0)[1] < 1e-6


def test_errors_fall_as_thresholds_rise(measured: XAttentionCalibrator) -> None:
    kept = measured.kept
    assert (kept.diff(dim=-1) >= 0).all() and (kept[..., -1] == measured.causal).all()
    assert (kept[..., 0] == 4 * 15).all()  # first block and diagonal of 8 rows, four sequences
    assert (measured.errors[..., 0] > measured.errors[..., -2]).all()


def test_artefact_has_one_threshold_per_query_head(
    tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path
) -> None:
    calibrator = run(tiny_model, sequences[:1], OPTIONS, tmp_path / "out")
    config = load_artefact(tmp_path / "out").config
    methods = config.resolve([[1, 1], [1, 1]])
    assert all(method.name == "xattention" and len(method.threshold) == 4 for row in methods for method in row)
    thresholds = torch.tensor([methods[layer][0].threshold for layer in range(2)])
    assert torch.equal(thresholds, calibrator.finish().maps["threshold"].float())


def test_layers_with_a_window_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        use_sliding_window=True,
        max_window_layers=1,
        sliding_window=40,
    )
    config._name_or_path = "test/windows"
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(31, (1, 300), generator=torch.Generator().manual_seed(0))
    run(model, ids, OPTIONS, tmp_path / "out")
    methods = load_artefact(tmp_path / "out").config.resolve([[1, 1]] * 3)
    assert methods[0][0].name == "xattention" and methods[1] == methods[2] == [Dense(), Dense()]
    sparsify(model, tmp_path / "out")
    assert model(ids).logits.isfinite().all()


def test_unreachable_targets_are_refused(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"0\.4167 of 512 tokens"):
        XAttentionCalibrator(replace(OPTIONS, target_density=0.41), Target.of(tiny_model, 512))
    with pytest.raises(ValueError, match="128 tokens are dense"):
        XAttentionCalibrator(OPTIONS, Target.of(tiny_model, 128))
