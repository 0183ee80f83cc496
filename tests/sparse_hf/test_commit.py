"""Which commit figures say they are of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparse_hf import figures


def test_the_commit_and_changes_other_than_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_HF_COMMIT", raising=False)
    measured, source = tmp_path / "docs" / "benchmarks" / "found.json", tmp_path / "sparse_hf" / "figures.py"
    monkeypatch.setattr(figures, "__file__", str(source))
    for file in (measured, source):
        file.parent.mkdir(parents=True)
        file.write_text("[]")
    assert figures.commit() is None, "no checkout"

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    assert figures.commit() == head
    measured.write_text("[1]")
    assert figures.commit() == head, "a program's own figures are no change"
    (tmp_path / "untracked.py").write_text("")
    assert figures.commit() == head
    source.write_text("# changed")
    assert figures.commit() == f"{head}+changes"
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    assert figures.commit() == "0123456789ab"
