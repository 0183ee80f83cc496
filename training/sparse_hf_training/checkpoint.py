"""Checkpoints that are whole or do not count.

A run may die at any instant. A checkpoint counts once its marker names every file and its size; the marker is written
last, under a temporary name, and renamed. Resuming takes the newest one that counts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sparse_hf.artefact import read_tensors
from sparse_hf_training.masks import MaskLearning

logger = logging.getLogger(__name__)

MARKER = "complete.json"
MASKS_FILE = "mask_learning.safetensors"
PREFIX = "checkpoint-"


def mark_complete(checkpoint: Path) -> None:
    """Writes the marker of a checkpoint whose files are all there."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    sizes.pop(MARKER, None)
    temporary = checkpoint / f".{MARKER}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MARKER)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the marker names is there in its size."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(sizes, dict):
        return False
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == n for name, n in sizes.items())


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_step)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that counts; says which newer ones were passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete (the run died while writing it); going back to the one before", checkpoint)
    return None


def remove_old_checkpoints(folder: Path, keep: int | None) -> None:
    """Keeps the newest `keep` complete checkpoints, and removes older ones and what is left of incomplete ones."""
    if keep is None or keep <= 0:
        return
    complete = [checkpoint for checkpoint in checkpoints(folder) if is_complete(checkpoint)]
    if not complete:
        return
    kept = set(complete[-keep:])
    for checkpoint in checkpoints(folder):
        if checkpoint not in kept and _step(checkpoint) < _step(complete[-1]):
            shutil.rmtree(checkpoint)


def save_mask_state(learning: MaskLearning, folder: Path) -> None:
    """Writes gates and multipliers."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learning.state_dict().items()}
    save_file(tensors, folder / MASKS_FILE, metadata={"format": "pt"})


def load_mask_state(learning: MaskLearning, folder: Path) -> None:
    """Reads gates and multipliers back; shapes are checked before anything changes.

    Raises:
        ValueError: if the file is missing, corrupt, holds NaN, or is of another model.
    """
    tensors = read_tensors(folder / MASKS_FILE)
    own: dict[str, Tensor] = learning.state_dict()
    if set(tensors) != set(own):
        raise ValueError(f"{folder / MASKS_FILE} holds {sorted(tensors)}, expected {sorted(own)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or bool(tensor.isnan().any()):
            raise ValueError(
                f"{folder / MASKS_FILE}: {name} must be {list(own[name].shape)} without NaN, got {list(tensor.shape)}"
            )
    learning.load_state_dict(tensors)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))
