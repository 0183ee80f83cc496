"""A run that is killed at any instant and started again ends as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_hf.artefact import load_artefact
from sparse_hf_training.checkpoint import MARKER, checkpoints, is_complete
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS, SAVE = 60, 3
TRAINER = {"max_steps": STEPS, "save_steps": SAVE, "logging_steps": SAVE, "lr_scheduler_type": "cosine"}


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TRAIN), str(config)]
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], limit: float = 60) -> bool:
    """SIGKILL as soon as `reached`; False if the run ended before."""
    end = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < end:
        if reached():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)  # leaves the core to the run
    process.kill()
    process.wait()
    return False


def newest(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints(folder)), default=0)


def losses(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in history if "loss" in row]


def test_killed_run_ends_as_one_left_alone(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    config = run_yaml(stage="masks_and_weights", objective={"lm": 1.0, "kl": 1.0}, evaluation={}, trainer=TRAINER)
    alone = run_training(RunConfig.load(config, [f"output_dir={tmp_path / 'alone'}"]))
    run, rng, kills = tmp_path / "run", random.Random(), 0

    def while_saving() -> bool:
        return any(not (path / MARKER).exists() for path in checkpoints(run))

    # Before the first checkpoint counts; in the middle of a save; at some instant of a later step.
    for instant in ("first", "saving", "any"):
        begun, delay = newest(run), rng.uniform(0, 0.3)

        def reached(instant: str = instant, begun: int = begun, delay: float = delay) -> bool:
            if newest(run) <= begun or (instant == "saving" and not while_saving()):
                return False
            time.sleep(delay if instant == "any" else 0)
            return True

        kills += kill_when(start(config, tmp_path / f"{instant}.log"), reached)
        assert not (run / "artefact").exists(), f"the run ended before it was killed ({instant})"
    assert kills == 3
    last = start(config, tmp_path / "last.log")
    assert last.wait(120) == 0, (tmp_path / "last.log").read_text()[-2000:]

    killed = load_artefact(run / "artefact")
    assert alone.scores is not None and killed.scores is not None
    assert torch.equal(killed.scores, alone.scores)
    weights = load_file(run / "artefact" / "model.safetensors")
    for name, tensor in load_file(alone.artefact / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    history: list[dict[str, Any]] = json.loads((run / "history.json").read_text())
    assert losses(history) == losses(alone.history)
    assert len(losses(history)) == STEPS // SAVE
    assert all(is_complete(path) for path in checkpoints(run)) and newest(run) == STEPS


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "torn marker"])
def test_damaged_checkpoint_is_passed_over(
    run_values: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    def config(name: str) -> RunConfig:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(run_values(output_dir=str(tmp_path / name), evaluation={})))
        return RunConfig.load(path)

    alone = run_training(config("run"))
    folder = tmp_path / "run" / "checkpoint-4"
    if damage == "truncated":
        os.truncate(folder / "optimizer.pt", 10)
    elif damage == "missing":
        (folder / "mask_learning.safetensors").unlink()
    elif damage == "no marker":
        (folder / MARKER).unlink()
    else:
        (folder / MARKER).write_bytes(b"\xff\xfe{")
    caplog.clear()
    again = run_training(config("run"))
    assert "checkpoint-4 is incomplete" in caplog.text and "going back to the one before" in caplog.text
    assert alone.scores is not None and again.scores is not None and torch.equal(alone.scores, again.scores)
    assert losses(again.history) == losses(alone.history)
    assert is_complete(folder)


def test_all_checkpoints_damaged_starts_anew(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_values(evaluation={})))
    alone = run_training(RunConfig.load(path))
    for folder in checkpoints(tmp_path / "run"):
        (folder / MARKER).unlink()
    again = run_training(RunConfig.load(path))
    assert alone.scores is not None and again.scores is not None and torch.equal(alone.scores, again.scores)
    assert losses(again.history) == losses(alone.history)
