"""`print_sparsity_summary`: what a sparse configuration does at a length, layer by layer, against dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.adapters import ModelShape
from sparse_hf.break_even import described
from sparse_hf.config import SparseConfig
from sparse_hf.dynamic import without_selection
from sparse_hf.head_masks import check_head_masks
from sparse_hf.patching import get_handle, head_layout
from sparse_hf.retention import retention_groups
from sparse_hf_kernels import UNBOUNDED, AttentionLayout

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One layer at the summary's length.

    Args:
        layer: its number.
        methods: each KV head's method, by name.
        head_sparsity: share of KV heads whose mask is 0.
        attention_density: kept (query, key) pairs / causal pairs, over the heads; those of dynamic methods,
            which choose by q and k, count as dense.
        kv_bytes: keys and values held after `seq_len` tokens.
        dense_kv_bytes: the same with every key kept.
    """

    layer: int
    methods: tuple[str, ...]
    head_sparsity: float
    attention_density: float
    kv_bytes: int
    dense_kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class SparsitySummary:
    """A model at one length and batch size. Bytes count keys and values in the model's dtype.

    `min_seq_len` is a number, also where the configuration says "auto".
    """

    seq_len: int
    batch_size: int
    min_seq_len: int
    layers: tuple[LayerSummary, ...]

    @property
    def head_sparsity(self) -> float:
        return sum(layer.head_sparsity for layer in self.layers) / len(self.layers)

    @property
    def attention_density(self) -> float:
        return sum(layer.attention_density for layer in self.layers) / len(self.layers)

    @property
    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def dense_kv_bytes(self) -> int:
        return sum(layer.dense_kv_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        totals = ("head_sparsity", "attention_density", "kv_bytes", "dense_kv_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}


def sparsity_summary(model: PreTrainedModel, seq_len: int, batch_size: int = 1) -> SparsitySummary:
    """Exact counts for a sparsified model.

    Args:
        model: a sparsified model.
        seq_len: tokens of each sequence, unpadded.
        batch_size: sequences.

    Raises:
        ValueError: if the model is not sparsified, or a length is not positive or beyond an explicit pattern.
    """
    handle = get_handle(model)
    return summarize(
        handle.resolved,
        handle.head_masks,
        handle.shape,
        seq_len=seq_len,
        batch_size=batch_size,
        bytes_per_element=model.dtype.itemsize,
        windows=[state.layout.max_distance for state in handle.states],
    )


def summarize(
    config: SparseConfig,
    head_masks: Tensor,
    shape: ModelShape,
    *,
    seq_len: int,
    batch_size: int = 1,
    bytes_per_element: int = 2,
    windows: Sequence[int] | None = None,
) -> SparsitySummary:
    """Exact counts from shapes alone: no model is needed.

    Args:
        config: what is sparse; with `min_seq_len="auto"` see `resolve_min_seq_len`.
        head_masks: `[num_layers, num_kv_heads]` of 0 and 1.
        shape: the model's attention shape.
        seq_len: tokens of each sequence, unpadded.
        batch_size: sequences.
        bytes_per_element: of a key or value in the cache.
        windows: each layer's own sliding window in the model, UNBOUNDED without one; by default none has one.

    Raises:
        ValueError: if a length is not positive or beyond an explicit pattern, or masks or rules do not fit the shape.
    """
    if seq_len <= 0 or batch_size <= 0:
        raise ValueError(f"seq_len and batch_size must be positive, got {seq_len} and {batch_size}")
    masks = check_head_masks(head_masks, shape)
    windows = [UNBOUNDED] * shape.num_layers if windows is None else windows
    if len(windows) != shape.num_layers:
        raise ValueError(f"windows must hold one entry per layer ({shape.num_layers}), got {len(windows)}")
    bytes_per_token = 2 * shape.head_dim * bytes_per_element * batch_size
    layers = []
    for layer, methods in enumerate(config.resolve(masks.tolist())):
        layout = head_layout(methods, config, windows[layer], layer, shape.num_layers)
        held = sum(
            len(heads) * retention.kept_tokens(seq_len, layout.num_dense_rows)
            for retention, heads in retention_groups(layout, config.cache_policy == "per_head")
        )
        row = LayerSummary(
            layer=layer,
            methods=tuple(method.name for method in methods),
            head_sparsity=1 - masks[layer].float().mean().item(),
            attention_density=attention_density(layout, seq_len),
            kv_bytes=held * bytes_per_token,
            dense_kv_bytes=shape.num_kv_heads * seq_len * bytes_per_token,
        )
        layers.append(row)
    return SparsitySummary(
        seq_len=seq_len, batch_size=batch_size, min_seq_len=config.num_dense_rows, layers=tuple(layers)
    )


def attention_density(layout: AttentionLayout, seq_len: int) -> float:
    """Kept pairs of all heads / causal pairs, for one sequence; at most, where heads choose by q and k."""
    layout = without_selection(layout)
    causal = seq_len * (seq_len + 1) // 2
    kept = sum(len(heads) * int(layout.row_counts(pattern, seq_len).sum()) for pattern, heads in layout.groups)
    return kept / (causal * layout.num_kv_heads)


def print_sparsity_summary(model: PreTrainedModel, seq_len: int, batch_size: int = 1) -> SparsitySummary:
    """Prints per-layer head sparsity, attention density and KV bytes at a length, and returns them.

    Raises:
        ValueError: as `sparsity_summary`.
    """
    from rich.console import Console

    summary = sparsity_summary(model, seq_len, batch_size)
    Console().print(summary_table(summary))
    return summary


def summary_table(summary: SparsitySummary, title: str | None = None) -> Table:
    """The summary as a rich table, one row per layer and one for all."""
    from rich.table import Table

    table = Table(title=title or f"{summary.seq_len} tokens, batch {summary.batch_size}")
    for column in ("layer", "methods", "sparse heads", "density", "KV bytes", "of dense"):
        table.add_column(column, justify="left" if column == "methods" else "right")
    for row in summary.layers:
        counts = {name: row.methods.count(name) for name in dict.fromkeys(row.methods)}
        methods = ", ".join(f"{count} {name}" for name, count in counts.items())
        table.add_row(str(row.layer), methods, *_figures(row))
    if summary.min_seq_len:
        table.caption = f"dense below {described(summary.min_seq_len)}"
    table.add_section()
    table.add_row("all", "", *_figures(summary))
    return table


def _figures(row: LayerSummary | SparsitySummary) -> tuple[str, str, str, str]:
    share = row.kv_bytes / row.dense_kv_bytes
    return f"{row.head_sparsity:.1%}", f"{row.attention_density:.1%}", f"{row.kv_bytes:,}", f"{share:.1%}"
