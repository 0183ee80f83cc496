"""What all calibrations share: text, statistics that survive a kill, the artefact, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sparse_hf import load_artefact, sparsify, unsparsify
from sparse_hf.calibrate.framework import REPORT_FILE, STATISTICS_FILE, Calibrator, Target, calibrate, steps_done
from sparse_hf.calibrate.registry import available_calibrators, calibrator_class
from sparse_hf.calibrate.text import CalibrationText, demo_text, load_sequences

OPTIONS = {
    "xattention": {"block_size": 64, "target_density": 0.5, "num_steps": 3, "num_rows": 16},
    "flexprefill": {
        "block_size": 64,
        "target_density": 0.6,
        "min_budget": 64,
        "taus": "0,0.2",
        "num_gammas": 3,
        "num_passes": 2,
        "num_rows": 16,
    },
    "scores": {"num_sink_tokens": 4, "window_size": 32},
}
METHODS = tuple(OPTIONS)


def calibrator_of(name: str, model: PreTrainedModel, seq_len: int = 512, seed: int = 0) -> Calibrator:
    kind = calibrator_class(name)
    return kind(kind.Options(**OPTIONS[name]), Target.of(model, seq_len), seed)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def kill_after(number: int) -> Callable[[str], None]:
    left = [number]

    def progress(figures: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return progress


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_gives_the_same_bits(
    name: str, tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path
) -> None:
    calibrate(tiny_model, sequences[:3], calibrator_of(name, tiny_model), tmp_path / "whole")
    total = calibrator_of(name, tiny_model).num_passes * 3
    # In the middle of the last pass; twice, then between two passes where there are two.
    for kills in ([total - 1], [1, 3] if total > 3 else [1, 2]):
        out = tmp_path / f"resumed{len(kills)}"
        done = 0
        for number in kills:
            with pytest.raises(Killed):
                calibrate(
                    tiny_model,
                    sequences[:3],
                    calibrator_of(name, tiny_model),
                    out,
                    resume=True,
                    progress=kill_after(number - done),
                )
            done = number
            assert steps_done(out) == done and not (out / "sparse_config.json").exists()
        (out / f".{STATISTICS_FILE}.tmp").write_bytes(b"half a file")  # killed while it wrote
        calibrate(tiny_model, sequences[:3], calibrator_of(name, tiny_model), out, resume=True)
        ours, theirs = load_file(out / STATISTICS_FILE), load_file(tmp_path / "whole" / STATISTICS_FILE)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        ours, theirs = load_artefact(out), load_artefact(tmp_path / "whole")
        assert ours.config == theirs.config and torch.equal(ours.head_masks, theirs.head_masks)


@pytest.mark.parametrize("name", METHODS)
def test_artefact_loads(name: str, tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    result = calibrate(tiny_model, sequences[:1], calibrator_of(name, tiny_model), tmp_path / "out", data="a text")
    ids = sequences[3:]
    with torch.no_grad():
        dense = tiny_model(ids).logits
        sparsify(tiny_model, tmp_path / "out")
        sparse = tiny_model(ids).logits
        unsparsify(tiny_model)
    assert sparse.isfinite().all() and not torch.equal(dense, sparse)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["settings"]["method"] == name and report["options"] == {**report["options"], **OPTIONS[name]}
    assert [row["case"] for row in report["figures"]] == [figure.case for figure in result.outcome.figures]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"calibration of {name}" in card and "1 sequences of 512 tokens of a text" in card


def test_new_target_needs_no_new_look(
    tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(tiny_model, sequences[:2], calibrator_of("xattention", tiny_model), tmp_path / "out")
    other = calibrator_of("xattention", tiny_model)
    other.options = replace(other.options, target_density=0.8)
    monkeypatch.setattr(type(other), "run", None)
    result = calibrate(tiny_model, sequences[:2], other, tmp_path / "out", resume=True)
    density = result.figures[0]["value"]
    assert 0.7 < density <= 0.8
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["options"]["target_density"] == 0.8


def test_other_settings_are_not_resumed(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibrate(tiny_model, sequences[:1], calibrator_of("xattention", tiny_model), out)
    kind = calibrator_class("xattention")
    other = kind(kind.Options(**{**OPTIONS["xattention"], "stride": 8}), Target.of(tiny_model, 512))
    with pytest.raises(ValueError, match="stride 16 != 8"):
        calibrate(tiny_model, sequences[:1], other, out, resume=True)
    with pytest.raises(ValueError, match="tokens "):
        calibrate(tiny_model, sequences[1:2], calibrator_of("xattention", tiny_model), out, resume=True)
    with pytest.raises(ValueError, match="seed 0 != 1"):
        calibrate(tiny_model, sequences[:1], calibrator_of("xattention", tiny_model, seed=1), out, resume=True)
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite replaces it"):
        calibrate(tiny_model, sequences[:1], other, out)
    calibrate(tiny_model, sequences[:1], other, out, overwrite=True)
    assert load_artefact(out).config.rules[0].full.stride == 8


def test_foreign_folders_are_left_alone(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(ValueError, match=r"resume|overwritten|exists already"):
            calibrate(tiny_model, sequences[:1], calibrator_of("scores", tiny_model), tmp_path, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["letters.txt"]


def test_sparsified_model_is_refused(tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path) -> None:
    sparsify(tiny_model, "dense")
    try:
        with pytest.raises(ValueError, match="unsparsify"):
            calibrate(tiny_model, sequences[:1], calibrator_of("scores", tiny_model), tmp_path / "out")
    finally:
        unsparsify(tiny_model)


# text


def test_text_is_read_in_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"body": "w5 w6"}\n{"body": "w7"}\n')
    (tmp_path / "a.txt").write_text("w1 w2\nw3 w4")
    end = tokenizer.eos_token_id
    text = CalibrationText(path=str(tmp_path), text_column="body")
    found = load_sequences(text, tokenizer, num_sequences=2, seq_len=5)
    assert found.tolist() == [[1, 2, 3, 4, end], [5, 6, end, 7, end]]


def test_parquet_is_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["w1 w2", "w3"]}).to_parquet(str(file))
    found = load_sequences(CalibrationText(path=str(file)), tokenizer, num_sequences=1, seq_len=4)
    assert found.tolist() == [[1, 2, tokenizer.eos_token_id, 3]]


def test_demo_text_is_the_default(tokenizer: PreTrainedTokenizerFast) -> None:
    first = sorted(demo_text().iterdir())[0]
    assert next(CalibrationText().documents()) == first.read_text(encoding="utf-8")


def test_bad_text_says_what_to_do(tokenizer: PreTrainedTokenizerFast, words_file: Path, tmp_path: Path) -> None:
    def load(path: Path, column: str = "text") -> None:
        load_sequences(CalibrationText(path=str(path), text_column=column), tokenizer, num_sequences=4, seq_len=500)

    with pytest.raises(ValueError, match="holds 1201 tokens, enough for 2 sequences of 500, and 4 were asked for"):
        load(words_file)
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        load(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match="unknown suffix"):
        load(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text('{"body": "w1"}')
    with pytest.raises(ValueError, match=r"set --text-column to one of \['body'\]"):
        load(tmp_path / "x.jsonl")


# the command

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", METHODS)
def test_command(name: str, run_main: Run, model_folder: Path, words_file: Path, tmp_path: Path) -> None:
    own = [text for key, value in OPTIONS[name].items() for text in (f"--{key.replace('_', '-')}", str(value))]
    shared = ["--model", model_folder, "--data", words_file, "--num-sequences", "2", "--seq-len", "512"]
    out = tmp_path / "out"
    code, text, error = run_main("calibrate", name, *shared, "--out", out, *own, "--json")
    assert code == 0, error
    figures = json.loads(text)
    assert figures and {"case", "value", "unit", "command", "hardware"} <= set(figures[0])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sparsify(model, out)
    code, text, error = run_main("calibrate", name, *shared, "--out", out, *own, "--resume")
    assert code == 0 and f"Calibration of {name}" in text and f"wrote {out}" in error


def test_help_lists_all_calibrations(run_main: Run) -> None:
    code, text, _ = run_main("calibrate", "--help")
    assert code == 0 and all(name in text for name in available_calibrators())
    code, text, _ = run_main("calibrate", "scores", "--help")
    assert code == 0 and "--retrieval-weight" in text and "--num-sequences" in text
    code, _, error = run_main("calibrate", "magic")
    assert code == 2 and "magic" in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out", "{folder}"], "exists already; --resume goes on with it"),
        (["--seq-len", "4096"], "--seq-len 4096 is beyond the model's 1024 positions"),
        (["--data", "/none.txt"], "no such file or folder"),
        (["--target-density", "1.5"], "--target-density must lie in (0, 1], got 1.5"),
        (["--target-density", "0.01"], "density 0.01 cannot be reached"),
        (["--stride", "5"], "stride must be one of"),
        (["--block-size", "128", "--seq-len", "256"], "sequences up to 2 * block_size = 256 tokens are dense"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--device", "nowhere"], "cannot be put on 'nowhere'"),
        (["--model", "/none"], "/none"),
    ],
)
def test_errors_are_one_line(
    args: list[str], words: str, run_main: Run, model_folder: Path, words_file: Path, tmp_path: Path
) -> None:
    given = {"--model": model_folder, "--data": words_file, "--seq-len": "512", "--num-sequences": "1"}
    given |= {"--block-size": "64", "--out": tmp_path / "out"} | dict(zip(args[::2], args[1::2], strict=True))
    pairs = [str(text).format(folder=tmp_path) for pair in given.items() for text in pair]
    code, _, error = run_main("calibrate", "xattention", *pairs)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and words in lines[0] and "Traceback" not in error


def test_weights_are_refused_before_anything_is_measured(
    tiny_model: PreTrainedModel, sequences: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    calibrate(tiny_model, sequences[:1], calibrator_of("xattention", tiny_model), out)
    (out / "model.safetensors").write_bytes(b"trained")
    other = calibrator_of("xattention", tiny_model)
    monkeypatch.setattr(type(other), "run", None)
    with pytest.raises(ValueError, match="holds weights"):
        calibrate(tiny_model, sequences[:1], other, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"trained"
