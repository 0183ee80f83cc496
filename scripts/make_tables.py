"""Writes the tables of the docs from docs/benchmarks/*.json, between their markers. `--check` only compares.

    python scripts/make_tables.py [--check]

A table stands between one of these lines and `<!-- end -->`; NAME is a file of docs/benchmarks without its suffix:

    <!-- table: NAME -->            all its figures
    <!-- table: NAME / TEXT -->     those whose case contains the text
    <!-- grid: NAME / TEXT -->      the cases "TEXT, ROW: COLUMN", by row and column, with their "COLUMN (95% low)"
                                    and "COLUMN (95% high)" in brackets
    <!-- grid: NAME / TEXT | COLUMN; COLUMN -->    of them these columns alone, in this order
    <!-- source: NAME -->           where its figures come from
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "docs/methods.md",
    "docs/quality.md",
    "docs/training.md",
    "docs/inference.md",
    "docs/benchmarks/README.md",
    "docs/benchmarks/kernels.md",
    "docs/benchmarks/patterns.md",
    "docs/benchmarks/end_to_end.md",
    "docs/benchmarks/training.md",
)
BLOCK = re.compile(
    r"(<!-- (?P<kind>table|grid|source): (?P<name>[\w-]+)(?: / (?P<text>[^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL
)
FORMATS = {
    "bytes": ",.0f",
    "s": ",.0f",
    "tokens": ",.0f",
    "tokens/s": ",.0f",
    "MiB": ",.1f",
    "%": ".2f",
    "nats/token": ".4f",
    "count": ",.0f",
    "setting": ".4g",
}

ENDS = (" (95% low)", " (95% high)")


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return format(value, FORMATS.get(unit, ".3f"))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of figures, and the line that says where they come from."""
    lines = ["| case | value | dense or baseline | bound | unit |", "|---|---|---|---|---|"]
    for row in rows:
        unit = row["unit"]
        cells = [row["case"], *(number(row[key], unit) for key in ("value", "baseline", "must")), unit]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(rows)])


def source(rows: list[dict[str, Any]]) -> str:
    """The line that says where figures come from."""
    first = rows[0]
    return f"{first['hardware']}; {first['software']}; commit {first['commit']}; `{first['command']}`\n"


def grid(rows: list[dict[str, Any]], chosen: str) -> str:
    """A Markdown table of the figures whose case is "TEXT, ROW: COLUMN"; columns of one unit stand together, unless
    they are named in `chosen`, "TEXT | COLUMN; COLUMN".

    Raises:
        ValueError: if no figure is of a column that is named.
    """
    text, _, named = chosen.partition(" | ")
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, str] = {}
    values = {row["case"]: row["value"] for row in rows}
    for row in rows:
        if row["case"].startswith(f"{text}, ") and not row["case"].endswith(ENDS):
            name, _, column = row["case"].removeprefix(f"{text}, ").partition(": ")
            bound = f" (bound {row['must']:g})" if row["must"] is not None else ""
            ends = [values[row["case"] + end] for end in ENDS if row["case"] + end in values]
            interval = f" [{', '.join(f'{end:.2f}' for end in ends)}]" if ends else ""
            cells.setdefault(name, {})[column] = number(row["value"], row["unit"]) + bound + interval
            columns[column] = row["unit"]
    units = list(dict.fromkeys(columns.values()))
    ordered = named.split("; ") if named else sorted(columns, key=lambda column: units.index(columns[column]))
    if unknown := [column for column in ordered if column not in columns]:
        raise ValueError(f"no figure of {text!r} is of {', '.join(unknown)}; there are {', '.join(columns)}")
    lines = [
        f"| | {' | '.join(f'{column}, {columns[column]}' for column in ordered)} |",
        "|---" * (len(ordered) + 1) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(found.get(column, '') for column in ordered)} |" for name, found in cells.items()
    ]
    return "\n".join([*lines, ""]) if cells else ""


def render(text: str, folder: Path = ROOT / "docs" / "benchmarks") -> str:
    """The text with its tables filled in.

    Raises:
        FileNotFoundError: if figures that a table names are not there.
        ValueError: if none of them is of a table.
    """

    def fill(match: re.Match[str]) -> str:
        rows = json.loads((folder / f"{match['name']}.json").read_text(encoding="utf-8"))
        part = match["text"]
        if match["kind"] == "grid":
            made = grid(rows, part or "")
        elif match["kind"] == "source":
            made = source(rows) if rows else ""
        else:
            chosen = [row for row in rows if part is None or part in row["case"]]
            made = table(chosen) if chosen else ""
        if not made:
            raise ValueError(f"{match['name']}.json has no figure for {match[1].strip()}")
        return f"{match[1]}{made}{match[5]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table is not what its figures say")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if (rendered := render(text)) != text:
            stale.append(name)
            if not check:
                path.write_text(rendered, encoding="utf-8")
    if stale:
        print(("stale: " if check else "written: ") + ", ".join(stale))
    sys.exit(bool(stale) and check)


if __name__ == "__main__":
    main()
