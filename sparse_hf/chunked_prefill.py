"""Long prompts of `generate` in chunks: activations stay small, and sparse heads free keys as chunks pass.

Every path of a sparsified model reads the same keys, so chunks change no result, except of methods that are defined per
chunk: last rows (`triangle`, `tri_shape`) and estimates from the last queries (`flexprefill`, `minference`).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from sparse_hf.cache import SparseCache
from sparse_hf.cache_layer import spare_tokens

PREFILL_METHOD = "_prefill"

CHUNK_TOKENS = 8192
"""New tokens of all rows together in one forward: few enough for the activations of an 8B model to stay below 1 GB, and
enough to keep a GPU busy."""

WHOLE_TOKENS = 2 * CHUNK_TOKENS
"""So many are still read in one forward."""

ALIGNMENT = 128
"""Chunks begin at multiples of it, where block lists are cut least."""


def chunk_size(batch: int, num_new: int, asked: int | None) -> int:
    """Tokens per chunk for `num_new` tokens in each of `batch` rows; `asked` is `prefill_chunk_size`."""
    if asked is not None:
        return asked
    if batch * num_new <= WHOLE_TOKENS:
        return max(num_new, 1)
    return max(CHUNK_TOKENS // batch // ALIGNMENT, 1) * ALIGNMENT


def prefill(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Stands in for the model's own method, which it calls chunk by chunk. Caches other than ours are left to that.

    Unlike transformers' chunks these begin after what the cache holds, so that later turns are chunked too.
    """
    original = getattr(type(model), PREFILL_METHOD)
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, SparseCache) or model_kwargs.get("inputs_embeds") is not None:
        return original(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    batch, total = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    # As transformers has it: ids as wide as the mask begin with those that the cache has seen.
    whole = mask is not None and mask.shape[1] == total
    seen = int(cache.get_seq_length()) if whole else 0
    size = chunk_size(batch, total - seen, generation_config.prefill_chunk_size)
    if generation_config.prefill_chunk_size is None and model_kwargs.get("output_hidden_states"):
        size = max(total - seen, 1)  # those of all tokens are asked for, a chunk's outputs hold its own
    all_tokens = total if mask is None else mask.shape[1]
    if generation_config.max_length is not None:
        cache.expect(min(generation_config.max_length, all_tokens + spare_tokens(all_tokens)))
    config = copy.copy(generation_config)
    config.prefill_chunk_size = None
    outputs = None
    for begin in range(seen, total, size):
        end = min(begin + size, total)
        inputs = dict(model_kwargs)
        for name in ("attention_mask", "position_ids"):
            if (x := model_kwargs.get(name)) is not None:
                inputs[name] = x[..., : x.shape[-1] - (total - end)]
        ids = input_ids[:, :end] if whole else input_ids[:, begin:end]
        outputs = original(model, ids, config, inputs, *args, **kwargs)
    if outputs is None:
        raise ValueError(f"the cache holds all {total} tokens of input_ids already; append the new turn's tokens")
    return outputs
