"""XAttention's thresholds, one per query head, at a target density or error (arXiv 2503.16428, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_hf.calibrate.blocks import check_dynamic, forced_density, full_rules, num_causal_blocks, rows_of
from sparse_hf.calibrate.contributions import gram_matrices, layer_norms, sample_rows, selection_errors
from sparse_hf.calibrate.framework import Calibrator, Outcome, Target, option
from sparse_hf.calibrate.knapsack import Knapsack
from sparse_hf.calibrate.probe import LayerCall
from sparse_hf.config import SparseConfig
from sparse_hf.figures import Figure
from sparse_hf.methods import Dense, XAttention
from sparse_hf_kernels import BlockSelection
from sparse_hf_kernels.scoring import select_top_p, xattention_block_mass

START, STEP = 0.9, 0.9  # the paper's
MAX_STEPS = 40  # 0.9 ** 41 is 0.013
ABOVE = (0.93, 0.96, 0.98, 0.99, 1.0)
_MAX_COSTS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class XAttentionOptions:
    target_density: float = option(0.3, "Mean share of causal blocks that heads may read.", solves=True)
    max_error: float | None = option(
        None, "Instead of a density: relative error of layers' attention outputs.", solves=True
    )
    stride: int = option(16, "4, 8 or 16.")
    block_size: int = option(128, "64 or 128 tokens.")
    num_steps: int = option(10, "Thresholds 0.9 * 0.9^k that are tried, besides 0 and some from 0.93 to 1.")
    num_rows: int = option(64, "Queries per layer and sequence on which errors are measured.")

    def __post_init__(self) -> None:
        if not 0 < self.target_density <= 1:
            raise ValueError(f"--target-density must lie in (0, 1], got {self.target_density}")
        if self.max_error is not None and not self.max_error >= 0:
            raise ValueError(f"--max-error must not be negative, got {self.max_error}")
        if not 1 <= self.num_steps <= MAX_STEPS or self.num_rows < 1:
            raise ValueError(
                f"--num-steps must lie in [1, {MAX_STEPS}] and --num-rows be >= 1, "
                f"got {self.num_steps} and {self.num_rows}"
            )
        XAttention(stride=self.stride, block_size=self.block_size)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Ascending."""
        lowered = (round(START * STEP**k, 6) for k in range(self.num_steps))
        return (0.0, *sorted(lowered), *ABOVE)


class XAttentionCalibrator(Calibrator):
    """Measures density and error of each head at each threshold; a knapsack over all heads picks one per head."""

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "XAttention's thresholds per query head, at a target density or error."
    Options: ClassVar[type] = XAttentionOptions
    options: XAttentionOptions

    def __init__(self, options: XAttentionOptions, target: Target, seed: int = 0) -> None:
        super().__init__(options, target, seed)
        check_dynamic(target, options.block_size)
        least = forced_density(target.seq_len, options.block_size)
        if options.max_error is None and options.target_density < least:
            raise ValueError(
                f"density {options.target_density} cannot be reached: the first block and the diagonal alone are "
                f"{least:.4f} of {target.seq_len} tokens; raise --target-density, or calibrate with a longer --seq-len"
            )
        settings = len(options.thresholds)
        shape = target.shape
        # Blocks kept; squared changes of the layer's output; its squared norm.
        self.kept = torch.zeros(shape.num_layers, shape.num_heads, settings, dtype=torch.float64)
        self.errors = torch.zeros_like(self.kept)
        self.norms = torch.zeros(shape.num_layers, dtype=torch.float64)
        self.causal = torch.zeros((), dtype=torch.float64)

    def observe(self, call: LayerCall) -> None:
        if call.layer not in self.target.free_layers:
            return
        size, thresholds = self.options.block_size, self.options.thresholds
        length = call.q.shape[2]
        mass = xattention_block_mass(call.q, call.k, stride=self.options.stride, block_size=size, scale=call.scale)
        rows = sample_rows(length, self.options.num_rows, self.generator(call.layer)).to(call.q.device)
        kept, keep = [], []
        for threshold in thresholds:
            counts, indices = select_top_p(mass, threshold)
            kept.append(counts[0].sum(-1))
            keep.append(rows_of(BlockSelection(block_size=size, counts=counts, indices=indices), rows, mass.shape[-1]))
        self.kept[call.layer] += torch.stack(kept, -1).double().cpu()
        gram = gram_matrices(call.module, call.q.shape[1])
        errors = selection_errors(call, rows, torch.stack(keep), gram, size)
        self.errors[call.layer] += errors.T.double().cpu()
        self.norms[call.layer] += layer_norms(call.out[0][:, rows], call.module).sum().double().cpu()
        if call.layer == self.target.free_layers[0]:
            self.causal += num_causal_blocks(length, size)

    def state(self) -> dict[str, Tensor]:
        return {
            "kept": self.kept.clone(),
            "errors": self.errors.clone(),
            "norms": self.norms.clone(),
            "causal": self.causal.clone(),
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("kept", "errors", "norms", "causal"):
            setattr(self, name, tensors[name].clone())

    def finish(self) -> Outcome:
        layers = list(self.target.free_layers)
        densities = self.kept[layers] / self.causal
        # Shares of the layer's output: what every head of every layer may spend is then of one kind.
        errors = self.errors[layers] / self.norms[layers, None, None].clamp_min(1e-30)
        choices = self._solve(densities.flatten(0, 1), errors.flatten(0, 1))
        chosen = torch.tensor(choices).view(len(layers), -1)
        thresholds = torch.tensor(self.options.thresholds, dtype=torch.float64)[chosen]
        density, error = (x.gather(-1, chosen[..., None])[..., 0] for x in (densities, errors))
        relative = error.sum(-1).mean().sqrt().item()
        methods = {
            layer: XAttention(
                stride=self.options.stride, block_size=self.options.block_size, threshold=tuple(row.tolist())
            )
            for layer, row in zip(layers, thresholds, strict=True)
        }
        shape = self.target.shape
        return Outcome(
            config=SparseConfig(full=Dense(), rules=full_rules(methods)),
            head_masks=torch.ones(shape.num_layers, shape.num_kv_heads, dtype=torch.long),
            figures=[
                Figure(case="density", value=density.mean().item(), unit="share", lower_is_better=True),
                Figure(case="relative output error", value=relative, unit="share", lower_is_better=True),
                Figure(case="mean threshold", value=thresholds.mean().item(), unit="share", lower_is_better=True),
            ],
            report={
                "layers": layers,
                "thresholds": thresholds.tolist(),
                "densities": density.tolist(),
                "squared_errors": error.tolist(),
            },
            maps={"threshold": thresholds, "density": density, "relative error": error.sqrt()},
        )

    def _solve(self, densities: Tensor, errors: Tensor) -> Sequence[int]:
        """The threshold's number of each head `[heads]`, from `[heads, thresholds]`."""
        costs, losses = densities.numpy(), errors.numpy()
        if self.options.max_error is None:
            target = self.options.target_density
            return Knapsack(costs, losses, max_cost=target).within_cost(target)
        bound = self.options.max_error**2 * len(self.target.free_layers)
        for max_cost in _MAX_COSTS:
            found = Knapsack(costs, losses, max_cost=max_cost).within_error(bound)
            if found is not None:
                return found
        return [len(self.options.thresholds) - 1] * len(costs)  # all blocks: the error is rounding
