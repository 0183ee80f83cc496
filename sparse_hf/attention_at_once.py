"""Short calls of layers that are dense at their length, where PyTorch's own attention computes those.

They take less time on the device than on the host, and a stock model does nothing but call SDPA. What other calls ask
in every layer is asked once per forward pass here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from sparse_hf.forward_plan import ForwardPlan
from sparse_hf.layer_state import LayerState
from sparse_hf_kernels import AttentionLayout
from sparse_hf_kernels.sparse_attention.sdpa import takes_at_once

FLASH_TOKENS = 512
"""Of all rows of a batch together: up to so many, calls go to the flash kernel by name. On Hopper SDPA prefers cuDNN,
whose kernels take less time on the device but more to launch. At 512 tokens a whole model is bound by the host, at 2048
by the device (`docs/benchmarks/end_to_end.md`)."""


def check_length(plan: ForwardPlan, state: LayerState) -> None:
    """Raises ValueError for a longer sequence than the model was made for."""
    seen = plan.q_len + (plan.q_offset if isinstance(plan.q_offset, int) else 0)
    if seen > state.max_position:
        raise ValueError(
            f"the sequence has {seen} tokens, the model was made for {state.max_position} "
            "(config.max_position_embeddings); shorten it, or configure rope scaling and the limit"
        )


def attend_at_once(
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ForwardPlan | Tensor | None,
    position_ids: Tensor | None,
    scale: float,
) -> Tensor | None:
    """Output `[batch, num_heads, q_len, head_dim]` of whole dense sequences without padding and packing; None for any
    other call. Arguments as in `sparse_attention_forward`."""
    if not isinstance(plan, ForwardPlan) or plan.q_len > state.whole_len:
        return None
    if plan.at_once is None:
        if torch.compiler.is_compiling():
            return None
        check_length(plan, state)
        plan.at_once = _are_at_once(query, key, value, plan, position_ids)
        plan.grouped = query.shape[1] != key.shape[1]
        plan.flash = plan.at_once and _is_flash(query, key, value, plan)
    if not plan.at_once:
        return None
    if plan.flash and not torch.compiler.is_compiling():
        # Not by `torch.ops`, which takes the host longer; but only that can be traced, and graphs need no such haste.
        return torch._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=plan.grouped)


def _are_at_once(query: Tensor, key: Tensor, value: Tensor, plan: ForwardPlan, position_ids: Tensor | None) -> bool:
    """Whether SDPA serves the dense calls of this forward pass."""
    lengths = plan.q_len, plan.kv_len, plan.q_offset, plan.kv_offset
    if isinstance(plan.q_offset, Tensor) or lengths != (query.shape[2], key.shape[2], 0, 0) or lengths[0] != lengths[1]:
        return False
    # Under autocast dtypes differ, and without a dense last dimension SDPA would form the N x N scores.
    if torch.is_autocast_enabled(query.device.type) or not query.dtype == key.dtype == value.dtype:
        return False
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return False
    fixed_order = torch.are_deterministic_algorithms_enabled()
    layout = _dense_layout(key.shape[1])
    return takes_at_once(query, key, value, layout, None, None, fixed_order) and plan.is_plain(position_ids)


def _is_flash(query: Tensor, key: Tensor, value: Tensor, plan: ForwardPlan) -> bool:
    """Whether the flash kernel serves these calls: they are short, and it is neither unfit nor switched off, as within
    torch's `sdpa_kernel`."""
    if query.shape[0] * plan.q_len > FLASH_TOKENS:
        return False
    # SDPA would pad a head_dim that is no multiple of 8, which `sparsify` refuses.
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, plan.grouped))


@lru_cache
def _dense_layout(num_kv_heads: int) -> AttentionLayout:
    return AttentionLayout.dense(num_kv_heads)
