"""Checkpoints that are whole or do not count.

A run may die at any instant, and disks fill and lose bytes. A checkpoint counts once its marker names every file with
its size and digest; all files are on the disk before the marker is, which is written last, under a temporary name, and
renamed. Resuming takes the newest one whose contents are what was written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_hf.artefact import read_tensors
from sparse_hf.hub import one_line
from sparse_hf_training.masks import MaskLearning

logger = logging.getLogger(__name__)

MARKER = "complete.json"
MASKS_FILE = "mask_learning.safetensors"
PREFIX = "checkpoint-"
PIECE, READ = 2**26, 2**20  # bytes that one thread hashes, and reads at a time
HASH_THREADS = 8


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; those before it are untouched."""


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Around all that writes a checkpoint: where writing fails, what is there of it goes, and the message has a remedy.

    Raises:
        CheckpointNotSaved: with the folder, the cause and what to do.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_write_failure(error):
            raise
        # It would not count, and where the disk is full it is in the way.
        shutil.rmtree(checkpoint, ignore_errors=True)
        good = last_complete_checkpoint(checkpoint.parent)
        raise CheckpointNotSaved(
            f"{checkpoint} cannot be written: {one_line(error)}; last good checkpoint: {good or 'none yet'}. "
            f"Make room in {checkpoint.parent} (or mend what the cause says) and start the same run again: it goes on "
            "from there"
        ) from error


def _is_write_failure(error: BaseException) -> bool:
    """torch.save reports a failed write as a RuntimeError of its zip writer."""
    if not isinstance(error, RuntimeError):
        return True
    return any(sign in str(error) for sign in ("PytorchStreamWriter", "inline_container", "file write failed"))


def mark_complete(checkpoint: Path) -> None:
    """Writes the marker of a checkpoint whose files are all there.

    Raises:
        OSError: if a file cannot be read or brought to the disk.
    """
    (checkpoint / MARKER).unlink(missing_ok=True)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        _to_disk(path)
    entries = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, _digests(files), strict=True)
    }
    temporary = checkpoint / f".{MARKER}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MARKER)
    _to_disk(checkpoint)
    _to_disk(checkpoint.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digests(files: list[Path]) -> list[str]:
    """SHA-256 of each file's SHA-256s of 64 MiB pieces: these are hashed at the same time, one big file's as well."""

    def piece(job: tuple[Path, int]) -> bytes:
        digest = hashlib.sha256()
        with open(job[0], "rb") as file:
            file.seek(job[1])
            for _ in range(0, PIECE, READ):
                digest.update(file.read(READ))
        return digest.digest()

    jobs = [(path, start) for path in files for start in range(0, max(path.stat().st_size, 1), PIECE)]
    digests = {path: hashlib.sha256() for path in files}
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        for (path, _), digest in zip(jobs, pool.map(piece, jobs), strict=True):
            digests[path].update(digest)
    return [digests[path].hexdigest() for path in files]


def _entries(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    try:
        entries = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return {str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the marker names is there in its size. Contents are not read: see `damage`."""
    entries = _entries(checkpoint)
    if entries is None:
        return False
    paths = {checkpoint / name: entry["size"] for name, entry in entries.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, contents included, or None."""
    if not is_complete(checkpoint):
        return "is incomplete (the run died while writing it, or files were changed)"
    entries = _entries(checkpoint) or {}
    try:
        found = _digests([checkpoint / name for name in entries])
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
    changed = [name for name, digest in zip(entries, found, strict=True) if entries[name]["sha256"] != digest]
    return f"is corrupt ({', '.join(changed)} not as written)" if changed else None


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that counts; says which newer ones were passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        found = damage(checkpoint)
        if found is None:
            return checkpoint
        logger.warning("%s %s; going back to the one before", checkpoint, found)
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
        if checkpoint not in kept and checkpoint_step(checkpoint) < checkpoint_step(complete[-1]):
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


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))
