"""What an adapter answers about a family. A new family costs one small file and one row in the test matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf_kernels import UNBOUNDED


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The attention shape of a model: what head masks and kernels depend on."""

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


class Adapter:
    """A family whose attention goes through transformers' `AttentionInterface`.

    The defaults describe a decoder of Llama's build: `layers[i].self_attn`, one window for all layers or none.
    """

    model_type: ClassVar[str]
    attention_name: ClassVar[str] = "self_attn"
    layers_name: ClassVar[str] = "layers"

    def shape(self, config: PretrainedConfig) -> ModelShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return ModelShape(
            model_type=self.model_type,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
        )

    def attention_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The self-attention modules in layer order."""
        return [getattr(layer, self.attention_name) for layer in getattr(model.base_model, self.layers_name)]

    def native_window(self, config: PretrainedConfig, layer: int) -> int:
        """Keys at this distance or more are unreadable in the model itself; UNBOUNDED without such a window."""
        layer_types = getattr(config, "layer_types", None)
        if layer_types is not None and layer_types[layer] != "sliding_attention":
            return UNBOUNDED
        return getattr(config, "sliding_window", None) or UNBOUNDED

    def check(self, config: PretrainedConfig) -> None:
        """Raises ValueError for a configuration of the family that cannot be served. None by default."""
