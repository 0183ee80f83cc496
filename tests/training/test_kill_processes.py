"""Runs of two processes, one or all of which are killed, go on where they saved last and end bitwise the same."""

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
import yaml
from safetensors.torch import load_file

from sparse_hf.artefact import load_artefact
from sparse_hf_training.checkpoint import MARKER, checkpoints, is_complete

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TRAIN = ROOT / "scripts" / "train.py"
TOGETHER = Path(__file__).parent / "workers" / "run_engines.py"
"""Several runs, one after the other in the same two processes."""
STEPS, SAVE = 24, 3
TRAINER = {"max_steps": STEPS, "save_steps": SAVE, "logging_steps": SAVE, "lr_scheduler_type": "cosine"}
ENGINES: dict[str, dict[str, Any]] = {
    "DeepSpeed ZeRO-2": {"deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json")},
    "FSDP2": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
}


def start(log: Path, program: Path, *configs: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*LAUNCHER, str(program), *map(str, configs)]
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


def start_and_kill(config: Path, run: Path, log: Path, amid_a_save: bool) -> None:
    """One process after a checkpoint, or all of them while they write one."""
    process = start(log, TRAIN, config)

    def saved() -> bool:
        return any(is_complete(path) for path in checkpoints(run))

    def saving() -> bool:
        newest = checkpoints(run)[-1:]
        return saved() and any(not (path / MARKER).exists() for path in newest)

    wait_until(process, saved)
    if amid_a_save:
        # torchrun gives each worker a session of its own.
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        wait_until(process, saving)
        kill_all(process, family)
        assert not is_complete(checkpoints(run)[-1])
    else:
        kill_one(process)
    assert not (run / "artefact").exists()


def test_killed_runs_of_two_processes_end_as_those_left_alone(
    run_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Each is killed in processes of its own; those left alone share theirs, and so do those that go on."""
    pytest.importorskip("deepspeed")

    def written(engine: str, name: str) -> Path:
        values = run_values(
            stage="masks_and_weights",
            lora={"rank": 4, "alpha": 8} if engine == "FSDP2" else None,
            objective={"lm": 1.0, "kl": 1.0},
            evaluation={},
            trainer={**TRAINER, **ENGINES[engine]},
            output_dir=str(tmp_path / engine / name),
        )
        path = tmp_path / f"{engine} {name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    log = tmp_path / "log"
    finish(start(log, TOGETHER, *(written(engine, "alone") for engine in ENGINES)), log)
    configs = {engine: written(engine, "run") for engine in ENGINES}
    for engine, config in configs.items():
        start_and_kill(config, tmp_path / engine / "run", log, amid_a_save=engine == "FSDP2")
    finish(start(log, TOGETHER, *configs.values()), log)
    for engine in ENGINES:
        assert log.read_text().count(f"engine: {engine}, 2 processes, cpu") == 1
        check_same_end(tmp_path / engine / "run", tmp_path / engine / "alone", lora=engine == "FSDP2")


def check_same_end(run: Path, alone: Path, lora: bool) -> None:
    scores = [load_artefact(folder / "artefact").scores for folder in (alone, run)]
    assert scores[0] is not None and scores[1] is not None and torch.equal(scores[0], scores[1])
    file = Path("artefact") / ("adapter_model.safetensors" if lora else "model.safetensors")
    weights = load_file(run / file)
    for name, tensor in load_file(alone / file).items():
        assert torch.equal(tensor, weights[name]), name
    assert losses(run) == losses(alone) and len(losses(run)) == STEPS // SAVE
    assert all(is_complete(path) for path in checkpoints(run))
