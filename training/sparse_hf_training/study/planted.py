"""A Llama whose weights are written by hand, so that which heads must retrieve is known and not judged.

The residual stream has five parts: the token (in one of two subspaces, by the token's parity), the previous token, the
prediction, noise that nobody reads, and a constant that holds the norm. One head of the first layer copies the previous
token, which a window of two tokens serves. Two heads further up are induction heads (Olsson et al. 2022): they look for
the place where the present token stood before and predict what followed it, one for even tokens and one for odd ones,
each useless without its whole context. All other heads attend at random and write noise. So a model under head masks is
right where, and only where, both induction heads are full.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_hf_training.data import Document, PackedTextDataset, pack_documents
from sparse_hf_training.tasks import Filler

VOCAB_SIZE = 1024
HEAD_DIM = 64
HALF = HEAD_DIM // 2
SUBSPACE = 32
# Rotary pairs below this number turn fast and tell positions apart; those from it on hardly turn and match tokens.
FAST_PAIRS = 12
ROPE_THETA = 1e10
CONSTANT = 8.0
GAIN_PREVIOUS, GAIN_MATCH, GAIN_LOGIT, GAIN_NOISE = 12.0, 48.0, 40.0, 0.02

TOKEN, PREVIOUS, PREDICTION = 0, 64, 128
NOISE, NOISE_DIM, CONSTANT_PLACE = 192, 63, 255
HIDDEN = 256


@dataclass(frozen=True, kw_only=True)
class PlantedModel:
    """The model and what was planted.

    Args:
        model: a Llama in fp32, in evaluation mode.
        head_masks: `[num_layers, num_kv_heads]`, 1 for the two induction heads.
        local: layer and KV head of the head that reads the previous token.
    """

    model: PreTrainedModel
    head_masks: Tensor
    local: tuple[int, int]


def planted_llama(seed: int = 0, *, num_layers: int = 4, num_kv_heads: int = 4) -> PlantedModel:
    """A Llama with two planted induction heads at places drawn by the seed, in different layers.

    Args:
        seed: of the places, the tokens' vectors and the noise.
        num_layers: 3 or more.
        num_kv_heads: a power of two, 2 or more; two query heads share each.

    Raises:
        ValueError: for fewer layers, or other numbers of heads.
    """
    if num_layers < 3 or num_kv_heads < 2 or HIDDEN % (2 * num_kv_heads):
        raise ValueError(
            f"a planted model has 3 layers or more, and 2, 4 or 8 KV heads or so, got {num_layers} and {num_kv_heads}"
        )
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=num_layers,
        num_attention_heads=2 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    draw = torch.randperm(num_kv_heads * (num_layers - 1), generator=generator).tolist()
    first, second = draw[0], next(n for n in draw if n // num_kv_heads != draw[0] // num_kv_heads)
    places = [(1 + n // num_kv_heads, n % num_kv_heads) for n in (first, second)]
    local = (0, int(torch.randint(num_kv_heads, (1,), generator=generator)))
    masks = torch.zeros(num_layers, num_kv_heads, dtype=torch.long)
    with torch.no_grad():
        _write_tokens(model, generator)
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            _write_noise(block.self_attn, generator)
            if layer == local[0]:
                _write_previous(block.self_attn, local[1])
        for parity, (layer, head) in enumerate(places):
            _write_induction(model.model.layers[layer].self_attn, head, parity)
            masks[layer, head] = 1
    return PlantedModel(model=model, head_masks=masks, local=local)


def planted_filler(seed: int = 0) -> Filler:
    """Text for it: all tokens in a random order, twice, so that no slice of up to `VOCAB_SIZE` holds one twice."""
    return Filler(np.tile(np.random.default_rng(seed).permutation(VOCAB_SIZE), 2))


def planted_rows(filler: Filler, seq_len: int, *, count: int = 64, seed: int = 0) -> PackedTextDataset:
    """Plain text for recipes that read it: rows whose second half is the first again, as long documents repeat."""
    rng = random.Random(f"planted:{seed}")
    halves = [filler.take(rng, seq_len // 2).tolist() for _ in range(count)]
    documents = [Document(input_ids=2 * half, labels=2 * half) for half in halves]
    return PackedTextDataset(pack_documents(documents, 2 * (seq_len // 2))[0])


def precision_recall(found: Tensor, planted: Tensor) -> tuple[float, float]:
    """Of the heads that are full in `found`, the share that was planted; of those planted, the share that is full.

    Raises:
        ValueError: for masks of different shapes, or without a full head.
    """
    if found.shape != planted.shape or not found.any() or not planted.any():
        raise ValueError(
            f"masks must have one shape and full heads, got {list(found.shape)} with {int(found.sum())} full heads and "
            f"{list(planted.shape)} with {int(planted.sum())}"
        )
    both = int((found * planted).sum())
    return both / int(found.sum()), both / int(planted.sum())


def average_precision(scores: Tensor, planted: Tensor) -> float:
    """Mean, over the planted heads, of the precision down to each one's rank; ties count against it."""
    flat, wanted = scores.flatten().double(), planted.flatten().bool()
    found = [int((flat[wanted] >= value).sum()) / int((flat >= value).sum()) for value in flat[wanted].tolist()]
    return sum(found) / len(found)


def _write_tokens(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    vectors = torch.randn(VOCAB_SIZE, SUBSPACE, generator=generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    parity = torch.arange(VOCAB_SIZE) % 2
    embedding = model.model.embed_tokens.weight.zero_()
    head = model.lm_head.weight.zero_()
    for half in range(2):
        rows, start = parity == half, SUBSPACE * half
        embedding[rows, TOKEN + start : TOKEN + start + SUBSPACE] = vectors[rows]
        head[rows, PREDICTION + start : PREDICTION + start + SUBSPACE] = GAIN_LOGIT * vectors[rows]
    embedding[:, CONSTANT_PLACE] = CONSTANT


def _norm_scale() -> float:
    """What RMSNorm multiplies the stream by, as good as constant since the constant outweighs the rest."""
    return float(HIDDEN**0.5 / (CONSTANT**2 + 1) ** 0.5)


def _write_noise(attention: Any, generator: torch.Generator) -> None:
    """All heads of a layer: random attention over the stream's tokens, noise out."""
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        weight[:, CONSTANT_PLACE] = 0
    out = attention.o_proj.weight.zero_()
    out[NOISE : NOISE + NOISE_DIM] = GAIN_NOISE * torch.randn(NOISE_DIM, out.shape[1], generator=generator)


def _rows(head: int) -> slice:
    return slice(HEAD_DIM * head, HEAD_DIM * (head + 1))


def _clear(attention: Any, head: int) -> None:
    """Zeroes one KV head and its two query heads, of which the second stays silent."""
    for name in ("k_proj", "v_proj"):
        getattr(attention, name).weight[_rows(head)] = 0
    for query in (2 * head, 2 * head + 1):
        attention.q_proj.weight[_rows(query)] = 0
        attention.o_proj.weight[:, _rows(query)] = 0


def _write_previous(attention: Any, head: int) -> None:
    """Attends one token back, wherever it is, and copies what stood there."""
    _clear(attention, head)
    scale, query = _norm_scale(), HEAD_DIM * 2 * head
    pairs = torch.arange(FAST_PAIRS)
    angle = ROPE_THETA ** (-pairs / HALF)
    # Rotary pair f is the coordinates f and f + HALF. Turning the query back by one position makes distance 1 the peak.
    strength = (GAIN_PREVIOUS * HEAD_DIM**0.5) ** 0.5 / (CONSTANT * scale)
    attention.k_proj.weight[HEAD_DIM * head + pairs, CONSTANT_PLACE] = strength
    attention.q_proj.weight[query + pairs, CONSTANT_PLACE] = strength * angle.cos()
    attention.q_proj.weight[query + HALF + pairs, CONSTANT_PLACE] = -strength * angle.sin()
    _copy(attention, head, TOKEN, PREVIOUS, 2 * SUBSPACE, 1.0)


def _write_induction(attention: Any, head: int, parity: int) -> None:
    """Attends to where the previous token was the present one, and predicts the token that stands there."""
    _clear(attention, head)
    scale, start = _norm_scale(), SUBSPACE * parity
    strength = (GAIN_MATCH * HEAD_DIM**0.5) ** 0.5 / scale
    # SUBSPACE coordinates of the pairs that hardly turn: HALF - FAST_PAIRS first halves, then second halves.
    slow = [*range(FAST_PAIRS, HALF), *range(HALF + FAST_PAIRS, HEAD_DIM)][:SUBSPACE]
    for number, place in enumerate(slow):
        attention.q_proj.weight[HEAD_DIM * 2 * head + place, TOKEN + start + number] = strength
        attention.k_proj.weight[HEAD_DIM * head + place, PREVIOUS + start + number] = strength
    _copy(attention, head, TOKEN, PREDICTION, 2 * SUBSPACE, 1.0)


def _copy(attention: Any, head: int, source: int, target: int, size: int, gain: float) -> None:
    """What the head's first query head attends to, from one part of the stream to another."""
    for number in range(size):
        attention.v_proj.weight[HEAD_DIM * head + number, source + number] = gain / _norm_scale()
        attention.o_proj.weight[target + number, HEAD_DIM * 2 * head + number] = 1.0


def planted_places(masks: Tensor) -> Sequence[tuple[int, int]]:
    """Layer and KV head of each full head."""
    return [(int(layer), int(head)) for layer, head in masks.nonzero().tolist()]
