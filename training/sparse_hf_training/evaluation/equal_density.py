"""Methods at equal density: what each loses when its parameter is set so that it reads a given share of the pairs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf import Method, SparseConfig, sparsify, unsparsify
from sparse_hf.capture import capture
from sparse_hf.methods import Dense
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.density_knobs import Knob, find_position
from sparse_hf_training.evaluation.judge import Judge, Judgement
from sparse_hf_training.evaluation.lab import weight_digest
from sparse_hf_training.evaluation.method_quality import MethodQuality, judge_methods
from sparse_hf_training.tasks import task_label

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DensityPoint:
    """A method at the setting that reads so much.

    Args:
        method: what tables call it.
        target: share of the causal pairs that it should read.
        knob: the parameter that was searched.
        setting: its value.
        calibrated: density on the calibration text.
        quality: what it is worth on held text; None where no setting comes near the target.
    """

    method: str
    target: float
    knob: str
    setting: float
    calibrated: float
    quality: MethodQuality | None

    @property
    def described(self) -> str:
        return f"at {100 * self.target:g}% density, {self.method} ({self.knob} {self.setting:.4g})"


class EqualDensity:
    """Finds each method's setting for each density on calibration text, and judges it there on held text.

    Args:
        model: dense, not sparsified; it is so again after each step.
        judge: on held text.
        calibration: int64 ids `[num_rows, seq_len]` of other text, as long as what is judged.
        knobs: the methods, by the names that tables use.
        targets: densities, shares of the causal pairs.
        tolerance: how far from the target, as a share of the causal pairs, a density may lie.
        store: where cells are kept; `cell_settings` says what they depend on.

    Raises:
        ValueError: for targets that are no shares, or a tolerance that is not positive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        judge: Judge,
        calibration: Tensor,
        knobs: Mapping[str, Knob],
        *,
        targets: Sequence[float],
        tolerance: float,
        store: CellStore,
    ) -> None:
        if not targets or not all(0 < target < 1 for target in targets) or len(set(targets)) < len(targets):
            raise ValueError(f"densities must be different and lie between 0 and 100%, got {list(targets)}")
        if not 0 < tolerance < 1:
            raise ValueError(f"the tolerance must lie between 0 and 100%, got {tolerance}")
        self.model, self.judge, self.calibration, self.knobs = model, judge, calibration, knobs
        self.targets, self.tolerance, self.store = targets, tolerance, store
        self._known: dict[str, dict[float, float]] = {name: {} for name in knobs}

    def dense(self, progress: Progress = lambda what: None) -> MethodQuality:
        """What all points are compared with."""
        return self._judged(Dense.name, Dense.name, Dense(), progress)

    def points(
        self, *, deadline: float | None = None, progress: Progress = lambda what: None
    ) -> Iterator[DensityPoint]:
        """Density by density, so that a run that is cut short compares what it has.

        Args:
            deadline: of `time.monotonic`; no point is begun after it.
            progress: called as it goes.
        """
        for target in self.targets:
            for name, knob in self.knobs.items():
                if deadline is not None and time.monotonic() > deadline:
                    return
                yield self._point(name, knob, target, lambda what, name=name: progress(f"{name}: {what}"))  # type: ignore[misc]

    def _point(self, name: str, knob: Knob, target: float, progress: Progress) -> DensityPoint:
        def density(setting: float) -> float:
            progress(f"density at {knob.name} {setting:.4g}")
            cell = self.store.get(
                name, f"density at {setting!r}", lambda: {"density": self.density(knob.method(setting))}
            )
            return cell["density"]

        known = self._known[name]
        position = find_position(knob, target, density, known, close=self.tolerance / 4)
        setting, calibrated = knob.setting(position), known[position]
        quality = None
        if abs(calibrated - target) <= self.tolerance:
            quality = self._judged(name, f"judged at {setting!r}", knob.method(setting), progress)
        return DensityPoint(
            method=name, target=target, knob=knob.name, setting=setting, calibrated=calibrated, quality=quality
        )

    @torch.no_grad()
    def density(self, method: Method) -> float:
        """What a method on all heads reads of the calibration text."""
        sparsify(self.model, SparseConfig(sparse=method))
        try:
            with capture(self.model) as stats:
                for rows in self.calibration.split(self.judge.batch_size):
                    self.model(input_ids=rows.to(self.model.device), use_cache=False, logits_to_keep=1)
            return stats.density.mean().item()
        finally:
            unsparsify(self.model)

    def _judged(self, name: str, cell: str, method: Method, progress: Progress) -> MethodQuality:
        done = 0

        def step(_: str) -> None:
            nonlocal done
            done += 1
            progress(f"sample {done} of {self.judge.steps}")

        def measure() -> dict[str, Any]:
            (quality,) = judge_methods(self.model, {name: method}, self.judge, progress=step)
            return {"density": quality.density, "judgement": quality.judgement.to_dict(with_samples=True)}

        values = self.store.get(name, cell, measure)
        return MethodQuality(name=name, density=values["density"], judgement=Judgement.from_dict(values["judgement"]))


def cell_settings(
    model: PreTrainedModel, judge: Judge, calibration: Tensor, knobs: Mapping[str, Knob]
) -> dict[str, Any]:
    """What the cells depend on besides their names: JSON-plain."""
    held = [judge.rows[number]["input_ids"].numpy().tobytes() for number in range(judge.num_rows)]
    return {
        "weights": weight_digest(model),
        "dtype": str(model.dtype),
        "seq_len": judge.seq_len,
        "num_samples": judge.num_samples,
        "seed": judge.seed,
        "tasks": [task_label(task) for task in judge.tasks],
        "text": _digest([judge.filler.tokens.tobytes(), *held]),
        "calibration": _digest([calibration.numpy().tobytes()]),
        # Defaults of the other parameters, too.
        "methods": {name: knob.method(knob.setting(0.0)).to_dict() for name, knob in sorted(knobs.items())},
    }


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
