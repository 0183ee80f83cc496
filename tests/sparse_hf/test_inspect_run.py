"""`sparse-hf inspect MODEL --run` on the demo's model and books."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from sparse_hf import SparseConfig, Streaming, XAttention, capture, save_artefact, sparsify, sparsity_summary
from sparse_hf.cli import build_app

SPEC = find_spec("sparse_hf_training")
assert SPEC is not None and SPEC.submodule_search_locations
MODEL = Path(SPEC.submodule_search_locations[0]) / "demo" / "assets" / "llama-4m"
CONFIG = SparseConfig(
    full=XAttention(threshold=0.6, block_size=64),
    sparse=Streaming(num_sink_tokens=4, window_size=60),
    head_masks=((1, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)),
)


def invoke(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", *map(str, args)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "sparse.json").write_text(json.dumps(CONFIG.to_dict()))
    return tmp_path / "sparse.json"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 300)
    return tmp_path / "text.txt"


def test_json(config_file: Path, text: Path) -> None:
    """The figures of a run by hand on the same tokens."""
    run = ("--run", "--data", text, "--seq-len", "300", "--batch", "2", "--dtype", "float32", "--json")
    shown = json.loads(invoke(MODEL, "--sparse", config_file, *run).stdout)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][:600]).view(2, 300)
    model = sparsify(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), CONFIG)
    with torch.no_grad(), capture(model) as stats:
        model(ids)
    assert shown["layers"] == json.loads(json.dumps(stats.to_dict()["layers"]))
    assert shown["methods"] == json.loads(json.dumps(stats.to_dict()["methods"]))
    assert shown["attention_density"] == pytest.approx(stats.density.mean().item())
    assert (shown["seq_len"], shown["batch_size"], shown["dtype"]) == (300, 2, "float32")
    assert shown["config"]["head_masks"] == [list(row) for row in CONFIG.head_masks]
    streamed = shown["layers"][0]["heads"][2]["branches"][0]
    assert (streamed["window"], streamed["num_sink_tokens"], streamed["block_share"]) == (60, 4, None)
    assert 0 < shown["layers"][3]["density"] < 1 and shown["layers"][3]["heads"][0]["branches"][0]["block_share"] < 1
    # The static layer is what the formulas of a plain inspect say.
    assert shown["layers"][2]["density"] == pytest.approx(sparsity_summary(model, 300).layers[2].attention_density)


def test_text_and_plot(config_file: Path, tmp_path: Path) -> None:
    """The demo's books, at a length that the model takes."""
    pytest.importorskip("matplotlib")
    result = invoke(MODEL, "--sparse", config_file, "--run", "--seq-len", "200", "--plot", tmp_path / "map.png")
    text = " ".join(result.stdout.split())
    assert "the demo's books" in text and "200 tokens" in text and "2 xattention, 6 streaming" in text
    assert "of causal pairs read" in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_an_artefact(text: Path, tmp_path: Path) -> None:
    """Weights come from the base model that it names."""
    model = sparsify(AutoModelForCausalLM.from_pretrained(MODEL), CONFIG)
    save_artefact(model, tmp_path / "run" / "artefact", base_model_name_or_path=str(MODEL))
    run = ("--run", "--data", text, "--seq-len", "150", "--json")
    shown = json.loads(invoke(tmp_path / "run", *run).stdout)
    assert shown["dtype"] == "bfloat16" and shown["layers"][0]["heads"][2]["branches"][0]["window"] == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "--run"), "is a model and no artefact; say how it shall be sparse with --sparse"),
        (("xattention", "--run"), "--run needs a model: sparse-hf inspect MODEL --sparse xattention --run"),
        ((MODEL, "--sparse", "streaming", "--data", "x.txt"), "--data is the text of a run; add --run"),
        ((MODEL, "--sparse", "streaming", "--run", "--seq-len", "5000"), "beyond the model's 4096 positions"),
        ((MODEL, "--sparse", "streaming", "--run", "--data", "./no.txt"), "no such file or folder"),
        ((MODEL, "a=1", "--sparse", "streaming", "--run"), "go with a method"),
    ],
)
def test_errors(arguments: tuple[str | Path, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them before any weights are read."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    result = CliRunner().invoke(build_app(["inspect"]), ["inspect", *map(str, arguments)])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
    assert "\n" not in str(result.exception)
