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
Run = Callable[..., tuple[int, str, str]]


def sparse_hf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a user has it; errors and repeated calls run in the test's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-c", CALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_train_then_eval(run_yaml: Callable[..., Path], run_main: Run, text_file: Path, tmp_path: Path) -> None:
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
    options = ["--text", str(text_file), "--seq-len", "560", "--num-samples", "1", "--num-rows", "1", "--quick"]
    judged = sparse_hf("eval", str(out), *options, "--figures", str(figures), "--json")
    assert judged.returncode == 0, judged.stderr[-2000:]
    found = json.loads(judged.stdout)
    # The model is tiny and random: it answers nothing, dense or sparse, and the report sets all of it apart.
    assert found["worst_task"] is None and found["tasks"] == []
    assert {task["task"] for task in found["failed_by_dense"]} == {"needle", "key_value", "chain"}
    assert "left out: task 'two_turns' needs seq_len >= " in judged.stderr
    assert found["kv_bytes"]["sparse"]["held"] < found["kv_bytes"]["dense"]["held"] and found["kv_share"] < 1
    assert found["folder"] == str(out / "evaluation") and found["settings"]["num_samples"] == 1
    rows = json.loads(figures.read_text())
    assert rows == json.loads((out / "evaluation" / "figures.json").read_text())
    assert rows[0]["case"] == "recall needle, 560 tokens, 1 samples, which dense itself fails"
    assert {row["unit"] for row in rows} == {"share", "nats/token", "bytes", "%"}
    assert rows[0]["command"].startswith("sparse-hf eval over --seq-len 560 ") and str(tmp_path) not in str(rows)
    before = (out / "evaluation" / "report.json").read_text()
    code, told, _ = run_main("eval", out, *options)
    assert code == 0 and (out / "evaluation" / "report.json").read_text() == before
    assert "no task is left to judge" in told and "density of decoding" in told
    code, _, error = run_main("eval", out, *options, "--seed", "7")
    assert code == 1 and "other settings (seed 1234 != 7)" in error


def test_eval_of_a_preset_on_a_model(model_folder: Path, run_main: Run, text_file: Path, tmp_path: Path) -> None:
    options = ["--model", str(model_folder), "--text", str(text_file), "--seq-len", "300", "--num-rows", "1"]
    options += ["--tasks", "key_value:num_pairs=2", "--num-samples", "2", "--out", str(tmp_path / "out")]
    done = sparse_hf("eval", "streaming", *options, "--name", "all streaming", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning: 300 tokens are less than 8 times sinks and window (8704)" in done.stderr
    report = json.loads(done.stdout)
    assert report["name"] == "all streaming" and report["about"]["methods"] == ["streaming"]
    assert report["about"]["sparsity"] == "4 of 4 KV heads sparse (100.0%)"
    code, _, error = run_main("eval", "streaming", *options, "--strict-length")
    assert code == 1 and error.splitlines()[-1].startswith("error: 300 tokens are less")
    listed = CliRunner().invoke(build_app(), ["eval", "--list-tasks", "--json"])
    assert "niah_multikey_3" in [row["task"] for row in json.loads(listed.stdout)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "no such file: none.yaml"),
        (["train", "{config}", "masks.target=1"], "config.yaml.masks: unknown keys ['target']"),
        (["demo", "--out", "{config}"], "is no folder; choose another name with --out"),
        (["eval"], "nothing to measure; give a run"),
        (["eval", "streaming"], "'streaming' is a preset and names no model; name one"),
        (["eval", "{folder}", "--text", "x.txt"], "holds no artefact"),
        (["eval", "{folder}", "--tasks", "haystack"], "unknown task 'haystack'"),
        (["eval", "{folder}", "--tasks", "vt:num_hops=many"], "expected option=NUMBER"),
        (["eval", "{folder}", "--dtype", "int8"], "--dtype must be auto"),
        (["compare", "{folder}"], "holds no report.json; `sparse-hf eval"),
    ],
)
def test_errors_are_one_line(
    run_yaml: Callable[..., Path], run_main: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, told, error = run_main(*(text.format(config=run_yaml(), folder=tmp_path) for text in arguments))
    assert code == 1 and told == ""
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_bf16_without_a_gpu_names_the_remedy(
    run_yaml: Callable[..., Path], run_main: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    code, _, error = run_main("train", str(run_yaml()), "trainer={bf16: true, max_steps: 1}")
    assert code == 1 and error.strip().endswith("To train on a CPU, add trainer.use_cpu=true.")


@pytest.mark.parametrize("command", ["demo", "train", "eval", "compare"])
def test_help(command: str) -> None:
    shown = CliRunner().invoke(build_app(), [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and "--json" in shown.output and "Example: sparse-hf" in shown.output


def test_commands_are_listed_without_loading_what_they_need() -> None:
    code = (
        "import sys; import sparse_hf_training.cli.train, sparse_hf_training.cli.demo, sparse_hf_training.cli.evaluate,"
        "sparse_hf_training.cli.compare, sparse_hf_training.cli.lm_eval;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
