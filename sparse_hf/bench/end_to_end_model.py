"""A random Llama whose queries and keys have the structure that dynamic methods look for, and prompts for it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_hf.bench.end_to_end_plan import ModelOptions
from sparse_hf.bench.planted import LOCAL_LOGIT, LOCAL_TOKENS, NUM_TOPICS, TOPIC_LOGIT
from sparse_hf.bench.workload import BLOCK_SIZE

ROPE_THETA = 500000.0
RESIDUAL_SCALE = 0.05
"""On what layers add to the residual stream, so that every layer sees about the embeddings."""


def planted_model(options: ModelOptions, device: torch.device) -> LlamaForCausalLM:
    """A model in evaluation mode with transformers' SDPA attention, made on the device.

    Attention of random weights is close to uniform, and a method that keeps 90% of it keeps nearly every block. Here
    scores have the parts of `planted_inputs`, in coordinates of queries and keys besides the random ones:

    - **Topics.** A token's topic is its number modulo `NUM_TOPICS`; its embedding says which. Query head h asks for the
      token's topic plus h. Where a key has that one the score rises by `TOPIC_LOGIT`, in the coordinates that rotary
      embedding turns least.
    - **Locality.** A constant in the coordinates whose wavelengths are about 2 pi `LOCAL_TOKENS` gives scores that fall
      with the distance from `LOCAL_LOGIT` on.

    Raises:
        ValueError: if head_dim or hidden_size has no room for the topics.
    """
    half = options.head_dim // 2
    if half < 2 * NUM_TOPICS or options.hidden_size <= NUM_TOPICS:
        raise ValueError(f"the model needs head_dim >= {4 * NUM_TOPICS}, got {options.head_dim}")
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        vocab_size=options.vocab_size,
        max_position_embeddings=options.longest,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=options.dtype, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None  # its texts shall not end early
    _plant(model, options)
    return model


def _plant(model: LlamaForCausalLM, options: ModelOptions) -> None:
    embedding = model.model.embed_tokens.weight
    generator = torch.Generator(embedding.device).manual_seed(0)
    # After the norm a feature of this size stays about as large, since it is one of many coordinates.
    feature = math.sqrt(options.hidden_size) / 8
    embedding.normal_(generator=generator)
    topics = torch.arange(len(embedding), device=embedding.device) % NUM_TOPICS
    embedding[:, :NUM_TOPICS] = torch.nn.functional.one_hot(topics, NUM_TOPICS).to(embedding.dtype) * feature
    embedding[:, NUM_TOPICS] = feature
    half = options.head_dim // 2
    first = half - NUM_TOPICS
    near = [i for i in range(first) if LOCAL_TOKENS / 4 <= ROPE_THETA ** (i / half) <= LOCAL_TOKENS * 4]
    root = options.head_dim**0.5
    topic, local = (math.sqrt(logit * root) / feature for logit in (TOPIC_LOGIT, LOCAL_LOGIT / len(near)))
    for layer in model.model.layers:
        for shift, projection in ((1, layer.self_attn.q_proj), (0, layer.self_attn.k_proj)):
            weight = projection.weight.normal_(std=options.hidden_size**-0.5, generator=generator)
            heads = weight.view(-1, options.head_dim, options.hidden_size)
            heads[:, :, : NUM_TOPICS + 1] = 0
            heads[:, near, NUM_TOPICS] = local
            for head in range(len(heads)):
                for given in range(NUM_TOPICS):
                    heads[head, first + (given + shift * head) % NUM_TOPICS, given] = topic
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(RESIDUAL_SCALE)


def planted_prompt(options: ModelOptions, num_tokens: int, device: torch.device) -> Tensor:
    """Token ids `[1, num_tokens]`; each 128-block has one topic, at random."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    last = options.vocab_size // NUM_TOPICS
    chosen = torch.randint(NUM_TOPICS, (-(-num_tokens // BLOCK_SIZE),), generator=generator, device=device)
    words = torch.randint(last, (num_tokens,), generator=generator, device=device)
    return (words * NUM_TOPICS + chosen.repeat_interleave(BLOCK_SIZE)[:num_tokens])[None]


def sharing_weights(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model with the same parameters and buffers; what is set on one does not reach the other."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
