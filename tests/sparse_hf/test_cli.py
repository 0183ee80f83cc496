"""The subcommands of `sparse-hf`: what each prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig
from typer.testing import CliRunner, Result

from sparse_hf import SparseConfig, Streaming, load_artefact, save_artefact, sparsify, sparsity_summary
from sparse_hf.cli import build_app

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
MASKS = torch.tensor([[0, 1], [0, 0]])


def tiny_llama() -> LlamaForCausalLM:
    model = sparsify(
        LlamaForCausalLM(CONFIG).eval(),
        SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16)),
        head_masks=MASKS,
    )
    return model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A training run's folder with its artefact."""
    folder = tmp_path / "run"
    save_artefact(tiny_llama(), folder / "artefact", base_model_name_or_path="me/base", scores=torch.rand(2, 2))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model's folder that holds config.json alone: weights must not be needed."""
    CONFIG.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def invoke(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app(), [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.mark.parametrize("command", ["inspect", "export", "import", "methods", "env", "generate", "serve"])
def test_help_has_an_example(command: str) -> None:
    text = invoke(command, "--help").output
    assert f"sparse-hf {command}" in text.split("Example:")[1]


def test_methods() -> None:
    listed = json.loads(invoke("methods", "--json").stdout)
    by_name = {row["name"]: row for row in listed["methods"]}
    assert by_name["streaming"]["parameters"] == {"num_sink_tokens": 64, "window_size": 1024}
    assert by_name["streaming"]["static"] is True and "2309.17453" in by_name["streaming"]["source"]
    assert "duo_attention" in listed["presets"] and "llama" in listed["families"]
    text = invoke("methods").output
    assert all(name in text for name in (*by_name, *listed["presets"], *listed["families"]))


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_HF_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    report = json.loads(invoke("env", "--json").stdout)
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "cpu" in report["devices"]
    assert report["variables"]["TRITON_PTXAS_PATH"] == "/opt/ptxas"
    assert report["variables"]["SPARSE_HF_BACKEND"] == "-"
    row = next(
        row for row in report["backends"] if (row["device"], row["dtype"], row["head_dim"]) == ("cpu", "float32", 64)
    )
    assert row["backend"] != "-" and row["reason"]
    assert "Backends" in invoke("env").output


def test_env_reports_a_forced_backend_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_HF_BACKEND", "nonsense")
    report = json.loads(invoke("env", "--json").stdout)
    assert all(row["backend"] == "-" and "'nonsense' is unknown" in row["reason"] for row in report["backends"])


def test_env_marks_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_hf.cli.env.PACKAGES", ("no-such-package-at-all",))
    assert json.loads(invoke("env", "--json").stdout)["versions"]["no-such-package-at-all"] == "-"


@pytest.mark.parametrize("where", ["run", "artefact"])
def test_inspect_an_artefact(run_folder: Path, where: str) -> None:
    target = run_folder if where == "run" else run_folder / "artefact"
    shown = json.loads(
        invoke("inspect", target, "--seq-len", "200", "--batch", "2", "--dtype", "float32", "--json").stdout
    )
    expected = sparsity_summary(tiny_llama(), 200, 2).to_dict()
    assert {name: shown[name] for name in expected} == json.loads(json.dumps(expected))
    assert shown["config"]["head_masks"] == MASKS.tolist() and shown["head_sparsity"] == 0.75
    text = invoke("inspect", target, "--seq-len", "200").output
    assert "75.0% of heads sparse" in text and "bfloat16" in text


def test_inspect_a_model_reads_its_config_alone(model_folder: Path, run_folder: Path, tmp_path: Path) -> None:
    shown = json.loads(invoke("inspect", model_folder, "--sparse", "streaming", "--json").stdout)
    assert shown["head_sparsity"] == 1.0 and shown["seq_len"] == 8192
    assert shown["kv_bytes"] < shown["dense_kv_bytes"]
    artefact = json.loads(invoke("inspect", model_folder, "--sparse", run_folder / "artefact", "--json").stdout)
    assert artefact["config"]["head_masks"] == MASKS.tolist()
    (tmp_path / "c.yaml").write_text("head_masks: all_full\n")
    assert json.loads(invoke("inspect", model_folder, "--sparse", tmp_path / "c.yaml", "--json").stdout)["kv_bytes"] > 0


def test_inspect_counts_the_models_own_window(tmp_path: Path) -> None:
    values = {name: getattr(CONFIG, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    MistralConfig(**values, num_key_value_heads=2, sliding_window=100).save_pretrained(tmp_path / "mistral")
    command = ("inspect", tmp_path / "mistral", "--sparse", "dense", "--seq-len", "1000", "--json")
    assert json.loads(invoke(*command).stdout)["attention_density"] < 0.2


def test_inspect_plots(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = invoke("inspect", run_folder, "--plot", tmp_path / "map.png", "--json")
    json.loads(result.stdout)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_export_copies_a_run(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "artefact" / "README.md").unlink()
    output = tmp_path / "copies" / "mine"
    assert "wrote" in invoke("export", run_folder, "--out", output).output
    assert torch.equal(load_artefact(output).head_masks, MASKS)
    assert (output / "README.md").is_file()
    (output / "stale").write_text("x")
    invoke("export", output, "--out", output, "--overwrite")
    assert (output / "stale").is_file()  # a copy of itself
    invoke("export", run_folder, "--out", output, "--overwrite")
    assert not (output / "stale").exists()


def test_export_pushes_what_it_wrote(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "sparse_hf.cli.export.push_to_hub", lambda *args, **kwargs: calls.append((args, kwargs)) or "url"
    )
    invoke("export", run_folder, "--push", "me/a", "--private", "--revision", "b")
    invoke("export", run_folder, "--push", "me/a", "--out", tmp_path / "o")
    assert calls == [
        ((run_folder / "artefact", "me/a"), {"private": True, "revision": "b"}),
        ((tmp_path / "o", "me/a"), {"private": None, "revision": None}),
    ]


def test_import_duo(model_folder: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "pattern"
    pattern.mkdir()
    (pattern / "full_attention_heads.tsv").write_text("0.9\t0.1\n0.2\t0.3\n")
    (pattern / "config.json").write_text('{"sink_size": 4, "recent_size": 8}')
    command = ("import", "duo", pattern, "--model", model_folder, "--out", tmp_path / "out")
    assert "2 of 4 heads sparse" in invoke(*command).output.replace("\n", "")
    artefact = load_artefact(tmp_path / "out")
    assert artefact.head_masks.tolist() == [[1, 0], [0, 1]]
    assert artefact.scores is not None and artefact.training["head_sparsity"] == 0.5
    assert artefact.config.sparse == Streaming(num_sink_tokens=4, window_size=8)
    invoke(*command, "--head-sparsity", "0.75", "--overwrite")
    assert load_artefact(tmp_path / "out").head_masks.tolist() == [[1, 0], [0, 0]]
    invoke(*command, "--threshold", "0.15", "--window-size", "9", "--overwrite")
    artefact = load_artefact(tmp_path / "out")
    assert artefact.head_masks.tolist() == [[1, 0], [1, 1]]
    assert artefact.config.sparse == Streaming(num_sink_tokens=4, window_size=9)
    # It is an artefact like any other.
    sparsify(LlamaForCausalLM(CONFIG), tmp_path / "out")


def test_import_prulong(model_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "masks.tsv"
    table.write_text("1\t0\n0\t0\n")
    command = ("import", "prulong", table, "--model", model_folder, "--out", tmp_path / "out")
    invoke(*command)
    assert load_artefact(tmp_path / "out").config.sparse == Streaming(num_sink_tokens=128, window_size=1024)
    invoke(*command, "--num-sink-tokens", "2", "--window-size", "6", "--overwrite")
    assert load_artefact(tmp_path / "out").config.sparse == Streaming(num_sink_tokens=2, window_size=6)
    assert "rounded already" in " ".join(invoke(*command, "--head-sparsity", "0.5", code=2).output.split())
