"""transformers' Trainer and TRL's with our callback: two processes do what one does; trackers get all rows."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_hf_training.callbacks import MaskLearningCallback

WORKER = Path(__file__).parent / "workers" / "other_trainers.py"
KINDS = ("plain", "trl")
FIGURES = {"loss/penalty", "sparsity/target", "sparsity/expected", "sparsity/realised", "lagrangian/linear"}


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("other_trainers", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path


def test_two_processes_equal_one(worker: ModuleType, folder: Path) -> None:
    one = {kind: worker.run_case(kind, folder) for kind in KINDS}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(WORKER), str(folder), *KINDS),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for kind, expected in one.items():
        found = torch.load(folder / f"{kind}.pt")
        assert (expected["world"], expected["wrapped"]) == (1, False)
        assert (found["world"], found["wrapped"]) == (2, True)
        for name in ("losses", "penalties"):
            assert len(found[name]) == worker.STEPS and found[name] == pytest.approx(expected[name], abs=2e-5), kind
        assert found["penalties"][-1] != 0
        for part in ("gates", "weights"):
            for name, tensor in expected[part].items():
                torch.testing.assert_close(found[part][name], tensor, rtol=1e-4, atol=2e-5, msg=f"{kind} {name}")
        assert not torch.equal(expected["gates"]["gates.log_alpha"], torch.full((2, 2), 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_gets_the_masks(
    kind: str, worker: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    trainer, learning = worker.make_trainer(kind, folder, report_to="tensorboard")
    MaskLearningCallback(learning).add_to(trainer)
    trainer.train()
    events = accumulator.EventAccumulator(str(folder / "events"))
    events.Reload()
    assert {f"train/{name}" for name in FIGURES} <= set(events.Tags()["scalars"])
    for name in FIGURES:
        logged = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        expected = {row["step"]: row[name] for row in trainer.state.log_history if name in row}
        assert len(expected) == worker.STEPS and logged == pytest.approx(expected), name


def test_wandb_offline_gets_the_masks(
    worker: ModuleType,
    wandb_rows: Callable[[Path], Iterator[dict[str, Any]]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(folder)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # what an earlier run in this process was told
    trainer, learning = worker.make_trainer("plain", folder, report_to="wandb")
    MaskLearningCallback(learning).add_to(trainer)
    trainer.train()
    wandb.finish()
    wandb.teardown()  # waits for the process that writes the file
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = list(wandb_rows(file))
    for name in FIGURES:
        logged = {row["train/global_step"]: row[f"train/{name}"] for row in rows if f"train/{name}" in row}
        assert logged == {row["step"]: row[name] for row in trainer.state.log_history if name in row}, name
        assert len(logged) == worker.STEPS


def test_callback_behind_the_trackers_says_so(
    worker: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And `add_to` moves it before them."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    trainer, learning = worker.make_trainer("plain", folder, report_to="tensorboard", max_steps=1)
    callback = MaskLearningCallback(learning)
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING, "sparse_hf_training.callbacks"):
        trainer.train()
    assert "tensorboard will miss them" in caplog.text and ".add_to(trainer)" in caplog.text
    caplog.clear()
    number = len(trainer.callback_handler.callbacks)
    callback.add_to(trainer)
    assert trainer.callback_handler.callbacks[0] is callback and len(trainer.callback_handler.callbacks) == number
    with caplog.at_level(logging.WARNING, "sparse_hf_training.callbacks"):
        trainer.train()
    assert not caplog.text
