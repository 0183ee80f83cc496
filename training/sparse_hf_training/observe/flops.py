"""Floating-point operations of a training step, counted from shapes and from the keys that each head reads.

PaLM (arXiv 2204.02311, appendix B) counts 6N + 12 L H Q T per token: 2 per parameter and product in the forward pass,
4 in the backward pass, and two products of attention with T keys per query. Here attention counts the pairs that are
read: the causal half of a full head, the pattern's pairs of a sparse one, documents of a packed row apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_hf.call_counts import QueryRuns, kept_pairs
from sparse_hf.layer_state import LayerState
from sparse_hf_kernels import AttentionLayout

BACKWARD_MODEL = 2.0
"""Attention products of the backward pass over those of the forward pass, as PaLM counts."""
BACKWARD_EXECUTED = 2.5
"""The same with the scores recomputed from q and k, as fused kernels do."""

# Dense peaks in bf16 and fp16, FLOP/s, from NVIDIA's data sheets (half of the figures with sparsity). The first name
# that the device's name contains counts.
PEAKS = (
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of one device, or None where it is not known: another device, a slice of one, or another dtype."""
    if dtype not in (torch.bfloat16, torch.float16) or "MIG" in device_name:
        return None
    return next((peak for name, peak in PEAKS if name in device_name), None)


@dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """Parameters that take part in matrix products; those of them that are trained.

    Args:
        body, body_trained: of linear layers that every token passes, adapters included.
        head, head_trained: of the output embedding, which label tokens pass. Tied or not, the input embedding is a
            look-up and costs nothing.
    """

    body: int
    body_trained: int
    head: int
    head_trained: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> LinearSizes:
        """From the layers' own widths: sharded and quantised weights count in full."""
        output = model.get_output_embeddings()
        counts = {"body": 0, "body_trained": 0, "head": 0, "head_trained": 0}
        for module in model.modules():
            place = "head" if module is output else "body"
            size = _linear_size(module)
            counts[place] += size
            if size and module._parameters["weight"].requires_grad:  # type: ignore[union-attr]
                counts[f"{place}_trained"] += size
        return cls(**counts)

    def forward(self, tokens: int, labels: int) -> float:
        """FLOPs of the products of one forward pass."""
        return 2.0 * (self.body * tokens + self.head * labels)

    def backward(self, tokens: int, labels: int) -> float:
        """Gradients of activations, and of the weights that are trained (frozen ones cost 4N, not 6N, in all)."""
        return self.forward(tokens, labels) + 2.0 * (self.body_trained * tokens + self.head_trained * labels)


def _linear_size(module: nn.Module) -> int:
    if module._parameters.get("weight") is None:
        return 0
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return int(module.nx) * int(module.nf) if isinstance(module, Conv1D) else 0


@dataclass(frozen=True, kw_only=True)
class AttentionPairs:
    """(query, key) pairs of one forward pass, over all layers and query heads.

    Args:
        model: that the output depends on: a head whose gate is 0 reads its sparse keys, any other its full ones, of
            which the sparse ones are a part.
        executed: those of both branches where the gate lies between 0 and 1 (kernels that fuse them compute less).
        dense: of all heads without sparsity, a teacher's.
    """

    model: int
    executed: int
    dense: int


def attention_pairs(
    states: Sequence[LayerState], group_size: int, runs: QueryRuns, gates: Tensor | None
) -> AttentionPairs | None:
    """Counts one forward pass; None if a head that it needs chooses its keys by q and k.

    Args:
        states: of all layers.
        group_size: query heads per KV head.
        runs: where the queries stand.
        gates: `[num_layers, num_kv_heads]` on the CPU, or None where the deployed layout counts.
    """
    model = executed = dense = 0
    for layer, state in enumerate(states):
        row = None if gates is None else gates[layer].tolist()
        if state.selects(None if gates is None else gates[layer]):
            return None
        dense += _pairs(AttentionLayout.dense(state.full.num_kv_heads, state.full.max_distance), runs)
        if row is None:
            deployed = _pairs(state.layout, runs)
            model, executed = model + deployed, executed + deployed
            continue
        read = _pairs(state.full, runs, [head for head, z in enumerate(row) if z > 0])
        read += _pairs(state.sparse, runs, [head for head, z in enumerate(row) if z == 0])
        model += read
        executed += read + _pairs(state.sparse, runs, [head for head, z in enumerate(row) if 0 < z < 1])
    return AttentionPairs(model=model * group_size, executed=executed * group_size, dense=dense * group_size)


def _pairs(layout: AttentionLayout, runs: QueryRuns, heads: Sequence[int] | None = None) -> int:
    """Pairs that the KV heads (by default all) read."""
    total = 0
    for pattern, members in layout.groups:
        count = len(members) if heads is None else len(set(members).intersection(heads))
        if count:
            # One head: what is counted for it is remembered, whichever heads share it.
            alone = replace(layout, patterns=(pattern,))
            total += count * sum(number * kept_pairs(alone, first, length) for first, length, number in runs.runs)
    return total
