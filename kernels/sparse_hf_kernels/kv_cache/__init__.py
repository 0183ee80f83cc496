"""What a KV cache of heads of unequal lengths needs: one storage per layer, storing, and a fused decode step."""

from sparse_hf_kernels.kv_cache.layout import HeadStorage, StorageGroup, StorageLayout, slot_positions
from sparse_hf_kernels.kv_cache.offload import OffloadedStorage, Stage
from sparse_hf_kernels.kv_cache.op import decode_attention, kernels_refuse, store_tokens
from sparse_hf_kernels.kv_cache.storage import KVDtype, KVStorage, counted_states

__all__ = [
    "HeadStorage",
    "KVDtype",
    "KVStorage",
    "OffloadedStorage",
    "Stage",
    "StorageGroup",
    "StorageLayout",
    "counted_states",
    "decode_attention",
    "kernels_refuse",
    "slot_positions",
    "store_tokens",
]
