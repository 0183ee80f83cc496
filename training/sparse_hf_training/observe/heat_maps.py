"""How the masks came to be: each gate over the steps, kept in the run's folder, drawn, and sent to trackers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from sparse_hf.plots import has_matplotlib
from sparse_hf_training.masks import MaskLearning
from sparse_hf_training.plots import mask_image

logger = logging.getLogger(__name__)

HISTORY_NAME = "mask_history.jsonl"
IMAGE_TAG = "masks/openness"
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class MaskSnapshot:
    """The gates after a step.

    Args:
        step: optimizer steps made.
        target: the head sparsity aimed at, or None before the first step.
        scores: what heads are ranked by, `[num_layers, num_kv_heads]`.
        openness: 1 - expected sparsity, `[num_layers, num_kv_heads]` in [0, 1].
    """

    step: int
    target: float | None
    scores: list[list[float]]
    openness: list[list[float]]


class MaskHistory:
    """Snapshots in a file of JSON lines. A line that a killed run left half written is no snapshot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, snapshot: MaskSnapshot) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(snapshot)) + "\n")

    def read(self) -> list[MaskSnapshot]:
        """All snapshots in order; none if there is no file."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(MaskSnapshot(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found

    def keep_up_to(self, step: int) -> None:
        """Drops what a run wrote after the checkpoint that it goes on from, and half a line."""
        if not self.path.exists():
            return
        kept = [snapshot for snapshot in self.read() if snapshot.step <= step]
        temporary = self.path.with_name(f".{self.path.name}")
        temporary.write_text("".join(json.dumps(asdict(snapshot)) + "\n" for snapshot in kept), encoding="utf-8")
        os.replace(temporary, self.path)


def snapshot_of(learning: MaskLearning, step: int, target: float | None = None) -> MaskSnapshot:
    """The gates as they are now."""
    openness = 1 - learning.expected_sparsity().detach().float().cpu()
    return MaskSnapshot(
        step=step,
        target=target,
        scores=np.round(learning.gates.scores().double().numpy(), DIGITS).tolist(),
        openness=np.round(openness.double().numpy(), DIGITS).tolist(),
    )


def log_image(callbacks: Sequence[TrainerCallback], tag: str, image: np.ndarray, step: int) -> None:
    """Sends an image, uint8 `[height, width, 3]`, to the trackers among a trainer's callbacks."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(tag, image, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({tag: wandb.Image(image), "train/global_step": step})


class MaskHistoryCallback(TrainerCallback):
    """Writes down the gates in intervals, from the main process. A full disk costs entries, not the run.

    Args:
        learning: the gates.
        path: of the history.
        every: steps between two entries; the first and the last step always have one.
        image_every: steps between two images, 0 for none.
        callbacks: of the trainer, among which the trackers are.
    """

    def __init__(
        self,
        learning: MaskLearning,
        path: Path,
        *,
        every: int,
        image_every: int = 0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.learning, self.history = learning, MaskHistory(path)
        self.every, self.image_every, self.callbacks = every, image_every, callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        trackers = any(isinstance(callback, (TensorBoardCallback, WandbCallback)) for callback in self.callbacks)
        if self.image_every and trackers and not has_matplotlib():
            logger.warning("mask maps need matplotlib, which is not installed: none are sent (pip install matplotlib)")
            self.image_every = 0
        if not trackers:
            self.image_every = 0
        self.history.keep_up_to(state.global_step)
        if state.global_step == 0:
            self._write(snapshot_of(self.learning, 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step == state.max_steps
        if not state.is_world_process_zero:
            return
        if step % self.every == 0 or last:
            self._write(snapshot_of(self.learning, step, self.learning.target))
        if self.image_every and (step % self.image_every == 0 or last):
            snapshot = snapshot_of(self.learning, step, self.learning.target)
            log_image(self.callbacks, IMAGE_TAG, mask_image(snapshot.openness, f"step {step}"), step)

    def _write(self, snapshot: MaskSnapshot) -> None:
        try:
            self.history.append(snapshot)
        except OSError as error:
            logger.warning("step %d is missing in %s: %s", snapshot.step, self.history.path, error)
