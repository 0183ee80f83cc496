"""`sparse-hf generate` on the demo's model: the text of plain `generate`, figures that were measured, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from sparse_hf import SparseCache, SparseConfig, Streaming, dense, save_artefact, sparsify
from sparse_hf.answer import answer
from sparse_hf.cli import build_app, main
from sparse_hf.cli.generate import encode

CONFIG = SparseConfig(
    sparse=Streaming(num_sink_tokens=4, window_size=28),
    head_masks=((1, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)),
)
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def invoke(*args: str | Path, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(build_app(["generate"]), ["generate", *map(str, args)], input=stdin)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "sparse.json"
    path.write_text(json.dumps(CONFIG.to_dict()))
    return path


def expected(folder: Path, text: str, *, new: int, make_dense: bool = False) -> str:
    """What plain `generate` says, greedily, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sparsify(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), CONFIG)
    ids = tokenizer(text, return_tensors="pt").input_ids
    if make_dense:
        with dense(model):
            out = model.generate(ids, max_new_tokens=new, do_sample=False)
    else:
        out = model.generate(ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_text_comes_from_generate_and_the_summary_on_stderr(demo_model: Path, config_file: Path) -> None:
    options = ("--sparse", config_file, "--dtype", "float32", "--max-new-tokens", "12")
    result = invoke(demo_model, PROMPT, *options)
    assert result.stdout == expected(demo_model, PROMPT, new=12)
    assert "sparse: " in result.stderr and "12 new, first token after" in result.stderr
    both = invoke(demo_model, PROMPT, *options, "--dense")
    assert both.stdout == result.stdout + expected(demo_model, PROMPT, new=12, make_dense=True)
    assert "\ndense: " in both.stderr


def test_json_says_what_the_caches_held(demo_model: Path, config_file: Path, tmp_path: Path) -> None:
    text = PROMPT * 4
    (tmp_path / "prompt.txt").write_text(text)
    args = ("--sparse", config_file, "--dtype", "float32", "--max-new-tokens", "5", "--dense", "--json")
    shown = json.loads(invoke(demo_model, "--prompt-file", tmp_path / "prompt.txt", *args).stdout)
    sparse, full = shown["sparse"], shown["dense"]
    assert json.loads(invoke(demo_model, *args, stdin=text).stdout)["sparse"]["text"] == sparse["text"]
    assert sparse["text"] == expected(demo_model, text, new=5) and sparse["new_tokens"] == full["new_tokens"] == 5
    held = sparse["prompt_tokens"] + 4
    # 7 of 16 KV heads keep all tokens, 9 keep 4 sinks and the 27 before the next token; fp32, head_dim 64. Buffers may
    # hold some more.
    assert full["kv_bytes"] == sparse["dense_kv_bytes"] == held * 16 * 64 * 2 * 4
    assert (7 * held + 9 * 31) * 64 * 2 * 4 <= sparse["kv_bytes"] < 0.75 * full["kv_bytes"]
    assert sparse["seconds_to_first_token"] > 0 and sparse["tokens_per_second"] > 0
    assert shown["device"] == "cpu" and shown["dtype"] == "float32" and shown["temperature"] == 0.0


def test_artefacts_runs_and_seeds(demo_model: Path, tmp_path: Path) -> None:
    """An artefact names its model; `--sparse` takes it or the folder of its run; a seed repeats a sample."""
    model = sparsify(AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32), CONFIG)
    save_artefact(model, tmp_path / "run" / "artefact", base_model_name_or_path=str(demo_model))
    args = ("--dtype", "float32", "--max-new-tokens", "8", "--temperature", "1.5")
    texts = [
        invoke(tmp_path / "run", PROMPT, *args, "--seed", "3").stdout,
        invoke(demo_model, PROMPT, "--sparse", tmp_path / "run", *args, "--seed", "3").stdout,
        invoke(demo_model, PROMPT, "--sparse", tmp_path / "run" / "artefact", *args, "--seed", "4").stdout,
    ]
    assert texts[0] == texts[1] != texts[2] and texts[0]


def test_a_chat_template_is_used_unless_raw(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    plain = encode(tokenizer, "Hello.", raw=False)["input_ids"]
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(encode(tokenizer, "Hello.", raw=False)["input_ids"][0]) == "<user> Hello.<a>"
    assert torch.equal(encode(tokenizer, "Hello.", raw=True)["input_ids"], plain)


def test_times_are_those_of_tokens(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks at every reading: one tick to the first token, one for each later one."""
    ticks = iter(range(10, 1000))
    monkeypatch.setattr("sparse_hf.answer.time.perf_counter", lambda: float(next(ticks)))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = sparsify(AutoModelForCausalLM.from_pretrained(demo_model), CONFIG)
    inputs, pieces = encode(tokenizer, PROMPT, raw=True), list[str]()
    found = answer(model, tokenizer, inputs, max_new_tokens=6, on_text=pieces.append)
    assert (found.seconds_to_first_token, found.tokens_per_second) == (1.0, 1.0) and found.new_tokens == 6
    assert "".join(pieces) == found.text and found.prompt_tokens == inputs["input_ids"].shape[1]
    single = answer(model, tokenizer, inputs, max_new_tokens=1)
    assert single.tokens_per_second is None and single.new_tokens == 1
    cache = SparseCache.for_model(model)
    cache.expect(single.prompt_tokens + 1)
    model(**inputs, past_key_values=cache)
    assert single.kv_bytes == cache.allocated_bytes() > cache.kv_bytes(), "there is room for the new token"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["MODEL", "Hi", "--sparse", "streaming", "--max-new-tokens", "4096"], "go beyond the model's 4096 positions"),
        (["MODEL", "Hi"], "is a model and no artefact; say how it shall be sparse with --sparse"),
        (["MODEL", " ", "--sparse", "streaming"], "the prompt is empty; give it as the second argument"),
        (["MODEL", "Hi", "--prompt-file", "x", "--sparse", "streaming"], "give one of them"),
        (["MODEL", "--prompt-file", "missing.txt", "--sparse", "streaming"], "give a text file, or - for stdin"),
        (["MODEL", "Hi", "--sparse", "streming"], "`sparse-hf methods` lists presets"),
        (
            ["MODEL", "Hi", "--sparse", "no preset"],
            "'no preset' is neither a preset, a folder here, a file, nor a Hub id",
        ),
        (["MODEL", "Hi", "--sparse", "streaming", "--device", "nowhere"], "`sparse-hf env` shows devices"),
        (["./nowhere", "Hi", "--sparse", "streaming"], "is no folder here and cannot be a Hub id"),
    ],
)
def test_errors_are_one_line(
    demo_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-hf", "generate", *(str(demo_model) if a == "MODEL" else a for a in args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 1 and len(lines) == 1 and words in lines[0]
