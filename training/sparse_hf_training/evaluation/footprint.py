"""What a cache holds while a sequence is read and gone on with, and what attention reads: both measured."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparse_hf.cache import SparseCache
from sparse_hf.capture import capture
from sparse_hf_training.evaluation.generation import is_sparse_now, new_cache, prefill


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Keys and values of one sequence over time.

    Args:
        tokens: tokens that were read when the bytes beside them were held.
        kv_bytes: keys and values in the cache, from the storage of its tensors.
        prefill_density, decode_density: pairs of query and key that were read / causal pairs, over layers and heads.
        device_peak: bytes that the device had allocated at most beyond what was there before; None on a CPU.
    """

    tokens: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    prefill_density: float
    decode_density: float
    device_peak: int | None = None

    @property
    def peak(self) -> int:
        return max(self.kv_bytes)

    @property
    def held(self) -> int:
        """Bytes at the end."""
        return self.kv_bytes[-1]

    @property
    def byte_tokens(self) -> float:
        """Bytes held, summed over the tokens that were read: the area under the curve."""
        points = list(zip((0, *self.tokens), (0, *self.kv_bytes), strict=True))
        return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(points))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Footprint:
        return cls(**{**values, "tokens": tuple(values["tokens"]), "kv_bytes": tuple(values["kv_bytes"])})


@torch.no_grad()
def measure_footprint(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    chunk: int = 512,
    num_decoded: int = 32,
    prefill_chunk: int | None = None,
) -> Footprint:
    """Reads `input_ids [1, seq_len]` in chunks, then writes `num_decoded` tokens greedily.

    Args:
        model: dense or sparse, in evaluation mode.
        input_ids: of one sequence.
        chunk: tokens per forward pass, after each of which the bytes are taken.
        num_decoded: tokens that are decoded one by one.
        prefill_chunk: tokens per pass of the prefill whose density is taken, a pass of its own: methods with dense last
            rows, and dynamic ones, read more in small chunks. None for all at once, as `generate` does.

    Raises:
        ValueError: for several sequences, or a chunk that is not positive.
    """
    if input_ids.shape[0] != 1 or chunk < 1:
        raise ValueError(f"a footprint is of one sequence in chunks of 1 or more, got {len(input_ids)} and {chunk}")
    cache, tokens, held = new_cache(model), list[int](), list[int]()
    device = input_ids.device
    before = _reset_peak(device)
    sparse = is_sparse_now(model)
    pieces = list(input_ids.split(chunk, dim=1))
    split, num_steps = len(pieces), len(pieces) + num_decoded
    with capture(model) if sparse else nullcontext() as stats:
        for step in range(num_steps):
            piece = pieces[step]
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens.append((tokens[-1] if tokens else 0) + piece.shape[1])
            held.append(held_bytes(cache))
            if step + 1 >= len(pieces):
                pieces.append(logits[:, -1:].argmax(-1))
    device_peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
    return Footprint(
        tokens=tuple(tokens),
        kv_bytes=tuple(held),
        prefill_density=_prefill_density(model, input_ids, prefill_chunk) if sparse else 1.0,
        decode_density=1.0 if stats is None or not num_decoded else stats[split:].density.mean().item(),
        device_peak=device_peak,
    )


def _prefill_density(model: PreTrainedModel, input_ids: Tensor, chunk: int | None) -> float:
    with capture(model) as stats:
        prefill(model, input_ids, new_cache(model), chunk)
    return stats.density.mean().item()


def held_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache, from the storage of its tensors."""
    if isinstance(cache, SparseCache):
        return cache.kv_bytes()
    held: list[Tensor] = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
