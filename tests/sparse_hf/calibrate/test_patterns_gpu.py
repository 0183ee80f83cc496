"""Layers' gradients and heads' patterns on a GPU: the CPU's figures, and memory linear in the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.registry import calibrator_class

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "triangle": {"window_size": 32, "num_last_tokens": 16, "held_out": 2},
    "minference": {"target_density": 0.9, "num_rows": 32},
}
STATISTICS = {"triangle": ("gradients", "losses"), "minference": ("slash_costs", "costs", "errors", "norms")}


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_equal_the_cpus(name: str, assert_cpu_and_gpu_agree: Callable) -> None:
    assert_cpu_and_gpu_agree(name, OPTIONS[name], STATISTICS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_at_32k_tokens_of_an_8b_shape(name: str, make_8b_shape: Callable, tmp_path: Path) -> None:
    """Three layers of Llama-3.1-8B's shape in bf16; the scores of one layer alone would be 128 GiB in fp32."""
    model = make_8b_shape(3)
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
