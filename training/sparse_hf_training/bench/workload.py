"""What the training benchmark computes: a model of Llama-3.1-8B's shape, random rows, and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparse_hf.config import SparseConfig
from sparse_hf.head_masks import round_scores

FULL_LAYERS, FULL_VOCABULARY = 32, 128256
NUM_KV_HEADS = 8
WINDOW, NUM_SINK_TOKENS = 1024, 64


def llama_8b_config(num_layers: int) -> LlamaConfig:
    """Llama 3.1 8B with fewer layers, and as many fewer tokens: embeddings keep their share of the work."""
    return LlamaConfig(
        vocab_size=FULL_VOCABULARY * num_layers // FULL_LAYERS,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=128,
        max_position_embeddings=2**17,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made where it will train; the same on every rank."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def streaming_masks(num_layers: int, num_kv_heads: int, head_sparsity: float) -> Tensor:
    """Head masks `[num_layers, num_kv_heads]` with random heads at zero."""
    scores = torch.rand(num_layers, num_kv_heads, generator=torch.Generator().manual_seed(0))
    return round_scores(scores, head_sparsity)


def streaming_config() -> SparseConfig:
    return SparseConfig.from_dict(
        {"sparse": {"method": "streaming", "window_size": WINDOW, "num_sink_tokens": NUM_SINK_TOKENS}}
    )


class RandomRows(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, each packed from documents of one length; item i is always the same.

    Args:
        seq_len, document_len: tokens of a row and of a document in it.
        vocab_size: of the model.
        length: rows.
    """

    def __init__(self, *, seq_len: int, document_len: int, vocab_size: int, length: int) -> None:
        if seq_len % document_len:
            raise ValueError(f"a row of {seq_len} tokens is no whole number of documents of {document_len}")
        self.seq_len, self.document_len, self.vocab_size, self.length = seq_len, document_len, vocab_size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocab_size, (self.seq_len,), generator=generator)
        positions = torch.arange(self.document_len).repeat(self.seq_len // self.document_len)
        labels = ids.masked_fill(positions == 0, -100)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Floating point operations of one optimizer step over one row, multiply-adds as two.

    Args:
        products: of all matrix products with weights, recomputation included.
        attention: of all attention products, recomputation included.
    """

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def step_work(
    config: LlamaConfig,
    *,
    seq_len: int,
    document_len: int,
    head_sparsity: float,
    train_weights: bool,
    two_branches: bool = False,
    teacher: bool = False,
) -> StepWork:
    """The work of a step under gradient checkpointing of whole layers.

    A layer's products run forward, forward again, backward to their inputs, and backward to their weights where those
    train; its attention forward, again, and 2.5 times backward (five products for two). Mask learning computes each
    pair of tokens once, whatever its gates. A teacher adds a dense forward pass.
    """
    hidden, head_dim, num_kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    assert head_dim is not None and num_kv_heads is not None
    projections = hidden * head_dim * (2 * config.num_attention_heads + 2 * num_kv_heads)
    layer = projections + 3 * hidden * config.intermediate_size
    passes = 3.0 + train_weights
    forward = 2.0 * seq_len * layer * config.num_hidden_layers
    output = 2.0 * seq_len * hidden * config.vocab_size
    products = forward * (passes + teacher) + output * (passes + teacher)
    num_documents = seq_len // document_len
    causal = num_documents * document_len * (document_len + 1) / 2
    reach = min(WINDOW + NUM_SINK_TOKENS, document_len)
    windowed = num_documents * (reach * (reach + 1) / 2 + (document_len - reach) * reach)
    pairs = causal if two_branches else (1 - head_sparsity) * causal + head_sparsity * windowed
    heads = config.num_attention_heads * config.num_hidden_layers
    per_pair = 4.0 * head_dim * heads
    attention = per_pair * (pairs * 4.5 + (causal if teacher else 0))
    return StepWork(products=products, attention=attention)
