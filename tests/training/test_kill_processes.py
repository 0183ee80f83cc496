"""A run of two processes, one or all of which are killed, goes on where it saved last and ends bitwise the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sparse_hf.artefact import load_artefact
from sparse_hf_training.checkpoint import MARKER, checkpoints, is_complete

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STEPS, SAVE = 24, 3
ENGINES = {"ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "fsdp2": "FSDP2"}
TRAINER = {"max_steps": STEPS, "save_steps": SAVE, "logging_steps": SAVE, "lr_scheduler_type": "cosine"}


def start(config: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*LAUNCHER, str(ROOT / "scripts" / "train.py"), str(config), *overrides]
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path, limit: float = 400) -> None:
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == 0, log.read_text()[-3000:]


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool], limit: float = 300) -> None:
    end = time.monotonic() + limit
    while not reached():
        assert process.poll() is None and time.monotonic() < end, "the run ended before it could be killed"
        time.sleep(0.001)


def kill_one(process: subprocess.Popen[bytes]) -> None:
    """The worker that saves nothing; the launcher notices and ends the other."""
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    assert len(workers) == 1
    workers[0].kill()
    assert process.wait(60) != 0


def kill_all(process: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait()


def losses(folder: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads((folder / "history.json").read_text()) if "loss" in row]


@pytest.mark.parametrize(
    "engine, lora, victim",
    [("ddp", False, "one"), ("zero2", False, "all, amid a save"), ("fsdp2", True, "all, amid a save")],
)
def test_killed_run_of_two_processes_ends_as_one_left_alone(
    run_yaml: Callable[..., Path], tmp_path: Path, engine: str, lora: bool, victim: str
) -> None:
    trainer: dict[str, Any] = dict(TRAINER)
    if engine == "zero2":
        pytest.importorskip("deepspeed")
        trainer["deepspeed"] = str(ROOT / "configs" / "deepspeed" / "zero2.json")
    elif engine == "fsdp2":
        trainer |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    config = run_yaml(
        stage="masks_and_weights",
        lora={"rank": 4, "alpha": 8} if lora else None,
        objective={"lm": 1.0, "kl": 1.0},
        evaluation={},
        trainer=trainer,
    )
    alone, run, log = tmp_path / "alone", tmp_path / "run", tmp_path / "log"
    finish(start(config, log, f"output_dir={alone}"), log)

    process = start(config, log, f"output_dir={run}")

    def saved() -> bool:
        return any(is_complete(path) for path in checkpoints(run))

    def saving() -> bool:
        newest = checkpoints(run)[-1:]
        return saved() and any(not (path / MARKER).exists() for path in newest)

    wait_until(process, saved)
    if victim == "one":
        kill_one(process)
    else:
        # torchrun gives each worker a session of its own.
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        wait_until(process, saving)
        kill_all(process, family)
    assert not (run / "artefact").exists()
    if victim != "one":
        assert not is_complete(checkpoints(run)[-1])
    finish(start(config, log, f"output_dir={run}"), log)
    assert f"engine: {ENGINES[engine]}, 2 processes, cpu" in log.read_text()

    scores = [load_artefact(folder / "artefact").scores for folder in (alone, run)]
    assert scores[0] is not None and scores[1] is not None and torch.equal(scores[0], scores[1])
    file = Path("artefact") / ("adapter_model.safetensors" if lora else "model.safetensors")
    weights = load_file(run / file)
    for name, tensor in load_file(alone / file).items():
        assert torch.equal(tensor, weights[name]), name
    assert losses(run) == losses(alone) and len(losses(run)) == STEPS // SAVE
    assert all(is_complete(path) for path in checkpoints(run))
