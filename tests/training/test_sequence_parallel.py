"""Sequence parallelism: the same losses and gradients as whole rows in one process."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, Trainer, TrainingArguments

from sparse_hf.artefact import load_artefact
from sparse_hf.cache import SparseCache
from sparse_hf.capture import capture
from sparse_hf.config import SparseConfig
from sparse_hf.head_exchange import check_head_counts, head_order, kv_head_range
from sparse_hf.patching import apply_config, dense
from sparse_hf_kernels import AttentionLayout, HeadPattern
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data import collate
from sparse_hf_training.engines.judging import JudgeDenseCallback
from sparse_hf_training.evaluation import Judgement
from sparse_hf_training.run import run_training
from sparse_hf_training.sequence_parallel import (
    SequenceGroup,
    disable_sequence_parallel,
    enable_sequence_parallel,
    get_sequence_group,
    sequence_parallel_disabled,
    shard_batch,
)
from sparse_hf_training.trainer import SparseTrainer

WORKERS = Path(__file__).parent / "workers"
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def launch(processes: int, program: str, *arguments: str, limit: float = 400) -> str:
    """Standard output of a worker program; a deadlock ends in a failure, with no process left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    process = subprocess.Popen(
        [*command, str(WORKERS / program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | ({} if "cuda" in arguments else CPU_ONLY),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {limit} s: {process.communicate()[1][-2000:]}")
    assert process.returncode == 0, err[-4000:]
    return out


def test_four_processes_equal_one() -> None:
    rows = [json.loads(line) for line in launch(4, "sequence_parallel.py").splitlines() if line.startswith("{")]
    assert len(rows) == 30
    for row in rows:
        assert row["loss"] < 2e-6, row
        assert row["gradient"] < 1e-6 * max(row.get("largest", 0), 1e-1), row
        if "gate_gradient" in row and ", gates" in row["case"]:
            assert row["gate_gradient"] > 1e-5, row
            assert row["gate_error"] < 1e-5 * row["gate_gradient"], row
        if "saved_share" in row:
            assert row["saved_share"] < (0.55 if "SP 2" in row["case"] else 0.32), row


@pytest.mark.multi_gpu
def test_gpus_equal_one_in_bf16() -> None:
    """Fused kernels over NCCL; gradients of two layers in bf16, summed over ranks in another order."""
    number = 4 if torch.cuda.device_count() >= 4 else 2
    out = launch(number, "sequence_parallel.py", "cuda", limit=500)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(rows) == 15 * (2 if number == 4 else 1)
    for row in rows:
        # Rounding may change which blocks xattention selects.
        bound = 0.1 if "xattention" in row["case"] else 0.03
        assert row["loss"] < 0.02, row
        assert row["gradient"] < bound * max(row.get("largest", 0), 1e-2), row
        if row.get("gate_gradient", -1) > 0:
            assert row["gate_error"] < 2 * bound * row["gate_gradient"], row
        if "saved_share" in row:
            assert row["saved_share"] < (0.6 if "SP 2" in row["case"] else 0.35), row


def history(folder: Path, name: str) -> list[float]:
    return [row[name] for row in json.loads((folder / "history.json").read_text()) if name in row]


STAGES: list[dict[str, Any]] = [
    {"stage": "masks", "objective": {"lm": 0.5, "kl": 1.0}, "trainer": {"eval_strategy": "steps", "eval_steps": 2}},
    {
        "stage": "masks_and_weights",
        "objective": {"lm": 1.0, "kl": 0.5},
        "trainer": {"optim": "sgd", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        "evaluation": {},
    },
]


def test_runs_equal_one_process(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A recall sample has its labels at its end, so that the first rank has none."""
    paths = []
    for changes in STAGES:
        values = run_values(**changes, output_dir=str(tmp_path / f"{changes['stage']}-one"))
        run_training(RunConfig.load(written(tmp_path / "one.yaml", values)))
        values |= {"seq_parallel_size": 2, "output_dir": str(tmp_path / f"{changes['stage']}-two")}
        paths.append(str(written(tmp_path / f"{changes['stage']}.yaml", values)))
    launch(2, "run_several.py", *paths)
    for changes in STAGES:
        one, two = (tmp_path / f"{changes['stage']}-{n}" for n in ("one", "two"))
        assert history(two, "loss") == pytest.approx(history(one, "loss"), abs=2e-4)
        a, b = load_artefact(one / "artefact"), load_artefact(two / "artefact")
        assert a.scores is not None and b.scores is not None
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.head_masks, b.head_masks)
        if changes["stage"] == "masks":
            assert history(two, "eval_loss") == pytest.approx(history(one, "eval_loss"), abs=1e-4)
            assert history(two, "eval_recall/needle") == history(one, "eval_recall/needle")
        else:
            weights = [load_file(next(folder.rglob("artefact/**/model*.safetensors"))) for folder in (one, two)]
            for name, value in weights[0].items():
                torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=2e-6)


def test_every_stage_of_zero_equals_one_process(tmp_path: Path) -> None:
    """Gradient norms and clipped steps too, with our exchange; with DeepSpeed's under ZeRO-3, and not below."""
    program = "deepspeed_sequence_parallel.py"
    two = json.loads(launch(2, program, str(tmp_path / "two")).splitlines()[-1])
    spec = importlib.util.spec_from_file_location("deepspeed_sequence_parallel", WORKERS / program)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    one = worker.train_alone(tmp_path / "one")
    refused = two.pop("refused")
    assert sorted(two) == ["DeepSpeed's, ZeRO-3", "own, ZeRO-1", "own, ZeRO-2", "own, ZeRO-3"]
    for found in two.values():
        for name, values in one.items():
            assert found[name] == pytest.approx(values, rel=1e-5), name
    assert "gradients 2 times too large" in refused["zero2"] and "seq_parallel_size=2" in refused["zero2"]
    assert "objective.lm alone" in refused["kl"]


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_shards_are_the_shifted_row() -> None:
    rows = [
        {"input_ids": range(10, 17), "labels": [-100, 11, 12, -100, 14, 15, 16], "position_ids": [0, 1, 2, 0, 1, 2, 3]}
    ]
    batch = collate(rows, pad_to_multiple_of=4)
    groups = [SequenceGroup(name="", rank=rank, size=4, data_rank=0, data_size=1) for rank in range(4)]
    shards = [shard_batch(batch, group) for group in groups]
    whole = {key: torch.cat([shard[key] for shard in shards], 1)[0].tolist() for key in shards[0]}
    assert whole["input_ids"][:7] == list(range(10, 17))
    assert whole["position_ids"] == [0, 1, 2, 0, 1, 2, 3, 0]  # the padding is a document of its own
    assert whole["shift_labels"] == [11, 12, -100, 14, 15, 16, -100, -100]
    assert "labels" not in whole
    with pytest.raises(ValueError, match="pad_to_multiple_of=4"):
        shard_batch(collate(rows), groups[0])
    with pytest.raises(ValueError, match="shift_labels already"):
        shard_batch(shards[0], groups[0])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_query_heads_find_their_kv_heads(size: int) -> None:
    num_heads, num_kv_heads = 16, 4
    for rank in range(size):
        mine = range(rank * num_heads // size, (rank + 1) * num_heads // size)
        needed = {head // (num_heads // num_kv_heads) for head in mine}
        assert set(kv_head_range(num_kv_heads, rank, size)) == needed


@pytest.mark.parametrize(
    ("kinds", "num_heads", "size", "order"),
    [
        ("dsdsdsds", 32, 2, (0, 1, 4, 5, 2, 3, 6, 7)),
        ("ssdd", 4, 2, (0, 2, 1, 3)),
        ("ddssssss", 8, 4, (0, 4, 1, 5, 2, 6, 3, 7)),  # one query head each: none to split
        ("ddssssss", 32, 4, (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),  # halves: 0 and 1 of head 0
        ("dsss", 8, 2, (0, 2, 4, 6, 1, 3, 5, 7)),
        ("dddd", 16, 2, None),
        ("dsds", 16, 4, None),
        ("ds", 16, 4, None),
    ],
)
def test_dense_and_sparse_heads_are_dealt_evenly(
    kinds: str, num_heads: int, size: int, order: tuple[int, ...] | None
) -> None:
    patterns = {"d": HeadPattern(), "s": HeadPattern(window=4)}
    layout = AttentionLayout(patterns=tuple(patterns[kind] for kind in kinds))
    assert head_order(layout, num_heads, size) == order


def test_ranks_have_equal_work_where_heads_can_be_split() -> None:
    patterns = [HeadPattern()] * 3 + [HeadPattern(window=4)] * 5
    order = head_order(AttentionLayout(patterns=tuple(patterns)), 32, 4)
    assert order is not None and sorted(order) == list(range(32))
    for rank in range(4):
        mine = [patterns[number // 4] for number in order[rank * 8 : rank * 8 + 8]]
        assert sum(pattern.is_dense for pattern in mine) == 3


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(28, 4, 8), (6, 3, 2), (12, 12, 5)])
def test_uneven_heads_are_refused(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(ValueError, match="use one of"):
        check_head_counts(heads, kv_heads, size)


@pytest.fixture
def shared_model() -> PreTrainedModel:
    """A tiny sparsified model whose rows two ranks share, without processes: what is refused is refused before."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("llama", vocab_size=50, hidden_size=32, intermediate_size=32, **shape)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    apply_config(model, SparseConfig.from_dict({"sparse": {"method": "streaming", "window_size": 4}}))
    enable_sequence_parallel(model, HALF)
    return model


HALF = SequenceGroup(name="none", rank=0, size=2, data_rank=0, data_size=1)
SLICE = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}


def test_what_a_slice_cannot_answer_is_refused(shared_model: PreTrainedModel) -> None:
    model = shared_model
    with pytest.raises(ValueError, match="needs position_ids"):
        model(SLICE["input_ids"])
    with pytest.raises(ValueError, match="a SparseCache cannot hold slices"):
        model(**SLICE, past_key_values=SparseCache.for_model(model))
    with sequence_parallel_disabled(model):
        seen = model(**SLICE, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="use_cache=False, or generate within"):
        model(SLICE["input_ids"], position_ids=SLICE["position_ids"] + 8, past_key_values=seen)
    with capture(model), pytest.raises(ValueError, match="capture sees whole sequences"):
        model(**SLICE, use_cache=False)
    with pytest.raises(ValueError, match="sequence parallel already"):
        enable_sequence_parallel(model, HALF)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="use `with dense"):
        model(**SLICE, use_cache=False)
    model.set_attn_implementation("sparse_hf")
    disable_sequence_parallel(model)
    assert model(SLICE["input_ids"]).logits.isfinite().all()
    with pytest.raises(ValueError, match="not sequence parallel"):
        disable_sequence_parallel(model)


def test_dense_model_of_a_sharded_run_is_judged_on_whole_rows(shared_model: PreTrainedModel, tmp_path: Path) -> None:
    seen = []

    def judge(model: PreTrainedModel) -> Judgement:
        seen.append(model(SLICE["input_ids"], use_cache=False).logits)
        return Judgement(text_loss=1.0, recall=())

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer: Any = Trainer(shared_model, arguments)
    callback = JudgeDenseCallback(trainer, judge, tmp_path / "dense.json")  # type: ignore[arg-type]
    callback.on_train_begin(arguments, trainer.state, trainer.control)
    assert get_sequence_group(shared_model) == HALF
    disable_sequence_parallel(shared_model)
    with dense(shared_model):
        torch.testing.assert_close(seen[0], shared_model(SLICE["input_ids"], use_cache=False).logits)


def test_means_over_slices_are_refused(shared_model: PreTrainedModel, tmp_path: Path) -> None:
    """One slice of a recall sample has all of its labels, and would count as much as one without any."""
    options = {"max_steps": 1, "use_cpu": True, "remove_unused_columns": False, "report_to": "none"}
    arguments = TrainingArguments(output_dir=str(tmp_path), average_tokens_across_devices=False, **options)
    rows: Any = [{name: value[0] for name, value in SLICE.items()} | {"labels": SLICE["input_ids"][0]}]
    with pytest.raises(ValueError, match="average_tokens_across_devices=false would average over slices"):
        SparseTrainer(shared_model, arguments, train_dataset=rows).get_train_dataloader()


def test_models_that_cannot_be_split_are_refused(shared_model: PreTrainedModel) -> None:
    disable_sequence_parallel(shared_model)
    with pytest.raises(ValueError, match="use one of"):
        enable_sequence_parallel(shared_model, replace(HALF, size=3))
    shared_model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="chooses frequencies by the length"):
        enable_sequence_parallel(shared_model, HALF)


def test_models_are_copied_and_saved_with_their_place(shared_model: PreTrainedModel, tmp_path: Path) -> None:
    twin = copy.deepcopy(shared_model)
    assert get_sequence_group(twin) == HALF
    shared_model.save_pretrained(tmp_path)
    assert get_sequence_group(AutoModelForCausalLM.from_pretrained(tmp_path)) is None


def test_one_process_is_refused(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path / "c.yaml", run_values(seq_parallel_size=2)))
    with pytest.raises(ValueError, match="needs 2 processes; start them with"):
        run_training(config)
