"""One GPU: mask learning over LoRA and QLoRA by fused kernels, compiled layers, a run that is killed and goes on.

All on the shipped model, without `datasets`. On a CPU the same programs run with the reference in the kernels' place.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.lora import adapter_targets
from sparse_hf_kernels.testing import assert_close_to_truth
from sparse_hf_training.compile_layers import CompileConfig, compile_layers
from sparse_hf_training.data import collate
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.peft import LoraConfig, Quantization, add_lora, load_base
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.trainer import SparseTrainer

WORKER = Path(__file__).parent / "workers" / "demo_run.py"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 3
MASKS = MaskLearningConfig(end_head_sparsity=0.5, mask_learning_rate=0.1, reg_learning_rate=0.1, init_log_alpha=0.5)
EPS = {"weights": 3e-2, "gates": 5e-2}
"""Beyond what bf16 costs the reference. A gate's gradient is a sum of many terms of either sign."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused(device: str) -> str:
    """The backend that must serve, or the call raises: the best of this GPU, on a CPU the reference."""
    if device == "cpu":
        return "reference"
    return "gluon" if torch.cuda.get_device_capability() == (9, 0) else "triton"


def rows(seq_len: int) -> list[dict[str, Tensor]]:
    """Packed rows of two documents from the shipped text; label tokens differ in number."""
    text = (ASSETS / "text" / "train" / "through_the_looking_glass.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text[: 12 * seq_len * STEPS])["input_ids"])
    assert len(ids) >= 2 * STEPS * seq_len
    found = []
    for number in range(2 * STEPS):
        row, border = ids[number * seq_len : (number + 1) * seq_len], seq_len // 3 + 17 * number
        labels = row.clone()
        labels[: 11 * number] = labels[border] = -100
        positions = torch.cat([torch.arange(border), torch.arange(seq_len - border)])
        found.append({"input_ids": row, "labels": labels, "position_ids": positions})
    return found


@dataclass
class FirstGradients(TrainerCallback):
    """Of the adapter and the gates, in the first step; clipping is off."""

    trainer: SparseTrainer | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self.kept or trainer is None or trainer.learning is None:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        named = {**adapter_targets(model), **{f"gates.{n}": p for n, p in trainer.learning.gates.named_parameters()}}
        for name, parameter in named.items():
            assert parameter.grad is not None and parameter.dtype == torch.float32, name
            self.kept[name] = parameter.grad.detach().float().cpu().clone()


Learned = tuple[list[float], dict[str, Tensor]]


@cache
def learn(
    device: str,
    dtype: torch.dtype,
    backend: str,
    quantization: Quantization | None = None,
    compiled: str | None = None,
) -> Learned:
    """Losses of mask learning over an adapter that moves what the model computes, and the first step's gradients."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("SPARSE_HF_BACKEND", backend)
        return _learn(device, dtype, Path(folder), quantization, compiled)


def _learn(
    device: str, dtype: torch.dtype, folder: Path, quantization: Quantization | None, compiled: str | None
) -> Learned:
    torch.manual_seed(0)
    model = load_base(str(MODEL), dtype, quantization=quantization, device=device)
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=16, window_size=64), head_masks="all_full"))
    add_lora(model, LoraConfig(rank=8, alpha=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_targets(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))  # the same in every precision
    prepare_stage(model, "masks_and_weights", MASKS)
    if compiled is not None:
        compile_layers(model, CompileConfig(backend=compiled))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel where one process sees several GPUs
    watch = FirstGradients()
    watch.trainer = trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=rows(256 if device == "cpu" else 1024),
        data_collator=collate,
        objective=ObjectiveConfig(lm=1.0, kl=0.5, kernel="torch"),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert next(model.parameters()).device.type == device
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], watch.kept


def check(found: Learned, same: Learned, truth: Learned) -> None:
    """`found` is no further from the fp32 reference, `truth`, than `same`, which is in bf16 too."""
    losses, gradients = found
    assert len(losses) == STEPS and losses == pytest.approx(truth[0], rel=5e-3)
    assert set(gradients) == set(same[1]) == set(truth[1])
    kinds = {name: "gates" if name.startswith("gates.") else "weights" for name in gradients}
    assert set(kinds.values()) == set(EPS)
    for name, kind in kinds.items():
        assert truth[1][name].norm() > 0, name
        assert_close_to_truth(gradients[name], same[1][name], truth[1][name], eps=EPS[kind], name=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
def test_fused_steps_equal_the_reference(quantization: Quantization | None, device: str) -> None:
    pytest.importorskip("peft")
    if quantization is not None:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    truth, same = (learn(device, dtype, "reference", quantization) for dtype in (torch.float32, torch.bfloat16))
    check(learn(device, torch.bfloat16, fused(device), quantization), same, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_layers_equal_eager_ones(device: str) -> None:
    pytest.importorskip("peft")
    truth, eager = learn(device, torch.float32, "reference"), learn(device, torch.bfloat16, fused(device))
    torch._dynamo.utils.counters.clear()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = learn(device, torch.bfloat16, fused(device), compiled=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    check(compiled, eager, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_killed_run_ends_as_one_left_alone(device: str, tmp_path: Path) -> None:
    """`run_training` on the shipped model: masks, losses and the optimizer of the gates, bit for bit."""

    def start(name: str, *kill_after: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(WORKER), device, str(tmp_path / name), *kill_after]
        with open(tmp_path / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    alone, killed = start("alone"), start("run", "7")
    assert killed.wait(200) == -signal.SIGKILL, (tmp_path / "run.log").read_text()[-3000:]
    assert not (tmp_path / "run" / "artefact").exists() and (tmp_path / "run" / "checkpoint-4").is_dir()
    assert start("run").wait(200) == 0, (tmp_path / "run.log").read_text()[-3000:]
    assert alone.wait(200) == 0, (tmp_path / "alone.log").read_text()[-3000:]

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["status"] for session in record["sessions"]] == ["killed", "finished"]
    assert record["sessions"][1]["resumed_from_step"] == 4 and device in record["sessions"][1]["engine"]
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("run", "alone")]
    losses = [[row for row in history if "loss" in row] for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    for file in ("artefact/head_masks.safetensors", *(f"checkpoint-16/mask_{n}.safetensors" for n in PARTS)):
        found, expected = (load_file(tmp_path / name / file) for name in ("run", "alone"))
        assert set(found) == set(expected) and found
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{file} {name}"


PARTS = ("learning", "optimizer")
