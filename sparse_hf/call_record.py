"""What one attention call of a captured layer reads: references and small tensors now, figures when they are asked for.

Nothing here waits for the device while the model runs, masks apart. Closed forms are counted by formula, from where the
queries stand; what dynamic methods chose is added up on the device and read later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_hf.call_counts import QueryRuns, causal_blocks, kept_blocks, kept_pairs, selected_counts
from sparse_hf.methods import DynamicMethod, Method, MInference, XAttention
from sparse_hf_kernels import UNBOUNDED, AttentionLayout, BlockSelection, TokenPositions
from sparse_hf_kernels.capture import is_capturing
from sparse_hf_kernels.sparse_attention.reference import AllowedKeys

if TYPE_CHECKING:
    from sparse_hf.dynamic import Sequences
    from sparse_hf.layer_state import LayerState

DEPLOYED, FULL, SPARSE = "deployed", "full", "sparse"
MAX_MASK_ELEMENTS = 2**30
"""Of all masks that one capture keeps; a byte each."""
MASK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class BranchStats:
    """What one query head read in one branch.

    Args:
        branch: "deployed"; while gates train "full" and "sparse".
        method: the method in force, with the parameters of this head where it has some per head.
        window, num_sink_tokens: where the pattern is a closed form: keys at a distance below `window` and at positions
            below `num_sink_tokens`; a window of the model's own counts. None without a bound.
        queries: of real tokens.
        kept_pairs, causal_pairs: pairs that were read, and all pairs of a query and a token up to it in its sequence.
        blended_pairs: `kept_pairs`, times the branch's weight in the blend.
        block_size: tokens per block, for dynamic and block methods; None for others, as the next two.
        kept_blocks, causal_blocks: blocks of keys that were read, and all up to the queries' own, counted for each
            block of queries.
        kept_columns: single keys that the method chose besides.
    """

    branch: str
    method: Method
    window: int | None
    num_sink_tokens: int
    queries: int
    kept_pairs: int
    causal_pairs: int
    blended_pairs: float
    block_size: int | None = None
    kept_blocks: int | None = None
    causal_blocks: int | None = None
    kept_columns: int = 0

    @property
    def density(self) -> float:
        """Share of the causal pairs; 0 without any."""
        return self.kept_pairs / max(self.causal_pairs, 1)

    @property
    def block_share(self) -> float | None:
        """Share of the causal blocks."""
        if self.kept_blocks is None or self.causal_blocks is None:
            return None
        return self.kept_blocks / max(self.causal_blocks, 1)

    @property
    def what(self) -> tuple[Any, ...]:
        """Branches are added up where this is equal."""
        return self.branch, self.method, self.window, self.num_sink_tokens

    def plus(self, other: BranchStats) -> BranchStats:
        """Both together; they agree in `what`."""
        summed = ("queries", "kept_pairs", "causal_pairs", "blended_pairs", "kept_columns")
        values = {name: getattr(self, name) + getattr(other, name) for name in summed}
        if self.kept_blocks is not None:
            values |= {name: getattr(self, name) + getattr(other, name) for name in ("kept_blocks", "causal_blocks")}
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain, the method by its name and parameters."""
        values = {name: value for name, value in vars(self).items() if name != "method"}
        return {"method": self.method.to_dict(), **values, "density": self.density, "block_share": self.block_share}


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorCall:
    """One call of the attention operator.

    Args:
        layout: of these KV heads; patterns are selected ones only where a selection counts.
        kv_heads: their numbers in the layer.
        queries: where the queries stand.
        selected: `selected_counts` of their query heads, or None.
    """

    layout: AttentionLayout
    kv_heads: tuple[int, ...]
    queries: QueryRuns
    selected: Tensor | None = None

    @cached_property
    def table(self) -> list[tuple[int, int, int]]:
        """Pairs, blocks and columns of each query head of the selection."""
        assert self.selected is not None
        return [(pairs, blocks, columns) for pairs, blocks, columns in self.selected.T.tolist()]


@dataclass(kw_only=True, eq=False)
class BranchRecord:
    """What was read for one branch: the deployed heads, or the full or sparse ones while gates train.

    Args:
        name: "deployed", "full" or "sparse".
        methods: one per KV head.
        group: query heads per KV head.
        mask: boolean `[batch, num_heads, q_len, kv_len]` to be filled, or None.
        by_position: the mask's columns are positions in the row's sequence instead of slots.
    """

    name: str
    methods: tuple[Method, ...]
    group: int
    mask: Tensor | None = None
    by_position: bool = False
    calls: list[OperatorCall] = field(default_factory=list)

    def attended(
        self,
        layout: AttentionLayout,
        positions: TokenPositions,
        batch: int,
        kv_heads: Sequence[int] | None = None,
        selection: BlockSelection | None = None,
        sequences: Sequences | None = None,
    ) -> None:
        """Notes a call of the operator.

        Args:
            layout, positions, selection: as the operator was given them.
            batch: its rows.
            kv_heads: numbers of its KV heads in the layer; by default all.
            sequences: the slots of its rows in the batch, where it was split.
        """
        kv_heads = tuple(range(len(self.methods)) if kv_heads is None else kv_heads)
        selected = None
        if selection is not None:
            assert positions.offset is not None
            selected = selected_counts(selection.expand(batch), positions.offset, positions.q_len)
        queries = QueryRuns.of(positions, batch)
        self.calls.append(OperatorCall(layout=layout, kv_heads=kv_heads, queries=queries, selected=selected))
        if self.mask is not None:
            self._fill(self.mask, layout, positions, kv_heads, selection, sequences)

    def _fill(
        self,
        mask: Tensor,
        layout: AttentionLayout,
        positions: TokenPositions,
        kv_heads: tuple[int, ...],
        selection: BlockSelection | None,
        sequences: Sequences | None,
    ) -> None:
        """Marks what the operator's definition allows."""
        width = mask.shape[-1]
        for pattern, members in layout.groups:
            heads = torch.tensor([kv_heads[n] * self.group + g for n in members for g in range(self.group)])
            heads = heads.to(mask.device)
            allowed = AllowedKeys(layout, pattern, members, positions, selection, self.group)
            for start in range(0, positions.q_len, MASK_ROWS):
                part = allowed.of(slice(start, start + MASK_ROWS))
                rows = slice(start, start + part.shape[3])
                batch = len(mask) if sequences is None else len(sequences.queries)
                part = part.expand(batch, len(members), self.group, -1, -1).flatten(1, 2)
                if sequences is not None:
                    mask[_places(sequences, heads, rows, mask, self.by_position)] = part
                elif self.by_position:
                    slots = torch.where(positions.k_positions < 0, width, positions.k_positions)
                    found = mask.new_zeros(*part.shape[:3], width + 1)
                    found.scatter_(-1, slots[:, None, None].expand_as(part), part)
                    mask[:, heads, rows] = found[..., :width]
                else:
                    mask[:, heads, rows, : positions.kv_len] = part


def _places(
    sequences: Sequences, heads: Tensor, rows: slice, mask: Tensor, by_position: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of these heads and queries of split sequences in a mask: broadcast to `[num_sequences, heads, q, k]`."""
    q_total, width = mask.shape[2:]
    queries = sequences.queries[:, None, rows, None]
    columns = sequences.keys % width
    if by_position:  # a sequence that was split off has all its keys, in order
        columns = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    return queries[:, :, :1] // q_total, heads[None, :, None, None], queries % q_total, columns[:, None, None]


class CallRecord:
    """One attention call of a layer; `open` comes before the operator, `Recorder.add` after it."""

    def __init__(self, recorder: Recorder, state: LayerState) -> None:
        self.recorder, self.state, self.layer = recorder, state, state.layer_idx
        self.gate: Tensor | None = None
        self.skip_saturated = state.skip_saturated
        self.branches: dict[str, BranchRecord] = {}
        self.num_heads = 0

    def open(self, gate: Tensor | None, query: Tensor, kv_len: int, by_position: bool = False) -> None:
        """Takes the methods in force.

        Args:
            gate: `[num_kv_heads]` while gates train, else None.
            query: `[batch, num_heads, q_len, head_dim]`.
            kv_len: columns of a mask.
            by_position: these are positions in a row's sequence.

        Raises:
            ValueError: if masks are asked for and too large, or a CUDA graph is captured.
        """
        if is_capturing():
            raise ValueError(
                "a forward pass cannot be recorded while a CUDA graph is captured: a replay would not tell; leave "
                "sparse_hf.capture before capturing the graph"
            )
        state, (batch, self.num_heads, q_len, _) = self.state, query.shape
        self.gate = None if gate is None else gate.detach().clone()
        branches = {DEPLOYED: state.methods}
        if gate is not None:
            branches = {FULL: state.full_methods, SPARSE: state.sparse_methods}
        group = self.num_heads // state.layout.num_kv_heads
        for name, methods in branches.items():
            mask = self.recorder.new_mask((batch, self.num_heads, q_len, kv_len), query.device)
            self.branches[name] = BranchRecord(
                name=name, methods=methods, group=group, mask=mask, by_position=by_position
            )

    @cached_property
    def gates(self) -> list[float] | None:
        return None if self.gate is None else self.gate.tolist()

    @cached_property
    def heads(self) -> list[list[BranchStats]]:
        """What each query head read, by branch; waits for the device.

        A branch of weight 0 that was skipped is left out.
        """
        found: list[dict[str, BranchStats]] = [{} for _ in range(self.num_heads)]
        for branch in self.branches.values():
            for call in branch.calls:
                for n, kv_head in enumerate(call.kv_heads):
                    weight = self._weight(branch.name, kv_head)
                    if weight == 0 and self.skip_saturated:
                        continue
                    for g, stats in enumerate(_call_stats(branch, call, n, weight)):
                        row = found[kv_head * branch.group + g]
                        row[branch.name] = row[branch.name].plus(stats) if branch.name in row else stats
        return [list(row.values()) for row in found]

    def mask(self, branch: str) -> Tensor | None:
        """Boolean `[batch, num_heads, q_len, kv_len]` of a branch, empty for heads that skipped it; None without."""
        found = self.branches[branch]
        if found.mask is None or self.gates is None or not self.skip_saturated:
            return found.mask
        ran = [self._weight(branch, head // found.group) > 0 for head in range(self.num_heads)]
        return found.mask & torch.tensor(ran, device=found.mask.device)[:, None, None]

    @property
    def causal_pairs(self) -> int:
        """Of each head in the whole call."""
        return max((branch.causal_pairs for head in self.heads for branch in head), default=0)

    def _weight(self, branch: str, kv_head: int) -> float:
        """Of a branch in the head's blend."""
        if self.gates is None:
            return 1.0
        return self.gates[kv_head] if branch == FULL else 1 - self.gates[kv_head]


def _call_stats(branch: BranchRecord, call: OperatorCall, n: int, weight: float) -> list[BranchStats]:
    """The query heads of the n-th KV head of an operator call."""
    pattern, method, runs = call.layout.patterns[n], branch.methods[call.kv_heads[n]], call.queries.runs
    layout = replace(call.layout, patterns=(pattern,))
    causal = sum(copies * (length * (2 * first + length + 1) // 2) for first, length, copies in runs)
    window = call.layout.max_distance if pattern.blocks else min(pattern.window, call.layout.max_distance)
    size = method.block_size if isinstance(method, DynamicMethod) else None
    if pattern.blocks is not None:
        size = pattern.blocks.block_size
    blocks = sum(copies * causal_blocks(size, *run) for *run, copies in runs) if size else None
    per_head: list[tuple[int, int | None, int]]
    if pattern.selected:
        per_head = [*call.table[n * branch.group : (n + 1) * branch.group]]
    else:
        kept = blocks
        if pattern.blocks is not None:
            kept = sum(copies * kept_blocks(layout, *run) for *run, copies in runs)
        pairs = sum(copies * kept_pairs(layout, *run) for *run, copies in runs)
        per_head = [(pairs, kept, 0)] * branch.group
    return [
        BranchStats(
            branch=branch.name,
            method=at_head(method, call.kv_heads[n] * branch.group + g),
            window=None if window == UNBOUNDED else window,
            num_sink_tokens=pattern.num_sink_tokens,
            queries=sum(length * copies for _, length, copies in runs),
            kept_pairs=pairs,
            causal_pairs=causal,
            blended_pairs=weight * pairs,
            block_size=size,
            kept_blocks=kept,
            causal_blocks=blocks,
            kept_columns=columns,
        )
        for g, (pairs, kept, columns) in enumerate(per_head)
    ]


def at_head(method: Method, head: int) -> Method:
    """The method as one query head follows it: of parameters per head, its own."""
    if isinstance(method, XAttention | MInference):
        return _of_head(method, head)
    return method


@lru_cache(maxsize=4096)
def _of_head(method: XAttention | MInference, head: int) -> Method:
    if isinstance(method, XAttention):
        return replace(method, threshold=method.threshold[head]) if isinstance(method.threshold, tuple) else method
    return replace(method, **vars(method.heads[head]), heads=()) if method.heads else method


class Recorder:
    """Collects the calls of one capture by forward pass: dicts from layer to call. Layers run in ascending order."""

    def __init__(self, masks: bool) -> None:
        self.masks = masks
        self.forwards: list[dict[int, CallRecord]] = []
        self._mask_elements, self._latest = 0, 0

    def begin(self, state: LayerState) -> CallRecord:
        return CallRecord(self, state)

    def add(self, record: CallRecord) -> None:
        """Keeps the record of a call that went well."""
        if not self.forwards or record.layer <= self._latest:
            self.forwards.append({})
        self.forwards[-1][record.layer], self._latest = record, record.layer

    def new_mask(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        if not self.masks:
            return None
        elements = shape[0] * shape[1] * shape[2] * shape[3]
        self._mask_elements += elements
        if self._mask_elements > MAX_MASK_ELEMENTS:
            raise ValueError(
                f"capture(masks=True) keeps up to {MAX_MASK_ELEMENTS:,} elements in all, and this forward pass needs "
                f"more (one layer is {list(shape)}); use a shorter or smaller batch, or leave masks out"
            )
        return torch.zeros(shape, dtype=torch.bool, device=device)
