"""The gradient of each layer's Middle against autograd on dense scores, and which layers become triangle."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from sparse_hf import Dense, SparseConfig, Triangle, is_sparsified, load_artefact, sparsify, unsparsify
from sparse_hf.calibrate import middle
from sparse_hf.calibrate.framework import STATISTICS_FILE, Target, calibrate
from sparse_hf.calibrate.middle import num_middle_cells, probe_middles
from sparse_hf.calibrate.triangle import TriangleCalibrator, TriangleOptions
from sparse_hf.cli import build_app
from sparse_hf_kernels import UNBOUNDED

TRIANGLE = Triangle(num_sink_tokens=3, window_size=7, num_last_tokens=5)
SIZES = {"num_sink_tokens": 3, "window_size": 7, "num_last_tokens": 5}
LENGTH = 48
WINDOW = 21
COMMON = {"vocab_size": 97, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None}


def in_middle(i: int, j: int, length: int) -> bool:
    return j >= 3 and i - j >= 7 and i < length - 5


def brute_force(model: PreTrainedModel, ids: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, float]:
    """Means of |dS| `[num_layers, num_heads]` by autograd on N x N scores, cell by cell; and the logit."""
    scores: list[Tensor] = []

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group, length = q.shape[1] // k.shape[1], q.shape[2]
        s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * (scaling or q.shape[-1] ** -0.5)
        s.retain_grad()
        window = windows[len(scores)]
        scores.append(s)
        keep = torch.tensor([[0 <= i - j < window for j in range(length)] for i in range(length)])
        out = s.masked_fill(~keep, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)
        return out.transpose(1, 2), None

    AttentionInterface.register("test_scores", attend)
    AttentionMaskInterface.register("test_scores", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = "test_scores"
    try:
        embeds = model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
        logit = model(inputs_embeds=embeds, use_cache=False).logits[0, -1, ids[0, -1]]
        logit.backward()
    finally:
        model.config._attn_implementation = before
        model.zero_grad()
    means = torch.zeros(len(scores), scores[0].shape[1], dtype=torch.float64)
    for layer, s in enumerate(scores):
        assert s.grad is not None
        length = s.shape[-1]
        cells = [
            (i, j) for i in range(length) for j in range(i + 1) if in_middle(i, j, length) and i - j < windows[layer]
        ]
        for head in range(s.shape[1]):
            means[layer, head] = sum(abs(float(s.grad[0, head, i, j])) for i, j in cells) / max(len(cells), 1)
    return means, logit.item()


def probed(model: PreTrainedModel, ids: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, float]:
    means = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads, dtype=torch.float64)

    def found(layer: int, sums: Tensor, cells: int) -> None:
        assert not means[layer].any(), "each layer once"
        means[layer] = sums / cells

    logit = probe_middles(model, ids, TRIANGLE, windows, found)
    return means, logit


def models(tiny_model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    torch.manual_seed(1)
    rope = {**COMMON, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    native = Qwen2Config(
        **rope, num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )
    gpt2 = GPT2Config(**COMMON, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    return {
        "llama": tiny_model,
        "qwen2_native": Qwen2ForCausalLM(native).eval(),
        "gpt2": GPT2LMHeadModel(gpt2).eval(),  # its dropout must stay off
    }


@pytest.mark.parametrize("name", ["llama", "qwen2_native", "gpt2"])
@pytest.mark.parametrize("at_once", [2**26, 200], ids=["one chunk", "chunks"])
def test_gradients_are_those_of_autograd(
    name: str, at_once: int, tiny_model: PreTrainedModel, sequences: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middle, "CELLS_AT_ONCE", at_once)
    model, ids = models(tiny_model)[name], sequences[:1, :LENGTH]
    windows = (UNBOUNDED, *[WINDOW if name == "qwen2_native" else UNBOUNDED] * 3)[: model.config.num_hidden_layers]
    states = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    hooks = len(model.get_input_embeddings()._forward_hooks)
    expected, logit = brute_force(model, ids, windows)
    means, ours = probed(model, ids, windows)
    assert expected[:-1].min() > 0 and abs(ours - logit) < 1e-4
    assert not expected[-1].any(), "the last layer's Middle reaches the last token in no way"
    torch.testing.assert_close(means, expected, rtol=1e-3, atol=1e-3 * expected[:-1].min().item())
    # The model is left as it was.
    assert states == [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert len(model.get_input_embeddings()._forward_hooks) == hooks


@pytest.mark.parametrize("window", [UNBOUNDED, 30, 8, 7, 1])
@pytest.mark.parametrize("length", [5, 15, 16, 40])
def test_cells_of_the_middle(window: int, length: int) -> None:
    cells = [in_middle(i, j, length) and i - j < window for i in range(length) for j in range(i + 1)]
    assert num_middle_cells(TRIANGLE, length, window) == sum(cells)


def test_triangle_leaves_out_the_middle_alone() -> None:
    """The pattern's own mask is the complement of what is probed."""
    from sparse_hf_kernels import AttentionLayout

    layout = AttentionLayout(patterns=(TRIANGLE.pattern(),))
    assert int(layout.row_counts(layout.patterns[0], 40).sum()) == 40 * 41 // 2 - num_middle_cells(
        TRIANGLE, 40, UNBOUNDED
    )


@pytest.fixture
def layered(tiny_model: PreTrainedModel) -> PreTrainedModel:
    """Four layers, of which layer 2 adds nothing to the stream."""
    torch.manual_seed(5)
    config = copy.deepcopy(tiny_model.config)
    config.num_hidden_layers = 4
    config._name_or_path = "test/layered"
    model = type(tiny_model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    return model


def calibrator_of(model: PreTrainedModel, seq_len: int = LENGTH, **options: Any) -> TriangleCalibrator:
    return TriangleCalibrator(TriangleOptions(**{**SIZES, **options}), Target.of(model, seq_len))


def test_layers_that_do_not_matter_come_first(layered: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    ids = sequences[:3, :LENGTH]
    calibrator = calibrator_of(layered, held_out=0, num_layers=1)
    outcome = calibrate(layered, ids, calibrator, tmp_path / "a").outcome
    gradients = torch.tensor(outcome.report["gradients"])
    assert gradients[2] == gradients[3] == 0 and (gradients[:2] > 0).all()
    assert outcome.report["triangle_layers"] == [2]
    # Means over sequences of what the definition gives.
    expected = torch.stack([brute_force(layered, ids[n : n + 1], (UNBOUNDED,) * 4)[0] for n in range(3)]).mean((0, 2))
    torch.testing.assert_close(gradients.double(), expected, rtol=1e-3, atol=1e-9)
    # More layers are solved from what was measured, in ascending order and not necessarily contiguous.
    calibrator = calibrator_of(layered, held_out=0, num_layers=3)
    outcome = calibrate(layered, ids, calibrator, tmp_path / "a", resume=True).outcome
    assert outcome.report["triangle_layers"] == sorted(expected.argsort(stable=True)[:3].tolist())
    artefact = load_artefact(tmp_path / "a")
    methods = artefact.config.resolve(artefact.head_masks.tolist())
    left = int(expected.argmax())
    assert methods == [[Dense() if layer == left else TRIANGLE] * 2 for layer in range(4)]
    density = next(row for row in outcome.figures if row.case == "density").value
    kept = num_middle_cells(TRIANGLE, LENGTH, UNBOUNDED) / (LENGTH * (LENGTH + 1) / 2)
    assert density == pytest.approx(1 - 0.75 * kept)


def loss_with(model: PreTrainedModel, ids: Tensor, layers: list[int]) -> float:
    """Of the last queries that stay dense, by the model's own logits."""
    if layers:
        rules = [{"layers": ",".join(map(str, layers)), "sparse": TRIANGLE}]
        sparsify(model, SparseConfig(sparse="dense", rules=rules))
    with torch.no_grad():
        logits = model(ids).logits[0]
    if layers:
        unsparsify(model)
    picked = [-logits[i].log_softmax(-1)[ids[0, i + 1]].item() for i in range(LENGTH - 5, LENGTH - 1)]
    return sum(picked) / len(picked)


def test_losses_bound_the_number_of_layers(layered: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    ids = sequences[:4, :LENGTH]  # the second and the fourth are held out
    outcome = calibrate(layered, ids, calibrator_of(layered, held_out=2), tmp_path / "a").outcome
    order = outcome.report["order"]
    expected = []
    for count in range(5):
        losses = [loss_with(layered, ids[n : n + 1], order[:count]) for n in (1, 3)]
        expected.append(sum(losses) / 2)
    increases = outcome.report["loss_increases"]
    assert outcome.report["num_layers_tried"] == [0, 1, 2, 3, 4]
    assert increases == pytest.approx([loss - expected[0] for loss in expected], abs=1e-4)
    assert order[0] == 2 and abs(increases[1]) < 1e-5, "the layer that adds nothing costs nothing"
    gradients = [brute_force(layered, ids[n : n + 1], (UNBOUNDED,) * 4)[0].mean(1) for n in (0, 2)]
    total = gradients[0] + gradients[1]
    assert order == total.argsort(stable=True).tolist(), "held-out sequences have no say in the order"
    assert not is_sparsified(layered)
    for bound in (0.0, 0.5, 1e9):
        other = calibrator_of(layered, held_out=2, max_loss_increase=bound)
        found = calibrate(layered, ids, other, tmp_path / "a", resume=True).outcome
        count = 0
        while count < 4 and increases[count + 1] <= bound:
            count += 1
        assert found.report["triangle_layers"] == sorted(order[:count])
        value = next(row.value for row in found.figures if row.case == "loss increase")
        assert value == pytest.approx(increases[count])


def test_resumed_run_gives_the_same_bits(layered: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    ids = sequences[:4, :LENGTH]
    calibrate(layered, ids, calibrator_of(layered, held_out=2, layer_step=3), tmp_path / "whole")

    class Killed(BaseException):
        pass

    for number in (1, 2, 2, 2):
        left = [number]

        def kill(figures: str, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed

        with pytest.raises(Killed):
            calibrate(
                layered,
                ids,
                calibrator_of(layered, held_out=2, layer_step=3),
                tmp_path / "cut",
                resume=True,
                progress=kill,
            )
    found = calibrate(layered, ids, calibrator_of(layered, held_out=2, layer_step=3), tmp_path / "cut", resume=True)
    assert found.outcome.report["num_layers_tried"] == [0, 3, 4]
    ours, theirs = (load_file(tmp_path / name / STATISTICS_FILE) for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_artefact(tmp_path / "cut").config == load_artefact(tmp_path / "whole").config


def test_layers_without_a_middle_are_left_alone(sequences: Tensor, tmp_path: Path) -> None:
    rope = {**COMMON, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**rope, num_hidden_layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=2)
    config._name_or_path = "test/native"
    model = Qwen2ForCausalLM(config).eval()
    calibrator = calibrator_of(model, held_out=0, num_layers=2)
    outcome = calibrate(model, sequences[:1, :LENGTH], calibrator, tmp_path / "a").outcome
    assert outcome.report["gradients"][2] == 0 and outcome.report["triangle_layers"] == [0, 1]
    with pytest.raises(ValueError, match="--num-layers 3 is more than the 2 layers to choose"):
        calibrator_of(model, held_out=0, num_layers=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 0}, "with --held-out 0 no loss is measured; give --num-layers"),
        ({"held_out": 1}, "--held-out must be 0 or at least 2"),
        ({"num_last_tokens": 1}, "--num-last-tokens must be at least 2"),
        ({"max_loss_increase": -1.0}, "--max-loss-increase must not be negative"),
        ({"num_layers": -1}, "--num-layers must not be negative"),
        ({"window_size": 0}, "window_size must be a positive integer"),
        ({"window_size": 600}, "no layer has a Middle at 47 tokens.*raise --seq-len"),
    ],
)
def test_options_that_cannot_be(tiny_model: PreTrainedModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrator_of(tiny_model, **options)


def test_too_few_sequences(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    calibrator = calibrator_of(tiny_model, held_out=4)
    with pytest.raises(ValueError, match="no sequence was held out"):
        calibrate(tiny_model, sequences[:2, :LENGTH], calibrator, tmp_path / "a")
    calibrator.options = replace(calibrator.options, num_layers=1)
    found = calibrate(tiny_model, sequences[:2, :LENGTH], calibrator, tmp_path / "a", resume=True)
    assert len(found.outcome.report["triangle_layers"]) == 1


def test_command(model_folder: Path, words_file: Path, tmp_path: Path) -> None:
    args = ["calibrate", "triangle", "--model", model_folder, "--data", words_file, "--out", tmp_path / "out"]
    args += ["--num-sequences", 4, "--seq-len", 128, "--window-size", 16, "--num-last-tokens", 8, "--held-out", 2]
    args += ["--max-loss-increase", 1e9, "--device", "cpu", "--json"]
    result = CliRunner().invoke(build_app(), list(map(str, args)))
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert {row["case"] for row in json.loads(result.stdout)} >= {"triangle layers", "loss increase", "density"}
    artefact = load_artefact(tmp_path / "out")
    (rule,) = artefact.config.rules
    assert rule.layers == "0-1" and rule.full == Triangle(window_size=16, num_last_tokens=8)
