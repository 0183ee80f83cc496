"""What became of all documents of a run: shown when it starts, and kept in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_hf.figures import replace_json
from sparse_hf_training.data.packing import PackingReport


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """One source in one phase of the curriculum."""

    name: str
    seq_len: int | None
    """Tokens per row; None for a stream, which goes on from phase to phase."""
    streamed: bool
    rows_used: int
    """Rows that the run asks for."""
    packing: PackingReport
    """Of all documents; of a stream, of those that were read so far."""

    @property
    def epochs(self) -> float | None:
        """How often the run reads the source's rows; below 1 some are never read. None for a stream."""
        return None if self.streamed else self.rows_used / self.packing.rows

    def line(self) -> str:
        """The report in one line of text."""
        p = self.packing
        used = f"{self.rows_used:,} rows"
        if self.epochs is not None:
            used += f" of {self.seq_len} tokens of {p.rows:,} ({self.epochs:.2f} epochs)"
        read = "so far " if self.streamed else ""
        facts = [
            f"{read}{p.documents:,} documents, {p.tokens:,} tokens",
            _counted(p.documents_empty, "empty"),
            _counted(p.documents_split, "split"),
            _counted(p.documents_truncated, "truncated"),
            *(_counted(n, f"documents dropped ({reason})") for reason, n in p.documents_dropped.items()),
            *(_counted(n, f"tokens dropped ({reason})") for reason, n in p.tokens_dropped_for.items()),
            _counted(p.rows_without_loss, "rows without loss left out"),
            _counted(p.tokens_padding, "tokens of padding"),
        ]
        return f"{self.name}: {used}; " + ", ".join(filter(None, facts))


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count else ""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What a run is trained on.

    Args:
        sources: text sources, once per phase of the curriculum that packs them.
        rows: rows of the run.
        recall_rows: those of them that are recall samples.
        filler_tokens: tokens of the text that recall samples are hidden in.
    """

    sources: tuple[SourceReport, ...]
    rows: int
    recall_rows: int
    filler_tokens: int

    def lines(self) -> list[str]:
        """One line of text per source."""
        lines = [source.line() for source in self.sources]
        if self.recall_rows:
            lines.append(f"recall: {self.recall_rows:,} rows, hidden in {self.filler_tokens:,} tokens of text")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain."""
        sources = [
            {**asdict(source), "epochs": source.epochs, "tokens_dropped": source.packing.tokens_dropped}
            for source in self.sources
        ]
        return {**asdict(self), "sources": sources}

    def write(self, path: Path) -> None:
        """Writes JSON; the file is whole or the old one."""
        replace_json(path, self.to_dict())
