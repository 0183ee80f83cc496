"""Methods at equal density: the search by hand, densities counted pair by pair, the script on the shipped model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_hf import SparseConfig, Streaming, is_sparsified, sparsify
from sparse_hf.figures import Figure
from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.evaluation import RecallResult, evaluate_text_loss
from sparse_hf_training.evaluation import equal_density as equal_density_module
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.cost_chart import CostPoint, cost_lines
from sparse_hf_training.evaluation.density_knobs import MAX_STEPS, Knob, density_knobs, find_position
from sparse_hf_training.evaluation.equal_density import EqualDensity
from sparse_hf_training.evaluation.statistics import paired_difference_interval, wilson_interval
from sparse_hf_training.evaluation.worst_task import answered_by_dense, recall_figures, worst_task
from sparse_hf_training.study.charts import plot_study

Load = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 768


@pytest.fixture
def tiny(model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


class Counted:
    """A density that says how often it was asked for."""

    def __init__(self, density: Any) -> None:
        self.density, self.asked = density, list[float]()

    def __call__(self, setting: float) -> float:
        self.asked.append(setting)
        return self.density(setting)


def plain_knob(setting: Any = lambda position: position) -> Knob:
    return Knob(name="share", setting=setting, method=lambda share: Streaming())


@pytest.mark.parametrize("power", [0.5, 1, 2, 5, 8])
def test_the_search_meets_its_targets_in_few_steps(power: float) -> None:
    density, known = Counted(lambda share: 0.05 + 0.9 * share**power), dict[float, float]()
    for target in (0.1, 0.2, 0.3, 0.5):
        before = len(density.asked)
        position = find_position(plain_knob(), target, density, known, close=0.002)
        assert known[position] == density.density(position) and abs(known[position] - target) < 0.005
        assert len(density.asked) - before <= MAX_STEPS + (2 if target == 0.1 else 0), "the ends are measured once"
    assert density.asked[:2] == [0.0, 1.0] and len(set(density.asked)) == len(density.asked) == len(known)


def test_a_straight_line_is_met_at_once() -> None:
    density = Counted(lambda share: share)
    assert find_position(plain_knob(), 0.25, density, {}, close=1e-9) == 0.25 and density.asked == [0.0, 1.0, 0.25]


@pytest.mark.parametrize(("target", "end"), [(0.2, 0.0), (0.95, 1.0)])
def test_beyond_the_ends_the_end_is_nearest(target: float, end: float) -> None:
    density = Counted(lambda share: 0.4 + 0.5 * share)
    assert find_position(plain_knob(), target, density, {}, close=0.01) == end
    assert density.asked == [0.0, 1.0]


def test_whole_numbers_end_at_the_nearest() -> None:
    knob = plain_knob(lambda position: round(1 + 7 * position))
    density = Counted(lambda number: number / 8)
    assert knob.setting(find_position(knob, 0.4, density, {}, close=0.0)) == 3  # 0.375, where 4 is 0.5
    assert len(density.asked) <= 2 + MAX_STEPS and set(density.asked) <= set(range(1, 9))


def test_knobs_turn_the_way_they_say(tiny: Any, tmp_path: Path) -> None:
    """Every method reads more at the middle than at the lower end, and at the upper one most of the pairs."""
    study = small_study(tiny, tmp_path)
    for name, knob in density_knobs(SEQ_LEN).items():
        low, middle, high = (study.density(knob.method(knob.setting(position))) for position in (0.0, 0.5, 1.0))
        assert low <= middle <= high and low < high and high > 0.7, name
        assert high == pytest.approx(1.0) or name == "bigbird", name
    assert not is_sparsified(tiny)
    with pytest.raises(ValueError, match="32 tokens or more, got 31"):
        density_knobs(31)


def small_study(model: Any, folder: Path, **changes: Any) -> EqualDensity:
    class Judge:
        batch_size = 2

    ids = torch.randint(0, 300, (3, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"targets": (0.5,), "tolerance": 0.01, "store": CellStore(folder / "cells", {})}
    return EqualDensity(model, Judge(), ids, density_knobs(SEQ_LEN), **{**options, **changes})  # type: ignore[arg-type]


def test_the_density_is_that_of_the_pairs(tiny: Any, tmp_path: Path) -> None:
    i, j = torch.arange(SEQ_LEN)[:, None], torch.arange(SEQ_LEN)
    kept = ((j < 64) | (i - j < 40)) & (j <= i)
    study = small_study(tiny, tmp_path)
    assert study.density(Streaming(window_size=40)) == pytest.approx(
        kept.sum().item() / (SEQ_LEN * (SEQ_LEN + 1) / 2), rel=1e-9
    )
    for bad, message in (
        ({"targets": (0.5, 0.5)}, "must be different"),
        ({"targets": (1.0,)}, "lie between 0 and 100%"),
        ({"tolerance": 0.0}, "the tolerance"),
    ):
        with pytest.raises(ValueError, match=message):
            small_study(tiny, tmp_path, **bad)


def test_the_worst_task_by_hand() -> None:
    dense = {"one": (True,) * 4, "two": (True, True, True, False), "hard": (False, False, True, False)}
    found = {"one": (True, True, True, False), "two": (True, False, False, False)}
    assert answered_by_dense(dense) == ["one", "two"] and worst_task(found, dense) == ("two", -0.5)
    values = {figure.case: figure for figure in recall_figures("t", [found], {name: dense[name] for name in found})}
    assert values["t: recall"].value == 4 / 8 and values["t: recall"].baseline == 7 / 8
    assert values["t: recall (95% low)"].value == wilson_interval(4, 8)[0]
    assert values["t: worst task, change"].value == -0.5
    low, high = paired_difference_interval(found["two"], dense["two"])
    assert values["t: worst task, change (95% low)"].value == low
    assert values["t: worst task, change (95% high)"].value == high
    assert (values["t: recall one"].value, values["t: recall one"].baseline) == (0.75, 1.0)
    with pytest.raises(ValueError, match="answers no task in 50% of the samples"):
        answered_by_dense({"hard": dense["hard"]})


def test_outcomes_go_through_json() -> None:
    result = RecallResult(task="needle", num_samples=2, num_exact=1, seq_len=9, exact=(True, False))
    whole = json.loads(json.dumps(result.to_dict(with_samples=True)))
    assert RecallResult.from_dict(whole) == result and whole["exact_match"] == 0.5
    counts = result.to_dict()
    assert "exact" not in counts and RecallResult.from_dict(counts).exact is None


def cost_figures(title: str, x_column: str, x: float) -> list[Figure]:
    columns = {x_column: x, "loss, increase": x + 1, "worst task, change": -0.2}
    columns |= {"worst task, change (95% low)": -0.3, "worst task, change (95% high)": -0.1}
    return [
        Figure(case=f"{title}: {name}", value=value, unit="", lower_is_better=True) for name, value in columns.items()
    ]


def test_lines_are_read_from_figures(tmp_path: Path) -> None:
    column = "KV bytes, of dense"
    figures = [
        *cost_figures("masks only, 50% sparse, gates", column, 60.0),
        *cost_figures("masks only, 62.5% sparse, gates", column, 45.0),
        *cost_figures("masks only, 50% sparse, random", column, 60.0),
        *cost_figures("masks and weights, 50% sparse, gates", column, 60.0),
    ]
    lines = cost_lines(figures, "masks only, [^,]+ sparse", column)
    assert list(lines) == ["gates", "random"]
    assert lines["gates"] == [CostPoint(x=x, loss=x + 1, worst=-0.2, interval=(-0.3, -0.1)) for x in (45.0, 60.0)]
    written = plot_study(figures, tmp_path, "study")
    assert [path.name for path in written] == ["study_masks.png", "study_masks_and_weights.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    # Drawn against density, which these figures have not: nothing was freed.
    assert plot_study(cost_figures("masks only, 50% sparse, gates", column, 100.0), tmp_path, "none") == []
    assert plot_study(cost_figures("masks only, 50% sparse, gates", "density of prefill", 60.0), tmp_path, "some") == [
        tmp_path / "some_masks.png"
    ]
    assert plot_study(figures[-5:], tmp_path, "other") == [tmp_path / "other_masks_and_weights.png"]


def test_the_script_on_the_shipped_model(
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure_keys: set[str],
) -> None:
    monkeypatch.setenv("SPARSE_HF_COMMIT", "0123456789ab")
    line = f"--seq-len {SEQ_LEN} --samples 2 --rows 1 --tasks key_value:num_pairs=4 --calibration-rows 1 "
    line += "--methods streaming,xattention --densities 25,60 --tolerance 3 "
    line += f"--cells {tmp_path / 'cells'} --out {tmp_path / 'out'}"
    script, file = load("method_density"), tmp_path / "out" / "method_density.json"
    script.main([*line.split(), "--budget-minutes", "0"])
    assert len(list((tmp_path / "cells" / "cells").iterdir())) == 1 and not file.exists(), "dense, and nothing after it"
    assert "time is up after 0 of 4 points" in capsys.readouterr().err

    script.main(line.split())
    said = " ".join(capsys.readouterr().err.split())
    # The first block and the own one of each of 6 rows: (6 * 8256 + 5 * 128**2) / (768 * 769 / 2).
    assert "left out at 25% density, xattention (threshold 0): no setting comes nearer, and it reads 44.52%" in said
    rows = json.loads(file.read_text())
    assert all(set(row) == figure_keys for row in rows) and str(tmp_path) not in file.read_text()
    values = {row["case"]: row["value"] for row in rows}
    assert not any(case.startswith("at 25% density, xattention") for case in values)
    for title in ("at 25% density, streaming", "at 60% density, streaming", "at 60% density, xattention"):
        assert values[f"{title}: density of calibration"] == pytest.approx(float(title[3:5]), abs=3)
        assert 0 < values[f"{title}: density"] < 100 and f"{title}: recall key_value" in values
    assert (tmp_path / "out" / "method_density.png").read_bytes()[:4] == b"\x89PNG"

    window = values["at 25% density, streaming: knob"]
    assert window == int(window)
    title = f"dense, {SEQ_LEN} tokens: loss on held text"
    held, shipped = load_rows(script, line), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert values[title] == pytest.approx(evaluate_text_loss(shipped, held), rel=1e-6)
    sparse = sparsify(shipped, SparseConfig(sparse=Streaming(window_size=int(window))))
    increase = 100 * (evaluate_text_loss(sparse, held) / values[title] - 1)
    assert values["at 25% density, streaming: loss, increase"] == pytest.approx(increase, abs=1e-4)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("everything is measured already")

    monkeypatch.setattr(equal_density_module, "judge_methods", refuse)
    monkeypatch.setattr(EqualDensity, "density", refuse)
    script.main(line.split())
    assert {row["case"]: row["value"] for row in json.loads(file.read_text())} == values
    text = load("make_tables").render("<!-- grid: method_density / at 60% density -->\n<!-- end -->", tmp_path / "out")
    assert "| streaming | " in text and "| xattention | " in text and "worst task, change, share" in text
    with pytest.raises(ValueError, match="other settings"):
        script.main([*line.split(), "--seed", "5"])
    with pytest.raises(ValueError, match="unknown methods dense; known: xattention"):
        script.main([*line.split(), "--methods", "dense"])


def load_rows(script: ModuleType, line: str) -> Any:
    """The held rows that the script's judge reads."""
    from transformers import AutoTokenizer

    from sparse_hf.calibrate.text import CalibrationText
    from sparse_hf_training.evaluation.method_quality import whole_rows

    options = script.parse(line.split())
    assert options.data == str(ASSETS / "text" / "validation")
    texts = CalibrationText(path=options.data).documents()
    return whole_rows(texts, AutoTokenizer.from_pretrained(MODEL), SEQ_LEN, options.rows)
