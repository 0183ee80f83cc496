"""Head elimination goes on where it was ended or killed, and nowhere else; two processes do what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf_training.config import RunConfig
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.elimination import MaskedLoss
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.typed_config import build

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TASKS = [{"task": "needle", "num_needles": 2}, {"task": "key_value", "num_pairs": 4}]


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def rounds_of(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "elimination.json").read_text())["rounds"]
    return found


def assert_same_outcome(one: Path, two: Path) -> None:
    a, b = (load_file(folder / "artefact" / "head_masks.safetensors") for folder in (one, two))
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert rounds_of(one) == rounds_of(two), "and every loss, bit for bit"


def test_an_ended_run_goes_on_where_it_was(
    elimination_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run({**elimination_values, "output_dir": str(tmp_path / "alone")})
    measure, asked = MaskedLoss.__call__, list[int]()

    def watched(self: MaskedLoss, many: Any, first: int, count: int) -> list[float]:
        asked.append(len(many))
        if len(asked) == 3:
            raise ValueError("the third round\nis not to be")
        return measure(self, many, first, count)

    monkeypatch.setattr(MaskedLoss, "__call__", watched)
    with pytest.raises(ValueError, match="the third round"):
        run(elimination_values)
    assert len(rounds_of(tmp_path / "run")) == 2 and not (tmp_path / "run" / "artefact").exists()
    run(elimination_values)
    assert asked == [4, 3, 2, 2]
    assert_same_outcome(tmp_path / "run", tmp_path / "alone")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["status"] for session in record["sessions"]] == ["failed", "finished"]
    assert "ValueError: the third round is not to be" in record["sessions"][0]["reason"]
    assert [session["resumed_from_step"] for session in record["sessions"]] == [None, 2]
    run(elimination_values)
    assert asked == [4, 3, 2, 2], "a finished run measures nothing again"


def test_rounds_of_other_settings_are_refused(elimination_values: dict[str, Any], tmp_path: Path) -> None:
    run(elimination_values)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="holds a run already; choose another output_dir"):
        run({**elimination_values, "resume": False})
    changed = {**elimination_values, "head_elimination": {**elimination_values["head_elimination"], "row_passes": 5}}
    with pytest.raises(ValueError, match=r"another configuration .*head_elimination differ"):
        run(changed)
    (folder / "config.yaml").unlink()
    before = (folder / "elimination.json").read_bytes()
    with pytest.raises(ValueError, match=r"rounds of other settings \(head_elimination differ\); choose another"):
        run(changed)
    with pytest.raises(ValueError, match="holds rounds already; choose another output_dir"):
        run({**elimination_values, "resume": False})
    assert not (folder / "config.yaml").exists() and (folder / "elimination.json").read_bytes() == before
    (folder / "elimination.json").write_bytes(before.replace(b'"dropped"', b'"drops"'))
    with pytest.raises(ValueError, match=r"elimination\.json holds no rounds \(KeyError\('dropped'\)\); delete"):
        run(elimination_values)
    (folder / "elimination.json").write_bytes(before[:-40])
    with pytest.raises(ValueError, match=r"elimination\.json cannot be read .* truncated"):
        run(elimination_values)
    (folder / "elimination.json").unlink()
    run(changed)


def test_other_weights_or_text_under_the_same_names_are_refused(
    elimination_values: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """The configuration is the same, the losses are not."""
    copy = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(copy)
    elimination_values["model"] = str(copy)
    run(elimination_values)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"other settings \(weights differ\)"):
        run(elimination_values)


def test_a_killed_run_ends_as_one_left_alone(tmp_path: Path) -> None:
    values = {
        "model": str(MODEL),
        "output_dir": str(tmp_path / "run"),
        "stage": "head_elimination",
        "sparse": {"sparse": {"method": "streaming", "num_sink_tokens": 4, "window_size": 24}},
        "head_elimination": {"end_head_sparsity": 0.25, "row_passes": 1, "min_rows": 1, "drop_ratio": 0.0},
        "data": {"text": [{"path": str(ASSETS / "text" / "train")}], "seq_len": 256, "recall": {"tasks": TASKS}},
        "trainer": {"use_cpu": True},
    }
    config, log, folder = tmp_path / "config.yaml", tmp_path / "log", tmp_path / "run"
    config.write_text(yaml.safe_dump(values))
    process = start([sys.executable, str(TRAIN), str(config)], log)
    try:
        end = time.monotonic() + 120
        while not (folder / "elimination.json").exists() or len(rounds_of(folder)) < 2:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 2 <= len(rounds_of(folder)) < 4 and not (folder / "artefact").exists()
    run(values)
    run({**values, "output_dir": str(tmp_path / "alone")})
    assert_same_outcome(folder, tmp_path / "alone")
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert [session["status"] for session in sessions] == ["killed", "finished"]


def test_two_processes_find_what_one_finds(elimination_values: dict[str, Any], tmp_path: Path) -> None:
    """Rounds of 4, 3 and 2 masks: of three, one process has two."""
    elimination_values["evaluation"] = {
        "text": elimination_values["data"]["text"][0],
        "seq_len": 256,
        "num_samples": 1,
        "num_rows": 1,
    }
    elimination_values["evaluation"]["tasks"] = TASKS[:1]
    config, log = tmp_path / "config.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump({**elimination_values, "output_dir": str(tmp_path / "two")}))
    process = start([*LAUNCHER, str(TRAIN), str(config)], log)
    try:
        assert process.wait(300) == 0, log.read_text()[-3000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    result = run({**elimination_values, "output_dir": str(tmp_path / "one")})
    assert_same_outcome(tmp_path / "two", tmp_path / "one")
    assert log.read_text().count("round 3, 1 heads left") == 1, "one process tells"
    figures = json.loads((tmp_path / "two" / "figures.json").read_text())
    assert [row["value"] for row in figures] == [figure.value for figure in result.figures]
    session = json.loads((tmp_path / "two" / "run.json").read_text())["sessions"][0]
    assert (session["world_size"], session["engine"]) == (2, "DDP, 2 processes, cpu")
