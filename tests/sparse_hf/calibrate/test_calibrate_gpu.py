"""Calibrations on a GPU: the CPU's figures, and memory that does not grow with the square of the length."""

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
    "xattention": {"target_density": 0.8, "num_rows": 32},
    "flexprefill": {"target_density": 0.8, "min_budget": 128, "num_passes": 1},
    "scores": {"num_sink_tokens": 4, "window_size": 32},
}
STATISTICS = {"xattention": ("kept", "errors"), "flexprefill": ("kept", "errors"), "scores": ("changes", "retrieval")}


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
        # A block on the border of a threshold may fall to either side.
        assert (ours - theirs).abs().sum() <= 0.02 * theirs.abs().sum(), key


@pytest.mark.parametrize("name", OPTIONS)
def test_32k_tokens_of_an_8b_shape(name: str, tmp_path: Path) -> None:
    """Two layers of Llama-3.1-8B's shape in bf16; scores of one layer alone would be 128 GiB in fp32."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=1024,
        num_hidden_layers=2,
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
    ids = torch.randint(1024, (1, 32768), generator=torch.Generator().manual_seed(0))
    kind = calibrator_class(name)
    options = {"xattention": {"target_density": 0.3}, "flexprefill": {"target_density": 0.6}, "scores": {}}[name]
    calibrator = kind(kind.Options(**options), Target.of(model, 32768))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calibrator.begin_pass(0)
    calibrator.run(model, ids.cuda(), 0)
    end.record()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"{name}: {start.elapsed_time(end) / 1000:.2f} s for two layers, peak {peak:.2f} GiB")
    assert peak < 8
    assert all(x.isfinite().all() for x in calibrator.state().values())
