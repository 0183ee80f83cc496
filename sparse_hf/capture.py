"""`capture`: what the attention of a sparsified model really did, forward pass by forward pass, layer and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.call_record import BranchStats, CallRecord, Recorder
from sparse_hf.methods import Method
from sparse_hf.patching import get_handle


@dataclass(frozen=True, kw_only=True)
class HeadStats:
    """One query head over the forward passes that were asked for.

    Args:
        head: its number.
        gate: weight of the full branch while gates train, the mean over the causal pairs of these passes; else None.
        causal_pairs: of all its attention calls.
        branches: what was read; several while gates train, or where the methods changed in between. A branch of weight
            0 that was not computed is missing.
    """

    head: int
    gate: float | None
    causal_pairs: int
    branches: tuple[BranchStats, ...]

    @property
    def density(self) -> float:
        """Kept pairs / causal pairs; while gates train the branches' densities, blended as their outputs are."""
        return sum(branch.blended_pairs for branch in self.branches) / max(self.causal_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """One layer: its number, its query heads (none if it did not run), and the mean of their densities."""

    layer: int
    heads: tuple[HeadStats, ...]

    @property
    def density(self) -> float:
        return sum(head.density for head in self.heads) / max(len(self.heads), 1)


class CaptureStats:
    """Forward passes in the order in which they ran. `stats[n]` and `stats[a:b]` are some of them alone.

    Figures are sums over the passes, worked out when they are asked for: that waits for the device, running does not.
    """

    def __init__(self, num_layers: int, num_heads: int, forwards: list[dict[int, CallRecord]]) -> None:
        self.num_layers, self.num_heads, self._forwards = num_layers, num_heads, forwards

    def __len__(self) -> int:
        return len(self._forwards)

    def __getitem__(self, which: int | slice) -> CaptureStats:
        chosen = self._forwards[which] if isinstance(which, slice) else [self._forwards[which]]
        return CaptureStats(self.num_layers, self.num_heads, chosen)

    def __iter__(self) -> Iterator[CaptureStats]:
        return (self[n] for n in range(len(self)))

    @property
    def layers(self) -> tuple[LayerStats, ...]:
        """All layers of the model."""
        return tuple(
            LayerStats(layer=layer, heads=_heads([calls[layer] for calls in self._forwards if layer in calls]))
            for layer in range(self.num_layers)
        )

    @property
    def density(self) -> Tensor:
        """`HeadStats.density` of all heads: float64 `[num_layers, num_heads]`, NaN where no layer ran."""
        rows = [[head.density for head in layer.heads] or [float("nan")] * self.num_heads for layer in self.layers]
        return torch.tensor(rows, dtype=torch.float64)

    def mask(self, layer: int, branch: str | None = None) -> Tensor:
        """Which keys each query of one forward pass read in a layer, as the operator's definition has it.

        Columns are the slots of the keys that the attention was given. With a `SparseCache`, which drops keys, they are
        positions in the row's sequence: the same without padding.

        Args:
            layer: its number.
            branch: "full" or "sparse" while gates train.

        Returns:
            Boolean `[batch, num_heads, q_len, kv_len]`; heads that the branch was not computed for read nothing.

        Raises:
            ValueError: if there are several passes (choose one: `stats[n].mask(layer)`), the layer did not run in this
                one, no masks were kept, or the branch is not one of the pass.
        """
        if len(self) != 1:
            raise ValueError(f"a mask belongs to one forward pass, and these are {len(self)}; take stats[n].mask(...)")
        record = self._forwards[0].get(layer)
        if record is None:
            raise ValueError(f"layer {layer} did not run; layers that did: {sorted(self._forwards[0])}")
        names = sorted(record.branches)
        chosen = names[0] if branch is None and len(names) == 1 else branch
        if chosen not in names:
            raise ValueError(f"branch must be one of {names}, got {branch!r}")
        mask = record.mask(chosen)
        if mask is None:
            raise ValueError("no masks were kept; use capture(model, masks=True)")
        return mask

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain: `methods` are those in force, which branches name by their numbers."""
        methods: list[Method] = []
        layers = []
        for layer in self.layers:
            heads = []
            for head in layer.heads:
                branches = []
                for branch in head.branches:
                    if branch.method not in methods:
                        methods.append(branch.method)
                    branches.append({**branch.to_dict(), "method": methods.index(branch.method)})
                heads.append({**vars(head), "density": head.density, "branches": branches})
            layers.append({"layer": layer.layer, "density": layer.density if heads else None, "heads": heads})
        return {"num_forwards": len(self), "methods": [method.to_dict() for method in methods], "layers": layers}


@contextmanager
def capture(model: PreTrainedModel, *, masks: bool = False) -> Iterator[CaptureStats]:
    """Records what each attention call of a sparsified model reads, for the length of a `with` block.

    Training, prefill, its chunks and decoding, padded and packed, with and without a cache: each forward pass is kept
    apart. A pass that gradient checkpointing repeats in the backward is recorded once. Compiled models break their
    graph around attention meanwhile; replays of a captured CUDA graph are not seen. Captures may nest, on one model or
    several; each has what ran on its model within its own block. What `dense(model)` runs is not recorded.

    Args:
        model: a sparsified model.
        masks: keep boolean masks too, up to 2**30 elements in all.

    Raises:
        ValueError: if the model is not sparsified; in the block, if masks are too large or a CUDA graph is captured.
    """
    handle, recorder = get_handle(model), Recorder(masks)
    states = handle.states
    for state in states:
        state.recorders = (*state.recorders, recorder)
    try:
        yield CaptureStats(handle.shape.num_layers, handle.shape.num_heads, recorder.forwards)
    finally:
        for state in states:
            state.recorders = tuple(other for other in state.recorders if other is not recorder)


def _heads(records: Sequence[CallRecord]) -> tuple[HeadStats, ...]:
    """A layer's query heads over some of its calls."""
    if not records:
        return ()
    found: list[list[BranchStats]] = [[] for _ in range(records[0].num_heads)]
    pairs, gated_pairs, gated = 0, 0, [0.0] * len(found)
    for record in records:
        here, causal = record.heads, record.causal_pairs
        pairs += causal
        gated_pairs += 0 if record.gates is None else causal
        for head, branches in enumerate(here):
            for branch in branches:
                # Methods are compared, not hashed: the blocks of an explicit one are many.
                same = next((n for n, known in enumerate(found[head]) if known.what == branch.what), None)
                if same is None:
                    found[head].append(branch)
                else:
                    found[head][same] = found[head][same].plus(branch)
            if record.gates is not None:
                gated[head] += causal * record.gates[head // (len(found) // len(record.gates))]
    with_gates = any(record.gates is not None for record in records)
    return tuple(
        HeadStats(
            head=head,
            gate=gated[head] / max(gated_pairs, 1) if with_gates else None,
            causal_pairs=pairs,
            branches=tuple(branches),
        )
        for head, branches in enumerate(found)
    )
