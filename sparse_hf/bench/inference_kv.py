"""Caches that hold a long context of random keys and values without a prefill, and the best static cache for dense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sparse_hf.adapters import ModelShape, adapter_for
from sparse_hf.cache import SparseCache
from sparse_hf.cache_layer import PendingKV
from sparse_hf.forward_plan import ForwardPlan

CHUNK = 32768
MASKLESS = "sparse_hf_bench_dense"


def model_shape(model: PreTrainedModel) -> ModelShape:
    return adapter_for(model).shape(model.config)


def random_kv(model: PreTrainedModel, num_tokens: int, batch: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, `[batch, num_kv_heads, num_tokens, head_dim]` each, normal."""
    shape = model_shape(model)
    size = (batch, shape.num_kv_heads, num_tokens, shape.head_dim)
    keys, values = (torch.randn(size, device=model.device, dtype=model.dtype) for _ in range(2))
    return keys, values


@torch.no_grad()
def store_random(cache: Cache, model: PreTrainedModel, num_tokens: int, batch: int = 1, chunk: int = CHUNK) -> None:
    """Stores the keys and values of so many more tokens, in all layers alike, as prefills in chunks would."""
    num_layers, device = model_shape(model).num_layers, model.device
    for start in range(0, num_tokens, chunk):
        new = min(chunk, num_tokens - start)
        keys, values = random_kv(model, new, batch)
        seen = cache.get_seq_length()
        # What the model would hand to its layers.
        plan = ForwardPlan(q_len=new, kv_len=seen + new, q_offset=seen, kv_offset=0, padding_mask=None, device=device)
        for layer in range(num_layers):
            pending: Any = cache.update(keys, values, layer)[0]
            if isinstance(pending, PendingKV):
                pending.layer.store(keys, values, plan, None)


class PrefixLayer(CacheLayerMixin):
    """A fixed context and one slot after it, which every decode step overwrites in place.

    What it returns is contiguous and holds live keys only, so that SDPA needs no mask.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # it is never empty

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.get_seq_length() + 1


class PrefixCache(Cache):
    """`PrefixLayer`s, which compiled layers leave out as they leave out a `SparseCache`."""

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        assert isinstance(layer, PrefixLayer)
        return layer.update(key_states, value_states)


def prefix_cache(model: PreTrainedModel, num_tokens: int, batch: int) -> Cache:
    """A cache for decode steps of a dense model after so many tokens, keys and values of its own in every layer."""
    layers = range(model_shape(model).num_layers)
    return PrefixCache(layers=[PrefixLayer(*random_kv(model, num_tokens + 1, batch)) for _ in layers])


@contextmanager
def without_mask(model: PreTrainedModel) -> Iterator[None]:
    """Decode steps of a stock model read their whole cache by one call of SDPA.

    transformers leaves out a mask that masks nothing, but not while a CUDA graph is captured, and with a mask SDPA
    copies keys for every query head and runs no fast kernel.
    """
    AttentionInterface.register(MASKLESS, _sdpa_of_all)
    AttentionMaskInterface.register(MASKLESS, lambda **_: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = MASKLESS
    try:
        yield
    finally:
        model.config._attn_implementation = before


@torch.compiler.disable
def _sdpa_of_all(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    assert query.shape[2] == 1 and mask is None
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def static_sparse_cache(model: PreTrainedModel, num_tokens: int, batch: int, room: int) -> SparseCache:
    """A cache for CUDA graphs that holds so many tokens and has room for more."""
    cache = SparseCache.for_model(model, max_length=num_tokens + room)
    store_random(cache, model, num_tokens, batch)
    return cache
