"""The search for MInference's patterns: planted heads get theirs, at equal cost; errors are those of the definition."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sparse_hf import MInference, MInferenceHead, load_artefact, sparsify, unsparsify
from sparse_hf.adapters import ModelShape
from sparse_hf.calibrate.framework import STATISTICS_FILE, Outcome, Target, calibrate
from sparse_hf.calibrate.minference import MInferenceCalibrator, MInferenceOptions, pattern_errors
from sparse_hf.calibrate.probe import LayerCall
from sparse_hf.cli import build_app
from sparse_hf_kernels import UNBOUNDED, TokenPositions

LENGTH, SIZE, WIDTH = 2048, 64, 8
OPTIONS: dict[str, Any] = {"block_size": SIZE, "target_density": 0.5, "num_rows": 64}


def planted() -> Tensor:
    """Scores `[4, LENGTH, LENGTH]`: single columns; far diagonals; sinks and a window; blocks.

    Where blocks are not what is planted, their means say nothing.
    """
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    scores = 0.3 * torch.randn(4, LENGTH, LENGTH, generator=generator)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    hot = torch.tensor([rng.randrange(64 * b, 64 * b + 64) for b in range(1, 26) for _ in range(6)])
    scores[0][:, hot] += 8
    for distance in (700, 1088, 1500):  # 1088 = 17 * 64 lies on one block diagonal, the others cross two
        scores[1][i - j == distance] += 12
        scores[1][(i - distance) // SIZE == j // SIZE] -= 12 / SIZE
    inside = (j < 128) | (i - j < 384)
    comb = torch.where((i - j) % 16 == 0, 10.0, -2 / 3)
    scores[2] += torch.where(inside, comb, torch.zeros(()))
    blocks = torch.zeros(LENGTH // SIZE, LENGTH // SIZE)
    for row in range(LENGTH // SIZE):
        blocks[row, rng.sample(range(row + 1), min(4, row + 1))] = 3
    scores[3] += blocks.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)
    return scores


def call_of(scores: Tensor) -> LayerCall:
    """One KV head whose keys are unit vectors: q . k is what was planted."""
    length = scores.shape[-1]
    k = torch.eye(length)[None, None]
    v = torch.randn(1, 1, length, WIDTH, generator=torch.Generator().manual_seed(1))
    nothing = torch.empty(0)
    return LayerCall(
        layer=0,
        q=scores[None],
        k=k,
        v=v,
        out=nothing,
        lse=nothing,
        scale=1.0,
        positions=TokenPositions.causal(length, length, k.device),
        module=nn.Identity(),
    )


def target_of(length: int, num_heads: int = 4) -> Target:
    shape = ModelShape(model_type="llama", num_layers=1, num_heads=num_heads, num_kv_heads=1, head_dim=16)
    return Target(shape=shape, windows=(UNBOUNDED,), seq_len=length)


@pytest.fixture(scope="module")
def search() -> tuple[MInferenceCalibrator, Outcome]:
    call = call_of(planted())
    calibrator = MInferenceCalibrator(MInferenceOptions(**OPTIONS), target_of(LENGTH))
    for number in (0, 1):
        calibrator.begin_pass(number)
        calibrator.observe(call)
    return calibrator, calibrator.finish()


def test_planted_heads_get_their_pattern(search: tuple[MInferenceCalibrator, Outcome]) -> None:
    _, outcome = search
    (rule,) = outcome.config.rules
    assert isinstance(rule.full, MInference) and rule.full.block_size == SIZE
    vertical, slash, local, _ = rule.full.heads
    assert [entry.kind for entry in rule.full.heads] == ["vertical_slash", "vertical_slash", "a_shape", "block_sparse"]
    assert vertical.vertical_size == 3000 * LENGTH // 32768 >= 150
    assert slash.slash_size >= 103
    assert (local.n_init, local.n_local) == (128, 384)
    # The winner is much better than what is not the head's own.
    errors = dict(zip(outcome.report["candidates"], torch.tensor(outcome.report["relative_errors"][0]).T, strict=True))
    assert errors["a_shape"][2] < 0.1 * min(errors[name][2] for name in errors if name != "a_shape")
    assert errors["block_sparse"][3] < 0.7 * min(errors[name][3] for name in errors if name != "block_sparse")
    assert errors["vertical_slash 187"][0] < 0.5 * min(errors["a_shape"][0], errors["block_sparse"][0])
    assert max(errors[name][1] for name in errors if "slash 3" in name) < 0.3 * errors["a_shape"][1]


def test_candidates_cost_the_same(search: tuple[MInferenceCalibrator, Outcome]) -> None:
    """Blocks counted by hand: no candidate is beyond the budget, none far below it."""
    calibrator, outcome = search
    densities = torch.tensor(outcome.report["densities"][0])
    assert calibrator.verticals == (30, 31, 187)
    assert densities.max() <= 0.5 and densities.min() > 0.8 * 0.5
    num_blocks = LENGTH // SIZE
    a_shape = sum(len({b for b in range(row + 1) if b < 2 or row - b <= 6}) for row in range(num_blocks))
    causal = num_blocks * (num_blocks + 1) / 2
    assert densities[:, 3].tolist() == pytest.approx([a_shape / causal] * 4)
    (top_k,) = {entry.top_k for entry in calibrator.fixed if entry.kind == "block_sparse"}
    assert sum(min(top_k, row + 1) for row in range(num_blocks)) <= 0.5 * causal
    assert sum(min(top_k + 1, row + 1) for row in range(num_blocks)) > 0.5 * causal
    # What the first pass took numbers of diagonals to cost is what selections cost.
    call = call_of(planted())
    for n in (0, 1, 40, 150, len(calibrator.slashes) - 1):
        entry = MInferenceHead(vertical_size=30, slash_size=int(calibrator.slashes[n]))
        chosen = MInference(heads=(entry,) * 4, block_size=SIZE).select(call.q, call.k, scale=1.0, q_offset=0)
        assert calibrator.slash_costs[0, :, n].tolist() == chosen.counts[0].sum(-1).tolist()


def test_winners_are_not_rewritten(search: tuple[MInferenceCalibrator, Outcome], tmp_path: Path) -> None:
    from sparse_hf.interop import export_minference, import_minference

    calibrator, outcome = search
    config = outcome.config.from_dict({**outcome.config.to_dict(), "head_masks": "all_full"})
    with pytest.warns(UserWarning, match="block_sparse"):
        out = export_minference(config, tmp_path / "best.json", model_or_shape=calibrator.target.shape)
    (row,) = json.loads(out.read_text())
    assert [row[str(head)][0] for head in range(4)] == [
        "vertical_and_slash",
        "vertical_and_slash",
        "stream_llm",
        "block_sparse",
    ]
    again = import_minference(out, calibrator.target.shape, block_size=SIZE)
    assert again.config.sparse == outcome.config.rules[0].full


def test_errors_are_those_of_masked_attention() -> None:
    torch.manual_seed(0)
    length, rows = 300, torch.tensor([0, 5, 63, 64, 130, 299])
    q, k, v = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16), torch.randn(1, 2, length, WIDTH)
    nothing = torch.empty(0)
    call = LayerCall(
        layer=0,
        q=2 * q,
        k=k,
        v=v,
        out=nothing,
        lse=nothing,
        scale=0.3,
        positions=TokenPositions.causal(length, length, q.device),
        module=nn.Identity(),
    )
    blocks = torch.rand(2, 4, len(rows), 5) < 0.5
    blocks[..., 0] = True
    columns = torch.tensor([[[3, 70, 200], [-1, -1, 299], [66, 65, -1], [-1, -1, -1]]], dtype=torch.int32)
    errors, norms = pattern_errors(call, rows, [(blocks[0], None), (blocks[1], columns)], SIZE)
    for head in range(4):
        expected, total = [0.0, 0.0], 0.0
        for n, i in enumerate(rows.tolist()):
            weights = (2 * q[0, head, i] @ k[0, head // 2].T * 0.3).exp()
            keys = torch.arange(length)
            dense = torch.where(keys <= i, weights, torch.zeros(()))
            truth = dense @ v[0, head // 2] / dense.sum()
            total += float((truth**2).sum())
            for choice, single in enumerate(([], columns[0, head].tolist())):
                kept = [j for j in range(i + 1) if blocks[choice, head, n, j // SIZE] or j in single]
                ours = dense[kept] @ v[0, head // 2][kept] / dense[kept].sum()
                expected[choice] += float(((ours - truth) ** 2).sum())
        torch.testing.assert_close(errors[:, head], torch.tensor(expected), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(norms[head].item(), total, rtol=1e-3, atol=1e-6)


def calibrator_of(model: PreTrainedModel, seq_len: int = 512, **options: Any) -> MInferenceCalibrator:
    values = {**OPTIONS, "num_rows": 16, **options}
    return MInferenceCalibrator(MInferenceOptions(**values), Target.of(model, seq_len))


def test_sequences_add_up(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    """Two sequences: sizes from the mean cost of both, errors from both."""
    both = calibrator_of(tiny_model)
    calibrate(tiny_model, sequences[:2], both, tmp_path / "both")
    parts = []
    for n in range(2):
        calibrator = calibrator_of(tiny_model)
        calibrator.begin_pass(0)
        calibrator.run(tiny_model, sequences[n : n + 1], n)
        parts.append(calibrator.slash_costs)
    torch.testing.assert_close(both.slash_costs, parts[0] + parts[1])
    assert both.count == 2 and both.costs.min() > 0 and (both.norms > 0).all()


def test_resumed_run_gives_the_same_bits(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    calibrate(tiny_model, sequences[:2], calibrator_of(tiny_model), tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(figures: str) -> None:
        raise Killed

    for _ in range(3):  # after each sequence of both passes but the last
        with pytest.raises(Killed):
            calibrate(
                tiny_model, sequences[:2], calibrator_of(tiny_model), tmp_path / "cut", resume=True, progress=kill
            )
    calibrate(tiny_model, sequences[:2], calibrator_of(tiny_model), tmp_path / "cut", resume=True)
    ours, theirs = (load_file(tmp_path / name / STATISTICS_FILE) for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_artefact(tmp_path / "cut").config == load_artefact(tmp_path / "whole").config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_density": 0.0}, r"in \(0, 1\]"),
        ({"num_rows": 1}, "--num-rows must be >= 2"),
        ({"block_size": 32}, "block_size must be one of"),
        ({"target_density": 0.2}, "below what the first block and the diagonal alone are"),
    ],
)
def test_options_that_cannot_be(tiny_model: PreTrainedModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrator_of(tiny_model, **options)


def test_full_density_is_exact(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    """With all blocks allowed some pattern has no error at all."""
    calibrator = calibrator_of(tiny_model, target_density=1.0)
    outcome = calibrate(tiny_model, sequences[:1], calibrator, tmp_path / "a").outcome
    error = next(row.value for row in outcome.figures if row.case == "relative output error")
    assert error < 1e-3


def test_command_and_export(model_folder: Path, words_file: Path, tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    args = ["calibrate", "minference", "--model", model_folder, "--data", words_file, "--out", tmp_path / "out"]
    args += ["--num-sequences", 2, "--seq-len", 512, "--block-size", 64, "--target-density", 0.6, "--num-rows", 16]
    result = CliRunner().invoke(build_app(), [*map(str, args), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    figures = {row["case"]: row["value"] for row in json.loads(result.stdout)}
    assert 0.4 < figures["density"] < 0.65
    assert sum(figures[f"{kind} heads"] for kind in ("vertical_slash", "block_sparse", "a_shape")) == 1
    sparsify(tiny_model, tmp_path / "out", check_base_model=False)
    try:
        with torch.no_grad():
            assert tiny_model(torch.arange(97)[None].repeat(1, 5)).logits.isfinite().all()
    finally:
        unsparsify(tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export = ["export", tmp_path / "out", "--format", "minference", "--out", tmp_path / "best.json"]
        result = CliRunner().invoke(build_app(), list(map(str, export)))
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = json.loads((tmp_path / "best.json").read_text())
    assert [sorted(row) for row in rows] == [["0", "1", "2", "3"]] * 2
