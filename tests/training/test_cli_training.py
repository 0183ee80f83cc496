"""`sparse-hf train`, `eval` and `demo` as a user calls them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparse_hf.artefact import load_artefact
from sparse_hf.cli import build_app

CALL = "import sys; from sparse_hf.cli import main; main()"


def sparse_hf(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-c", CALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_train_then_eval(run_yaml: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "over"
    done = sparse_hf("train", str(run_yaml()), f"output_dir={out}", "masks.end_head_sparsity=2.5e-1", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)  # pure JSON, whatever libraries print
    artefact = load_artefact(report["artefact"])
    assert report["artefact"] == str(out / "artefact") and int((artefact.head_masks == 0).sum()) == 1
    assert [result["task"] for result in report["sparse"]["recall"]] == ["needle"]
    assert len(report["scores"]) == 2 and report["last_log"]["step"] == 4
    assert "training (masks)" in done.stderr

    figures = tmp_path / "figures.json"
    # The model is tiny, but the tasks are the real ones, which need their room.
    options = ["--text", str(text_file), "--seq-len", "2048", "--num-samples", "1", "--num-rows", "1"]
    judged = sparse_hf("eval", str(out), *options, "--output", str(figures), "--json")
    assert judged.returncode == 0, judged.stderr[-2000:]
    rows = json.loads(judged.stdout)
    assert [row["case"].split(",")[0].split()[0] for row in rows] == ["recall"] * 3 + ["loss", "KV"]
    assert rows[-1]["value"] < rows[-1]["baseline"]
    assert [row["case"] for row in json.loads(figures.read_text())] == [row["case"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "no such file: none.yaml"),
        (["train", "{config}", "masks.target=1"], "config.yaml.masks: unknown keys ['target']"),
        (["eval", "{folder}", "--text", "x.txt"], "holds no artefact"),
    ],
)
def test_errors_are_one_line(run_yaml: Callable[..., Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    filled = [text.format(config=run_yaml(), folder=tmp_path) for text in arguments]
    done = sparse_hf(*filled)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize("command", ["demo", "train", "eval"])
def test_help(command: str) -> None:
    shown = CliRunner().invoke(build_app(), [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and "--json" in shown.output and "Example: sparse-hf" in shown.output


def test_commands_are_listed_without_loading_what_they_need() -> None:
    code = (
        "import sys; import sparse_hf_training.cli.train, sparse_hf_training.cli.demo, sparse_hf_training.cli.evaluate;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
