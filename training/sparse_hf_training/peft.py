"""LoRA and QLoRA under masks: the adapter trains in the weights' place, over weights that may be quantised."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from sparse_hf.lora import (
    ADAPTER_CONFIG_FILE,
    adapter_targets,
    add_adapter,
    base_module,
    has_adapter,
    is_quantized,
    load_adapter,
    unwrapped,
)

if TYPE_CHECKING:
    from sparse_hf_training.engines import Engine
    from sparse_hf_training.stages import Stage

Quantization = Literal["nf4"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A fresh LoRA adapter (arXiv 2106.09685): W x becomes W x + alpha / rank * B A x.

    Args:
        rank: rows of A.
        alpha: numerator of the scale.
        dropout: of x in the adapter's branch, while training.
        target_modules: `all-linear` (all but the output embedding), or ends of modules' names.
        modules_to_save: ends of names of modules that train whole, beside the adapter, such as `embed_tokens`.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha < 1:
            raise ValueError(f"lora.alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise ValueError("lora.target_modules must name modules, or be all-linear")


def check_peft_settings(stage: Stage, lora: LoraConfig | None, quantization: Quantization | None) -> None:
    """Raises ValueError for a stage that `lora` or `quantization` has no meaning in."""
    if lora is not None and stage not in ("masks_and_weights", "sft"):
        raise ValueError(f"lora trains in the stages masks_and_weights and sft; leave it out of stage {stage}")
    if quantization is not None and stage == "layer_selection":
        raise ValueError("layer_selection measures the model as it is; leave quantization out")


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
    """Puts a fresh adapter into a model, which remains a transformers model and computes what it did.

    Args:
        model: without an adapter.
        config: of the adapter.
        seed: of A; processes that share a model must agree on it.

    Raises:
        ValueError: if peft is missing, the model has an adapter already, or it lacks the named modules.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora needs peft ({error}); pip install 'sparse-hf[peft]'") from error
    if has_adapter(model):
        raise ValueError("the model comes with a LoRA adapter, which goes on training; leave lora out of this run")
    targets = config.target_modules
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(config.modules_to_save) or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_adapter(model, settings)


def set_trainable(model: nn.Module, weights: bool) -> None:
    """Lets all weights train, or none; of a model with an adapter, the adapter alone.

    Raises:
        ValueError: if quantised weights were to train.
    """
    adapter = has_adapter(model)
    if weights and not adapter and is_quantized(model):
        raise ValueError("quantised weights do not train; give the run an adapter (lora.rank=16), or stage=masks")
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.requires_grad:
            parameter.requires_grad_(weights and not adapter)
    if weights and adapter:
        for parameter in adapter_targets(model).values():
            parameter.requires_grad_(True)


def base_output_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The base model's output embedding, where an adapter wraps it; None where the model's own is the base model's."""
    module: nn.Module = model.get_output_embeddings()
    base = base_module(module)
    return None if base is module else base


@contextmanager
def gates_alone_allowed(model: nn.Module) -> Iterator[None]:
    """transformers' Trainer refuses quantised models without an adapter: nothing in them could train. Gates can."""
    inner = unwrapped(model)
    if not is_quantized(inner) or has_adapter(inner):
        yield
        return
    before = inner._hf_peft_config_loaded
    inner._hf_peft_config_loaded = True
    try:
        yield
    finally:
        inner._hf_peft_config_loaded = before


def check_adapter_engine(model: nn.Module, engine: Engine, *, compiled: bool) -> None:
    """Raises ValueError for an engine under which quantised weights, the adapter or compiled layers do not work."""
    if is_quantized(model) and engine.shards_weights:
        raise ValueError(f"{engine} would shard quantised weights, which is not supported; use DDP or ZeRO-1/2")
    if engine.name == "zero3" and has_adapter(model) and base_output_embedding(unwrapped(model)) is not None:
        raise ValueError(
            "ZeRO-3 cannot share the output embedding with an adapter: its loss is computed in chunks; leave lm_head "
            "(and tied embed_tokens) out of lora.modules_to_save and lora.target_modules, or use FSDP2 or ZeRO-1/2"
        )
    if compiled and engine.name == "zero3":
        raise ValueError("ZeRO-3 gathers weights inside of layers, which graphs cannot follow; use FSDP2 or ZeRO-1/2")


# ---- loading ----


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """QLoRA's storage (arXiv 2305.14314): 4-bit NormalFloat with quantised scales; products in `dtype`.

    Raises:
        ValueError: if bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization={quantization} needs bitsandbytes; pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_base(
    name: str,
    dtype: torch.dtype,
    *,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """A model, or the base model of an adapter with the adapter in it.

    Args:
        name: folder or Hub id of a model, or of an adapter that names its base model.
        dtype: of the weights; quantised ones compute in it.
        quantization: of the linear layers.
        device: where quantised weights are made; they cannot be moved by engines later.

    Raises:
        ValueError: if a needed library is missing or the adapter does not fit.
        OSError: if the model is not found.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
        options["device_map"] = {"": torch.device(device or "cpu")}
    found = find_adapter_config_file(name)
    if found is None:
        return _without_inference_layout(AutoModelForCausalLM.from_pretrained(name, **options))
    folder = _adapter_folder(name, Path(found))
    base = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG_FILE} names no base_model_name_or_path")
    model = _without_inference_layout(AutoModelForCausalLM.from_pretrained(base, **options))
    load_adapter(model, folder)
    return model


def _without_inference_layout(model: PreTrainedModel) -> PreTrainedModel:
    """On CPUs with AVX512-BF16, bitsandbytes rearranges weights in an evaluation; no gradient passes them then."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _adapter_folder(name: str, config: Path) -> Path:
    from sparse_hf.lora import ADAPTER_WEIGHTS_FILE

    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        hf_hub_download(name, ADAPTER_WEIGHTS_FILE, revision=config.parent.name)
    return config.parent


def base_name(model: PreTrainedModel, name: str) -> str:
    """What an artefact of this run names as its base model: under an adapter the model below it."""
    return str(model.config._name_or_path) if has_adapter(model) else name
