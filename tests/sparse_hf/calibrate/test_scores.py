"""Head scores: planted retrieval heads win, and both parts equal their definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf import Streaming, load_artefact
from sparse_hf.adapters import ModelShape
from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.probe import LayerCall, observed
from sparse_hf.calibrate.scores import ScoresCalibrator, ScoresOptions
from sparse_hf_kernels import UNBOUNDED, TokenPositions

SINKS, WINDOW, LENGTH, DIM, GROUP, KV_HEADS = 2, 16, 256, 32, 2, 4
OPTIONS = ScoresOptions(num_sink_tokens=SINKS, window_size=WINDOW)
SHAPE = ModelShape(model_type="llama", num_layers=1, num_heads=GROUP * KV_HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
TARGET = Target(shape=SHAPE, windows=(UNBOUNDED,), seq_len=LENGTH)


def make_call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> LayerCall:
    """Dense attention, in full."""
    length = q.shape[2]
    mask = torch.ones(length, length).tril().bool()
    scores = (q @ k.repeat_interleave(GROUP, 1).mT * DIM**-0.5).masked_fill(~mask, float("-inf"))
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = nn.Parameter(weight)
    return LayerCall(
        layer=0,
        q=q,
        k=k,
        v=v,
        out=scores.softmax(-1) @ v.repeat_interleave(GROUP, 1),
        lse=scores.logsumexp(-1),
        scale=DIM**-0.5,
        positions=TokenPositions.causal(length, length),
        module=SimpleNamespace(o_proj=projection),  # type: ignore[arg-type]
    )


def local_heads(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of heads whose scores fall with the distance: rotations by position, and little else."""
    angles = torch.arange(LENGTH)[:, None] * (2.0 ** -torch.arange(0, DIM // 2))
    turns = torch.cat([angles.cos(), angles.sin()], -1) * 3
    q = turns.expand(1, GROUP * KV_HEADS, -1, -1).clone()
    k = turns.expand(1, KV_HEADS, -1, -1).clone()
    v = torch.randn(1, KV_HEADS, LENGTH, DIM, generator=generator)
    return q, k, v


def plant(q: Tensor, k: Tensor, kv_head: int, query_head: int, codes: Tensor, shift: int) -> None:
    """This query head reads the key whose code is its own, `shift` tokens later than where that code stood first."""
    half = LENGTH // 2
    k[0, kv_head] = codes
    q[0, kv_head * GROUP + query_head] = codes * 4
    q[0, kv_head * GROUP + query_head, half : LENGTH - 1] = codes[shift : half - 1 + shift] * 4


def codes_of(generator: torch.Generator) -> Tensor:
    """Nearly orthogonal directions, the second half a repetition of the first: `[LENGTH, DIM]`."""
    half = nn.functional.normalize(torch.randn(LENGTH // 2, DIM, generator=generator), dim=-1) * DIM**0.5
    return half.repeat(2, 1)


@pytest.mark.parametrize("head", range(KV_HEADS))
def test_planted_retrieval_head_scores_highest(head: int) -> None:
    """One of its two query heads reads far keys on the text, and the next token of the first copy."""
    generator = torch.Generator().manual_seed(head)
    q, k, v = local_heads(generator)
    first_only = codes_of(generator)
    first_only[LENGTH // 2 :] = 0  # the key is found in the first half alone
    plant(q, k, head, 1, first_only, shift=1)
    call = make_call(q, k, v, torch.randn(48, GROUP * KV_HEADS * DIM, generator=generator))
    calibrator = ScoresCalibrator(OPTIONS, TARGET)
    calibrator.observe(call)
    calibrator.observe_repeated(call)
    calibrator.count += 1
    for weight in (0.0, 0.5, 1.0):
        calibrator.options = replace(OPTIONS, retrieval_weight=weight, sparsity=0.75)
        outcome = calibrator.finish()
        scores = outcome.scores[0]
        assert scores.argmax() == head and scores[head] == 1
        assert scores.sort(descending=True).values[1] < 0.6
        assert outcome.head_masks.tolist() == [[int(n == head) for n in range(KV_HEADS)]]


def test_changes_equal_the_definition() -> None:
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, n, LENGTH, DIM, generator=generator) for n in (GROUP * KV_HEADS, KV_HEADS, KV_HEADS))
    weight = torch.randn(48, GROUP * KV_HEADS * DIM, generator=generator)
    call = make_call(q * 2, k, v, weight)
    calibrator = ScoresCalibrator(OPTIONS, TARGET)
    calibrator.observe(call)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    mask = ((i - j < WINDOW) | (j < SINKS)) & (j <= i)
    scores = (call.q @ k.repeat_interleave(GROUP, 1).mT * call.scale).masked_fill(~mask, float("-inf"))
    streamed = scores.softmax(-1) @ v.repeat_interleave(GROUP, 1)
    dense = call.out[0].transpose(0, 1).flatten(1) @ weight.T
    late = slice(LENGTH // 2, None)
    assert calibrator.norms.item() == pytest.approx(dense[late].square().sum().item(), rel=1e-4)
    for head in range(KV_HEADS):
        # The layer's output with this KV head's group streaming and all others dense.
        mixed = call.out[0].clone()
        group = slice(head * GROUP, (head + 1) * GROUP)
        mixed[group] = streamed[0, group]
        change = mixed.transpose(0, 1).flatten(1) @ weight.T - dense
        expected = change[late].square().sum().item()
        assert calibrator.changes[0, head].item() == pytest.approx(expected, rel=1e-3)


def test_retrieval_is_the_mass_on_the_next_token(tiny_model: PreTrainedModel, sequences: Tensor) -> None:
    """From the weights of eager attention on the repeated tokens."""
    target = Target.of(tiny_model, 512)
    calibrator = ScoresCalibrator(OPTIONS, target)
    calibrator.run(tiny_model, sequences[:1], 0)
    ids = calibrator.repeated(sequences[:1])
    assert ids.shape == (1, 512) and torch.equal(ids[:, :256], ids[:, 256:])
    assert set(ids.flatten().tolist()) <= set(sequences[0].tolist())
    weights: list[Tensor] = []

    def keep(call: LayerCall) -> None:
        mask = torch.ones(512, 512).tril().bool()
        scores = (call.q @ call.k.repeat_interleave(2, 1).mT * call.scale).masked_fill(~mask, float("-inf"))
        weights.append(scores.softmax(-1)[0])

    with torch.no_grad(), observed(tiny_model, keep):
        tiny_model(ids)
    t = torch.arange(255)
    for layer in range(2):
        mass = weights[layer][:, 256 + t, t + 1].mean(-1).view(2, 2).amax(1)
        torch.testing.assert_close(calibrator.retrieval[layer].float(), mass, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_seed_and_sequence_alone(tiny_model: PreTrainedModel, sequences: Tensor) -> None:
    def drawn(seed: int, sequence: int) -> list[int]:
        calibrator = ScoresCalibrator(OPTIONS, Target.of(tiny_model, 512), seed)
        calibrator.sequence = sequence
        return calibrator.repeated(sequences[:1]).flatten().tolist()

    assert drawn(0, 1) == drawn(0, 1) and drawn(0, 1) != drawn(0, 2) and drawn(0, 1) != drawn(1, 1)


def test_artefact_has_scores_and_masks(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    calibrator = ScoresCalibrator(replace(OPTIONS, sparsity=0.75), Target.of(tiny_model, 512))
    calibrate(tiny_model, sequences[:1], calibrator, tmp_path / "out")
    artefact = load_artefact(tmp_path / "out")
    assert artefact.scores is not None and artefact.scores.shape == (2, 2)
    assert artefact.scores.min() >= 0 and artefact.scores.max() <= 1
    assert artefact.head_masks.sum() == 1 and artefact.head_masks.flatten().argmax() == artefact.scores.argmax()
    assert artefact.config.sparse == Streaming(num_sink_tokens=SINKS, window_size=WINDOW)


def test_short_context_warns_and_too_short_is_refused(tiny_model: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="--seq-len 512 is below 8 times"):
        ScoresCalibrator(replace(OPTIONS, window_size=100), Target.of(tiny_model, 512))
    with pytest.raises(ValueError, match="lies within sinks and window"):
        ScoresCalibrator(replace(OPTIONS, window_size=300), Target.of(tiny_model, 512))
    with pytest.raises(ValueError, match="--sparsity must lie"):
        replace(OPTIONS, sparsity=1.2)
