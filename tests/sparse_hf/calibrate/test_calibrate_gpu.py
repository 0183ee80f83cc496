"""Calibrations on a GPU: the CPU's figures, and memory that does not grow with the square of the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_hf.calibrate.framework import Target
from sparse_hf.calibrate.registry import calibrator_class

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, dict[str, Any]] = {
    "xattention": {"target_density": 0.8, "num_rows": 32},
    "flexprefill": {"target_density": 0.8, "min_budget": 128, "num_passes": 1},
    "scores": {"num_sink_tokens": 4, "window_size": 32},
}
STATISTICS = {"xattention": ("kept", "errors"), "flexprefill": ("kept", "errors"), "scores": ("changes", "retrieval")}


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_equal_the_cpus(name: str, assert_cpu_and_gpu_agree: Callable) -> None:
    assert_cpu_and_gpu_agree(name, OPTIONS[name], STATISTICS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_32k_tokens_of_an_8b_shape(name: str, make_8b_shape: Callable) -> None:
    """Two layers of Llama-3.1-8B's shape in bf16; scores of one layer alone would be 128 GiB in fp32."""
    model = make_8b_shape(2)
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
