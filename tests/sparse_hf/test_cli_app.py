"""The `sparse-hf` command as a whole: how errors end it, commands of other packages, and a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig

import sparse_hf.cli.app as app_module
from sparse_hf import SparseConfig
from sparse_hf.adapters import ModelShape
from sparse_hf.artefact import write_artefact

SHAPE = ModelShape(model_type="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A training run's folder with its artefact."""
    write_artefact(
        tmp_path / "run" / "artefact",
        config=SparseConfig(),
        head_masks=torch.tensor([[0, 1], [0, 0]]),
        shape=SHAPE,
        base_model_name_or_path="me/base",
    )
    return tmp_path / "run"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model's folder that holds config.json alone."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


Run = Callable[..., tuple[int, str, str]]


def test_no_arguments_print_help(run_main: Run) -> None:
    code, out, err = run_main()
    assert code == 2 and "inspect" in out + err and "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("inspect", "{model}"), "is a model and no artefact; say how it shall be sparse with --sparse"),
        (("inspect", "{tmp}"), "holds no artefact"),
        (("inspect", "{model}", "--sparse", "duo_attention"), "head masks from a file"),
        (("inspect", "{tmp}/x", "--sparse", "dense"), "x"),
        (("inspect", "{model}", "--sparse", "{tmp}/none.yaml"), "no such file"),
        (("export", "{tmp}", "--out", "{tmp}/out"), "holds no artefact"),
        (("export", "{run}", "--out", "{run}"), "exists already"),
        (("export", "{run}", "--out", "{run}", "--overwrite"), "holds other files"),
        (("export", "{run}/artefact", "--out", "{run}/artefact/inner"), "lies inside the artefact"),
        (("export", "{run}", "--out", "{model}/config.json/x"), "config.json: File exists; choose another place"),
        (("inspect", "{run}", "--plot", "{tmp}/no/x.png"), "/no/x.png: No such file or directory; check the path"),
        (("import", "duo", "{tmp}/no.tsv", "--model", "{model}", "--out", "{tmp}/out"), "no such file"),
    ],
)
def test_errors_take_one_line(
    run_main: Run, run_folder: Path, model_folder: Path, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    names = {"tmp": tmp_path, "run": run_folder, "model": model_folder}
    code, out, err = run_main(*(arg.format(**names) for arg in args))
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("inspect", "x", "--seq-len", "0"),
        ("inspect", "x", "--seq-len", "many"),
        ("export", "x"),
        ("import", "other", "x", "--model", "m", "--out", "o"),
        ("import", "prulong", "x", "--out", "o"),
    ],
)
def test_usage_errors_exit_with_2(run_main: Run, args: tuple[str, ...]) -> None:
    code, out, err = run_main(*args)
    assert (code, out) == (2, "") and "Usage" in err


def test_the_debug_variable_lets_tracebacks_through(
    run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_HF_DEBUG", "1")
    with pytest.raises(ValueError, match="holds no artefact"):
        run_main("inspect", tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left"), 1, "error: No space left; free some, or choose another place\n"),
        (OSError("all in words"), 1, "error: all in words\n"),
    ],
)
def test_interrupts_and_system_errors(
    run_main: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("sparse_hf.cli.export.copy_artefact", fail)
    assert run_main("export", run_folder, "--out", "anywhere") == (code, "", said)


def test_defects_keep_their_traceback(run_main: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a defect")

    monkeypatch.setattr("sparse_hf.cli.export.copy_artefact", fail)
    with pytest.raises(AssertionError, match="a defect"):
        run_main("export", run_folder, "--out", "anywhere")


def _entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=app_module.COMMAND_GROUP)


def hello(name: str) -> None:
    """Greets, and stands for a command that another package installs."""
    typer.echo(f"hello {name}")


def test_commands_of_other_packages(run_main: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        EntryPoint, "load", lambda self: hello if self.name == "hello" else __import__("no_such_package")
    )
    entries = EntryPoints([_entry("hello", "a:b"), _entry("learn", "no_such_package:x"), _entry("env", "a:b")])
    monkeypatch.setattr(app_module, "entry_points", lambda group: entries)
    assert run_main("hello", "you") == (0, "hello you\n", "")
    listed = run_main("--help")[1]
    assert "learn" in listed and "sparse-hf[train]" in " ".join(listed.split()) and listed.count(" env ") == 1
    for args in (("learn",), ("learn", "config.yaml", "--steps", "3", "model=x")):
        code, out, err = run_main(*args)
        assert (code, out) == (1, "")
        assert err.startswith("error: 'learn'") and 'pip install "sparse-hf[train]"' in err and err.count("\n") == 1
    assert run_main("methods")[0] == 0


def test_as_a_process(run_folder: Path, tmp_path: Path) -> None:
    """JSON alone on stdout, whatever libraries say; and one line on stderr for an error."""
    program = [sys.executable, "-c", "from sparse_hf.cli import main; main()"]
    good = subprocess.run(
        [*program, "inspect", str(run_folder), "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["base_model_name_or_path"] == "me/base"
    bad = subprocess.run([*program, "inspect", "."], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1, bad.stderr
