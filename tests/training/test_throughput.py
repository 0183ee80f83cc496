"""Tokens, FLOPs and seconds of a run against counts made token by token from the definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.call_counts import QueryRuns
from sparse_hf.patching import get_handle
from sparse_hf_training.config import RunConfig
from sparse_hf_training.observe.flops import LinearSizes, attention_pairs, peak_flops
from sparse_hf_training.observe.throughput import ThroughputCallback, Work
from sparse_hf_training.run import run_training
from sparse_hf_training.typed_config import build

SINKS, WINDOW = 1, 4
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 2


def tiny_model(kind: str = "llama", **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **config}))


def sparse_model(masks: list[list[int]]) -> PreTrainedModel:
    config = SparseConfig(sparse=Streaming(num_sink_tokens=SINKS, window_size=WINDOW), head_masks="all_full")
    return sparsify(tiny_model(), config, head_masks=torch.tensor(masks))


def pairs_of(positions: list[int], sparse: bool) -> int:
    """Keys that each query reads, one by one."""
    read = 0
    for query in positions:
        for key in range(query + 1):
            read += not sparse or query - key < WINDOW or key < SINKS
    return read


PACKED = [[*range(11), *range(7), *range(2)], [*range(20)]]


@pytest.mark.parametrize("tied", [True, False])
def test_linear_sizes_are_those_of_the_matrix_products(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    products = {"body": 0, "head": 0}

    def count(module: nn.Linear, args: Any, output: torch.Tensor) -> None:
        place = "head" if module is model.lm_head else "body"
        products[place] += args[0].shape[-1] * output.shape[-1]

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)  # type: ignore[arg-type]
    model(torch.zeros(1, 1, dtype=torch.long))
    sizes = LinearSizes.of(model)
    assert (sizes.body, sizes.head) == (products["body"], products["head"])
    assert (sizes.body_trained, sizes.head_trained) == (48 * 32, 0)
    assert sizes.forward(10, 3) == 2 * (10 * sizes.body + 3 * sizes.head)
    # Gradients of all activations, of the one trained matrix, and of no other.
    assert sizes.backward(10, 3) == sizes.forward(10, 3) + 2 * 10 * 48 * 32


def test_all_weights_trained_is_six_times_their_number() -> None:
    sizes = LinearSizes.of(tiny_model())
    assert sizes.forward(1, 1) + sizes.backward(1, 1) == 6 * (sizes.body + sizes.head)


def test_conv1d_of_gpt2_counts() -> None:
    sizes = LinearSizes.of(tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=True))
    assert sizes.body == 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) and sizes.head == 50 * 32


def test_pairs_of_deployed_masks() -> None:
    states = get_handle(sparse_model([[1, 0], [0, 0]])).states
    runs = QueryRuns(q_len=20, copies=1, positions=torch.tensor(PACKED))
    found = attention_pairs(states, HEADS // KV_HEADS, runs, None)
    full = sum(pairs_of(row, sparse=False) for row in PACKED)
    sparse = sum(pairs_of(row, sparse=True) for row in PACKED)
    assert found is not None and sparse < full
    assert found.model == found.executed == 2 * (full + 3 * sparse) and found.dense == 2 * 4 * full


def test_pairs_of_gates() -> None:
    """0: the sparse keys, 1: the full ones, between: full ones for the model, those of both branches executed."""
    states = get_handle(sparse_model([[1, 1], [1, 1]])).states
    runs = QueryRuns(q_len=20, copies=3, first=0)
    found = attention_pairs(states, 2, runs, torch.tensor([[0.0, 1.0], [0.3, 0.0]]))
    full, sparse = 3 * pairs_of([*range(20)], sparse=False), 3 * pairs_of([*range(20)], sparse=True)
    assert found is not None
    assert found.model == 2 * (2 * full + 2 * sparse) and found.executed == 2 * (2 * full + 3 * sparse)


def test_a_slice_of_a_row_counts_its_own_queries() -> None:
    """Ranks of sequence parallelism hold slices; together they count the row."""
    states = get_handle(sparse_model([[1, 0], [0, 1]])).states

    def count(positions: list[int]) -> int:
        runs = QueryRuns(q_len=len(positions), copies=1, positions=torch.tensor([positions]))
        found = attention_pairs(states, 2, runs, None)
        assert found is not None
        return found.model

    assert sum(count(PACKED[0][start : start + 5]) for start in range(0, 20, 5)) == count(PACKED[0])


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H200", torch.float32, None),
        ("NVIDIA H200 MIG 1g.18gb", torch.bfloat16, None),
        ("Some Other Device", torch.bfloat16, None),
    ],
)
def test_peaks(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


def test_work_of_one_process_gathers_to_itself() -> None:
    work = Work(tokens=5, seconds=2.5, steps=3, model_flops=1e18, executed_flops=2e18)
    assert work.gathered(torch.device("cpu")) == work


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("sparse_hf_training.observe.throughput.time.perf_counter", lambda: self.now)


def test_clock_stands_still_while_the_run_logs_judges_and_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, model = Clock(monkeypatch), sparse_model([[1, 0], [1, 1]])
    args = Arguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=4)
    state, control = TrainerState(max_steps=4, is_world_process_zero=True), TrainerControl()
    callback = ThroughputCallback(peak_tflops=1e-6)
    callback.on_train_begin(args, state, control, model=model)
    batch = {"input_ids": torch.zeros(2, 20, dtype=torch.long), "labels": torch.full((2, 20), -100)}
    batch["labels"][:, :4] = 1  # three of each row are predicted

    def step(seconds: float, micro_batches: int = 1, **events: bool) -> None:
        clock.now += seconds
        for _ in range(micro_batches):
            callback.count(batch)
        state.global_step += 1
        control.should_log = events.get("log", False)
        control.should_evaluate, control.should_save = events.get("evaluate", False), events.get("save", False)
        callback.on_step_end(args, state, control)
        for name, event in (("log", callback.on_log), ("evaluate", callback.on_evaluate), ("save", callback.on_save)):
            if events.get(name):
                clock.now += 1000
                event(args, state, control)

    step(7.0)
    step(2.0, micro_batches=2, evaluate=True, save=True)
    step(4.0, log=True)
    figures = callback.take_figures()
    assert figures["throughput/tokens_per_second"] == pytest.approx(160 / 13)
    assert figures["throughput/tokens_per_second_per_device"] == pytest.approx(160 / 13)
    assert figures["throughput/seconds_per_step"] == pytest.approx(13 / 3)
    sizes = LinearSizes.of(model)
    pairs = 2 * 2 * (3 * pairs_of([*range(20)], False) + pairs_of([*range(20)], True))
    flops = 4 * (6 * (40 * sizes.body + 6 * sizes.head) + 12 * HEAD_DIM * pairs)
    assert figures["throughput/mfu"] == pytest.approx(flops / 13 / 1e6)
    assert figures["throughput/hfu"] == pytest.approx((flops + 4 * 2 * HEAD_DIM * pairs) / 13 / 1e6)
    assert callback.take_figures() == {} and state.num_input_tokens_seen == 160
    step(1.0, log=True)
    assert callback.take_figures()["throughput/tokens_per_second"] == pytest.approx(40)
    # The first step of the session apart.
    assert callback.summary(1)["throughput/tokens_per_second"] == pytest.approx(160 / 7)


def test_teacher_and_recomputation_are_executed_but_not_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def shares(**options: Any) -> tuple[float, float]:
        clock, model = Clock(monkeypatch), sparse_model([[0, 0], [0, 0]])
        checkpointing = options.pop("checkpointing", False)
        args = Arguments(str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=checkpointing)
        callback = ThroughputCallback(peak_tflops=1e-12, **options)
        state, control = TrainerState(max_steps=1, global_step=0), TrainerControl(should_log=True)
        callback.on_train_begin(args, state, control, model=model)
        ids = torch.zeros(1, 20, dtype=torch.long)
        callback.count({"input_ids": ids, "labels": ids})
        clock.now, state.global_step = clock.now + 1, 1
        callback.on_step_end(args, state, control)
        figures = callback.take_figures()
        return figures["throughput/mfu"], figures["throughput/hfu"]

    sizes = LinearSizes.of(tiny_model())
    sparse, full = 8 * pairs_of([*range(20)], True), 8 * pairs_of([*range(20)], False)
    mfu, hfu = shares()
    forward = 2 * (20 * sizes.body + 19 * sizes.head)
    assert shares(teacher=True) == pytest.approx((mfu, hfu + forward + 4 * HEAD_DIM * full))
    assert shares(checkpointing=True) == pytest.approx((mfu, hfu + 40 * sizes.body + 4 * HEAD_DIM * sparse))


def test_run_logs_its_speed(run_values: Callable[..., dict[str, Any]]) -> None:
    values = run_values(evaluation={}, trainer={"gradient_accumulation_steps": 2})
    result = run_training(build(RunConfig, values))
    rows = [row for row in result.history if "throughput/tokens_per_second" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["throughput/tokens_per_second"] > 0 and "loss" not in row for row in rows)
    assert not any("mfu" in name for row in rows for name in row)  # no peak is known for a CPU
    for row in rows:
        speed, seconds = row["throughput/tokens_per_second"], row["throughput/seconds_per_step"]
        assert speed * seconds == pytest.approx(2 * 256)
    assert result.summary is not None and result.summary.tokens == 4 * 2 * 256


def test_tokens_of_earlier_sessions_count(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = run_values(evaluation={}, trainer={"logging_steps": 3})
    run_training(build(RunConfig, values))
    (tmp_path / "run" / "checkpoint-4" / "complete.json").unlink()
    again = run_training(build(RunConfig, values))
    assert again.summary is not None and again.summary.tokens == 4 * 256


def test_heads_that_choose_by_q_and_k_leave_mfu_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Clock(monkeypatch)
    config = {"sparse": {"method": "xattention"}, "head_masks": "all_sparse"}
    model = sparsify(tiny_model(), SparseConfig.from_dict(config))
    callback = ThroughputCallback(peak_tflops=1.0)
    args = Arguments(str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(max_steps=2), TrainerControl(should_log=True)
    callback.on_train_begin(args, state, control, model=model)
    for step in (1, 2):
        callback.count({"input_ids": torch.zeros(1, 20, dtype=torch.long)})
        callback._now.seconds, state.global_step = 1.0, step
        callback.on_step_end(args, state, control)
        assert set(callback.take_figures()) == {
            "throughput/tokens_per_second",
            "throughput/tokens_per_second_per_device",
            "throughput/seconds_per_step",
        }
    assert caplog.text.count("MFU are left out") == 1
