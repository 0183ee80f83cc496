"""GPT-2: one KV head per query head, learned positions, `h[i].attn`."""

from transformers import PretrainedConfig

from sparse_hf.adapters.base import Adapter


class GPT2Adapter(Adapter):
    model_type = "gpt2"
    attention_name = "attn"
    layers_name = "h"

    def check(self, config: PretrainedConfig) -> None:
        if config.add_cross_attention:
            raise ValueError("gpt2 with add_cross_attention=True is not supported: its cross-attention is not causal")
        if config.reorder_and_upcast_attn:
            # transformers applies it in its eager path alone; the reference computes in fp32 anyway.
            raise ValueError("gpt2 with reorder_and_upcast_attn=True is not supported; set it to False")
