"""MInference's pattern per query head: of patterns of equal kernel cost the one of least error (arXiv 2407.02490).

Section 3.2, algorithm 1, with costs counted in the blocks that our kernel computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.calibrate.blocks import check_dynamic, full_rules, num_causal_blocks, rows_of
from sparse_hf.calibrate.contributions import sample_rows
from sparse_hf.calibrate.framework import Calibrator, Outcome, Target, option
from sparse_hf.calibrate.probe import LayerCall
from sparse_hf.config import SparseConfig
from sparse_hf.figures import Figure
from sparse_hf.interop.minference import layer_method
from sparse_hf.methods import Dense, MInference, MInferenceHead
from sparse_hf.methods.minference import NUM_LAST_QUERIES, NUM_NEAR_DIAGONALS, NUM_SINK_COLUMNS
from sparse_hf_kernels import BlockSelection
from sparse_hf_kernels.scoring import last_q_sums

THEIR_LENGTH = 32768
"""Tokens that the paper's candidates are meant for; it searches on one sample of 30K."""
VERTICALS = (30, 100, 500, 3000)
"""Columns of its vertical-slash candidates at that length."""
LOCAL_TO_INIT = 4
"""Window to sinks of its A-shape candidate (1024, 4096)."""
NUM_SIZES = 256
"""Numbers of diagonals whose cost is counted, evenly spaced in their logarithm."""


@dataclass(frozen=True, kw_only=True)
class MInferenceOptions:
    target_density: float = option(0.3, "Share of causal blocks that each head may compute; the paper's, at 32K.")
    block_size: int = option(128, "64 or 128 tokens.")
    num_rows: int = option(64, "Queries per layer and sequence on which errors are measured, half in the last block.")

    def __post_init__(self) -> None:
        if not 0 < self.target_density <= 1:
            raise ValueError(f"--target-density must lie in (0, 1], got {self.target_density}")
        if self.num_rows < 2:
            raise ValueError(f"--num-rows must be >= 2, got {self.num_rows}")
        MInference(block_size=self.block_size)


class MInferenceCalibrator(Calibrator):
    """Two passes. The first counts the blocks that diagonals cost each head, which depends on where they lie; sizes of
    all candidates are then set to the same cost. The second measures each candidate's error. The winner is kept as it
    is.

    A candidate's cost is the number of blocks it computes, a column counting 1 / block_size of a block in every row of
    blocks. Its error is |o' - o|^2 / |o|^2 of the head's output against dense, summed over sampled queries.
    """

    name: ClassVar[str] = "minference"
    summary: ClassVar[str] = "MInference's pattern per query head, by a search at equal kernel cost."
    Options: ClassVar[type] = MInferenceOptions
    options: MInferenceOptions
    num_passes = 2

    def __init__(self, options: MInferenceOptions, target: Target, seed: int = 0) -> None:
        super().__init__(options, target, seed)
        check_dynamic(target, options.block_size)
        size, shape, length = options.block_size, target.shape, target.seq_len
        self.num_blocks = -(-length // size)
        self.budget = options.target_density * num_causal_blocks(length, size)
        least = 2 * self.num_blocks - 1
        if self.budget < least:
            raise ValueError(
                f"--target-density {options.target_density} is below what the first block and the diagonal alone are, "
                f"{least / num_causal_blocks(length, size):.4f} of {length} tokens; raise it, or --seq-len"
            )
        self.verticals = tuple(dict.fromkeys(max(NUM_SINK_COLUMNS, v * length // THEIR_LENGTH) for v in VERTICALS))
        grid = torch.logspace(0, 1, NUM_SIZES, base=length / NUM_NEAR_DIAGONALS, dtype=torch.float64)
        self.slashes = (grid * NUM_NEAR_DIAGONALS).round().long().clamp_max(length).unique()
        fixed = [self._a_shape(), self._block_sparse()]
        self.fixed = [entry for entry in fixed if entry is not None]
        layers, heads = shape.num_layers, shape.num_heads
        num_candidates = len(self.verticals) + len(self.fixed)
        # Blocks by diagonals; diagonals of the vertical-slash candidates, 0 where none fits; costs, errors, norms.
        self.slash_costs = torch.zeros(layers, heads, len(self.slashes), dtype=torch.float64)
        self.slash_sizes = torch.zeros(layers, heads, len(self.verticals), dtype=torch.int64)
        self.costs = torch.zeros(layers, heads, num_candidates, dtype=torch.float64)
        self.errors = torch.zeros_like(self.costs)
        self.norms = torch.zeros(layers, heads, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)
        self.measuring = torch.zeros((), dtype=torch.int64)

    def _a_shape(self) -> MInferenceHead | None:
        """The largest A-shape within the budget whose window is about four times its sinks; None if none is."""
        size, best, rows = self.options.block_size, None, torch.arange(1, self.num_blocks + 1)
        for window in range(1, self.num_blocks + 1):  # blocks besides the diagonal
            init = max(1, round(window / LOCAL_TO_INIT))
            if int(rows.clamp_max(init + window + 1).sum()) > self.budget:
                break
            best = MInferenceHead(kind="a_shape", n_init=init * size, n_local=window * size)
        return best

    def _block_sparse(self) -> MInferenceHead | None:
        rows = torch.arange(1, self.num_blocks + 1)
        fitting = [n for n in range(2, self.num_blocks + 1) if int(rows.clamp_max(n).sum()) <= self.budget]
        return MInferenceHead(kind="block_sparse", top_k=fitting[-1]) if fitting else None

    def begin_pass(self, number: int) -> None:
        self.measuring.fill_(number)
        if number == 1:
            for n, vertical in enumerate(self.verticals):
                self.slash_sizes[..., n] = self._fitting(vertical)
            self.count.zero_()

    def _fitting(self, vertical: int) -> Tensor:
        """The most diagonals `[num_layers, num_heads]` that what the columns leave of the budget pays; 0 if none."""
        left = self.budget - vertical / self.options.block_size * self.num_blocks
        number = (self.slash_costs / self.count <= left).sum(-1)  # they ascend
        return torch.where(number > 0, self.slashes[(number - 1).clamp_min(0)], 0)

    def observe(self, call: LayerCall) -> None:
        if call.layer not in self.target.free_layers:
            return
        if call.layer == self.target.free_layers[0]:
            self.count += 1
        if self.measuring == 0:
            self.slash_costs[call.layer] += self._count_blocks(call)
            return
        rows = self._rows(call.q.shape[2], call.layer).to(call.q.device)
        keeps = []
        for n in range(self.costs.shape[-1]):
            chosen = self._select(call, [self._entry(call.layer, head, n) for head in range(call.q.shape[1])])
            columns = 0.0
            if n < len(self.verticals):
                columns = self.verticals[n] / self.options.block_size * self.num_blocks
            self.costs[call.layer, :, n] += chosen.counts[0].sum(-1).double().cpu() + columns
            keeps.append((rows_of(chosen, rows, self.num_blocks), chosen.columns))
        errors, norms = pattern_errors(call, rows, keeps, self.options.block_size)
        self.errors[call.layer] += errors.T.double().cpu()
        self.norms[call.layer] += norms.double().cpu()

    def _count_blocks(self, call: LayerCall) -> Tensor:
        """Blocks that each number of diagonals costs, fp64 `[num_heads, sizes]`, the two forced ones included."""
        size, number = self.options.block_size, self.num_blocks
        _, sums = last_q_sums(call.q, call.k, scale=call.scale, q_offset=0, last_q=NUM_LAST_QUERIES)
        sums[..., :NUM_NEAR_DIAGONALS] = float("inf")
        ranks = sums[0].argsort(descending=True, stable=True).argsort()
        # A block diagonal is crossed by the diagonals less than a block off its own: it comes with the first of them.
        padded = F.pad(ranks, (0, number * size - ranks.shape[-1]), value=ranks.shape[-1]).unflatten(-1, (-1, size))
        earlier = F.pad(padded[:, :-1, 1:].amin(-1), (1, 0), value=ranks.shape[-1])
        first = torch.minimum(padded.amin(-1), earlier)  # [num_heads, blocks]
        crossed = first[:, None] < self.slashes.to(first.device)[:, None]
        crossed[..., 0] = True
        lengths = torch.arange(number, 0, -1, device=first.device)
        return torch.where(crossed, lengths, 1).sum(-1).double().cpu()  # elsewhere the first block of the row

    def _select(self, call: LayerCall, entries: Sequence[MInferenceHead]) -> BlockSelection:
        method = MInference(heads=tuple(entries), block_size=self.options.block_size)
        return method.select(call.q, call.k, scale=call.scale, q_offset=0)

    def _rows(self, length: int, layer: int) -> Tensor:
        """Ascending positions: half of them in the last block, the others all over the sequence."""
        number = self.options.num_rows // 2
        start = (self.num_blocks - 1) * self.options.block_size
        last = start + sample_rows(length - start, number, self.generator(layer, 1))
        return torch.cat([sample_rows(length, self.options.num_rows - number, self.generator(layer)), last]).unique()

    def _entry(self, layer: int, head: int, candidate: int) -> MInferenceHead:
        if candidate >= len(self.verticals):
            return self.fixed[candidate - len(self.verticals)]
        slash = int(self.slash_sizes[layer, head, candidate])
        return MInferenceHead(vertical_size=self.verticals[candidate], slash_size=slash or NUM_NEAR_DIAGONALS)

    def state(self) -> dict[str, Tensor]:
        names = ("slash_costs", "slash_sizes", "costs", "errors", "norms", "count", "measuring")
        return {name: getattr(self, name).clone() for name in names}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name in ("slash_costs", "slash_sizes", "costs", "errors", "norms", "count", "measuring"):
            setattr(self, name, tensors[name].clone())

    def finish(self) -> Outcome:
        layers, shape, size = list(self.target.free_layers), self.target.shape, self.options.block_size
        errors = (self.errors / self.norms[..., None].clamp_min(1e-30)).sqrt()
        fits = torch.ones_like(errors, dtype=torch.bool)
        fits[..., : len(self.verticals)] = self.slash_sizes > 0
        if not fits[layers].any(-1).all():
            raise ValueError(
                f"no pattern fits into --target-density {self.options.target_density} of {self.target.seq_len} tokens; "
                "raise it, or --seq-len"
            )
        best = errors.masked_fill(~fits, float("inf")).argmin(-1)
        densities = self.costs / self.count / num_causal_blocks(self.target.seq_len, size)
        density, error = (x.gather(-1, best[..., None])[..., 0][layers] for x in (densities, errors))
        entries = {
            layer: [self._entry(layer, h, int(best[layer, h])) for h in range(shape.num_heads)] for layer in layers
        }
        kinds = [entry.kind for row in entries.values() for entry in row]
        shares = {kind: kinds.count(kind) / len(kinds) for kind in ("vertical_slash", "block_sparse", "a_shape")}
        found = [("density", density.mean().item()), ("relative output error", error.mean().item())]
        return Outcome(
            config=SparseConfig(
                full=Dense(), rules=full_rules({layer: layer_method(row, size) for layer, row in entries.items()})
            ),
            head_masks=torch.ones(shape.num_layers, shape.num_kv_heads, dtype=torch.long),
            figures=[
                *(Figure(case=case, value=value, unit="share", lower_is_better=True) for case, value in found),
                *(
                    Figure(case=f"{kind} heads", value=share, unit="share", lower_is_better=False)
                    for kind, share in shares.items()
                ),
            ],
            report={
                "layers": layers,
                "candidates": [f"vertical_slash {n}" for n in self.verticals] + [entry.kind for entry in self.fixed],
                "chosen": best[layers].tolist(),
                "fits": fits[layers].tolist(),
                "densities": densities[layers].tolist(),
                "relative_errors": errors[layers].tolist(),
            },
            maps={"candidate": best[layers], "relative error": error, "density": density},
        )


def pattern_errors(
    call: LayerCall, rows: Tensor, keeps: Sequence[tuple[Tensor, Tensor | None]], block_size: int
) -> tuple[Tensor, Tensor]:
    """How much each head's output changes on some queries under each pattern.

    Args:
        call: one unpadded sequence; causal.
        rows: int64 `[num_rows]`, positions of the queries, on the device.
        keeps: per pattern its blocks, boolean `[num_heads, num_rows, num_kv_blocks]`, and its single columns, int32
            `[1, num_heads, num_columns]` with -1 for none, or None.
        block_size: tokens per block.

    Returns:
        fp32 `[patterns, num_heads]`, sums over the rows of |o' - o|^2, and `[num_heads]`, those of |o|^2. Memory:
        num_rows * kv_len per query head of one KV head.
    """
    num_kv_heads, kv_len = call.k.shape[1:3]
    group = call.q.shape[1] // num_kv_heads
    later = torch.arange(kv_len, device=rows.device) > rows[:, None]
    errors, norms = [], []
    for head in range(num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        q, k, v = call.q[0, heads][:, rows].float(), call.k[0, head].float(), call.v[0, head].float()
        weights = (q @ k.T * call.scale).masked_fill(later, float("-inf")).softmax(-1)  # [group, rows, kv_len]
        out = weights @ v
        norms.append(out.square().sum((1, 2)))
        changes = []
        for blocks, columns in keeps:
            keep = blocks[heads].repeat_interleave(block_size, -1)[..., :kv_len]
            if columns is not None:
                picked = columns[0, heads].long()
                single = torch.zeros(group, kv_len + 1, dtype=torch.bool, device=rows.device)
                single.scatter_(-1, torch.where(picked < 0, kv_len, picked), True)
                keep = keep | single[:, None, :kv_len]
            kept = weights * keep
            ours = kept @ v / kept.sum(-1, keepdim=True).clamp_min(1e-30)
            changes.append((ours - out).square().sum((1, 2)))
        errors.append(torch.stack(changes))
    return torch.cat(errors, 1), torch.cat(norms)
