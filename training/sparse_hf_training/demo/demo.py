"""`run_demo`: learn masks, fine-tune under them, judge beside random heads, export, reload in a new process, plot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.figures import Figure, write_figures
from sparse_hf.head_masks import round_scores
from sparse_hf.patching import get_handle, set_head_masks
from sparse_hf.plots import plot_head_masks
from sparse_hf.progress import progress_bar
from sparse_hf_training.build import build_judge, load_model
from sparse_hf_training.config import RunConfig
from sparse_hf_training.demo.recipe import (
    ASSETS,
    HEAD_SPARSITY,
    MASKS_FOLDER,
    MODEL,
    SEQ_LEN,
    masks_config,
    tune_config,
)
from sparse_hf_training.evaluation import Judge, Judgement
from sparse_hf_training.plots import plot_recall, plot_training
from sparse_hf_training.run import run_training
from sparse_hf_training.run_folder import CONFIG_NAME
from sparse_hf_training.run_result import FIGURES_NAME, RunResult, judgement_figures

MAX_RECALL_LOSS, MAX_TEXT_LOSS = 0.05, 0.01
COMMAND = "sparse-hf demo"


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo found.

    Args:
        dense: judgement of the model as it came.
        masks_only: under the learned masks, weights untouched.
        learned: after fine-tuning under those masks.
        random: one judgement per draw of random heads at the same sparsity.
        kv_bytes, dense_kv_bytes: held after `SEQ_LEN` tokens, measured.
        head_masks: the learned masks.
        reloaded: what a new process generated from the artefact.
        seconds: run time of the demo.
        output: its folder.
    """

    dense: Judgement
    masks_only: Judgement
    learned: Judgement
    random: tuple[Judgement, ...]
    kv_bytes: int
    dense_kv_bytes: int
    head_masks: Tensor
    reloaded: dict[str, Any]
    seconds: float
    output: Path

    @property
    def worst_recall_loss(self) -> float:
        """Largest fall of exact match from dense to learned heads over the tasks."""
        pairs = zip(self.dense.recall, self.learned.recall, strict=True)
        return max(before.exact_match - after.exact_match for before, after in pairs)

    @property
    def text_loss_increase(self) -> float:
        """Relative increase of the loss on held text."""
        return self.learned.text_loss / self.dense.text_loss - 1

    @property
    def reached(self) -> bool:
        """Whether the learned heads stay within the demo's bounds and the reloaded model answers right."""
        right = self.reloaded["generated"] == self.reloaded["expected"]
        # A rounding error of the subtraction is no sample.
        return self.worst_recall_loss <= MAX_RECALL_LOSS + 1e-9 and self.text_loss_increase <= MAX_TEXT_LOSS and right

    def random_mean(self, task: int) -> float:
        """Mean exact match of the random draws on a task."""
        return sum(draw.recall[task].exact_match for draw in self.random) / len(self.random)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense.to_dict(),
            "masks_only": self.masks_only.to_dict(),
            "learned": self.learned.to_dict(),
            "random": [draw.to_dict() for draw in self.random],
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "head_masks": self.head_masks.tolist(),
            "reloaded": self.reloaded,
            "worst_recall_loss": self.worst_recall_loss,
            "text_loss_increase": self.text_loss_increase,
            "reached": self.reached,
            "seconds": self.seconds,
            "output": str(self.output),
        }


def run_demo(
    output: Path,
    *,
    mask_steps: int = 120,
    tune_steps: int = 190,
    num_samples: int = 24,
    num_random: int = 5,
    random_samples: int = 5,
    seed: int = 0,
    console: Console | None = None,
) -> DemoReport:
    """Runs the demo into `output`.

    Args:
        output: folder; a demo that was there before is replaced, anything else is refused.
        mask_steps, tune_steps: optimizer steps of the two stages.
        num_samples: recall samples per task for dense and learned heads.
        num_random: draws of random heads.
        random_samples: recall samples per task for each draw.
        seed: of everything.
        console: where progress is shown.

    Raises:
        ValueError: if `output` exists and is no earlier demo.
    """
    start = time.monotonic()
    console = console or Console(stderr=True)
    _clear(output)
    config = masks_config(output, steps=mask_steps, num_samples=num_samples, seed=seed)
    found = run_training(config, console=console, command=COMMAND)
    assert found.dense is not None and found.sparse is not None
    masks = get_handle(found.model).head_masks
    judge = _judge(config)
    draws = _judge_random(found.model, judge, num_random, random_samples, seed, console)
    tune = tune_config(output, steps=tune_steps, num_samples=num_samples, seed=seed)
    tuned = run_training(tune, before=found.dense, console=console, command=COMMAND)
    assert tuned.sparse is not None
    figures = judgement_figures(judge, found.dense, tuned.sparse, tuned.model)
    with console.status("reloading the artefact in a new process"):
        reloaded = _reload(tuned.artefact, seed)
    report = DemoReport(
        dense=found.dense,
        masks_only=found.sparse,
        learned=tuned.sparse,
        random=draws,
        kv_bytes=int(figures[-1].value),
        dense_kv_bytes=int(figures[-1].baseline or 0),
        head_masks=masks,
        reloaded=reloaded,
        seconds=time.monotonic() - start,
        output=output,
    )
    _write(report, found, tuned, figures)
    return report


def _clear(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is no folder; choose another name with --out")
    try:
        earlier = RunConfig.load(output / MASKS_FOLDER / CONFIG_NAME)
        own = Path(earlier.model) == MODEL
    except ValueError:
        own = False
    if not own and any(output.iterdir()):
        raise ValueError(f"{output} exists and is no earlier demo; choose another folder with --out")
    shutil.rmtree(output)


def _judge(config: RunConfig) -> Judge:
    _, tokenizer = load_model(config.model, config.dtype)
    judge = build_judge(config.evaluation, tokenizer)
    assert judge is not None
    return judge


def random_head_masks(shape: tuple[int, ...], head_sparsity: float, seed: int) -> Tensor:
    """Head masks with the given share of sparse heads, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return round_scores(torch.rand(shape, generator=generator), head_sparsity)


def _judge_random(
    model: PreTrainedModel, judge: Judge, draws: int, samples: int, seed: int, console: Console
) -> tuple[Judgement, ...]:
    shape = tuple(get_handle(model).head_masks.shape)
    judgements = []
    with progress_bar(console) as progress:
        total = draws * len(judge.tasks) * samples
        task = progress.add_task("judging random heads", total=total, figures="")

        def advance() -> None:
            progress.advance(task)

        for draw in range(draws):
            set_head_masks(model, random_head_masks(shape, HEAD_SPARSITY, seed * 1000 + draw))
            judgements.append(judge(model, samples, advance))
    return tuple(judgements)


def _reload(artefact: Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "sparse_hf_training.demo.reload"]
    arguments = [str(artefact), str(ASSETS / "text" / "validation"), str(SEQ_LEN), str(seed)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"the artefact could not be used in a new process: {last[0]}")
    # Some libraries greet on stdout when they are imported.
    reloaded: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return reloaded


def _write(report: DemoReport, found: RunResult, tuned: RunResult, figures: list[Figure]) -> None:
    output = report.output
    bounded = [
        Figure(
            case="largest fall of recall from dense to learned heads",
            value=report.worst_recall_loss,
            unit="share",
            lower_is_better=True,
            must=MAX_RECALL_LOSS,
            goal=0.0,
        ),
        Figure(
            case="relative increase of the loss on held text",
            value=report.text_loss_increase,
            unit="share",
            lower_is_better=True,
            must=MAX_TEXT_LOSS,
            goal=0.0,
        ),
        Figure(case="run time of the demo", value=report.seconds, unit="s", lower_is_better=True, must=300.0),
    ]
    random = [
        Figure(
            case=f"recall {task.task}, random heads, mean of {len(report.random)} draws",
            value=report.random_mean(number),
            unit="share",
            lower_is_better=False,
            baseline=task.exact_match,
        )
        for number, task in enumerate(report.dense.recall)
    ]
    masks_only = [
        Figure(
            case=f"recall {after.task}, learned masks without fine-tuning",
            value=after.exact_match,
            unit="share",
            lower_is_better=False,
            baseline=before.exact_match,
        )
        for before, after in zip(report.dense.recall, report.masks_only.recall, strict=True)
    ]
    write_figures(output / FIGURES_NAME, [*figures, *masks_only, *random, *bounded], command=COMMAND)
    plots: list[tuple[str, Callable[[Path], object]]] = [
        ("head_masks.png", lambda path: plot_head_masks(report.head_masks, path, found.scores)),
        ("training_masks.png", lambda path: plot_training(found.history, path)),
        ("training_weights.png", lambda path: plot_training(tuned.history, path)),
        ("recall.png", lambda path: plot_recall(report, path)),
    ]
    for name, draw in plots:
        draw(output / name)
    (output / "demo.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
