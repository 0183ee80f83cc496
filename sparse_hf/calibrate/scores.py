"""Which heads retrieve, without training: what their windows miss, and what they find again in repeated text.

A start for mask learning, and head masks by themselves where there is no time for it. The first question is that of
DuoAttention (arXiv 2410.10819, section 2.2), how much the output changes when a head streams, asked of one head at a
time on dense activations; the second is the induction score of repeated random tokens (Olsson et al. 2022, In-context
Learning and Induction Heads).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.calibrate.contributions import gram_matrices, layer_norms, squared_norms
from sparse_hf.calibrate.framework import Calibrator, Outcome, Target, option
from sparse_hf.calibrate.probe import LayerCall, observed
from sparse_hf.config import SparseConfig
from sparse_hf.figures import Figure
from sparse_hf.head_masks import round_scores
from sparse_hf.methods import Dense, Streaming
from sparse_hf_kernels import AttentionLayout, sparse_attention

MIN_CONTEXT = 8
"""Sequences below so many times sinks and window leave too little to miss: every head then looks sparse."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class ScoresOptions:
    sparsity: float = option(0.5, "Share of KV heads that become sparse.", solves=True)
    num_sink_tokens: int = option(64, "Sinks of sparse heads.")
    window_size: int = option(256, "Window of sparse heads, tokens.")
    retrieval_weight: float = option(0.5, "Weight of retrieval on repeated text, in [0, 1].", solves=True)

    def __post_init__(self) -> None:
        for name, value in (("sparsity", self.sparsity), ("retrieval-weight", self.retrieval_weight)):
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {value}")
        Streaming(num_sink_tokens=self.num_sink_tokens, window_size=self.window_size)

    @property
    def streaming(self) -> Streaming:
        return Streaming(num_sink_tokens=self.num_sink_tokens, window_size=self.window_size)


class ScoresCalibrator(Calibrator):
    """Two forward passes per sequence: the text as it is, and random tokens of it twice."""

    name: ClassVar[str] = "scores"
    summary: ClassVar[str] = "Head scores and masks without training, as a start for mask learning."
    Options: ClassVar[type] = ScoresOptions
    options: ScoresOptions

    def __init__(self, options: ScoresOptions, target: Target, seed: int = 0) -> None:
        super().__init__(options, target, seed)
        reach = options.num_sink_tokens + options.window_size
        if target.seq_len // 2 <= reach:
            raise ValueError(
                f"the late half of {target.seq_len} tokens lies within sinks and window ({reach} tokens); raise "
                "--seq-len, or lower --num-sink-tokens and --window-size"
            )
        if target.seq_len < MIN_CONTEXT * reach:
            warnings.warn(
                f"--seq-len {target.seq_len} is below {MIN_CONTEXT} times sinks and window "
                f"({MIN_CONTEXT * reach}): a window misses little in so short a context, and scores say little",
                stacklevel=2,
            )
        shape = target.shape
        # Squared changes of the layer's output on late queries, and its squared norm; induction scores; sequences.
        self.changes = torch.zeros(shape.num_layers, shape.num_kv_heads, dtype=torch.float64)
        self.norms = torch.zeros(shape.num_layers, dtype=torch.float64)
        self.retrieval = torch.zeros_like(self.changes)
        self.count = torch.zeros((), dtype=torch.float64)

    def run(self, model: PreTrainedModel, ids: Tensor, sequence: int) -> str:
        self.sequence = sequence
        for observer, tokens in ((self.observe, ids), (self.observe_repeated, self.repeated(ids))):
            with torch.inference_mode(), observed(model, observer):
                model.base_model(input_ids=tokens, use_cache=False)
        self.count += 1
        return ""

    def repeated(self, ids: Tensor) -> Tensor:
        """Twice the same random tokens, drawn from those that the sequence holds: int64 `[1, 2 * (seq_len // 2)]`."""
        known = ids.unique().cpu()
        number = ids.shape[1] // 2
        span = known[torch.randint(len(known), (number,), generator=self.generator())]
        return span.repeat(2)[None].to(ids.device)

    def observe(self, call: LayerCall) -> None:
        """Adds |W (o' - o)|^2 of each KV head's query heads and |out|^2, over the late half of the queries."""
        num_heads, num_kv_heads = call.q.shape[1], call.k.shape[1]
        pattern, window = self.options.streaming.pattern(), self.target.windows[call.layer]
        layout = AttentionLayout(patterns=(pattern,) * num_kv_heads, max_distance=window)
        out = sparse_attention(call.q, call.k, call.v, layout, positions=call.positions, scale=call.scale)
        gram = gram_matrices(call.module, num_heads, num_heads // num_kv_heads)
        length = call.q.shape[2]
        for start in range(length // 2, length, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, length))
            change = out[0][:, rows].float() - call.out[0][:, rows].float()
            joined = change.unflatten(0, (num_kv_heads, -1)).transpose(1, 2).flatten(2)  # [KV heads, rows, group * dim]
            self.changes[call.layer] += squared_norms(joined, gram).sum(-1).double().cpu()
            self.norms[call.layer] += layer_norms(call.out[0][:, rows], call.module).sum().double().cpu()

    def observe_repeated(self, call: LayerCall) -> None:
        """Adds the mass that queries of the second copy put on the token after their own in the first copy."""
        half = call.q.shape[2] // 2
        # Query half + t reads key t + 1, which holds what comes next; the last query has none.
        q = call.q[0, :, half : 2 * half - 1].float().unflatten(0, (call.k.shape[1], -1))
        keys = call.k[0, :, 1:half].float()
        lse = call.lse[0, :, half : 2 * half - 1].unflatten(0, (call.k.shape[1], -1))
        mass = ((q * keys[:, None]).sum(-1) * call.scale - lse).exp()
        if half - 1 >= self.target.windows[call.layer]:  # the model's own window hides the first copy
            mass = torch.zeros_like(mass)
        # The best query head of a group counts: a KV head must be kept for one of them.
        self.retrieval[call.layer] += mass.mean(-1).amax(1).double().cpu()

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in ("changes", "norms", "retrieval", "count")}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("changes", "norms", "retrieval", "count"):
            setattr(self, name, tensors[name].clone())

    def finish(self) -> Outcome:
        change = (self.changes / self.norms[:, None].clamp_min(1e-30)).sqrt()
        retrieval = self.retrieval / self.count
        weight = self.options.retrieval_weight
        # Each from 0 to 1 over the model's heads, so that the weight is a weight.
        parts = [x / x.max().clamp_min(1e-30) for x in (change, retrieval)]
        scores = ((1 - weight) * parts[0] + weight * parts[1]).float()
        masks = round_scores(scores, self.options.sparsity)
        figures = [
            ("head sparsity", 1 - masks.float().mean().item()),
            ("largest relative change when a head streams", change.max().item()),
            ("largest mass found again in repeated text", retrieval.max().item()),
        ]
        return Outcome(
            config=SparseConfig(full=Dense(), sparse=self.options.streaming),
            head_masks=masks,
            scores=scores,
            figures=[Figure(case=case, value=value, unit="share", lower_is_better=False) for case, value in figures],
            report={"relative_changes": change.tolist(), "retrieval": retrieval.tolist()},
            maps={"score": scores, "relative change": change, "retrieval": retrieval},
        )
