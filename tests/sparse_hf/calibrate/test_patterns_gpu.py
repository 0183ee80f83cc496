"""Layers' gradients and heads' patterns on a GPU: the CPU's figures, and memory linear in the length."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.registry import calibrator_class

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "triangle": {"window_size": 32, "num_last_tokens": 16, "held_out": 2},
    "minference": {"target_density": 0.9, "num_rows": 32},
}
STATISTICS = {"triangle": ("gradients", "losses"), "minference": ("slash_costs", "costs", "errors", "norms")}


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_equal_the_cpus(name: str, tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    kind, found = calibrator_class(name), []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny_model).to(device)
        calibrator = kind(kind.Options(**OPTIONS[name]), Target.of(model, 512))
        calibrate(model, sequences[:2], calibrator, tmp_path / device)
        found.append(calibrator.state())
    for key in STATISTICS[name]:
        ours, theirs = found[1][key], found[0][key]
        # Diagonals and blocks of nearly equal scores may be ranked otherwise.
        assert (ours - theirs).abs().sum() <= 0.02 * theirs.abs().sum() + 1e-6, key


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_at_32k_tokens_of_an_8b_shape(name: str, tmp_path: Path) -> None:
    """Three layers of Llama-3.1-8B's shape in bf16; the scores of one layer alone would be 128 GiB in fp32."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._name_or_path = "test/8b"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(1024, (2, 32768), generator=torch.Generator().manual_seed(0))
    kind = calibrator_class(name)
    options = {"triangle": {"held_out": 2, "layer_step": 3, "max_loss_increase": 1e9}, "minference": {}}[name]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome = calibrate(model, ids, kind(kind.Options(**options), Target.of(model, 32768)), tmp_path / "a").outcome
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**30
    if name == "triangle":
        first, second, last = outcome.report["gradients"]
        assert first > 0 and second > 0 and last == 0
    else:
        density = next(row.value for row in outcome.figures if row.case == "density")
        assert 0.2 < density <= 0.3
