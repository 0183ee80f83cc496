"""`run.json`: what a run is, where and how it ran, and how it ended. It is true at any instant, also after a kill."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_hf.figures import commit, hardware, replace_json
from sparse_hf.hub import one_line

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
PACKAGES = (
    "sparse-hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "trl",
    "triton",
    "liger-kernel",
    "bitsandbytes",
    "safetensors",
    "wandb",
)


@dataclass(kw_only=True)
class RunRecord:
    """The record of a run, one entry per session: a run that was killed and goes on has several.

    Args:
        path: of the file.
        document: `status` (of the newest session), `config`, `seeds`, `sessions`, and `result` once it is finished.
    """

    path: Path
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path, *, config: dict[str, Any], seeds: dict[str, int], session: dict[str, Any]) -> RunRecord:
        """Writes a new session, status `running`; earlier ones that never ended are marked `killed`."""
        sessions = _earlier_sessions(path)
        for earlier in sessions:
            if earlier.get("status") == "running":
                earlier["status"] = "killed"
        sessions.append({"status": "running", "start": _now(), "end": None, **session})
        record = cls(path=path, document={"status": "running", "config": config, "seeds": seeds, "sessions": sessions})
        replace_json(path, record.document)
        return record

    def end(self, status: str, reason: str | None = None, result: dict[str, Any] | None = None) -> None:
        """Writes how the session ended: `finished`, `failed` or `interrupted`."""
        self.document["status"] = status
        self.document["sessions"][-1] |= {"status": status, "end": _now()} | ({"reason": reason} if reason else {})
        if result is not None:
            self.document["result"] = result
        replace_json(self.path, self.document)


@contextmanager
def recorded(record: RunRecord | None) -> Iterator[None]:
    """Writes why a session ended, where it did not end well; None on processes that keep no record."""
    try:
        yield
    except BaseException as error:
        if record is not None:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            try:
                record.end(status, f"{type(error).__name__}: {one_line(error)}")
            except OSError as unwritten:  # the disk that is full may be what ended the run
                logger.warning("%s still says running: %s", record.path, unwritten)
        raise


def describe_session(*, world_size: int, engine: str, resumed_from: int | None) -> dict[str, Any]:
    """Where and how this process runs.

    Args:
        world_size: processes.
        engine: what drives them, such as `MULTI_GPU`, `FSDP` or `DEEPSPEED ZeRO-3`.
        resumed_from: the checkpoint's step, or None.
    """
    return {
        "command": command_line(sys.argv),
        "world_size": world_size,
        "engine": engine,
        "devices": hardware(),
        "resumed_from_step": resumed_from,
        "versions": package_versions(),
        "commit": commit(),
    }


def command_line(arguments: list[str]) -> list[str]:
    """The words of the command; of an installed program its name alone, not where this machine keeps it."""
    program = arguments[0]
    return [os.path.basename(program) if os.path.isabs(program) else program, *arguments[1:]]


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _earlier_sessions(path: Path) -> list[dict[str, Any]]:
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
        return [dict(session) for session in sessions]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
