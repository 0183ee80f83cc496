"""The docs say what the figures say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_made_from_their_figures() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python scripts/make_tables.py"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_figures_have_the_schema_and_a_commit(path: Path, figure_keys: set[str]) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows
    for row in rows:
        assert set(row) == figure_keys
        assert row["commit"] and "+" not in row["commit"], "measure figures on a commit, not on changed files"


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
