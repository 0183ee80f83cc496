"""FlexPrefill's gamma and tau: the density that is reached, the search, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf import FlexPrefill, load_artefact
from sparse_hf.calibrate.flexprefill import FlexPrefillCalibrator, FlexPrefillOptions
from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.probe import LayerCall, observed

OPTIONS = FlexPrefillOptions(
    block_size=64, target_density=0.7, min_budget=64, taus="0,0.1,0.3", num_gammas=5, num_passes=3, num_rows=16
)
CAUSAL = 36  # blocks of 8 x 8


def run(
    model: PreTrainedModel, sequences: Tensor, out: Path, options: FlexPrefillOptions = OPTIONS
) -> tuple[FlexPrefill, dict[str, float], FlexPrefillCalibrator]:
    calibrator = FlexPrefillCalibrator(options, Target.of(model, sequences.shape[1]))
    result = calibrate(model, sequences, calibrator, out)
    method = load_artefact(out).config.resolve([[1, 1], [1, 1]])[1][1]
    assert isinstance(method, FlexPrefill)
    return method, {row["case"]: row["value"] for row in result.figures}, calibrator


def density_of(model: PreTrainedModel, sequences: Tensor, method: FlexPrefill) -> float:
    kept = []

    def count(call: LayerCall) -> None:
        kept.append(method.select(call.q, call.k, scale=call.scale, q_offset=0).counts.double().sum().item())

    with torch.no_grad(), observed(model, count):
        for row in sequences:
            model(row[None])
    return sum(kept) / (len(kept) * 4 * CAUSAL)


def test_density_is_reached(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    method, figures, calibrator = run(tiny_model, sequences, tmp_path / "out")
    density = density_of(tiny_model, sequences, method)
    assert density == pytest.approx(figures["density"], abs=1e-9)
    # Whole blocks of few sequences: the density jumps.
    assert 0.65 < density <= 0.7
    assert method.tau in OPTIONS.tau_values and method.min_budget == 64
    # A little more gamma than the search's last step goes beyond the target.
    report = calibrator.finish().report
    tau = OPTIONS.tau_values.index(method.tau)
    ladder = report["gammas"][tau]
    after = ladder[ladder.index(method.gamma) + 1]
    assert density_of(tiny_model, sequences, replace(method, gamma=after)) > 0.7
    assert after - method.gamma < 0.05


def test_the_tau_of_least_error_wins(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    method, figures, _ = run(tiny_model, sequences[:2], tmp_path / "all")
    errors = {}
    for tau in OPTIONS.tau_values:
        _, alone, _ = run(tiny_model, sequences[:2], tmp_path / str(tau), replace(OPTIONS, taus=str(tau)))
        errors[tau] = alone["relative output error"]
    assert method.tau == min(errors, key=errors.__getitem__)
    assert figures["relative output error"] == pytest.approx(min(errors.values()))


def test_lower_target_gives_a_lower_gamma(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    found = []
    for target in (0.6, 0.7, 0.9, 1.0):
        method, figures, _ = run(
            tiny_model, sequences[:2], tmp_path / str(target), replace(OPTIONS, taus="0", target_density=target)
        )
        assert figures["density"] <= target
        found.append((method.gamma, figures["density"], -figures["relative output error"]))
    assert all(list(values) == sorted(values) for values in zip(*found, strict=True)) and found[0] < found[-1]
    assert found[-1][0] > 0.99


def test_bad_options_are_refused(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--taus takes numbers"):
        replace(OPTIONS, taus="0,x")
    with pytest.raises(ValueError, match="tau must lie"):
        replace(OPTIONS, taus="2")
    with pytest.raises(ValueError, match="--num-gammas must be >= 3"):
        replace(OPTIONS, num_gammas=2)
    with pytest.raises(ValueError, match=r"the least is 0\.\d+ at min_budget 256"):
        run(tiny_model, sequences[:1], tmp_path / "out", replace(OPTIONS, min_budget=256, target_density=0.3))
