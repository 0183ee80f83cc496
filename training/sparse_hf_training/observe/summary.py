"""The end of a run in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_hf.figures import Figure


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a finished run says.

    Args:
        stage: which.
        steps: optimizer steps of the whole run, earlier sessions included.
        tokens: input tokens of the whole run.
        seconds: of this session, from the first batch to the last step, evaluations and saves included.
        losses: the last logged `loss` and `loss/...`.
        sparsity: the last logged `sparsity/...`.
        head_sparsity: of the masks that are deployed.
        throughput: of this session without its first step; empty after one step.
        figures: judgements beside the dense model's; empty without held text.
        artefact: its folder, or None before it is written.
    """

    stage: str
    steps: int
    tokens: int
    seconds: float
    losses: dict[str, float]
    sparsity: dict[str, float]
    head_sparsity: float
    throughput: dict[str, float]
    figures: tuple[Figure, ...]
    artefact: Path | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain, without the artefact's place."""
        return {key: value for key, value in asdict(self).items() if key != "artefact"}

    def rows(self) -> list[tuple[str, str, str]]:
        """Names, values, and the dense model's values where there are any."""
        rows = [
            ("stage", self.stage, ""),
            ("steps", f"{self.steps:,}", ""),
            ("tokens", f"{self.tokens:,}", ""),
            ("training time", _duration(self.seconds), ""),
        ]
        if speed := self.throughput.get("throughput/tokens_per_second"):
            rows.append(("tokens/s", f"{speed:,.0f}", ""))
        if share := self.throughput.get("throughput/mfu"):
            rows.append(("MFU", f"{share:.1%}", ""))
        rows += [(name, f"{value:.4f}", "") for name, value in self.losses.items()]
        rows += [(name, f"{value:.1%}", "") for name, value in self.sparsity.items()]
        rows.append(("sparse KV heads, deployed", f"{self.head_sparsity:.1%}", ""))
        return [*rows, *figure_rows(self.figures)]


def figure_rows(figures: Sequence[Figure]) -> list[tuple[str, str, str]]:
    """Names, values, and what they are compared with."""
    return [(f.case, _value(f.value, f.unit), _value(f.baseline, f.unit)) for f in figures]


def last_values(history: Sequence[dict[str, Any]], prefixes: Sequence[str]) -> dict[str, float]:
    """The last logged value of each name that is or begins with one of the prefixes."""
    found: dict[str, float] = {}
    for row in history:
        found |= {name: value for name, value in row.items() if any(_belongs(name, prefix) for prefix in prefixes)}
    return found


def _belongs(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value:,.0f} bytes"
    return f"{value:.2f}" if unit == "share" else f"{value:.4f} {unit}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
