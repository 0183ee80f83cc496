"""Artefacts to the Hub and back, against a hub on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PUSH = """
import sys, warnings
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from sparse_hf import push_to_hub, save_artefact, set_head_masks, sparsify, SparseConfig, Streaming
from sparse_hf.cli import main

torch.manual_seed(0)
folder = sys.argv[1]
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
model = LlamaForCausalLM(config).eval()
model.push_to_hub("me/base")
ids = torch.arange(96)[None]
sparse = SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16), head_masks=((0, 1), (1, 0)))
sparsify(model, sparse)
with torch.no_grad():
    logits = {"main": model(ids).logits}
save_artefact(model, folder + "/main", base_model_name_or_path="me/base", scores=torch.rand(2, 2))
push_to_hub(folder + "/main", "me/masks", private=True)
set_head_masks(model, torch.tensor([[0, 0], [0, 0]]))
with torch.no_grad():
    logits["none"] = model(ids).logits
save_artefact(model, folder + "/none", base_model_name_or_path="me/base")
sys.argv = ["sparse-hf", "export", folder + "/none", "--push", "me/masks", "--revision", "none"]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
torch.save(logits, folder + "/logits.pt")

push_to_hub(folder + "/main", "me/open", private=False)
try:
    push_to_hub(folder + "/main", "me/open", private=True)
    raise SystemExit("a public repository took a private push")
except ValueError as error:
    assert "public" in str(error)
save_artefact(model, folder + "/local", base_model_name_or_path=folder)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    push_to_hub(folder + "/local", "me/local")
assert any("local folder" in str(w.message) for w in caught), [str(w.message) for w in caught]
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from sparse_hf import AutoSparseModelForCausalLM, sparsify, unsparsify

logits = torch.load(sys.argv[1] + "/logits.pt")
ids = torch.arange(96)[None]
report = {}

def equal(model, name):
    with torch.no_grad():
        return torch.equal(model(ids).logits, logits[name])

def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)

base = AutoModelForCausalLM.from_pretrained("me/base").eval()
dense = base(ids).logits
# First, while nothing is cached: huggingface_hub falls back to its cache when the Hub refuses.
report["wrong_token"] = message(lambda: sparsify(base, "me/masks", token="hf_wrong"))
report["anonymous"] = message(lambda: sparsify(base, "me/masks", token=False))
report["main"] = equal(sparsify(base, "me/masks"), "main")
unsparsify(base)
report["token"] = equal(sparsify(base, "me/masks", token="hf_local"), "main")
unsparsify(base)
report["branch"] = equal(sparsify(base, "me/masks", revision="none"), "none")
unsparsify(base)
report["local"] = equal(sparsify(base, sys.argv[1] + "/main"), "main")
unsparsify(base)
report["auto"] = equal(AutoSparseModelForCausalLM.from_pretrained("me/masks").eval(), "main")
report["auto_branch"] = equal(AutoSparseModelForCausalLM.from_pretrained("me/masks", revision="none").eval(), "none")
own = {"cache_dir": sys.argv[1] + "/cache"}
report["own_cache"] = equal(AutoSparseModelForCausalLM.from_pretrained("me/masks", **own).eval(), "main")
again = AutoSparseModelForCausalLM.from_pretrained("me/masks", **own, local_files_only=True)
report["own_cache_alone"] = equal(again.eval(), "main")
empty = {"cache_dir": sys.argv[1] + "/empty", "local_files_only": True}
report["empty_cache"] = message(lambda: AutoSparseModelForCausalLM.from_pretrained("me/masks", **empty))
report["missing"] = message(lambda: sparsify(base, "me/nothing"))
report["no_revision"] = message(lambda: sparsify(base, "me/masks", revision="nowhere"))
report["no_artefact"] = message(lambda: sparsify(base, "me/base"))
report["no_id"] = message(lambda: sparsify(base, "./me/nothing/here"))
report["untouched"] = torch.equal(base(ids).logits, dense)
print(json.dumps(report))
"""

OFFLINE = """
import torch
from sparse_hf import AutoSparseModelForCausalLM, sparsify
model = AutoSparseModelForCausalLM.from_pretrained("me/masks")
try:
    sparsify(model.base_model, "me/other")
except ValueError as error:
    assert "cannot be reached" in str(error), error
"""

CLI = "from sparse_hf.cli import main\nmain()\n"


@pytest.fixture(scope="module")
def pushed(run_on_hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    process = run_on_hub(PUSH, str(folder))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def report(run_on_hub: Any, pushed: Path, home: Path) -> dict[str, Any]:
    process = run_on_hub(LOAD, str(pushed), home=home)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_push_creates_repositories_and_branches(local_hub: Any, pushed: Path) -> None:
    repo = local_hub.repos["me/masks"]
    assert repo.private
    assert not local_hub.repos["me/open"].private
    assert set(repo.branches) == {"main", "none"}
    assert {"sparse_config.json", "head_masks.safetensors", "README.md"} <= set(repo.files("main"))
    assert repo.files("main")["head_masks.safetensors"] == (pushed / "main/head_masks.safetensors").read_bytes()
    assert repo.files("none")["head_masks.safetensors"] == (pushed / "none/head_masks.safetensors").read_bytes()
    assert b"base_model: me/base" in repo.files("main")["README.md"]


@pytest.mark.parametrize(
    "case", ["main", "token", "branch", "local", "auto", "auto_branch", "own_cache", "own_cache_alone"]
)
def test_logits_equal_those_before_the_push(report: dict[str, Any], case: str) -> None:
    assert report[case] is True


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", ["me/nothing", "no preset or folder here", "Repository Not Found"]),
        ("no_revision", ["me/masks@nowhere", "nowhere"]),
        ("no_artefact", ["me/base", "holds no sparse artefact"]),
        ("no_id", ["neither a preset", "Hub id"]),
        ("wrong_token", ["me/masks", "401"]),
        ("anonymous", ["me/masks", "401"]),
        ("empty_cache", ["me/masks", "cannot be reached"]),
    ],
)
def test_what_cannot_be_loaded_says_why_in_one_line(report: dict[str, Any], case: str, words: list[str]) -> None:
    message = report[case]
    assert message is not None, "nothing was raised"
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_failed_load_leaves_the_model_dense(report: dict[str, Any]) -> None:
    assert report["untouched"] is True


def test_what_was_loaded_once_loads_offline(run_on_hub: Any, report: dict[str, Any], home: Path) -> None:
    process = run_on_hub(OFFLINE, home=home, HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stderr


def test_the_command_line_refuses_a_wrong_token_in_one_line(run_on_hub: Any, pushed: Path) -> None:
    process = run_on_hub(CLI, "export", str(pushed / "main"), "--push", "me/masks", token="hf_wrong")
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    assert "401" in process.stderr
    assert "Traceback" not in process.stderr
