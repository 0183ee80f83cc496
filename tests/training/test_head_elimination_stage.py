"""The stage `head_elimination`: what it finds and leaves, what it starts from, what it refuses."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparse_hf import AutoSparseModelForCausalLM, SparseConfig, Streaming, save_artefact, sparsify, unsparsify
from sparse_hf.artefact import load_artefact
from sparse_hf.head_masks import round_scores
from sparse_hf.patching import get_handle
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data import (
    PackedTextDataset,
    RecallDataset,
    ShuffledDataset,
    TextSource,
    derive_seed,
    pack_documents,
)
from sparse_hf_training.data.training_data import filler_of, read_sources
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.elimination import EliminationConfig, MaskedLoss, eliminate, elimination_masks
from sparse_hf_training.head_elimination import candidate_heads
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.progress import WorkProgress
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.tasks import KeyValueTask, NeedleTask
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]
TASKS = [{"task": "needle", "num_needles": 2}, {"task": "key_value", "num_pairs": 4}]


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


@pytest.fixture
def shipped(tmp_path: Path) -> dict[str, Any]:
    """On the shipped model: 16 heads, of which 8 go in 3 rounds."""
    text = {split: {"path": str(ASSETS / "text" / split)} for split in ("train", "validation")}
    return {
        "model": str(MODEL),
        "output_dir": str(tmp_path / "run"),
        "stage": "head_elimination",
        "sparse": {"sparse": {"method": "streaming", "num_sink_tokens": 4, "window_size": 24}},
        "head_elimination": {"row_passes": 36, "batch_size": 4},
        "data": {"text": [text["train"]], "seq_len": 256, "recall": {"tasks": TASKS, "ratio": 0.9}},
        "evaluation": {
            "text": text["validation"],
            "seq_len": 256,
            "num_samples": 2,
            "num_rows": 1,
            "tasks": TASKS[:1],
        },
        "trainer": {"use_cpu": True},
    }


def test_stage_gives_what_the_rounds_give_on_the_same_rows(
    shipped: dict[str, Any], tmp_path: Path, figure_keys: set[str]
) -> None:
    result = run(shipped)
    config = EliminationConfig(**shipped["head_elimination"])
    candidates = torch.ones(4, 4, dtype=torch.long)
    count = config.num_rows(candidates, 3)
    everything = result.data.rows
    assert len(everything) == 3 * count  # type: ignore[arg-type]
    kinds = [[everything[kind * count + number] for number in range(count)] for kind in range(3)]
    assert all(0 < int((row["labels"] >= 0).sum()) < 64 for kind in kinds[:2] for row in kind), "answers alone"
    assert all(int((row["labels"] >= 0).sum()) > 200 for row in kinds[2])
    rows = [tuple(row["input_ids"].tolist()) for kind in kinds for row in kind]
    assert len(set(rows)) == len(rows), "no row twice"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    sparsify(model, SparseConfig.from_dict({**shipped["sparse"], "head_masks": "all_full"}))
    measure = MaskedLoss(model, kinds[:2], kinds[2], text_weight=3.0, batch_size=4)  # type: ignore[arg-type]
    rounds = eliminate(measure, candidates, config, num_kinds=3)
    written = json.loads((tmp_path / "run" / "elimination.json").read_text())
    assert written["rounds"] == json.loads(json.dumps([past.to_dict() for past in rounds])) and len(rounds) == 3

    artefact, masks = load_artefact(result.artefact), elimination_masks(rounds, candidates)
    assert torch.equal(artefact.head_masks, masks) and int(masks.sum()) == 8
    assert torch.equal(get_handle(result.model).head_masks, masks)
    assert artefact.scores is not None and result.scores is not None and torch.equal(artefact.scores, result.scores)
    assert torch.equal(round_scores(artefact.scores, 0.5), masks)
    assert artefact.training["stage"] == "head_elimination" and artefact.training["rounds"] == 3
    assert artefact.training["tokens_read"] == 256 * sum(len(past.losses) * past.num_rows for past in rounds)
    assert not (result.artefact / "model.safetensors").exists()
    reloaded = AutoSparseModelForCausalLM.from_pretrained(result.artefact)
    assert torch.equal(get_handle(reloaded).head_masks, masks)

    left = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {"config.yaml", "run.json", "data.json", "elimination.json", "elimination.png", "figures.json", "artefact"}
    assert left == wanted
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [row["case"] for row in figures] == [
        "sparse KV heads",
        "recall needle, 256 tokens, 2 samples",
        "loss on held text",
        "KV cache at 256 tokens",
    ]
    assert set(figures[0]) == figure_keys and figures[0]["value"] == 0.5
    assert result.dense is not None and result.sparse is not None
    assert (figures[2]["value"], figures[2]["baseline"]) == (result.sparse.text_loss, result.dense.text_loss)
    assert figures[2]["value"] != figures[2]["baseline"] and figures[3]["value"] < figures[3]["baseline"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["sessions"][0]["engine"] == "one process, cpu"
    assert record["result"]["stage"] == "head_elimination" and len(record["result"]["figures"]) == 4
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (data["rows"], data["recall_rows"], data["sources"][0]["rows_used"]) == (3 * count, 2 * count, count)


def test_rows_are_those_of_the_data_section(elimination_values: dict[str, Any]) -> None:
    """Each task has samples of its own whatever the mixture says; text is packed, and shuffled by the seed."""
    recall = {"tasks": TASKS, "question_loss": True, "ratio": 0.1}
    elimination_values["data"] = {
        **elimination_values["data"],
        "seed": 5,
        "recall": recall,
        "length_schedule": [[0, 128], [9, 256]],
    }
    data = run(elimination_values).data
    count = len(data.rows) // 3  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(elimination_values["model"])
    documents = read_sources((TextSource(**elimination_values["data"]["text"][0]),), tokenizer)
    expected = [
        RecallDataset(
            tasks=[task],
            filler=filler_of(documents),
            tokenizer=tokenizer,
            seq_len=256,
            seed=derive_seed(5, number),
            length=count,
            question_loss=False,
        )
        for number, task in enumerate((NeedleTask(num_needles=2), KeyValueTask(num_pairs=4)))
    ]
    text = ShuffledDataset(PackedTextDataset(pack_documents(documents, 256)[0]), seed=5, length=count)
    for kind, dataset in enumerate([*expected, text]):
        for number in range(count):
            row, other = data.rows[kind * count + number], dataset[number]
            assert all(torch.equal(row[name], other[name]) for name in ("input_ids", "labels", "position_ids"))


def rounds_of(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "elimination.json").read_text())["rounds"]
    return found


# ---- where it starts, and what else a run may say ----


def test_heads_that_are_sparse_elsewhere_are_so_from_the_beginning(
    elimination_values: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = SparseConfig.from_dict(elimination_values["sparse"])
    save_artefact(sparsify(model, config, head_masks=[[1, 0], [1, 1]]), tmp_path / "narrow")
    elimination_values["head_elimination"] = {
        **elimination_values["head_elimination"],
        "start_from": str(tmp_path / "narrow"),
    }
    result = run(elimination_values)
    masks = get_handle(result.model).head_masks
    assert masks[0, 1] == 0 and int(masks.sum()) == 1 and result.scores is not None and result.scores[0, 1] == 0
    rounds = rounds_of(tmp_path / "run")
    assert [len(past["losses"]) for past in rounds] == [3, 2]
    assert all(found[:2] != [0, 1] for past in rounds for found in past["losses"])
    enough = {**elimination_values["head_elimination"], "end_head_sparsity": 0.25}
    with pytest.raises(ValueError, match="3 of 4 KV heads are full at the start, no more than at the end"):
        run({**elimination_values, "head_elimination": enough, "output_dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_without_text_in_the_loss_and_with_weights_in_four_bits(
    elimination_values: dict[str, Any], tmp_path: Path, quantization: str | None
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    elimination_values |= {
        "quantization": quantization,
        "head_elimination": {**elimination_values["head_elimination"], "text_weight": 0.0},
    }
    result = run(elimination_values)
    assert [past["num_rows"] for past in rounds_of(tmp_path / "run")] == [1, 1, 2]
    assert int(get_handle(result.model).head_masks.sum()) == 1 and not (result.artefact / "config.json").exists()


def test_a_model_with_an_adapter_keeps_it(
    elimination_values: dict[str, Any], run_values: Values, tmp_path: Path
) -> None:
    tuned = run(
        run_values(
            stage="masks_and_weights",
            lora={"rank": 4, "alpha": 8},
            objective={"lm": 1.0, "kl": 0.0},
            evaluation={},
            output_dir=str(tmp_path / "tuned"),
        )
    )
    result = run({**elimination_values, "model": str(tuned.artefact)})
    artefact = load_artefact(result.artefact)
    assert artefact.adapter and artefact.base_model_name_or_path == elimination_values["model"]
    file = "adapter_model.safetensors"
    before, after = load_file(tuned.artefact / file), load_file(result.artefact / file)
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_streamed_text(elimination_values: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    long, short = ({"path": str(path), "streaming": True} for path in (ASSETS / "text" / "validation", text_file))
    elimination_values["data"] = {**elimination_values["data"], "text": [long]}
    assert int(get_handle(run(elimination_values).model).head_masks.sum()) == 1
    elimination_values |= {
        "output_dir": str(tmp_path / "short"),
        "data": {**elimination_values["data"], "text": [short]},
    }
    with pytest.raises(ValueError, match="is used up after max_epochs=1"):
        run(elimination_values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.recall": None}, "by the answers of recall tasks, but data.recall has none; name tasks"),
        ({"data.recall": {"ratio": 0.0}}, "data.recall has none; name tasks"),
        ({"seq_parallel_size": 2}, "whole rows, .*leave seq_parallel_size and compile out"),
        ({"compile": True}, "leave seq_parallel_size and compile out"),
        ({"lora": {"rank": 4}}, "leave it out of stage head_elimination"),
        ({"trainer": {"use_cpu": True, "fsdp": True}}, "whole model in each process; leave FSDP out"),
        ({"head_elimination": {"row_passes": 4000}}, r"rows of '.*' are to be read, each once, .*; give more text"),
        ({"sparse": {"sparse": {"method": "streaming", "window_size": 400}}}, "layers 0-1 read the same full and spar"),
        (
            {"sparse": {"sparse": "streaming", "rules": [{"layers": "1", "sparse": "dense"}]}},
            "KV heads of layers 0-1 read the same full and sparse in rows of 256 tokens",
        ),
        (
            {
                "sparse": {
                    "sparse": {"method": "streaming", "num_sink_tokens": 2, "window_size": 8},
                    "rules": [{"layers": "1", "sparse": "dense"}],
                }
            },
            "KV heads of layers 1 read the same full and sparse in rows of 256 tokens",
        ),
        ({"head_elimination": {"start_from": "no such folder"}}, "'no such folder' is neither a preset, a folder here"),
    ],
)
def test_what_is_refused(
    elimination_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for name, value in changes.items():
        section, _, key = name.partition(".")
        elimination_values[section] = {**elimination_values[section], key: value} if key else value
    with pytest.raises(ValueError, match=message):
        run(elimination_values)
    assert not (tmp_path / "run").exists()  # or the corrected configuration would be refused there


@pytest.mark.parametrize(("own_window", "refused"), [(8, True), (64, False)])
def test_layers_with_a_window_of_their_own(own_window: int, refused: bool) -> None:
    """They take part as in mask learning, unless a sparse head would read no less."""
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=own_window,
    )
    model = AutoModelForCausalLM.from_config(config)
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks="all_full"))
    if refused:
        with pytest.raises(ValueError, match="layers 0-1 read the same full and sparse in rows of 256 tokens"):
            candidate_heads(model, None, 256)
    else:
        assert candidate_heads(model, None, 256).tolist() == [[1, 1], [1, 1]]


def test_heads_that_choose_by_q_and_k(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sparsify(model, SparseConfig(full="xattention", sparse="flexprefill", head_masks="all_full"))
    assert candidate_heads(model, None, 256).sum() == 4
    unsparsify(model)
    sparsify(model, SparseConfig(full="xattention", sparse="xattention", head_masks="all_full"))
    with pytest.raises(ValueError, match="read the same full and sparse"):
        candidate_heads(model, None, 256)


def test_other_code_is_told_that_nothing_trains(model_folder: Path) -> None:
    model = sparsify(AutoModelForCausalLM.from_pretrained(model_folder), "streaming")
    with pytest.raises(ValueError, match="head_elimination trains nothing: run it by run_training"):
        prepare_stage(model, "head_elimination", MaskLearningConfig())


def test_progress_says_how_far_it_is(elimination_values: dict[str, Any]) -> None:
    text = io.StringIO()
    run_training(build(RunConfig, elimination_values), console=Console(file=text, width=400))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("eliminating heads")]
    assert [line.partition(", loss")[0] for line in lines] == [
        f"eliminating heads: round {number}, {left} heads left" for number, left in ((1, 3), (2, 2), (3, 1))
    ]
    screen = io.StringIO()
    with WorkProgress(Console(file=screen, force_terminal=True, width=200), "eliminating heads", total=20) as progress:
        progress.advance(3)
        progress.report("round 1, loss 1.5", completed=4)
    assert "4/20" in screen.getvalue() and "round 1, loss 1.5" in screen.getvalue()
