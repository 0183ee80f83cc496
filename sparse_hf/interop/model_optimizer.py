"""NVIDIA Model-Optimizer: `sparse_attention_config`, which its checkpoints carry in config.json (export only)."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparse_hf.config import SparseConfig
from sparse_hf.interop.layers import ModelOrShape, reject_min_seq_len, resolve_source, write_text
from sparse_hf.methods import Dense, Method, XAttention

KEY = "sparse_attention_config"
FORMULA = "a * exp(b * target_sparsity)"


def export_model_optimizer(
    source: str | Path | SparseConfig,
    out: str | Path,
    *,
    coefficients: tuple[float, float],
    target_sparsity: float | None = None,
    model_or_shape: ModelOrShape | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes {"sparse_attention_config": ...}, a skip-softmax group, to be merged into a checkpoint's config.json.

    The format has no static pattern, no selection of blocks and no heads: it names layers that stay dense (`ignore`)
    and, for the others, a share of tiles to skip (BLASST: those whose scores stay below a threshold while softmax
    runs). So layers and share go over, not the choice of keys: an XAttention layer becomes a skip-softmax layer of the
    same share in prefill. Decoding stays dense. Everything else is refused.

    Args:
        source: an artefact's folder, or a configuration.
        out: the JSON file.
        coefficients: a and b of prefill that Model-Optimizer's calibration found for the model; the kernel's threshold
            is a * exp(b * target_sparsity) / length.
        target_sparsity: share of tiles to skip in [0, 1); by default the layers' `sparsity_ratio`.
        model_or_shape: needed with a configuration.
        overwrite: replace an existing file.

    Raises:
        ValueError: if heads of a layer differ, a layer is neither dense nor `xattention`, all are dense, shares
            differ or are not known, the coefficients are no finite numbers with a > 0, there is a break-even length,
            or `out` exists.
    """
    a, b = coefficients
    if not (math.isfinite(a) and math.isfinite(b) and a > 0):
        raise ValueError(f"coefficients must be finite numbers (a, b) with a > 0, got {coefficients}")
    found = resolve_source(source, model_or_shape)
    reject_min_seq_len(found.config, "Model-Optimizer")
    methods = [_layer_method(row, layer) for layer, row in enumerate(found.methods)]
    selecting = [method for method in methods if isinstance(method, XAttention)]
    if not selecting:
        raise ValueError("every layer is dense: there is nothing to export")
    if target_sparsity is None:
        shares = {method.sparsity_ratio for method in selecting}
        if len(shares) > 1 or None in shares:
            given = sorted(share for share in shares if share is not None)
            raise ValueError(
                "Model-Optimizer takes one share for all layers, and these have thresholds or the ratios "
                f"{given}; pass target_sparsity"
            )
        target_sparsity = shares.pop()
    if target_sparsity is None or not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity must lie in [0, 1), got {target_sparsity}")
    group: dict[str, Any] = {
        "algorithm": "skip_softmax",
        "ignore": [f"model.layers.{n}.self_attn" for n, method in enumerate(methods) if isinstance(method, Dense)],
        "threshold_scale_factor": {"formula": FORMULA, "prefill": {"a": float(a), "b": float(b)}},
        "target_sparsity": {"prefill": float(target_sparsity), "decode": 0.0},
    }
    producer = {"name": "sparse-hf", "version": version("sparse-hf")}
    document = {KEY: {"config_groups": {"group_0": group}, "producer": producer}}
    return write_text(Path(out), json.dumps(document, indent=2) + "\n", overwrite=overwrite)


def _layer_method(methods: list[Method], layer: int) -> Method:
    if len(set(methods)) > 1:
        raise ValueError(
            f"Model-Optimizer configures whole layers, and the heads of layer {layer} follow "
            f"{sorted({method.name for method in methods})}; give them one method"
        )
    if not isinstance(methods[0], Dense | XAttention):
        raise ValueError(
            f"Model-Optimizer has no words for {methods[0].name!r} (layer {layer}): it knows dense layers and, for "
            "xattention, skip-softmax; windows run in plain transformers by export_native, where the family has them"
        )
    return methods[0]
