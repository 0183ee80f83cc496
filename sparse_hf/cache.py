"""`SparseCache`: full heads keep every key, sparse heads keep their sinks and window and free the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sparse_hf.cache_layer import SparseCacheLayer
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.kv_cache import KVDtype, KVStorage, Stage


class SparseCache(Cache):
    """A KV cache whose heads hold what they can still read. `generate` makes one by itself on a sparsified model.

    Pass it as `past_key_values` to keep a conversation: `cache = SparseCache.for_model(model)`. Batches with padding,
    chunked prefill and beam search work; rolling back (assisted decoding) is refused.
    """

    def __init__(
        self,
        layouts: list[AttentionLayout],
        per_head: bool = True,
        *,
        max_length: int | None = None,
        kv_dtype: KVDtype | None = None,
        offload: bool = False,
    ) -> None:
        if max_length is not None and max_length <= 0:
            raise ValueError(f"max_length must be positive, got {max_length}")
        scratch: dict[torch.device, Any] = {}
        self._stages: dict[torch.device, Stage] = {}
        stages = self._stages if offload else None
        self._sparse_layers = [
            SparseCacheLayer(layout, per_head, max_length, kv_dtype, scratch, stages, number)
            for number, layout in enumerate(layouts)
        ]
        super().__init__(layers=list(self._sparse_layers))

    @classmethod
    def for_model(
        cls, model: Any, *, max_length: int | None = None, kv_dtype: KVDtype | None = None, offload: bool = False
    ) -> SparseCache:
        """An empty cache that fits a sparsified model.

        Args:
            model: a sparsified model.
            max_length: tokens of the longest sequence, padding included. All memory is then taken at the first token,
                nothing moves any more, and decode steps can be captured in a CUDA graph. By default the cache grows.
            kv_dtype: "int8" or "fp8" stores keys and values in 8 bits, with one scale for each token of each head.
            offload: full heads lie in host memory; a layer's come to the GPU while the layer before it computes. Cannot
                be captured in a CUDA graph.

        Raises:
            ValueError: if the model is not sparsified, or for an unknown `kv_dtype`.
        """
        from sparse_hf.patching import get_handle

        if kv_dtype not in (None, "int8", "fp8"):
            raise ValueError(f'kv_dtype must be "int8", "fp8" or None, got {kv_dtype!r}')
        handle = get_handle(model)
        per_head = handle.config.cache_policy == "per_head"
        layouts = [state.layout for state in handle.states]
        return cls(layouts, per_head, max_length=max_length, kv_dtype=kv_dtype, offload=offload)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The new tokens' `PendingKV`, twice. Compiled models break their graphs here, the same one for all layers:
        what a cache holds changes from call to call."""
        if torch.compiler.is_compiling():
            return self._update_untraced(key_states, value_states, layer_idx)
        return self._sparse_layers[layer_idx].update(key_states, value_states)

    @torch.compiler.disable
    def _update_untraced(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Any:
        return self.update(key_states, value_states, layer_idx)

    def expect(self, num_tokens: int) -> None:
        """Room for so many tokens is made at once, when the first of them come or when there is no room left."""
        for layer in self._sparse_layers:
            layer.expected_tokens = num_tokens

    def reset(self) -> None:
        super().reset()
        self._stages.clear()

    def storages(self) -> list[KVStorage]:
        """Those of the layers that have seen tokens."""
        return [layer.storage for layer in self._sparse_layers if layer.storage is not None]

    def kv_bytes(self) -> int:
        """Bytes that hold keys and values now, over all layers, on the device or with `offload` on the host."""
        return sum(layer.kv_bytes() for layer in self._sparse_layers)

    def allocated_bytes(self) -> int:
        """Bytes of the tensors' storage: `kv_bytes()`, and the room that full heads have for more; measured.

        With `offload` wherever they lie, and with the two buffers of a device through which they pass.
        """
        buffers = sum(stage.allocated_bytes() for stage in self._stages.values())
        return buffers + sum(layer.allocated_bytes() for layer in self._sparse_layers)

    def host_bytes(self) -> int:
        """Those of `allocated_bytes()` that `offload` took in host memory; all others lie on the device."""
        return sum(layer.host_bytes() for layer in self._sparse_layers)
