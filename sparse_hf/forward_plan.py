"""From transformers' masks to token positions: one object per forward pass, shared by its layers.

transformers calls the registered mask function once per forward and hands what it returns to every layer's attention.
Ours returns a `ForwardPlan`, which knows the padding mask and the lengths; position ids, which reveal packing, arrive
only at the attention. The positions are worked out at the first layer and kept.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_hf.own_positions import are_own
from sparse_hf_kernels import TokenPositions, TracedPositions
from sparse_hf_kernels.capture import asked_as_data, may_read
from sparse_hf_kernels.dispatch import BACKEND_VARIABLE

logger = logging.getLogger(__name__)

RESTARTS = (
    "a captured CUDA graph was replayed with position_ids that restart or jump; packed sequences need warm-up and "
    "capture within sparse_hf_kernels.positions_as_data()"
)


class ForwardPlan:
    """Lengths and padding of one forward pass; the same object in all layers.

    No dataclass: where FSDP2 casts the inputs of layers it would copy one, and what layers share would be lost.

    Args:
        q_len: new tokens.
        kv_len: keys that the attention will get.
        q_offset: tokens seen before; a tensor for transformers' static caches.
        kv_offset: tokens before the first key (sliding caches drop the oldest).
        padding_mask: boolean `[batch, tokens seen]` of real tokens, or None without padding.
        device: of the inputs.
        own_ids: the model makes the position ids itself, so that they never restart.
    """

    ndim: ClassVar[int] = 4  # `generate` prepares masks for static caches; models then leave them alone, like 4-D ones

    def __init__(
        self,
        *,
        q_len: int,
        kv_len: int,
        q_offset: int | Tensor,
        kv_offset: int,
        padding_mask: Tensor | None,
        device: torch.device,
        own_ids: bool = False,
    ) -> None:
        self.q_len, self.kv_len, self.q_offset, self.kv_offset = q_len, kv_len, q_offset, kv_offset
        self.padding_mask, self.device, self.own_ids = padding_mask, device, own_ids
        self.known: dict[str, Any] = {}  # what layers share that cannot be traced
        # Of `attend_at_once`: whether SDPA serves layers that are dense at this length, heads share keys, and its flash
        # kernel is called by name.
        self.at_once: bool | None = None
        self.grouped = self.flash = False
        self._positions: TokenPositions | TracedPositions | None = None
        self._look: tuple[Tensor | None, bool] | None = None
        self._elsewhere: dict[torch.device, ForwardPlan] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> ForwardPlan:
        """The plan for layers on a device, one for all of them. accelerate asks where a model spreads over several."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._elsewhere:
            offset, padding = self.q_offset, self.padding_mask
            self._elsewhere[device] = ForwardPlan(
                q_len=self.q_len,
                kv_len=self.kv_len,
                q_offset=offset.to(device, non_blocking=non_blocking) if isinstance(offset, Tensor) else offset,
                kv_offset=self.kv_offset,
                padding_mask=None if padding is None else padding.to(device, non_blocking=non_blocking),
                device=device,
                own_ids=self.own_ids,
            )
        return self._elsewhere[device]

    def positions(self, position_ids: Tensor | None) -> TokenPositions | TracedPositions:
        """Positions when the attention gets all keys in one tensor (no cache, or one of transformers' own)."""
        if self._positions is None:
            if torch.compiler.is_compiling():
                self._positions = self._trace(position_ids)
            else:
                self._positions = self.compute_positions(position_ids)
        return self._positions

    def trace_positions(self, position_ids: Tensor | None) -> None:
        """Has positions as compiled graphs take them, before the first layer's graph asks."""
        if self._positions is None:
            self._positions = self._trace(position_ids)

    def _trace(self, position_ids: Tensor | None) -> TracedPositions:
        """Leaves what depends on the data to an operator of the graph that is being traced."""
        static, offset = (self.q_offset, 0) if isinstance(self.q_offset, Tensor) else (None, self.q_offset)
        given = position_ids, self.padding_mask, static, self.q_len, self.kv_len, offset, self.kv_offset, self.device
        found = _positions_op(*given)
        return TracedPositions(
            q_positions=found[0], k_positions=found[1], q_segments=found[2], k_segments=found[3], form=found[4]
        )

    def new_tokens(self, position_ids: Tensor | None, lengths: Tensor) -> Tensor:
        """Positions `[batch, q_len]` of the new tokens after `lengths [batch]` earlier ones; -1 for padding.

        Raises:
            ValueError: for packed sequences, which a per-head cache cannot tell apart later.
            RuntimeError: for packed sequences where nothing can be read: as a recorded assertion on the device.
        """
        valid = self.new_valid(len(lengths))
        segments, _ = self._look_at(position_ids)
        if segments is not None and not may_read():
            torch._assert_async((segments == 0).all(), RESTARTS)
        elif segments is not None:
            raise ValueError(
                "packed sequences (position_ids that restart) cannot be cached per head; "
                "pass use_cache=False, or one sequence per row"
            )
        return (lengths[:, None] + valid.cumsum(-1) - 1).masked_fill(~valid, -1)

    def is_plain(self, position_ids: Tensor | None) -> bool:
        """Neither padding nor packing."""
        segments, padded = self._look_at(position_ids)
        return segments is None and not padded

    def new_valid(self, batch: int) -> Tensor:
        """Boolean `[batch, q_len]`: which new tokens are real."""
        return self._seen_mask(self._first + self.q_len)[:, -self.q_len :].expand(batch, -1)

    def newest_valid(self, batch: int) -> Tensor | None:
        """Boolean `[batch]`: which rows' newest token is real; None if all are known to be. Nothing is waited for."""
        if self.padding_mask is None:
            return None
        if "newest_valid" not in self.known:
            self.known["newest_valid"] = self.new_valid(batch)[:, -1].contiguous()
        return self.known["newest_valid"]

    def forced_backend(self) -> str | None:
        """The backend that the environment names, which takes as long to look up as a short Python function."""
        if "forced_backend" not in self.known:
            self.known["forced_backend"] = os.environ.get(BACKEND_VARIABLE)
        return self.known["forced_backend"]

    @property
    def _first(self) -> int:
        """Tokens seen before, as an integer.

        Raises:
            ValueError: where that is a tensor which cannot be read.
        """
        if isinstance(self.q_offset, Tensor) and not may_read():
            raise ValueError(
                "a static cache's length cannot be read while a CUDA graph is captured, as an attention_mask or packed "
                "sequences would need; leave attention_mask out if nothing is padded, or use a dynamic cache"
            )
        return int(self.q_offset)

    def _look_at(self, position_ids: Tensor | None) -> tuple[Tensor | None, bool]:
        """Numbers of packed sequences `[batch or 1, q_len]`, None when no position id restarts; and: is there padding?

        The one place where a forward pass waits for the device, once for all layers, if it may and must.
        """
        if self._look is None:
            self._look = self._seen(position_ids) if may_read() else self._unseen(self._borders(position_ids))
        return self._look

    def _seen(self, position_ids: Tensor | None) -> tuple[Tensor | None, bool]:
        """The answers by what the tensors hold. Whether there is anything to find at all is cheap to ask, so that
        comes first; a second wait tells padding from packing."""
        mask = None if self.padding_mask is None else self._seen_mask(self._first + self.q_len)
        runs = [] if mask is None else [mask.all()]
        if self._may_restart(position_ids):
            assert position_ids is not None
            runs.append((position_ids.diff(dim=-1) == 1).all())
        if not runs or bool(runs[0] if len(runs) == 1 else runs[0] & runs[1]):
            return None, False
        border = self._borders(position_ids)
        if border is None or mask is None:
            return (None if border is None else border.cumsum(-1)), mask is not None
        packed, whole = torch.stack([border.any(), runs[0]]).tolist()
        return (border.cumsum(-1) if packed else None), not whole

    def _unseen(self, border: Tensor | None) -> tuple[Tensor | None, bool]:
        """The answers where nothing can be read: a padding mask counts as padding.

        So do borders as borders, if that was asked for. Otherwise there are none, which the graph asserts when it runs.
        """
        packed = border is not None and asked_as_data() and isinstance(self.q_offset, int)
        if border is not None and not packed:
            torch._assert_async(~border.any(), RESTARTS)
        if packed or self.padding_mask is not None:
            _say_slow()
        return (border.cumsum(-1) if border is not None and packed else None), self.padding_mask is not None

    def _may_restart(self, position_ids: Tensor | None) -> bool:
        if position_ids is None or self.own_ids:
            return False
        return position_ids.ndim == 2 and position_ids.shape[-1] == self.q_len > 1

    def _borders(self, position_ids: Tensor | None) -> Tensor | None:
        """Boolean `[batch or 1, q_len]`: where a position id restarts; None where it cannot."""
        if position_ids is None or not self._may_restart(position_ids):
            return None
        if self.padding_mask is None:
            return F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
        # Padding breaks the run of position ids without being a border: compare with the real token before.
        valid = self.new_valid(len(self.padding_mask))
        slots = torch.arange(self.q_len, device=self.device).expand_as(valid)
        before = F.pad(torch.where(valid, slots, -1).cummax(-1).values, (1, -1), value=-1)
        ids = position_ids.expand(len(valid), -1)
        step = ids - ids.gather(1, before.clamp_min(0))
        return valid & (before >= 0) & (step != 1) & (step != slots - before)

    def compute_positions(self, position_ids: Tensor | None) -> TokenPositions:
        """Positions in closed form where there is neither padding nor packing; reads the device to learn that."""
        segments, _ = self._look_at(position_ids)
        newest = isinstance(self.q_offset, int) and self.q_offset + self.q_len == self.kv_offset + self.kv_len
        if newest and self.is_plain(position_ids):
            return TokenPositions.causal(
                self.q_len, self.kv_len, self.device, q_offset=int(self.q_offset), k_offset=self.kv_offset
            )
        index = torch.arange(self.kv_len, device=self.device)
        if self.padding_mask is None and segments is None:
            keys = (index + self.kv_offset)[None]
            queries = torch.arange(self.q_len, device=self.device)[None] + self.q_offset
            # A static cache hands out its empty slots too.
            return TokenPositions(q_positions=queries, k_positions=keys.masked_fill(keys > queries[:, -1:], -1))
        total = self._first + self.q_len
        seen = self.kv_offset + self.kv_len
        valid = self._seen_mask(max(total, seen))
        all_segments = self._all_segments(segments, valid, self._first)
        counted = valid.cumsum(-1)
        if all_segments is not None:
            # Count from the start of each segment: subtract what was counted before it.
            starts = F.pad(all_segments.diff(dim=-1) != 0, (1, 0))
            before = torch.where(starts, counted - valid.long(), 0).cummax(-1).values
            counted = counted - before
        logical = (counted - 1).masked_fill(~valid, -1)
        rows = slice(self._first, total)
        columns = slice(self.kv_offset, seen)
        if self.kv_offset and self.padding_mask is not None and (segments is None or not may_read()):
            self._check_dropped(logical[:, : self.kv_offset], logical[:, rows])
        return TokenPositions(
            q_positions=logical[:, rows],
            k_positions=logical[:, columns],
            q_segments=None if all_segments is None else all_segments[:, rows],
            k_segments=None if all_segments is None else all_segments[:, columns],
        )

    def _check_dropped(self, dropped: Tensor, queries: Tensor) -> None:
        """Raises ValueError if a sliding cache of transformers dropped keys that a query can still read.

        It counts slots: padding between a row's tokens fills its window and pushes real tokens out.
        """
        if not may_read():
            raise ValueError(
                "whether a sliding-window cache of transformers dropped keys that are still in the window cannot be "
                "read while a CUDA graph is captured; leave attention_mask out if nothing is padded, or pass "
                "past_key_values=SparseCache.for_model(model)"
            )
        window = self.kv_len - self.q_len + 1
        first = queries.masked_fill(queries < 0, queries.shape[1] + self.kv_offset + self.kv_len).amin(-1)
        newest = dropped.amax(-1)
        if bool(((newest >= 0) & (first - newest < window)).any()):
            raise ValueError(
                "a sliding-window cache of transformers counts padding between tokens and has dropped keys that are "
                "still in the window; pad on the left, or pass past_key_values=SparseCache.for_model(model)"
            )

    def _seen_mask(self, length: int) -> Tensor:
        """Boolean `[batch or 1, length]` of real tokens; slots after the newest token are empty."""
        total = self._first + self.q_len
        if self.padding_mask is None:
            return (torch.arange(length, device=self.device) < total)[None]
        given = self.padding_mask.shape[1]
        if given < total:
            raise ValueError(
                f"attention_mask covers {given} tokens but {total} have been seen; "
                "extend it by a column per new token, as generate does"
            )
        seen = self.padding_mask[:, :total]
        return seen if length == total else F.pad(seen, (0, length - total), value=False)

    def _all_segments(self, segments: Tensor | None, valid: Tensor, q_offset: int) -> Tensor | None:
        if segments is None:
            return None
        rows = max(len(segments), len(valid))
        # Earlier tokens belong to the first sequence of this chunk; slots after it belong nowhere.
        tail = valid.shape[1] - q_offset - self.q_len
        return F.pad(F.pad(segments, (q_offset, 0), value=0), (0, tail), value=-1).expand(rows, -1)


@lru_cache(maxsize=1)
def _say_slow() -> None:
    logger.warning(
        "padding and packing stay data in a captured CUDA graph: attention visits every block with a mask, and "
        "sparsity saves no time; leave attention_mask out if nothing is padded"
    )


def forward_plan_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | ForwardPlan | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> ForwardPlan:
    """The mask function that `sparsify` registers with `AttentionMaskInterface`."""
    if isinstance(attention_mask, ForwardPlan):
        return attention_mask
    return ForwardPlan(
        q_len=q_length,
        kv_len=kv_length,
        # A static cache counts on in the same tensor before the attention asks.
        q_offset=q_offset.clone() if isinstance(q_offset, Tensor) else q_offset,
        kv_offset=kv_offset,
        padding_mask=attention_mask,
        device=torch.device(device),
        own_ids=are_own(),
    )


@torch.library.custom_op(
    "sparse_hf::token_positions",
    mutates_args=(),
    schema="(Tensor? position_ids, Tensor? padding_mask, Tensor? static_offset, SymInt q_len, SymInt kv_len, "
    "SymInt q_offset, SymInt kv_offset, Device device) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _positions_op(
    position_ids: Tensor | None,
    padding_mask: Tensor | None,
    static_offset: Tensor | None,
    q_len: int,
    kv_len: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ForwardPlan.compute_positions` when a compiled graph runs, as the fields of `TracedPositions`."""
    plan = ForwardPlan(
        q_len=q_len,
        kv_len=kv_len,
        q_offset=q_offset if static_offset is None else static_offset,
        kv_offset=kv_offset,
        padding_mask=padding_mask,
        device=device,
    )
    return TracedPositions.pack(plan.compute_positions(position_ids), _batch(position_ids, padding_mask))


@_positions_op.register_fake
def _positions_fake(
    position_ids: Tensor | None,
    padding_mask: Tensor | None,
    static_offset: Tensor | None,
    q_len: int,
    kv_len: int,
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = _batch(position_ids, padding_mask)
    queries, keys = (torch.empty(batch, n, dtype=torch.int64, device=device) for n in (q_len, kv_len))
    return queries, keys, torch.empty_like(queries), torch.empty_like(keys), torch.empty(4, dtype=torch.int64)


def _batch(position_ids: Tensor | None, padding_mask: Tensor | None) -> int:
    """Rows of what `_positions_op` returns."""
    if padding_mask is not None:
        return padding_mask.shape[0]
    return 1 if position_ids is None or position_ids.ndim != 2 else position_ids.shape[0]
