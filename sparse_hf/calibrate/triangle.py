"""TriangleMix's layers: those on whose Middle the first generated token depends least (arXiv 2507.21526, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.calibrate.framework import Calibrator, Outcome, Target, option
from sparse_hf.calibrate.middle import num_middle_cells, probe_middles
from sparse_hf.config import LayerRule, SparseConfig
from sparse_hf.figures import Figure
from sparse_hf.layer_ranges import format_ranges
from sparse_hf.methods import Dense, Triangle
from sparse_hf.patching import apply_config, unsparsify


@dataclass(frozen=True, kw_only=True)
class TriangleOptions:
    num_layers: int | None = option(
        None, "Layers that become triangle; by default as many as --max-loss-increase allows.", solves=True
    )
    max_loss_increase: float = option(
        0.01, "Nats per token that the loss on held-out sequences may rise over the dense model's.", solves=True
    )
    num_sink_tokens: int = option(8, "Sinks of triangle layers.")
    window_size: int = option(512, "Window of triangle layers, tokens.")
    num_last_tokens: int = option(128, "Queries at the end that stay dense; held-out losses are theirs.")
    held_out: int = option(4, "Of so many sequences one measures losses instead of gradients; 0: none does.")
    layer_step: int = option(1, "Layers added between two measured losses.")

    def __post_init__(self) -> None:
        triangle = self.triangle
        if self.num_layers is not None and self.num_layers < 0:
            raise ValueError(f"--num-layers must not be negative, got {self.num_layers}")
        if not self.max_loss_increase >= 0:
            raise ValueError(f"--max-loss-increase must not be negative, got {self.max_loss_increase}")
        if self.held_out < 0 or self.held_out == 1 or self.layer_step < 1:
            raise ValueError(
                f"--held-out must be 0 or at least 2 and --layer-step at least 1, got {self.held_out} and "
                f"{self.layer_step}"
            )
        if self.held_out and triangle.num_last_tokens < 2:
            raise ValueError("losses are those of the last tokens: --num-last-tokens must be at least 2")
        if not self.held_out and self.num_layers is None:
            raise ValueError("with --held-out 0 no loss is measured; give --num-layers")

    @property
    def triangle(self) -> Triangle:
        return Triangle(
            num_sink_tokens=self.num_sink_tokens, window_size=self.window_size, num_last_tokens=self.num_last_tokens
        )


class TriangleCalibrator(Calibrator):
    """Grad(M, l) of each layer l: the mean of |dS_ij| over the cells (i, j) of its Middle M and over query heads.

    S are the scaled scores before softmax, dS the gradient of the logit of a sequence's last token, predicted from all
    before it. The mean is of magnitudes: a row of dS sums to 0, so signed cells would cancel. The last layer's is 0,
    for only its last query reaches the logit, and that is outside the Middle. Layers become triangle in ascending order
    of Grad as long as the loss stays within its bound. The second pass measures the losses by running the model with
    the first n layers sparse, for n = 0, step, 2 step, ... Layers whose own window leaves no Middle are left as they
    are.
    """

    name: ClassVar[str] = "triangle"
    summary: ClassVar[str] = "TriangleMix's layers, by a gradient probe and the loss on held-out sequences."
    Options: ClassVar[type] = TriangleOptions
    options: TriangleOptions

    def __init__(self, options: TriangleOptions, target: Target, seed: int = 0) -> None:
        super().__init__(options, target, seed)
        self.num_passes = 2 if options.held_out else 1
        triangle, length = options.triangle, target.seq_len - 1
        self.layers = [n for n, window in enumerate(target.windows) if num_middle_cells(triangle, length, window)]
        if not self.layers:
            reach = triangle.num_sink_tokens + triangle.window_size + triangle.num_last_tokens
            raise ValueError(
                f"no layer has a Middle at {length} tokens beyond sinks, window and last rows ({reach} tokens, or the "
                "model's own windows); raise --seq-len, or lower --num-sink-tokens, --window-size, --num-last-tokens"
            )
        if options.num_layers is not None and options.num_layers > len(self.layers):
            raise ValueError(f"--num-layers {options.num_layers} is more than the {len(self.layers)} layers to choose")
        counts = range(0, len(self.layers) + 1, options.layer_step)
        self.counts = [*counts] if counts[-1] == len(self.layers) else [*counts, len(self.layers)]
        # Sums over sequences of each layer and head's mean |dS|, and of losses with the first layers sparse.
        self.gradients = torch.zeros(target.shape.num_layers, target.shape.num_heads, dtype=torch.float64)
        self.num_probed = torch.zeros((), dtype=torch.float64)
        self.losses = torch.zeros(len(self.counts), dtype=torch.float64)
        self.num_held_out = torch.zeros((), dtype=torch.float64)
        self.measuring = torch.zeros((), dtype=torch.int64)

    def begin_pass(self, number: int) -> None:
        self.measuring.fill_(number)

    def run(self, model: PreTrainedModel, ids: Tensor, sequence: int) -> str:
        self.sequence = sequence
        held_out = bool(self.options.held_out) and (sequence + 1) % self.options.held_out == 0
        if held_out != bool(self.measuring):
            return ""
        if held_out:
            losses = [self._loss(model, ids, count) for count in self.counts]
            self.losses += torch.tensor(losses, dtype=torch.float64)
            self.num_held_out += 1
            return f"loss {losses[0]:.3f} dense, {losses[-1]:.3f} with every layer triangle"
        gradients = torch.zeros_like(self.gradients)

        def found(layer: int, sums: Tensor, cells: int) -> None:
            gradients[layer] = sums / cells

        logit = probe_middles(model, ids, self.options.triangle, self.target.windows, found)
        if not gradients.isfinite().all():
            raise ValueError(
                f"sequence {sequence} gave gradients that are not finite; calibrate in bfloat16 or float32"
            )
        self.gradients += gradients
        self.num_probed += 1
        return f"logit {logit:.2f}"

    def _loss(self, model: PreTrainedModel, ids: Tensor, count: int) -> float:
        """Mean loss of the last tokens with the first `count` layers of the order triangle."""
        apply_config(model, self._config(count))
        try:
            with torch.inference_mode():
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                rows = hidden[0, -self.options.num_last_tokens : -1]
                logits = model.get_output_embeddings()(rows).float()
                return F.cross_entropy(logits, ids[0, -len(rows) :]).item()
        finally:
            unsparsify(model)

    def _order(self) -> list[int]:
        """The layers by ascending gradient."""
        means = self.gradients.mean(1)
        return sorted(self.layers, key=lambda layer: means[layer].item())

    def _config(self, count: int) -> SparseConfig:
        chosen = self._order()[:count]
        rules = (LayerRule(layers=format_ranges(chosen), full=self.options.triangle),) if chosen else ()
        return SparseConfig(full=Dense(), rules=rules, head_masks="all_full")

    def state(self) -> dict[str, Tensor]:
        names = ("gradients", "num_probed", "losses", "num_held_out", "measuring")
        return {name: getattr(self, name).clone() for name in names}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("gradients", "num_probed", "losses", "num_held_out", "measuring"):
            setattr(self, name, tensors[name].clone())

    def finish(self) -> Outcome:
        if not self.num_probed:
            raise ValueError("every sequence was held out; give more --num-sequences than --held-out")
        means = self.gradients / self.num_probed
        increases = None
        if self.num_held_out:
            increases = (self.losses - self.losses[0]) / self.num_held_out
        count = self._count(increases)
        config, chosen = self._config(count), sorted(self._order()[:count])
        share = count / self.target.shape.num_layers
        figures = [
            Figure(case="triangle layers", value=float(count), unit="layers", lower_is_better=False),
            Figure(case="share of layers", value=share, unit="share", lower_is_better=False),
            Figure(case="density", value=self._density(chosen), unit="share", lower_is_better=True),
        ]
        if increases is not None and count in self.counts:
            increase = increases[self.counts.index(count)].item()
            figures.append(Figure(case="loss increase", value=increase, unit="nats per token", lower_is_better=True))
        shape = self.target.shape
        return Outcome(
            config=config,
            head_masks=torch.ones(shape.num_layers, shape.num_kv_heads, dtype=torch.long),
            figures=figures,
            report={
                "triangle_layers": chosen,
                "order": self._order(),
                "gradients": means.mean(1).tolist(),
                "num_layers_tried": self.counts if increases is not None else [],
                "loss_increases": [] if increases is None else increases.tolist(),
            },
            maps={"mean |dS| over the Middle": means},
        )

    def _count(self, increases: Tensor | None) -> int:
        """How many layers become triangle: the first measured number of layers that goes beyond the bound ends it."""
        if self.options.num_layers is not None:
            return self.options.num_layers
        if increases is None:
            raise ValueError(
                "no sequence was held out to measure losses; give --num-layers, or at least --held-out sequences "
                f"({self.options.held_out})"
            )
        within = int((increases <= self.options.max_loss_increase).long().cumprod(0).sum())
        return self.counts[within - 1]

    def _density(self, chosen: list[int]) -> float:
        """Share of the model's causal pairs that are read, its own windows apart."""
        length, triangle = self.target.seq_len, self.options.triangle
        causal = length * (length + 1) // 2
        saved = sum(num_middle_cells(triangle, length, self.target.windows[layer]) for layer in chosen)
        return 1 - saved / (causal * self.target.shape.num_layers)
