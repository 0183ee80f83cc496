"""Families by `config.model_type`."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from sparse_hf.adapters.base import Adapter
from sparse_hf.adapters.gpt2 import GPT2Adapter
from sparse_hf.adapters.llama import LlamaAdapter
from sparse_hf.adapters.mistral import MistralAdapter
from sparse_hf.adapters.qwen2 import Qwen2Adapter
from sparse_hf.adapters.qwen3 import Qwen3Adapter

_ADAPTERS: dict[str, type[Adapter]] = {
    cls.model_type: cls for cls in (LlamaAdapter, Qwen2Adapter, Qwen3Adapter, MistralAdapter, GPT2Adapter)
}


def available_families() -> tuple[str, ...]:
    """The supported `model_type`s."""
    return tuple(_ADAPTERS)


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The adapter of the model's family.

    Raises:
        ValueError: if this is no transformers model, or as `adapter_for_config`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected a transformers model, got {type(model).__name__}; for a PEFT model pass the model it wraps "
            "(peft_model.get_base_model())"
        )
    return adapter_for_config(model.config)


def adapter_for_config(config: PretrainedConfig) -> Adapter:
    """The adapter of a model's family, from its configuration alone: no weights are needed.

    Raises:
        ValueError: for an unsupported family, naming the supported ones and how to add one, or for a configuration of
            a supported family that cannot be served.
    """
    model_type = config.model_type
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"model type {model_type!r} is not supported; supported: {', '.join(_ADAPTERS)}. To add a family, write "
            "sparse_hf/adapters/<family>.py (see CONTRIBUTING.md) and add its row to the test matrix"
        )
    adapter = _ADAPTERS[model_type]()
    adapter.check(config)
    return adapter
