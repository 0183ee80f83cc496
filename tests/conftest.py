"""Shared fixtures, and the only GPU gates of the test suite."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
# Tensors this small cost threads more in waiting for each other than they save, and `make test` has a process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed probes for one and warns


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-archs", action="store_true", help="compile kernels for every GPU, dtype and layout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        long_files_first(items)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for mark, needed in (("gpu", 1), ("multi_gpu", 2)):
        if num_gpus >= needed:
            continue
        skip = pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {num_gpus}")
        for item in items:
            if mark in item.keywords:
                item.add_marker(skip)


def long_files_first(items: list[pytest.Item]) -> None:
    """The order in which pytest-xdist deals files out, so that at the end none keeps one process busy alone.

    Files of few tests are those that start processes and train: they come first, and then those of most tests.
    """
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (counts[item.path] > 10, -counts[item.path]))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the 4M Llama that the demo ships."""
    spec = find_spec("sparse_hf_training")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "demo" / "assets" / "llama-4m"


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `sparse-hf` with these words in this process: exit code, stdout, stderr."""
    from sparse_hf.cli import main  # not for tests of kernels, which need torch and triton only

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparse-hf", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every uninitialised floating tensor with NaN, so that code which forgets to write an element shows it."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def figure_keys() -> set[str]:
    """The columns of every row of measured figures."""
    return {
        "case",
        "value",
        "unit",
        "lower_is_better",
        "must",
        "goal",
        "baseline",
        "hardware",
        "software",
        "commit",
        "command",
    }
