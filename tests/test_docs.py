"""The docs say what the figures say."""

import json
import re
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


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                file = document.parent / target if target else document
                assert file.exists(), f"{document.name}: {target}"
                assert not anchor or anchor in anchors(file), f"{document.name}: {target}#{anchor}"
