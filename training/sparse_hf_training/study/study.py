"""Recipes side by side at equal bytes: rank, deploy, measure, cell by cell, as long as the time given lasts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.config import SparseConfig
from sparse_hf.head_masks import round_scores
from sparse_hf.methods import Streaming
from sparse_hf.patching import set_head_masks
from sparse_hf.sparsify import sparsify
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.lab import DENSE, Lab, Progress
from sparse_hf_training.evaluation.variant import VariantResult
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.study.bench import Bench
from sparse_hf_training.study.ranking import Ranking
from sparse_hf_training.study.recipes import RECIPES, UNIFORM_WINDOW, uniform_window

STAGES = ("masks", "masks_and_weights")
SPARSITIES = (0.5, 0.625, 0.75, 0.8125, 0.875)
SCORES = "scores"
"""The variant under which the store keeps them."""
LONGEST_MASKS = 120
"""Characters of a variant's name that spells masks out; names of files end at 255."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One thing to measure: a recipe's masks at a sparsity, from one seed, with the weights as they are or tuned."""

    recipe: str
    head_sparsity: float
    seed: int
    stage: str

    @property
    def variant(self) -> str:
        return f"{self.recipe}, {100 * self.head_sparsity:g}% sparse, seed {self.seed}, {self.stage}"

    @property
    def scores(self) -> str:
        """Names the scores that its masks come from. A recipe that ranks once does so once a seed."""
        recipe = RECIPES.get(self.recipe)
        name = f"{self.recipe}, seed {self.seed}"
        return f"{name}, {100 * self.head_sparsity:g}% sparse" if recipe is None or recipe.per_sparsity else name


def masks_variant(masks: Tensor) -> str:
    """Spells head masks: the same for whoever found them."""
    full = " ".join(f"{layer}.{head}" for layer, head in masks.nonzero().tolist()) or "none"
    if len(full) > LONGEST_MASKS:
        full = f"{int(masks.sum())} of digest {hashlib.sha256(full.encode()).hexdigest()[:16]}"
    return f"full heads {full}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study compares.

    Args:
        recipes: names of `RECIPES`, and `UNIFORM_WINDOW`.
        sparsities: shares of sparse KV heads.
        num_seeds: of recipes that depend on one.
        stages: `masks`, and `masks_and_weights`: the same masks after the weights were tuned under them.
        tune_rate: learning rate of the weights.
        tune_recall_share: share of recall samples in the rows that weights are tuned on; the others are text.
    """

    recipes: tuple[str, ...] = (*RECIPES, UNIFORM_WINDOW)
    sparsities: tuple[float, ...] = SPARSITIES
    num_seeds: int = 3
    stages: tuple[str, ...] = STAGES
    tune_rate: float = 2e-4
    tune_recall_share: float = 0.5

    def __post_init__(self) -> None:
        for what, given, known in (
            ("recipes", self.recipes, (*RECIPES, UNIFORM_WINDOW)),
            ("stages", self.stages, STAGES),
        ):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
        for what, each in (("recipes", self.recipes), ("sparsities", self.sparsities), ("stages", self.stages)):
            if len(set(each)) < len(each):
                raise ValueError(f"{what} must all be different, got {list(each)}")
        if not self.sparsities or not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise ValueError(f"sparsities must lie in (0, 1), got {list(self.sparsities)}")
        if self.num_seeds < 1:
            raise ValueError(f"a study needs 1 seed or more, got {self.num_seeds}")
        if not 0 < self.tune_recall_share < 1:
            raise ValueError(f"tune_recall_share must lie in (0, 1), got {self.tune_recall_share}")

    def units(self) -> Iterator[Unit]:
        """Stage by stage, sparsity by sparsity, so that a study that is cut short compares what it has."""
        for stage in self.stages:
            for head_sparsity in self.sparsities:
                for recipe in self.recipes:
                    known = RECIPES.get(recipe)
                    draws = 1 if known is None else known.draws or self.num_seeds
                    for seed in range(draws):
                        yield Unit(recipe=recipe, head_sparsity=head_sparsity, seed=seed, stage=stage)


class Study:
    """Measures the units of a plan.

    Args:
        bench: the model, and what recipes rank its heads with.
        lab: what is measured, on held text.
        plan: what is compared.
        folder: of the cells.
        tuning: the model with the branch that is measured, and what its weights are tuned on; `bench` if there is none.
            Recipes may read shorter rows, with a window that is shorter as well.
        overwrite: forget cells of other settings.

    Raises:
        ValueError: if the folder holds cells of other settings.
    """

    def __init__(
        self, bench: Bench, lab: Lab, plan: Plan, folder: Any, *, tuning: Bench | None = None, overwrite: bool = False
    ) -> None:
        self.bench, self.lab, self.plan, self.tuning = bench, lab, plan, tuning or bench
        self.model = self.tuning.model()
        self.ranked = self.model if self.tuning.branch == bench.branch else bench.model()
        self.store = CellStore(folder, self._settings(), overwrite=overwrite)

    def _settings(self) -> dict[str, Any]:
        """What all cells depend on, rankings among them."""
        return {
            **self.lab.settings(self.model),
            "branch": self.tuning.branch.to_dict(),
            "train_branch": self.bench.branch.to_dict(),
            **self.bench.settings("train"),
        }

    def cells(self, unit: Unit) -> str:
        """Under which name the store keeps what is measured of a unit whose heads are ranked: the same for whoever
        found equal masks. Tuned weights also depend on their training, and on its seed."""
        name = unit.variant if unit.recipe == UNIFORM_WINDOW else masks_variant(self.masks(unit))
        if unit.stage == "masks":
            return name
        tuning = {**self.tuning.settings("tune"), "rate": self.plan.tune_rate, "share": self.plan.tune_recall_share}
        return f"{name}, seed {unit.seed}, tuning {hashlib.sha256(json.dumps(tuning).encode()).hexdigest()[:16]}"

    def run(
        self,
        *,
        deadline: float | None = None,
        progress: Callable[[Unit | None, str], None] = lambda unit, what: None,
    ) -> Iterator[tuple[Unit | None, VariantResult]]:
        """Dense first, as None, then unit after unit; after the deadline only those that are measured already.

        Args:
            deadline: of `time.monotonic`.
            progress: called with the unit and what is done in it.
        """
        yield None, self.measure_dense(progress)
        for unit in self.plan.units():
            if deadline is None or time.monotonic() < deadline or self.is_measured(unit):
                yield unit, self.measure(unit, progress)

    def measure_dense(self, progress: Callable[[Unit | None, str], None] = lambda unit, what: None) -> VariantResult:
        """What all units are compared with."""
        return self.lab.measure(self.model, DENSE, self.store, self._step(None, progress))

    def has_scores(self, unit: Unit) -> bool:
        """Whether the unit's heads are ranked already, or need not be."""
        return unit.recipe == UNIFORM_WINDOW or self.store.has(SCORES, unit.scores)

    def is_measured(self, unit: Unit) -> bool:
        """Whether the store has all of its cells."""
        return self.has_scores(unit) and self.lab.complete(self.cells(unit), self.store)

    def _step(self, unit: Unit | None, progress: Callable[[Unit | None, str], None]) -> Progress:
        return lambda what, done: progress(unit, what)

    def measure(
        self, unit: Unit, progress: Callable[[Unit | None, str], None] = lambda unit, what: None
    ) -> VariantResult:
        """All cells of a unit, from the store or measured now; equal masks on the same weights share theirs."""
        progress(unit, "heads")
        cells, step = self.cells(unit), self._step(unit, progress)
        if self.lab.complete(cells, self.store):
            return replace(self.lab.measure(self.model, cells, self.store, step), name=unit.variant)
        if unit.stage == "masks" and unit.recipe != UNIFORM_WINDOW:
            return replace(self._measure_masks(self.masks(unit), cells, step), name=unit.variant)
        if unit.recipe == UNIFORM_WINDOW:
            model = self._uniform_window(unit)
        else:
            model = self._trainable()
            set_head_masks(model, self.masks(unit))
        if unit.stage == "masks_and_weights":
            progress(unit, "weights")
            self._tune(model, unit)
        return replace(self.lab.measure(model, cells, self.store, step), name=unit.variant)

    def _measure_masks(self, masks: Tensor, cells: str, step: Progress) -> VariantResult:
        set_head_masks(self.model, masks)
        try:
            return self.lab.measure(self.model, cells, self.store, step)
        finally:
            set_head_masks(self.model, torch.ones_like(masks))

    def _trainable(self) -> PreTrainedModel:
        """A model of its own whose weights may train: in fp32."""
        return sparsify(self.tuning.load().float(), SparseConfig(sparse=self.tuning.branch, head_masks="all_full"))

    def _uniform_window(self, unit: Unit) -> PreTrainedModel:
        branch = self.tuning.branch
        if not isinstance(branch, Streaming):
            raise ValueError(f"{UNIFORM_WINDOW} is of streaming heads, the branch is {branch.name!r}; leave it out")
        wide = uniform_window(branch, unit.head_sparsity, self.lab.seq_len)
        model = self.tuning.load()
        if unit.stage == "masks_and_weights":
            model = model.float()
        return sparsify(model, SparseConfig(sparse=wide))

    def masks(self, unit: Unit) -> Tensor:
        """The recipe's head masks, from the store or found now.

        Raises:
            ValueError: if the recipe chooses no heads.
        """
        ranking = self.ranking(unit)
        if ranking is None:
            raise ValueError(f"{unit.recipe} chooses no heads; ask for masks of {', '.join(RECIPES)}")
        return round_scores(ranking.scores, unit.head_sparsity)

    def ranking(self, unit: Unit) -> Ranking | None:
        """The heads as the unit's recipe ranks them, from the store or found now; None where it ranks none."""
        if unit.recipe == UNIFORM_WINDOW:
            return None
        recipe, bench = RECIPES[unit.recipe], self.bench.with_seed(unit.seed)

        def rank() -> dict[str, Any]:
            start = time.monotonic()
            found = recipe.rank(bench, self.ranked, unit.head_sparsity)
            return replace(found, seconds=time.monotonic() - start).to_dict()

        return Ranking.from_dict(self.store.get(SCORES, unit.scores, rank))

    def _tune(self, model: PreTrainedModel, unit: Unit) -> None:
        """Trains the weights under the masks, kept close to the dense model, on text and recall samples."""
        bench, dtype = self.tuning.with_seed(unit.seed + 1000), self.model.dtype
        bench.train(
            model,
            "sft",
            bench.mixed_rows(self.plan.tune_recall_share),
            ObjectiveConfig(kl=1.0),
            teacher=bench.load(),
            learning_rate=self.plan.tune_rate,
        )
        model.to(dtype)  # type: ignore[arg-type]
