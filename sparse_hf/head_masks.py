"""Head masks: integer `[num_layers, num_kv_heads]`, 1 = retrieval (full) head, 0 = sparse head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_hf.adapters import ModelShape


def check_head_masks(masks: Any, shape: ModelShape) -> Tensor:
    """The masks as an int64 CPU tensor.

    Args:
        masks: tensor or nested sequence `[num_layers, num_kv_heads]`, boolean, integer or floating, of 0 and 1.
        shape: the model that they are for.

    Raises:
        ValueError: for another shape or dtype, NaN, or values other than 0 and 1.
    """
    try:
        tensor = torch.as_tensor(masks).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"head masks must be a tensor or rows of numbers, got {type(masks).__name__}") from error
    expected = (shape.num_layers, shape.num_kv_heads)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"head masks must be [num_layers, num_kv_heads] = {list(expected)} for this {shape.model_type} model, "
            f"got {list(tensor.shape)}"
        )
    if tensor.is_complex() or (tensor.dtype.is_floating_point and bool(tensor.isnan().any())):
        raise ValueError(f"head masks must hold 0 and 1, got {'complex values' if tensor.is_complex() else 'NaN'}")
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        bad = tensor[(tensor != 0) & (tensor != 1)].flatten()[:4].tolist()
        raise ValueError(f"head masks must hold 0 (sparse) and 1 (full) only, got {bad}; round learned scores first")
    return tensor.long()


def keyword_head_masks(masks: Any, shape: ModelShape) -> Any:
    """The tensor that "all_sparse" or "all_full" stands for; rows as they are.

    Raises:
        ValueError: for "file": the file is the artefact's.
    """
    if masks == "file":
        raise ValueError(
            'this SparseConfig takes its head masks from a file (head_masks="file"); '
            "sparsify with the artefact's folder, or pass head_masks"
        )
    if isinstance(masks, str):
        return torch.full((shape.num_layers, shape.num_kv_heads), int(masks == "all_full"))
    return masks


def round_scores(scores: Tensor, head_sparsity: float) -> Tensor:
    """Head masks that make the lowest-scoring share of all KV heads sparse; ties go to the earlier head.

    Args:
        scores: `[num_layers, num_kv_heads]`, larger = needs full attention more.
        head_sparsity: share of sparse heads in [0, 1]; the count is rounded to the nearest whole head.
    """
    if not 0 <= head_sparsity <= 1:
        raise ValueError(f"head_sparsity must lie in [0, 1], got {head_sparsity}")
    if bool(scores.isnan().any()):
        raise ValueError("head scores hold NaN; the run that made them diverged")
    num_sparse = round(head_sparsity * scores.numel())
    order = scores.flatten().float().cpu().argsort(stable=True)
    masks = torch.ones(scores.numel(), dtype=torch.long)
    masks[order[:num_sparse]] = 0
    return masks.view(scores.shape)
