"""One case of the training benchmark: a real `SparseTrainer` takes steps, and each step's time and memory are kept."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from sparse_hf.patching import dense, set_head_masks
from sparse_hf.sparsify import sparsify
from sparse_hf_training.bench.workload import (
    NUM_KV_HEADS,
    RandomRows,
    StepWork,
    llama_8b_config,
    random_model,
    step_work,
    streaming_config,
    streaming_masks,
)
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.sequence_parallel import ExchangeTimer, time_exchanges
from sparse_hf_training.sequence_parallel.enable import sequence_parallel
from sparse_hf_training.stages import Stage, prepare_stage
from sparse_hf_training.trainer import SparseTrainer

Attention = Literal["flash", "cudnn", "sparse_hf"]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}
LM, KL = ObjectiveConfig(lm=1.0, kl=0.0), ObjectiveConfig(lm=0.0, kl=1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """What takes steps.

    Args:
        name: of the case in figures.
        num_layers: of the 8B shape.
        seq_len: tokens of a row, over all ranks of a sequence-parallel group.
        document_len: tokens of each document in the row; None for one document.
        attention: `flash` or `cudnn`: dense, by torch's SDPA through transformers; `sparse_hf`: this project's.
        head_sparsity: share of streaming heads; 0 for dense heads.
        stage: what trains.
        objective: of the step.
        seq_parallel_size: ranks that share a row.
    """

    name: str
    num_layers: int
    seq_len: int
    document_len: int | None = None
    attention: Attention = "sparse_hf"
    head_sparsity: float = 0.0
    stage: Stage = "sft"
    objective: ObjectiveConfig = LM
    seq_parallel_size: int = 1

    @property
    def work(self) -> StepWork:
        return step_work(
            llama_8b_config(self.num_layers),
            seq_len=self.seq_len,
            document_len=self.document_len or self.seq_len,
            head_sparsity=self.head_sparsity,
            train_weights=self.stage != "masks",
            two_branches=self.stage != "sft",
            teacher=self.objective.kl > 0,
        )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the steps of a case took.

    Args:
        case: what took them.
        seconds: of each step but the first, the slowest rank's.
        peak_bytes: the largest of any GPU after the first step.
        exchange_seconds: of a step that exchanges of heads take by themselves: the least wait of any rank, that of the
            rank which comes last.
        waiting_seconds: the longest wait of any rank, for late ones included.
    """

    case: TrainingCase
    seconds: tuple[float, ...]
    peak_bytes: int
    exchange_seconds: float
    waiting_seconds: float

    @property
    def step_seconds(self) -> float:
        return median(self.seconds)


@dataclass
class StepClock(TrainerCallback):
    """Times whole optimizer steps, the device's work included, and after the first one the exchanges in them.

    Args:
        stack: ends the timing of exchanges.
    """

    stack: ExitStack
    seconds: list[float] = field(default_factory=list)
    exchanges: ExchangeTimer = field(default_factory=ExchangeTimer)
    _start: float = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        if len(self.seconds) == 1:
            torch.cuda.reset_peak_memory_stats()  # the first step also compiles
            self.exchanges = self.stack.enter_context(time_exchanges())
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def take_steps(case: TrainingCase, num_steps: int = 4) -> Steps:
    """Takes `num_steps` optimizer steps of a case on all ranks; the first does not count."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clock = StepClock(stack)
        trainer = build_trainer(case, folder, num_steps, clock)
        model: Any = trainer.model
        stack.enter_context(sequence_parallel([model], case.seq_parallel_size))
        stack.enter_context(_attention(case, model))
        trainer.train()
    steps = _over_ranks(case, clock)
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return steps


def _over_ranks(case: TrainingCase, clock: StepClock) -> Steps:
    """The slowest and largest of all ranks."""
    waited = clock.exchanges.seconds / max(len(clock.seconds) - 1, 1)
    own = [*clock.seconds[1:], waited, -waited, float(torch.cuda.max_memory_allocated())]
    found = torch.tensor(own, device="cuda", dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    *seconds, longest, least, peak = found.tolist()
    return Steps(
        case=case, seconds=tuple(seconds), peak_bytes=int(peak), exchange_seconds=-least, waiting_seconds=longest
    )


def build_trainer(case: TrainingCase, folder: str, num_steps: int, clock: TrainerCallback) -> SparseTrainer:
    """The trainer of a case: weights, gradients and optimizer states in bf16, whole layers checkpointed."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        logging_steps=num_steps,
        disable_tqdm=True,
        remove_unused_columns=False,
        **(SHARDED if dist.is_initialized() and dist.get_world_size() > 1 else {}),
    )
    config = llama_8b_config(case.num_layers)
    model = random_model(config, arguments.device, torch.bfloat16)
    sparsify(model, streaming_config())
    set_head_masks(model, streaming_masks(case.num_layers, NUM_KV_HEADS, case.head_sparsity))
    if case.head_sparsity or case.stage != "sft":
        prepare_stage(model, case.stage, MaskLearningConfig())
    rows = RandomRows(
        seq_len=case.seq_len,
        document_len=case.document_len or case.seq_len,
        vocab_size=config.vocab_size,
        length=num_steps * arguments.world_size,
    )
    trainer = SparseTrainer(
        model, arguments, train_dataset=rows, data_collator=collate, objective=case.objective, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _attention(case: TrainingCase, model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        if case.attention != "sparse_hf":
            stack.enter_context(dense(model))
            stack.enter_context(sdpa_kernel(BACKENDS[case.attention]))
        yield
