"""PruLong (arXiv 2506.17121): a TSV of 0 and 1, one row per layer, one column per KV head."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf.adapters import ModelShape
from sparse_hf.interop.tsv import ImportedHeads, check_table_shape, read_tsv, shape_of, streaming_config

NUM_SINK_TOKENS = 128
WINDOW_SIZE = 1024


def import_prulong(
    path: str | Path,
    model_or_shape: PreTrainedModel | PretrainedConfig | ModelShape,
    *,
    num_sink_tokens: int = NUM_SINK_TOKENS,
    window_size: int = WINDOW_SIZE,
) -> ImportedHeads:
    """A configuration from rounded masks.

    Args:
        path: the TSV that `save_prulong_masks.py` wrote, or a folder with that one TSV.
        model_or_shape: what the masks are for; their shape is checked.
        num_sink_tokens, window_size: of the sparse heads; the defaults are what PruLong's scripts train with.

    Raises:
        ValueError: if the file is missing or malformed (naming the line), holds other values than 0 and 1, or does not
            fit the model.
    """
    shape = shape_of(model_or_shape)
    path = Path(path)
    if path.is_dir():
        tables = sorted(path.glob("*.tsv"))
        if len(tables) != 1:
            raise ValueError(f"{path} holds {len(tables)} .tsv files; name the one to import")
        path = tables[0]
    table = read_tsv(path)
    check_table_shape(table, shape, path)
    if bad := sorted({value for value in table.flatten().tolist() if value not in (0.0, 1.0)}):
        raise ValueError(
            f"{path}: expected masks of 0 and 1, got {bad[:4]}; save them with a sparsity, or import gates with "
            "import_duo_attention (sparse-hf import duo), which ranks them"
        )
    masks = table.long()
    return ImportedHeads(streaming_config(masks, num_sink_tokens, window_size), masks, None)
