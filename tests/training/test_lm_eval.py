"""lm-evaluation-harness with the model class `sparse-hf`, on local tasks, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparse_hf import SparseCache, SparseConfig, Streaming, is_sparsified, save_artefact, sparsify

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from sparse_hf_training.evaluation.lm_eval_model import SparseLM

CONFIG = SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks=((1, 0), (0, 0)))
CALL = "import sys; from sparse_hf.cli import main; main()"


@pytest.fixture(scope="module")
def sharp_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model with sharpened attention, whose windows then change what it says."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 8
    folder = tmp_path_factory.mktemp("lm") / "sharp"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config_file(sharp_folder: Path) -> Path:
    path = sharp_folder.parent / "sparse.yaml"
    path.write_text(yaml.safe_dump(CONFIG.to_dict()))
    return path


@pytest.fixture(scope="module")
def lm(sharp_folder: Path, config_file: Path) -> SparseLM:
    return SparseLM(pretrained=str(sharp_folder), sparse=str(config_file), device="cpu", dtype="float32", batch_size=2)


def oracle(folder: Path, sparse: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return sparsify(model, CONFIG) if sparse else model


def instance(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_it_is_registered_and_sparse(lm: SparseLM, config_file: Path) -> None:
    assert get_model("sparse-hf") is SparseLM and is_sparsified(lm.model)
    assert lm.get_model_info()["sparse"] == config_file.name


def test_loglikelihoods_are_those_of_sparse_attention(lm: SparseLM, sharp_folder: Path, story: str) -> None:
    pairs = [(story[:200], " the ship sailed"), (story[300:380], " at dawn")]
    found = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    scores = []
    for sparse in (True, False):
        model = oracle(sharp_folder, sparse)
        for context, continuation in pairs:
            first, whole = (lm.tok_encode(text) for text in (context, context + continuation))
            with torch.no_grad():
                logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(logits[n - 1, whole[n]].item() for n in range(len(first), len(whole))))
    assert [score for score, _ in found] == pytest.approx(scores[:2], abs=1e-3)
    assert scores[:2] != pytest.approx(scores[2:], abs=1e-2)


def test_generation_goes_through_the_per_head_cache(
    lm: SparseLM, sharp_folder: Path, story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SparseCache] = []
    original = SparseCache.for_model.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, model: Any, **options: Any) -> SparseCache:
        made.append(original(cls, model, **options))
        return made[-1]

    monkeypatch.setattr(SparseCache, "for_model", classmethod(spy))
    # Of unequal lengths: the harness pads them on the left.
    contexts = [story[:300], story[400:560]]
    options = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    found = lm.generate_until([instance("generate_until", text, options) for text in contexts], disable_tqdm=True)
    held, kept = made[0].kv_bytes(), 0
    for number, text in enumerate(contexts):
        ids = lm.tok_encode(text)
        for _ in range(6):
            with torch.no_grad():
                logits = oracle_of(sharp_folder)(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert found[number] == lm.tok_decode(ids[-6:])
        kept = max(kept, len(ids) - 1)
    # One of four KV heads keeps every token, three keep 2 sinks and 7 tokens; keys and values of 8 floats, two rows.
    assert len(made) == 1 and held == (kept + 3 * 9) * 2 * 8 * 4 * 2


_MODELS: dict[Path, Any] = {}


def oracle_of(folder: Path) -> Any:
    return _MODELS.setdefault(folder, oracle(folder, True))


def test_an_artefact_names_its_model(sharp_folder: Path, tmp_path: Path) -> None:
    model = oracle(sharp_folder, True)
    artefact = save_artefact(model, tmp_path / "run" / "artefact")
    for place in (artefact, tmp_path / "run"):
        found = SparseLM(pretrained=str(place), device="cpu", dtype="float32")
        assert is_sparsified(found.model) and found.sparse == str(artefact)
        assert torch.equal(found.model(torch.arange(2, 60)[None]).logits, model(torch.arange(2, 60)[None]).logits)
    whole = save_artefact(model, tmp_path / "whole", save_weights=True)
    with pytest.raises(ValueError, match="nothing says what is sparse"):
        SparseLM(pretrained=str(sharp_folder), device="cpu")
    with pytest.raises(ValueError, match="pretrained must name a model"):
        SparseLM(pretrained=SimpleNamespace())  # type: ignore[arg-type]
    assert (whole / "config.json").is_file()


def test_the_command_runs_a_local_task(sharp_folder: Path, config_file: Path, story: str, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"text": story[n : n + 120], "answer": " ship"} for n in (0, 200)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    generate = {
        **common,
        "task": "local_generation",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choose = {
        **common,
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": [" ship", " gulls"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (generate, choose):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    command = ["lm-eval", "run", "--model", "sparse-hf", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={sharp_folder},sparse={config_file},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "local_generation,local_choice", "--log_samples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", CALL, *command], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "local_generation" in done.stdout and "local_choice" in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["sparse"] == config_file.name and found["config"]["model"] == "sparse-hf"
    (samples,) = tmp_path.rglob("samples_local_choice_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lm = SparseLM(pretrained=str(sharp_folder), sparse=str(config_file), device="cpu", dtype="float32")
    for line, row in zip(lines, rows, strict=True):
        pairs = [instance("loglikelihood", row["text"], choice) for choice in choose["doc_to_choice"]]
        expected = [score for score, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
        assert [float(resp[0][0]) for resp in line["resps"]] == pytest.approx(expected, abs=1e-4)
