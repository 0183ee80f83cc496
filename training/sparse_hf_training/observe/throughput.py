"""How fast a run trains: tokens per second, the share of the device's peak, time per step, and memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_hf.call_counts import QueryRuns
from sparse_hf.patching import SparseHandle, get_handle
from sparse_hf_training.observe.flops import (
    BACKWARD_EXECUTED,
    BACKWARD_MODEL,
    LinearSizes,
    attention_pairs,
    peak_flops,
)

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


@dataclass(kw_only=True)
class Work:
    """What was done: sums over micro-batches and, after `gather`, over processes.

    Args:
        tokens: input tokens.
        seconds: wall time; the longest of all processes.
        steps: optimizer steps.
        model_flops: that training on these tokens needs: forward and backward of the sparse model.
        executed_flops: those, the recomputed scores of attention's backward, the second branch of gates between 0
            and 1, the teacher's forward, and the recomputation of activation checkpoints.
    """

    tokens: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0
    model_flops: float = 0.0
    executed_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})

    def gathered(self, device: torch.device) -> Work:
        """The same on every process: sums, the longest time, and the steps, which are everyone's."""
        from accelerate.utils import gather

        own = [float(getattr(self, f.name)) for f in fields(Work)]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        table: Tensor = gather(torch.tensor([own], dtype=dtype, device=device)).cpu()
        total, longest = table.sum(0).tolist(), table.max(0).values.tolist()
        values = {f.name: total[n] for n, f in enumerate(fields(Work))}
        return Work(**{**values, "seconds": longest[1], "steps": longest[2]})


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """What is needed to count one later: small tensors, on their device, so that no step waits for them."""

    shape: tuple[int, int]
    positions: Tensor | None
    num_labels: Tensor | None
    gates: Tensor | None


class ThroughputCallback(TrainerCallback):
    """Measures the steps between two logs; `SparseTrainer` counts its micro-batches here and logs the figures.

    The clock runs while data are loaded and steps are made, and stands still while the run logs, evaluates and saves.
    The first step of a session, which compiles and allocates, is in its row but not in `steady`.

    Args:
        teacher: a dense forward pass of the same size goes with each step.
        peak_tflops: of one device, where `peak_flops` does not know it.
    """

    def __init__(self, *, teacher: bool = False, peak_tflops: float | None = None) -> None:
        self.teacher, self.peak_tflops = teacher, peak_tflops
        self.steady = Work()
        self.figures: dict[str, float] = {}
        self._micro_batches: list[_MicroBatch] = []
        self._now, self._interval = Work(), Work()
        self._mark = 0.0
        self.countable = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self.handle: SparseHandle = get_handle(model)
        self.sizes = LinearSizes.of(model)
        self.recomputes = bool(args.gradient_checkpointing)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.device = args.device
        self.peak = 1e12 * self.peak_tflops if self.peak_tflops else _peak_of(self.device, dtype)
        if self.peak is None and state.is_world_process_zero and self.device.type != "cpu":
            logger.warning("the peak of this device in %s is not known: MFU is left out (observe.peak_tflops)", dtype)
        self._session_start = state.global_step
        self._restart()

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Notes a micro-batch after its forward pass, with the gates that were drawn for it."""
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        targets = inputs.get("shift_labels")
        if targets is None and inputs.get("labels") is not None:
            targets = inputs["labels"][:, 1:]
        gates = [state.current_gate() for state in self.handle.states]
        drawn = [gate.detach().float() for gate in gates if gate is not None]
        self._micro_batches.append(
            _MicroBatch(
                shape=(ids.shape[0], ids.shape[1]),
                positions=positions,
                num_labels=None if targets is None else (targets != IGNORE_INDEX).sum(),
                gates=torch.stack(drawn) if drawn else None,
            )
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        first = state.global_step == self._session_start + 1
        stops = control.should_log or control.should_evaluate or control.should_save
        if stops or first:
            _wait_for(self.device)
        self._tick()
        self._now.steps += 1
        if not (stops or first):
            return
        for micro_batch in self._micro_batches:
            self._now += self._work_of(micro_batch)
        self._micro_batches.clear()
        done = self._now.gathered(self.device)
        self._now, self._interval = Work(), self._interval + done
        if not first:
            self.steady += done
        if args.include_num_input_tokens_seen == "no":
            state.num_input_tokens_seen += int(done.tokens)  # kept in checkpoints
        if control.should_log:
            self.figures = {**self._speeds(self._interval, args.world_size), **self._memory()}
            self._interval = Work()
        self._restart()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._restart()

    def summary(self, world_size: int) -> dict[str, float]:
        """The session's speeds without its first step; empty if it had no other."""
        return self._speeds(self.steady, world_size) if self.steady.steps else {}

    def take_figures(self) -> dict[str, float]:
        """The figures of the steps since the last log, once."""
        figures, self.figures = self.figures, {}
        return figures

    def _restart(self) -> None:
        self._mark = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self._now.seconds += now - self._mark
        self._mark = now

    def _work_of(self, micro_batch: _MicroBatch) -> Work:
        rows, seq_len = micro_batch.shape
        tokens = rows * seq_len
        if not self.countable:
            return Work(tokens=tokens)
        labels = tokens if micro_batch.num_labels is None else int(micro_batch.num_labels)
        runs = QueryRuns(
            q_len=seq_len,
            copies=rows if micro_batch.positions is None else rows // len(micro_batch.positions),
            first=0 if micro_batch.positions is None else None,
            positions=micro_batch.positions,
        )
        shape = self.handle.shape
        gates = None if micro_batch.gates is None else micro_batch.gates.cpu()
        pairs = attention_pairs(self.handle.states, shape.num_heads // shape.num_kv_heads, runs, gates)
        if pairs is None:
            self.countable = False
            logger.warning("some heads choose their keys by q and k: FLOPs and MFU are left out")
            return Work(tokens=tokens)
        per_pair = 4.0 * shape.head_dim
        forward, backward = self.sizes.forward(tokens, labels), self.sizes.backward(tokens, labels)
        model = forward + backward + per_pair * (1 + BACKWARD_MODEL) * pairs.model
        executed = forward + backward + per_pair * (1 + BACKWARD_EXECUTED) * pairs.executed
        if self.recomputes:
            executed += self.sizes.forward(tokens, 0) + per_pair * pairs.executed
        if self.teacher:
            executed += forward + per_pair * pairs.dense
        return Work(tokens=tokens, model_flops=model, executed_flops=executed)

    def _speeds(self, work: Work, world_size: int) -> dict[str, float]:
        figures = {
            "throughput/tokens_per_second": work.tokens / work.seconds,
            "throughput/tokens_per_second_per_device": work.tokens / work.seconds / world_size,
            "throughput/seconds_per_step": work.seconds / work.steps,
        }
        if not self.countable:
            return figures
        figures["throughput/model_tflops_per_device"] = work.model_flops / work.seconds / world_size / 1e12
        if self.peak is not None:
            figures["throughput/mfu"] = work.model_flops / work.seconds / world_size / self.peak
            figures["throughput/hfu"] = work.executed_flops / work.seconds / world_size / self.peak
        return figures

    def _memory(self) -> dict[str, float]:
        """Peaks since the process began, the highest of all devices; nothing on a CPU."""
        from accelerate.utils import gather

        if self.device.type == "cpu":
            return {}
        peaks = [
            torch.accelerator.max_memory_allocated(self.device),
            torch.accelerator.max_memory_reserved(self.device),
        ]
        highest = gather(torch.tensor([peaks], dtype=torch.float32, device=self.device)).max(0).values.tolist()
        return {
            "memory/peak_allocated_gib": highest[0] / 2**30,
            "memory/peak_reserved_gib": highest[1] / 2**30,
        }


def _peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
