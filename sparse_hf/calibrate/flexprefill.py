"""FlexPrefill's gamma and tau at a target density (arXiv 2502.20766, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.calibrate.blocks import check_dynamic, full_rules, num_causal_blocks, rows_of
from sparse_hf.calibrate.contributions import gram_matrices, layer_norms, sample_rows, selection_errors
from sparse_hf.calibrate.framework import Calibrator, Outcome, Target, option
from sparse_hf.calibrate.probe import LayerCall
from sparse_hf.config import SparseConfig
from sparse_hf.figures import Figure
from sparse_hf.methods import Dense, FlexPrefill

MISSED_FIRST, MISSED_LAST = 0.95, 0.0005
"""1 - gamma of the widest search."""


@dataclass(frozen=True, kw_only=True)
class FlexPrefillOptions:
    target_density: float = option(0.3, "Mean share of causal blocks that heads may read.")
    taus: str = option("0,0.1,0.2,0.3", "Values of tau that are tried, separated by commas; one value fixes it.")
    min_budget: int = option(1024, "Tokens that heads read at least; part of every density.")
    block_size: int = option(128, "64 or 128 tokens.")
    num_gammas: int = option(6, "Values of gamma per pass, at least 3.")
    num_passes: int = option(3, "Times that the text is read; each narrows the search between two values of gamma.")
    num_rows: int = option(64, "Queries per layer and sequence on which errors are measured.")

    def __post_init__(self) -> None:
        if not 0 < self.target_density <= 1:
            raise ValueError(f"--target-density must lie in (0, 1], got {self.target_density}")
        if self.num_gammas < 3 or self.num_passes < 1 or self.num_rows < 1:
            raise ValueError(
                "--num-gammas must be >= 3, --num-passes and --num-rows >= 1, "
                f"got {self.num_gammas}, {self.num_passes} and {self.num_rows}"
            )
        for tau in self.tau_values:
            FlexPrefill(tau=tau, min_budget=self.min_budget, block_size=self.block_size)

    @property
    def tau_values(self) -> tuple[float, ...]:
        try:
            values = tuple(sorted({float(part) for part in self.taus.split(",") if part.strip()}))
        except ValueError:
            values = ()
        if not values:
            raise ValueError(f"--taus takes numbers separated by commas, got {self.taus!r}")
        return values


class FlexPrefillCalibrator(Calibrator):
    """For each tau the gamma that reaches the density, by a search that narrows; then the tau of least error.

    Every pass measures a few values of gamma between the last that was below the target and the first above it: a
    bisection that asks more than one question each time the text is read.
    """

    name: ClassVar[str] = "flexprefill"
    summary: ClassVar[str] = "FlexPrefill's gamma and tau at a target density."
    Options: ClassVar[type] = FlexPrefillOptions
    options: FlexPrefillOptions

    def __init__(self, options: FlexPrefillOptions, target: Target, seed: int = 0) -> None:
        super().__init__(options, target, seed)
        check_dynamic(target, options.block_size)
        self.num_passes = options.num_passes
        taus, number = len(options.tau_values), options.num_gammas
        missed = torch.logspace(0, 1, number, base=MISSED_LAST / MISSED_FIRST, dtype=torch.float64) * MISSED_FIRST
        self.gammas = (1 - missed).expand(taus, -1).clone()  # [taus, gammas], ascending
        shape = target.shape
        # Blocks kept by the layer's heads; squared changes of the layer's output, by head summed; its squared norm.
        self.kept = torch.zeros(shape.num_layers, taus, number, dtype=torch.float64)
        self.errors = torch.zeros_like(self.kept)
        self.norms = torch.zeros(shape.num_layers, dtype=torch.float64)
        self.causal = torch.zeros((), dtype=torch.float64)

    def begin_pass(self, number: int) -> None:
        if number > 0:
            self.gammas = torch.stack(
                [self._narrowed(*pair) for pair in zip(self.gammas, self._densities().mean(0), strict=True)]
            )
        for tensor in (self.kept, self.errors, self.norms, self.causal):
            tensor.zero_()

    def _narrowed(self, gammas: Tensor, densities: Tensor) -> Tensor:
        """As many gammas, evenly in log(1 - gamma), around where the densities cross the target."""
        above = int((densities <= self.options.target_density).sum())  # they ascend
        low, high = (min(max(n, 0), len(gammas) - 1) for n in (above - 1, above))
        first, last = (1 - gammas[low]).log(), (1 - gammas[high]).log()
        return 1 - torch.linspace(0, 1, len(gammas), dtype=torch.float64).mul(last - first).add(first).exp()

    def _densities(self) -> Tensor:
        """Of each free layer, `[layers, taus, gammas]`."""
        return self.kept[list(self.target.free_layers)] / (self.causal * self.target.shape.num_heads)

    def _method(self, tau: float, gamma: float) -> FlexPrefill:
        options = self.options
        return FlexPrefill(gamma=gamma, tau=tau, min_budget=options.min_budget, block_size=options.block_size)

    def observe(self, call: LayerCall) -> None:
        if call.layer not in self.target.free_layers:
            return
        size, length = self.options.block_size, call.q.shape[2]
        rows = sample_rows(length, self.options.num_rows, self.generator(call.layer)).to(call.q.device)
        gram = gram_matrices(call.module, call.q.shape[1])
        for n, tau in enumerate(self.options.tau_values):
            chosen = [
                self._method(tau, gamma).select(call.q, call.k, scale=call.scale, q_offset=0)
                for gamma in self.gammas[n].tolist()
            ]
            kept = torch.stack([selection.counts[0].sum() for selection in chosen])
            self.kept[call.layer, n] += kept.double().cpu()
            keep = torch.stack([rows_of(selection, rows, -(-length // size)) for selection in chosen])
            errors = selection_errors(call, rows, keep, gram, size)
            self.errors[call.layer, n] += errors.sum(1).double().cpu()
        self.norms[call.layer] += layer_norms(call.out[0][:, rows], call.module).sum().double().cpu()
        if call.layer == self.target.free_layers[0]:
            self.causal += num_causal_blocks(length, size)

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in ("gammas", "kept", "errors", "norms", "causal")}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("gammas", "kept", "errors", "norms", "causal"):
            setattr(self, name, tensors[name].clone())

    def finish(self) -> Outcome:
        layers = list(self.target.free_layers)
        densities = self._densities()
        relative = (self.errors / self.norms[:, None, None].clamp_min(1e-30))[layers].mean(0).sqrt()
        tau, gamma = self._choose(densities.mean(0), relative)
        method = self._method(self.options.tau_values[tau], self.gammas[tau, gamma].item())
        shape = self.target.shape
        found: list[tuple[str, float, bool]] = [
            ("density", densities[:, tau, gamma].mean().item(), True),
            ("relative output error", relative[tau, gamma].item(), True),
            ("gamma", method.gamma, True),
            ("tau", method.tau, True),
        ]
        return Outcome(
            config=SparseConfig(full=Dense(), rules=full_rules(dict.fromkeys(layers, method))),
            head_masks=torch.ones(shape.num_layers, shape.num_kv_heads, dtype=torch.long),
            figures=[Figure(case=c, value=v, unit="share", lower_is_better=lower) for c, v, lower in found],
            report={
                "taus": list(self.options.tau_values),
                "gammas": self.gammas.tolist(),
                "densities": densities.mean(0).tolist(),
                "relative_output_errors": relative.tolist(),
                "layers": layers,
                "layer_densities": densities[:, tau, gamma].tolist(),
            },
            maps={"density by tau (columns)": self._at_target(densities)},
        )

    def _choose(self, densities: Tensor, errors: Tensor) -> tuple[int, int]:
        """Numbers of tau and gamma: of each tau the densest that is not above the target; of these the least error.

        Raises:
            ValueError: if all are above it.
        """
        within = densities <= self.options.target_density
        if not within.any():
            raise ValueError(
                f"density {self.options.target_density} cannot be reached: the least is {densities.min().item():.4f} "
                f"at min_budget {self.options.min_budget} and {self.target.seq_len} tokens; raise --target-density, "
                "lower --min-budget, or calibrate with a longer --seq-len"
            )
        last = densities.masked_fill(~within, -1).argmax(1)
        least = errors.gather(1, last[:, None])[:, 0].masked_fill(~within.any(1), float("inf"))
        tau = int(least.argmin())
        return tau, int(last[tau])

    def _at_target(self, densities: Tensor) -> Tensor:
        """Each layer's density `[layers, taus]` at the gamma that each tau would take."""
        last = (densities.mean(0) <= self.options.target_density).sum(1).sub(1).clamp_min(0)
        return densities[:, torch.arange(len(last)), last]
