"""Writes the tables of the docs from docs/benchmarks/*.json, between their markers. `--check` only compares.

    python scripts/make_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file of docs/benchmarks without its suffix.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/training.md", "docs/benchmarks/README.md", "docs/benchmarks/kernels.md")
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if unit in ("bytes", "s") else f"{value:.4f}" if unit == "nats/token" else f"{value:.3f}"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of figures, and the line that says where they come from."""
    lines = ["| case | value | dense or baseline | bound | unit |", "|---|---|---|---|---|"]
    for row in rows:
        unit = row["unit"]
        cells = [row["case"], *(number(row[key], unit) for key in ("value", "baseline", "must")), unit]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    source = f"{first['hardware']}; {first['software']}; commit {first['commit']}; `{first['command']}`"
    return "\n".join([*lines, "", source, ""])


def render(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        rows = json.loads((ROOT / "docs" / "benchmarks" / f"{match['name']}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{table(rows)}{match[3]}"

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
