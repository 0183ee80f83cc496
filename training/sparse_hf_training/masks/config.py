"""`MaskLearningConfig`: how masks are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sparse_hf_training.masks.budgets import LayerBudget
from sparse_hf_training.masks.gates import BinarySTEGates, DuoGates, Gates, Granularity, HardConcreteGates
from sparse_hf_training.masks.gates.binary_ste import Sampling
from sparse_hf_training.masks.regularizers import Regularizer, RegularizerKind, make_regularizer
from sparse_hf_training.masks.schedule import RateSchedule, SparsitySchedule, rate_factor

GateKind = Literal["hard_concrete", "duo", "binary_ste"]


@dataclass(frozen=True, kw_only=True)
class MaskLearningConfig:
    """How masks are learned.

    Args:
        gates: `hard_concrete` (PruLong), `duo` (DuoAttention's clamped alpha) or `binary_ste`.
        granularity: `kv_head`, or `layer`: the KV heads of a layer share a gate.
        ste_sampling: of `binary_ste`: `bernoulli` or `threshold`.
        start_head_sparsity, end_head_sparsity: target at the first step and after the warm-up; the masks that are
            deployed have the end's. With `layer_budgets` or `layers_from`: of the heads that these leave free.
        sparsity_warmup_ratio: share of the steps over which the target moves.
        schedule: `linear`, `logarithmic` or `cubic`.
        layer_budgets: layers with a head sparsity of their own, in the penalty (a constraint for each of the layers)
            and in rounding; 0 keeps a layer full.
        layers_from: artefact folder or Hub id: heads may become sparse only in the layers where something is sparse
            there (stage `layer_selection` writes one).
        regularizer: `lagrangian`, `abs` (|s - t|) or `l1` (the mean gate, whatever the target).
        reg_weight: factor on it; None: 1, for `l1` DuoAttention's 0.05.
        linear_term, quadratic_term: of the Lagrangian.
        mask_learning_rate: of the gates. The weights' schedule does not touch it.
        reg_learning_rate: of the Lagrangian's multipliers, likewise.
        mask_rate_schedule: of both rates: `constant`, PruLong's `cosine` (up over the first tenth of the steps, then
            down to a hundredth) or DuoAttention's `trapezoid` (up over the first fifth, down over the last, a tenth at
            the ends).
        init_log_alpha: first value of all gates, or their mean with `init_scores`; `duo` has `init_alpha`.
        init_alpha: the same of `duo` gates, in [0, 1].
        init_scores: artefact folder or Hub id whose head scores order the gates' first values (`sparse-hf calibrate
            scores` writes one); None for equal ones.
        init_spread: how far the first values of the lowest and the highest score lie from the mean.
        init_masks: artefact folder or Hub id from whose head masks the gates start: full heads at the first value,
            sparse ones at its opposite (-log_alpha, 1 - alpha).
        clamp_log_alpha, clamp_multipliers: bounds, or None.
        seed: of the gates' noise. A draw depends on the seed, the step and the micro-batch alone: all ranks draw the
            same, and a resumed run goes on as if nothing had happened.
    """

    gates: GateKind = "hard_concrete"
    granularity: Granularity = "kv_head"
    ste_sampling: Sampling = "bernoulli"
    start_head_sparsity: float = 0.0
    end_head_sparsity: float = 0.5
    sparsity_warmup_ratio: float = 0.6
    schedule: str = "linear"
    layer_budgets: tuple[LayerBudget, ...] = ()
    layers_from: str | None = None
    regularizer: RegularizerKind = "lagrangian"
    reg_weight: float | None = None
    linear_term: bool = True
    quadratic_term: bool = True
    mask_learning_rate: float = 0.2
    reg_learning_rate: float = 0.05
    mask_rate_schedule: RateSchedule = "constant"
    init_log_alpha: float = 4.0
    init_alpha: float = 1.0
    init_scores: str | None = None
    init_spread: float = 1.0
    init_masks: str | None = None
    clamp_log_alpha: float | None = 6.0
    clamp_multipliers: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("gates", GateKind), ("granularity", Granularity), ("ste_sampling", Sampling)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {list(get_args(kinds))}, got {getattr(self, name)!r}")
        for name in ("mask_learning_rate", "reg_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("reg_weight", "clamp_log_alpha", "clamp_multipliers"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.init_spread > 0:
            raise ValueError(f"init_spread must be positive, got {self.init_spread}; leave init_scores out for none")
        if self.init_scores is not None and self.init_masks is not None:
            raise ValueError("gates start from init_scores or from init_masks, not from both")
        self._check_alpha()
        if self.granularity == "layer" and any(budget.head_sparsity > 0 for budget in self.layer_budgets):
            raise ValueError("with granularity 'layer' a layer is sparse or not: layer_budgets can only be 0")
        _ = self.schedule_to(self.end_head_sparsity), self.make_regularizer((1.0,)), self.rate_factor(0, 1)

    def _check_alpha(self) -> None:
        low, high = self.init_alpha, self.init_alpha
        if self.gates == "duo" and self.init_scores is not None:
            low, high = low - self.init_spread, high + self.init_spread
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"duo gates start in [0, 1], got {low} to {high}; with init_scores set init_alpha and init_spread to "
                "0.75 and 0.25, say"
            )

    def make_gates(self, num_layers: int, num_kv_heads: int) -> Gates:
        """Gates at their first values, without `init_scores` and `init_masks`."""
        if self.gates == "duo":
            return DuoGates(num_layers, num_kv_heads, granularity=self.granularity, init=self.init_alpha)
        init, clamp = self.init_log_alpha, self.clamp_log_alpha
        if self.gates == "hard_concrete":
            return HardConcreteGates(num_layers, num_kv_heads, granularity=self.granularity, init=init, clamp=clamp)
        return BinarySTEGates(
            num_layers, num_kv_heads, granularity=self.granularity, init=init, clamp=clamp, sampling=self.ste_sampling
        )

    def make_regularizer(self, shares: tuple[float, ...]) -> Regularizer:
        """The penalty on constraints with these shares of the heads."""
        return make_regularizer(
            self.regularizer,
            shares,
            weight=self.reg_weight,
            linear=self.linear_term,
            quadratic=self.quadratic_term,
            clamp=self.clamp_multipliers,
        )

    def schedule_to(self, end: float) -> SparsitySchedule:
        """The schedule of a constraint that ends with this head sparsity."""
        return SparsitySchedule(
            start=self.start_head_sparsity,
            end=end,
            warmup_ratio=self.sparsity_warmup_ratio,
            kind=self.schedule,  # type: ignore[arg-type]
        )

    def rate_factor(self, step: int, max_steps: int) -> float:
        """Factor on the learning rates of gates and multipliers in step `step` of `max_steps`, counted from 0."""
        return rate_factor(self.mask_rate_schedule, step, max_steps)
