"""Measured figures in the one schema that docs and tables are made from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value.

    Args:
        case: what was measured.
        value: the figure.
        unit: its unit; "share" for ratios.
        lower_is_better: which way is good.
        must, goal: bounds that were set beforehand, or None.
        baseline: the same of what it is compared with, measured in the same run, or None.
    """

    case: str
    value: float
    unit: str
    lower_is_better: bool
    must: float | None = None
    goal: float | None = None
    baseline: float | None = None


def figure_rows(figures: Sequence[Figure], *, command: str, more_software: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The figures with hardware, software (and `more_software`, each "name version"), commit and command."""
    versions = ", ".join([software(), *more_software])
    context = {"hardware": hardware(), "software": versions, "commit": commit(), "command": command}
    return [{**asdict(figure), **context} for figure in figures]


def write_figures(path: Path, figures: Sequence[Figure], *, command: str, more_software: Sequence[str] = ()) -> None:
    """Writes `figure_rows` as JSON; the old file stays until all is written."""
    replace_json(path, figure_rows(figures, command=command, more_software=more_software))


def replace_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name beside the file and renames it; its folder is made.

    The temporary name is the process's own, so that of several that write one file at a time the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def command_line(program: str, arguments: Sequence[str]) -> str:
    """The line that repeats a run; where files lie on the machine that measured is nobody's business."""
    return " ".join([program, *(Path(word).name if "/" in word else word for word in arguments)])


def hardware() -> str:
    """The device that computes: the GPU's name, or the CPU's architecture and core count."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def software() -> str:
    """Versions that figures depend on."""
    names = ("sparse-hf", "torch", "transformers", "triton")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"python {sys.version.split()[0]}", *found])


def commit() -> str | None:
    """The project's commit when it runs from a checkout, with "+changes" when files differ from it.

    `SPARSE_HF_COMMIT` names it where a copy of the files runs without git.
    """
    if given := os.environ.get("SPARSE_HF_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    # What runs measure lies there: a program that writes its figures anew as it goes would taint itself.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/benchmarks")
    return f"{head}+changes" if head and changed else head or None
