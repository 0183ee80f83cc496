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
import yaml

from sparse_hf.artefact import load_artefact
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SEVERAL = Path(__file__).parent / "workers" / "run_several.py"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(program: Path, *arguments: str, limit: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a program in two processes; a deadlock ends in a failure, with no process left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*LAUNCHER, str(program), *arguments],
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


STAGES: dict[str, dict[str, Any]] = {
    "masks": {"objective": {"lm": 0.5, "kl": 1.0}},
    "masks_and_weights": {"objective": {"lm": 1.0, "kl": 0.5}, "trainer": {"optim": "sgd"}},
}


def test_two_processes_equal_one_and_go_on(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The second launch goes on with the first one's run, and has another stage's as well."""

    def written(stage: str, name: str) -> str:
        values = run_values(stage=stage, evaluation={}, output_dir=str(tmp_path / stage / name), **STAGES[stage])
        path = tmp_path / f"{stage}-{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    for stage in STAGES:
        run_training(RunConfig.load(written(stage, "one"), ["trainer.per_device_train_batch_size=2"]))
    configs = {stage: written(stage, "two") for stage in STAGES}
    masks = tmp_path / "masks" / "two"
    first = launch(TRAIN, configs["masks"], "--json")
    assert first.returncode == 0, first.stderr[-2000:]
    assert json.loads(first.stdout)["artefact"] == str(masks / "artefact")  # one process tells, and nothing else
    check_equal(tmp_path / "masks")
    scores = load_artefact(masks / "artefact").scores
    # Both processes go on from the same checkpoint, and the claim on the folder is one for both.
    (masks / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    shutil.rmtree(masks / "artefact")
    second = launch(SEVERAL, *configs.values())
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stderr.count("checkpoint-4 is incomplete") == 1
    resumed = load_artefact(masks / "artefact").scores
    assert scores is not None and resumed is not None and torch.equal(resumed, scores)
    check_equal(tmp_path / "masks_and_weights")
    refused = launch(TRAIN, configs["masks"], "resume=false")
    assert refused.returncode == 1 and "holds a run already" in refused.stderr


def check_equal(folder: Path) -> None:
    one, two = folder / "one", folder / "two"
    states = sorted(path.name for path in (two / "checkpoint-4").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    a, b = load_artefact(one / "artefact"), load_artefact(two / "artefact")
    assert a.scores is not None and b.scores is not None
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(a.head_masks, b.head_masks)
    assert rows(one, "loss") == pytest.approx(rows(two, "loss"), abs=2e-4)
    assert rows(one, "loss/penalty") == pytest.approx(rows(two, "loss/penalty"), abs=1e-5)
