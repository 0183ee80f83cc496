"""`sparse-hf serve` as a process: an OpenAI client's streaming chat over HTTP is what the sparse model generates."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_hf import SparseConfig, Streaming, dense, is_sparsified, save_artefact, sparsify
from sparse_hf.cli import main
from sparse_hf.serving import loading_sparse

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CONFIG = SparseConfig(
    sparse=Streaming(num_sink_tokens=2, window_size=14), head_masks=((0,) * 4, (0, 0, 1, 0), (0,) * 4, (0,) * 4)
)
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
NEW = 24


@pytest.fixture(scope="module")
def folders(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo's model with a chat template, and a sparse artefact for it."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(demo_model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    save_artefact(load(folder / "model"), folder / "artefact", base_model_name_or_path=str(folder / "model"))
    return folder / "model", folder / "artefact"


def load(folder: Path) -> Any:
    return sparsify(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), CONFIG)


@pytest.fixture
def port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(folders: tuple[Path, Path], port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers on the port."""
    model, artefact = folders
    words = ["serve", str(model), "--sparse", str(artefact), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sparse-hf")), *words, "--device", "cpu", "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_streaming_chat_over_http(folders: tuple[Path, Path], server: subprocess.Popen[bytes], port: int) -> None:
    from openai import OpenAI

    folder, _ = folders
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def greedy() -> str:
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    expected = greedy()
    with dense(model):
        assert greedy() != expected, "the prompt does not tell sparse from dense"
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    options: dict[str, Any] = {"model": str(folder), "max_tokens": NEW, "temperature": 0}
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **options))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == expected and len(pieces) > 5, "it came in one piece"
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == NEW
    whole = client.chat.completions.create(messages=messages, **options)
    assert whole.choices[0].message.content == expected
    assert client.completions.create(prompt=PROMPT, **options).choices[0].text == expected
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0
    assert not answers(port)


def test_the_wrapped_manager_does_not_outlive_its_block(folders: tuple[Path, Path]) -> None:
    from transformers.cli.serving import model_manager

    original, (folder, artefact) = model_manager.ModelManager, folders
    with loading_sparse(lambda model: sparsify(model, artefact)):
        made = model_manager.ModelManager(device="cpu", dtype="float32")
    assert model_manager.ModelManager is original
    name = original.process_model_name(str(folder))
    assert is_sparsified(made._load_model(name))
    assert not is_sparsified(original(device="cpu", dtype="float32")._load_model(name))
    with pytest.raises(KeyError), loading_sparse(lambda model: model):
        raise KeyError
    assert model_manager.ModelManager is original


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "cannot listen on 127.0.0.1:{port} (Address already in use); choose another --host or --port"),
        (("--quantization", "int3"), "--quantization must be bnb-4bit or bnb-8bit, got 'int3'"),
        (("--log-level", "loud"), "--log-level must be debug, info, warning or error, got 'loud'"),
    ],
)
def test_errors(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    model, artefact = map(str, folders)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ["serve", model, "--sparse", artefact, "--host", "127.0.0.1", "--port", str(port), *options]
        monkeypatch.setattr(sys, "argv", ["sparse-hf", *given])
        with pytest.raises(SystemExit) as stopped:
            main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 1 and errors == [f"error: {words.format(port=port)}"]


def test_a_missing_template_is_said_before_the_model_loads(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("sparse_hf.serving.serve", lambda model, made_sparse, **options: seen.append((model, options)))
    (tmp_path / "sparse.json").write_text(json.dumps(CONFIG.to_dict()))
    monkeypatch.setattr(sys, "argv", ["sparse-hf", "serve", str(demo_model), "--sparse", str(tmp_path / "sparse.json")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "the tokenizer has no chat template; /v1/completions works" in capsys.readouterr().err
    assert seen[0][0] == str(demo_model) and seen[0][1]["port"] == 8000 and seen[0][1]["dtype"] == "auto"
