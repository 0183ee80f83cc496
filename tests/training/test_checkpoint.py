"""When a checkpoint counts: markers, contents, and what is kept."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from sparse_hf_training import checkpoint as module
from sparse_hf_training.checkpoint import (
    MARKER,
    CheckpointNotSaved,
    checkpoint_step,
    damage,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    remove_old_checkpoints,
    saving,
)

FILES = {"weights.safetensors": b"w" * 5000, "optimizer.pt": b"o" * 300, "sub/rng.pth": b"r" * 20, "empty": b""}


def write(folder: Path, step: int, marked: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content + str(step).encode() * (name != "empty"))
    if marked:
        mark_complete(checkpoint)
    return checkpoint


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_marker_names_every_file_with_size_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1024)
    monkeypatch.setattr(module, "READ", 256)
    checkpoint = write(tmp_path, 7)
    entries = json.loads((checkpoint / MARKER).read_text())
    assert set(entries) == set(FILES)
    content = (checkpoint / "weights.safetensors").read_bytes()
    pieces = [hashlib.sha256(content[start : start + 1024]).digest() for start in range(0, len(content), 1024)]
    expected = {"size": len(content), "sha256": hashlib.sha256(b"".join(pieces)).hexdigest()}
    assert len(pieces) == 5 and entries["weights.safetensors"] == expected
    assert damage(checkpoint) is None and checkpoint_step(checkpoint) == 7


@pytest.mark.parametrize("place", [0, 1023, 1024, 5000])
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(module, "PIECE", 1024)
    monkeypatch.setattr(module, "READ", 256)
    checkpoint = write(tmp_path, 1)
    flip(checkpoint / "weights.safetensors", place)
    assert is_complete(checkpoint)  # sizes alone do not tell
    assert damage(checkpoint) == "is corrupt (weights.safetensors not as written)"


@pytest.mark.parametrize("case", ["flipped", "zeroed", "truncated", "missing", "marker"])
def test_damaged_newest_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    before, newest = write(tmp_path, 90), write(tmp_path, 100)
    file = newest / "optimizer.pt"
    if case == "flipped":
        flip(file, 17)
    elif case == "zeroed":  # what a power cut leaves of a file whose size was written first
        file.write_bytes(bytes(file.stat().st_size))
    elif case == "truncated":
        os.truncate(file, 10)
    elif case == "missing":
        file.unlink()
    else:
        (newest / MARKER).write_text('{"optimizer.pt": 300}')
    assert last_complete_checkpoint(tmp_path) == before
    what = "is corrupt (optimizer.pt not as written)" if case in ("flipped", "zeroed") else "is incomplete"
    assert f"checkpoint-100 {what}" in caplog.text and "going back to the one before" in caplog.text
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("torn", ["", "{", "[]", "null", '{"a": {}}', '{"a": {"size": "x", "sha256": ""}}'])
def test_torn_marker_counts_for_nothing(tmp_path: Path, torn: str) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint / MARKER).write_text(torn)
    assert not is_complete(checkpoint) and last_complete_checkpoint(tmp_path) is None


def test_files_are_on_the_disk_before_the_marker_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(f"renamed to {Path(target).name}")
        rename(source, target)

    checkpoint = write(tmp_path, 3, marked=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    mark_complete(checkpoint)
    before = events.index(f"renamed to {MARKER}")
    assert {Path(name).name for name in FILES} | {f".{MARKER}"} <= set(events[:before])
    assert "checkpoint-3" in events[before:]


def test_old_marker_is_gone_while_a_checkpoint_is_marked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write(tmp_path, 3)

    def fails(files: list[Path]) -> list[str]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_digests", fails)
    with pytest.raises(OSError, match="Input/output"):
        mark_complete(checkpoint)
    assert not is_complete(checkpoint)


def test_newest_complete_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 5, marked=False)
    (tmp_path / "checkpoint-2" / MARKER).unlink()
    remove_old_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    remove_old_checkpoints(tmp_path, 2)
    # What is left of a later, incomplete one may be about to be completed.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize(
    ("error", "is_write"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (ValueError("holds NaN"), False),
    ],
)
def test_failed_write_removes_what_is_there_and_advises(tmp_path: Path, error: Exception, is_write: bool) -> None:
    good, failed = write(tmp_path, 1), write(tmp_path, 2, marked=False)
    with pytest.raises(CheckpointNotSaved if is_write else type(error)) as caught, saving(failed):
        raise error
    assert failed.exists() != is_write and is_complete(good)
    if is_write:
        message = str(caught.value)
        assert str(failed) in message and str(error) in message and f"last good checkpoint: {good}" in message
        assert f"Make room in {tmp_path}" in message and "\n" not in message
        assert caught.value.__cause__ is error
