"""Bytes that a KV cache really holds, from its tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparse_hf.cache import SparseCache


@torch.no_grad()
def measure_kv_bytes(model: PreTrainedModel, input_ids: Tensor, *, chunk: int = 512) -> tuple[int, int]:
    """Bytes held after `input_ids [batch, seq_len]`, read in chunks: by a `SparseCache`, and by a `DynamicCache`.

    Raises:
        ValueError: if the model is not sparsified.
    """
    sparse, full = SparseCache.for_model(model), DynamicCache(config=model.config)
    was_training = model.training
    model.eval()  # gradient checkpointing, for one, keeps no cache in training
    try:
        for cache in (sparse, full):
            for start in range(0, input_ids.shape[1], chunk):
                model(input_ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        model.train(was_training)
    held: list[Tensor] = [getattr(layer, name) for layer in full.layers for name in ("keys", "values")]
    return sparse.kv_bytes(), sum(tensor.untyped_storage().nbytes() for tensor in held)
