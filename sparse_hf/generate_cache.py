"""The cache that `generate` makes on a sparsified model: a `SparseCache`, as `cache_implementation` names its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_hf.attention import ATTENTION_NAME
from sparse_hf.cache import SparseCache

CACHE_METHOD = "_prepare_cache_for_generation"

SERVED = ("dynamic", "static", "offloaded", "offloaded_static")


def prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands in for the model's own method, to which it leaves caches that are given and dense attention."""
    sparse_now = model.config._attn_implementation == ATTENTION_NAME
    if sparse_now and model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = new_cache(model, generation_config, max_cache_length)
        return
    original: Callable[..., None] = getattr(type(model), CACHE_METHOD)
    original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def new_cache(model: Any, generation_config: Any, max_cache_length: int) -> SparseCache:
    """The cache that a call of `generate` asks for.

    Args:
        max_cache_length: tokens that the call feeds to the model at most, as `generate` computed them.

    Raises:
        ValueError: for a `cache_implementation` of which there is no `SparseCache`.
    """
    kind = generation_config.cache_implementation or "dynamic"
    if kind not in SERVED:
        raise ValueError(
            f"cache_implementation must be one of {', '.join(map(repr, SERVED))} on a sparsified model, got {kind!r}; "
            'for 8-bit keys and values pass past_key_values=SparseCache.for_model(model, kv_dtype="int8"), or pass a '
            "cache of that kind itself to keep all keys"
        )
    max_length = None
    if kind.endswith("static"):
        max_length = max(max_cache_length, generation_config.max_cache_len or 0)
    return SparseCache.for_model(model, max_length=max_length, offload=kind.startswith("offloaded"))
