"""Reports side by side: the order of tasks, the Pareto front, the card, and the HTML page in a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from typer.testing import CliRunner

from sparse_hf.cli import build_app
from sparse_hf_training.evaluation.card import BEGIN, END, update_card
from sparse_hf_training.evaluation.command import EvaluationOptions
from sparse_hf_training.evaluation.compare import Comparison, pareto_front
from sparse_hf_training.evaluation.footprint import Footprint
from sparse_hf_training.evaluation.html_report import html_report, write_html_report
from sparse_hf_training.evaluation.losses import TextLoss
from sparse_hf_training.evaluation.page import one_page
from sparse_hf_training.evaluation.report import LabReport
from sparse_hf_training.evaluation.statistics import mcnemar_p, wilson_interval
from sparse_hf_training.evaluation.variant import TaskOutcome, VariantResult

SAMPLES = 200
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SETTINGS = {"seq_len": 2048, "num_samples": SAMPLES, "seed": 1234, "weights": "w", "text": "t", "num_rows": 4}


def outcome(task: str, share: float, seed: int) -> TaskOutcome:
    rng = random.Random(f"{task}{seed}")
    return TaskOutcome(
        task=task,
        exact=tuple(rng.random() < share for _ in range(SAMPLES)),
        depths=tuple(rng.random() for _ in range(SAMPLES)),
        answer_losses=(1 - share, 1.1 - share),
        seconds=1.0,
    )


def variant(name: str, shares: dict[str, float], loss: float, kv: float) -> VariantResult:
    tokens = tuple(range(256, 2049, 256))
    return VariantResult(
        name=name,
        tasks=tuple(outcome(task, share, 0) for task, share in shares.items()),
        text=TextLoss(
            rows=tuple(3 + loss + 0.01 * n * loss for n in range(4)),
            edges=tuple(range(0, 2049, 128)),
            bins=tuple(3 + loss * n / 16 for n in range(16)),
        ),
        footprint=Footprint(
            tokens=tokens,
            kv_bytes=tuple(int(4096 * n * kv) for n in tokens),
            prefill_density=kv,
            decode_density=kv,
        ),
    )


DENSE = {"needle": 1.0, "chain": 0.9, "two_turns": 0.95, "cwe": 0.1}


def report(name: str, shares: Sequence[float], loss: float, kv: float, **settings: Any) -> LabReport:
    return LabReport(
        name=name,
        about={"base_model": "llama-<4m>", "sparsity": "10 of 16 KV heads sparse", "methods": ["streaming"]},
        settings={**SETTINGS, **settings},
        dense=variant("dense", DENSE, 0.0, 1.0),
        sparse=variant("sparse", dict(zip(DENSE, shares, strict=True)), loss, kv),
    )


@pytest.fixture
def comparison() -> Comparison:
    return Comparison.of(
        [
            report("learned", (1.0, 0.85, 0.94, 0.1), 0.01, 0.40),
            report("random & <wild>", (0.6, 0.2, 0.5, 0.0), 0.05, 0.45),
            report("streaming", (0.3, 0.0, 0.1, 0.0), 0.09, 0.10),
        ]
    )


def test_the_worst_task_comes_first_and_what_dense_fails_comes_apart(comparison: Comparison) -> None:
    found = comparison.reports[1]
    assert [each.task for each in found.judged] == ["chain", "two_turns", "needle"]
    differences = [each.difference for each in found.judged]
    assert differences == sorted(differences) and found.worst is not None and found.worst.task == "chain"
    assert [each.task for each in found.failed_by_dense] == ["cwe"]
    chain = found.worst
    assert chain.p_value == mcnemar_p(chain.sparse.exact, chain.dense.exact) <= chain.p_holm < 1e-9
    low, high = chain.interval
    assert low < chain.difference < high < -0.5
    assert found.loss_increase[0] == pytest.approx((0.05 + 0.0005 * 1.5) / 3)
    assert found.kv_share == pytest.approx(0.45, abs=1e-3) and found.footprint_share == pytest.approx(0.45, abs=1e-3)
    assert "apart" not in {row["case"] for row in map(vars, found.figures())}
    figures = {figure.case: figure for figure in found.figures()}
    case = "recall chain, 2048 tokens, 200 samples"
    assert (figures[case].value, figures[case].baseline) == (chain.sparse.share, chain.dense.share)
    assert figures[f"{case} (95% low)"].value == wilson_interval(chain.sparse.num_exact, SAMPLES)[0]
    assert "recall cwe, 2048 tokens, 200 samples, which dense itself fails" in figures


def test_the_page_says_the_worst_first(comparison: Comparison) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(one_page(comparison.reports[1]))
    text = console.export_text()
    assert text.index("worst task: chain -0.") < text.index("two_turns") < text.index("set apart") < text.index("cwe")
    assert "(beyond chance)" in text and "KV cache 45.0% of dense" in text and "loss, late half of documents" in text


def test_the_front_holds_what_no_other_run_beats() -> None:
    assert pareto_front([1, 2, 3, 3, 4], [0.5, 0.4, 0.9, 0.8, 0.9]) == {0, 2}
    assert pareto_front([1, 1], [0.5, 0.5]) == {0, 1} and pareto_front([], []) == set()
    assert pareto_front([1, 2], [float("nan"), 0.1]) == {1}


def test_runs_are_compared_on_the_tasks_that_all_can_be_judged_by(comparison: Comparison) -> None:
    assert set(comparison.tasks) == {"chain", "two_turns", "needle"}, "cwe is set apart"
    points = {point.name: point for point in comparison.points}
    assert [point.name for point in comparison.points] == ["streaming", "learned", "random & <wild>"]
    assert points["learned"].best_recall and points["learned"].best_loss
    assert points["streaming"].best_recall and not points["random & <wild>"].best_recall
    exact = [right for each in comparison.reports[0].judged for right in each.sparse.exact]
    assert points["learned"].recall == (sum(exact) / 600, wilson_interval(sum(exact), 600))
    other = report("else", (1.0, 0.9, 0.9, 0.1), 0.01, 0.4, seed=5, seq_len=4096)
    with pytest.raises(ValueError, match=r"the same samples \(seq_len 2048 != 4096, seed 1234 != 5\); evaluate them"):
        Comparison.of([comparison.reports[0], other])
    with pytest.raises(ValueError, match="different names"):
        Comparison.of([comparison.reports[0], comparison.reports[0]])


def test_an_artefacts_report_is_found_beside_it(comparison: Comparison, tmp_path: Path) -> None:
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    with pytest.raises(ValueError, match=r"holds no report\.json"):
        LabReport.load(artefact)
    comparison.reports[0].save(EvaluationOptions(target=str(artefact)).folder)
    assert LabReport.load(artefact) == comparison.reports[0]


def test_reports_that_are_cut_short_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    path = comparison.reports[0].save(tmp_path / "run" / "evaluation")
    assert LabReport.load(tmp_path / "run") == LabReport.load(path) == comparison.reports[0]
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"report.json cannot be read"):
        LabReport.load(tmp_path / "run")
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ValueError, match="is no report of sparse-hf eval"):
        LabReport.load(tmp_path / "run")


def test_the_card_keeps_what_people_wrote(comparison: Comparison, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nmy words\n")
    update_card(card, comparison)
    first = card.read_text()
    assert first.startswith(f"# Mine\n\nmy words\n\n{BEGIN}\n\n## Evaluation") and first.count(END) == 1
    assert (
        "| learned | 3,355,443 | 40.0% |" in first
        and "Not judged, since the dense model itself fails them: cwe." in first
    )
    card.write_text(first + "\nmore words\n")
    update_card(card, Comparison.of(comparison.reports[:1]))
    second = card.read_text()
    assert second.startswith("# Mine") and second.endswith("more words\n") and "streaming |" not in second
    card.write_text(BEGIN)
    with pytest.raises(ValueError, match="without the other"):
        update_card(card, comparison)
    assert card.read_text() == BEGIN


def test_the_command_writes_all_of_it(comparison: Comparison, tmp_path: Path) -> None:
    for number, each in enumerate(comparison.reports):
        each.save(tmp_path / str(number))
    page, card = tmp_path / "report.html", tmp_path / "CARD.md"
    runs = [str(tmp_path / str(number)) for number in range(3)]
    shown = CliRunner().invoke(build_app(), ["compare", *runs, "--out", str(page), "--card", str(card), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert [run["name"] for run in found["runs"]] == ["streaming", "learned", "random & <wild>"]
    assert page.is_file() and BEGIN in card.read_text()
    # Two runs of one name are told apart by their folders.
    same = CliRunner().invoke(build_app(), ["compare", runs[0], str(tmp_path / "0" / "report.json"), "--json"])
    assert [run["name"] for run in json.loads(same.stdout)["runs"]] == [runs[0], f"{runs[0]}/report.json"]
    told = CliRunner().invoke(build_app(), ["compare", runs[0]])
    assert told.exit_code == 0 and "learned" in told.stdout and "mean of" in told.stdout


@pytest.mark.parametrize("name", ["_hidden", "$a$", r"$\nothing{$", "1 $"])
def test_names_stand_in_the_charts_as_they_are(comparison: Comparison, name: str) -> None:
    page = html_report(Comparison.of([replace(comparison.reports[0], name=name)]))
    charts = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert [bool(re.search(rf"> ?{re.escape(name)}</text>", chart)) for chart in charts] == [True] * 4


@pytest.mark.parametrize("count", [4, 10, 14])  # their Wilson interval of a share of 1 ends below 1, by rounding
def test_a_run_without_a_wrong_answer_is_drawn(comparison: Comparison, count: int) -> None:
    def perfect(variant: VariantResult) -> VariantResult:
        needle = replace(variant.tasks[0], exact=(True,) * count, depths=variant.tasks[0].depths[:count])
        return replace(variant, tasks=(needle,))

    own = comparison.reports[0]
    found = Comparison.of([replace(own, dense=perfect(own.dense), sparse=perfect(own.sparse))])
    assert found.points[0].recall[0] == 1 and html_report(found).count("<svg") == 4


def test_what_is_no_number_is_null_in_json(comparison: Comparison, tmp_path: Path) -> None:
    own = comparison.reports[0]
    text = replace(own.sparse.text, bins=(*own.sparse.text.bins[:-1], float("nan")))
    apart = replace(own, min_dense=1.1, sparse=replace(own.sparse, text=text))
    path = apart.save(tmp_path)
    assert "NaN" not in path.read_text() and math.isnan(LabReport.load(path).sparse.text.bins[-1])
    found = Comparison.load([path]).to_dict()
    (run,) = json.loads(json.dumps(found, allow_nan=False))["runs"]
    assert run["recall"] == run["worst"] == [None, [None, None]] and run["loss"][0] > 0


def test_the_page_needs_no_network(comparison: Comparison) -> None:
    page = html_report(comparison)
    assert page.count("<svg") == 4 and "random &amp; &lt;wild&gt;" in page and "<wild>" not in page
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert attribute.startswith("#"), attribute
    assert "@import" not in page and "<script" not in page and "<link" not in page
    # Ids of one chart are not those of another.
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids) > 100
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) <= set(ids)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(comparison: Comparison, tmp_path: Path) -> None:
    page, shot = write_html_report(comparison, tmp_path / "report.html"), tmp_path / "shot.png"
    assert CHROMIUM is not None

    def chromium(*options: str) -> str:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--disable-dev-shm-usage", "--window-size=1100,2600", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    dom = chromium("--dump-dom")
    assert dom.count("<svg") == 4 and dom.count("<figure id=") == 4
    for figure in ("pareto", "tasks", "position", "memory"):
        assert f'<figure id="{figure}"><svg' in dom
    for words in ("KV bytes, % of dense", "learned", "random &amp; &lt;wild&gt;", "Set apart, since dense itself"):
        assert words in dom, words
    chromium(f"--screenshot={shot}")
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (2600, 1100)
    assert (pixels.min(-1) < 0.9).mean() > 0.01, "the page is blank"
    # matplotlib's first two colours: points and lines of two runs are drawn, below the table of runs.
    for red, green, blue in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        near = abs(pixels * 255 - (red, green, blue)).max(-1) < 8
        assert near[200:1600].sum() > 200
