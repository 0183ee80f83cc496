"""Two processes, started by torchrun on the CPU, do what one process does on the same rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_hf.artefact import load_artefact
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(*arguments: str, limit: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs scripts/train.py in two processes; a deadlock ends in a failure, with no process left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*LAUNCHER, str(TRAIN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {limit} s: {process.communicate()[1][-2000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows(folder: Path, name: str) -> list[float]:
    return [row[name] for row in json.loads((folder / "history.json").read_text()) if name in row]


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "masks", "objective": {"lm": 0.5, "kl": 1.0}},
        {"stage": "masks_and_weights", "objective": {"lm": 1.0, "kl": 0.5}, "trainer": {"optim": "sgd"}},
    ],
    ids=lambda changes: str(changes["stage"]),
)
def test_two_processes_equal_one(run_yaml: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    config = run_yaml(**changes, evaluation={})
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(RunConfig.load(config, [f"output_dir={one}", "trainer.per_device_train_batch_size=2"]))
    double = launch(str(config), f"output_dir={two}", "--json")
    assert double.returncode == 0, double.stderr[-2000:]
    assert json.loads(double.stdout)["artefact"] == str(two / "artefact")  # one process tells, and nothing else
    states = sorted(path.name for path in (two / "checkpoint-4").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    a, b = load_artefact(one / "artefact"), load_artefact(two / "artefact")
    assert a.scores is not None and b.scores is not None
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(a.head_masks, b.head_masks)
    assert rows(one, "loss") == pytest.approx(rows(two, "loss"), abs=2e-4)
    assert rows(one, "loss/penalty") == pytest.approx(rows(two, "loss/penalty"), abs=1e-5)
    if changes["stage"] == "masks":
        check_resuming(str(config), two, b.scores)


def check_resuming(config: str, folder: Path, scores: torch.Tensor) -> None:
    """Both processes go on from the same checkpoint, and the claim on the folder is one for both."""
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    shutil.rmtree(folder / "artefact")
    again = launch(config, f"output_dir={folder}")
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stderr.count("checkpoint-4 is incomplete") == 1
    resumed = load_artefact(folder / "artefact").scores
    assert resumed is not None and torch.equal(resumed, scores)
    refused = launch(config, f"output_dir={folder}", "resume=false")
    assert refused.returncode == 1 and "holds a run already" in refused.stderr
