"""LoRA adapters (arXiv 2106.09685) beside masks: read, written and taken off; peft is imported only where one is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
ADAPTER_NAME = "default"
_PREFIX = "base_model.model."  # of every name in peft's files
MARKER = "trained_under_sparse_hf_head_masks"
"""A key of `adapter_config.json`. peft ignores it, but warns of it by name when it loads the adapter on its own."""


def unwrapped(model: Any) -> Any:
    """The transformers model inside a `peft.PeftModel`; any other model itself."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def has_adapter(model: nn.Module) -> bool:
    """Whether peft put an adapter into the model."""
    return hasattr(unwrapped(model), "peft_config")


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights are held in fewer bits than they compute in."""
    return bool(getattr(unwrapped(model), "is_quantized", False))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"LoRA adapters need peft ({error}); pip install 'sparse-hf[peft]'") from error
    return peft


def add_adapter(model: PreTrainedModel, config: Any) -> None:
    """Puts a fresh adapter into a model, in place: it stays a transformers model. Its weights are fp32.

    Args:
        model: without an adapter.
        config: a `peft.LoraConfig`.

    Raises:
        ValueError: if the model has an adapter, or the configuration names modules that it lacks.
    """
    _import_peft()
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if has_adapter(model):
        raise ValueError(
            "the model has a LoRA adapter already; go on with that one, or merge it into the weights first"
        )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.add_adapter(config, ADAPTER_NAME)
    except ValueError as error:
        remove_adapter(model)
        raise ValueError(f"the adapter does not fit {type(model).__name__}: {error}") from error
    # In bf16 an update below 1/256 of a weight is lost.
    cast_adapter_dtype(model, ADAPTER_NAME)
    # peft freezes the base weights; what trains is the caller's to say.
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)


def adapter_targets(model: nn.Module) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by their names in peft's files, `modules_to_save` included.

    Raises:
        ValueError: if the model has no adapter, or several are active.
    """
    _import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: dict[str, nn.Parameter] = {}
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            active = _single(module.active_adapters)
            for kind in module.adapter_layer_names:
                held = getattr(module, kind)
                if active not in held:
                    continue
                part = held[active]
                named = part.named_parameters() if isinstance(part, nn.Module) else [("", part)]
                found |= {f"{name}.{kind}.{own}".rstrip("."): parameter for own, parameter in named}
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[_single(module.active_adapters)]
            found |= {f"{name}.{own}": parameter for own, parameter in saved.named_parameters()}
    if not found:
        raise ValueError("the model has no LoRA adapter")
    return found


def _single(active: list[str]) -> str:
    if len(active) != 1:
        raise ValueError(f"one adapter must be active, got {active}; call model.set_adapter(name)")
    return active[0]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for the length of a `with` block; nothing changes where there is no adapter.

    peft's own switch also sets `requires_grad`, which engines that shard parameters read when they gather them.
    """
    if not has_adapter(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = [m for m in unwrapped(model).modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [module.disable_adapters for module in modules]
    try:
        for module in modules:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module._disable_adapters = value


def base_module(module: nn.Module) -> nn.Module:
    """The module that an adapter wraps, or the module itself."""
    inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


# ---- files ----


def holds_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG_FILE).is_file()


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder, by the names of `adapter_targets`.

    Raises:
        ValueError: if the file is missing or corrupt.
    """
    from sparse_hf.artefact import read_tensors

    return {name.removeprefix(_PREFIX): t for name, t in read_tensors(folder / ADAPTER_WEIGHTS_FILE).items()}


@torch.no_grad()
def read_adapter(
    model: nn.Module,
    folder: Path,
    *,
    gathered: Callable[[nn.Parameter], AbstractContextManager[bool]] = lambda parameter: nullcontext(True),
) -> None:
    """Fills the adapter that a model has with the tensors of a folder; shapes are checked before anything changes.

    Args:
        model: with an adapter.
        folder: with the tensors.
        gathered: makes a parameter whole that an engine shards; yields whether this process writes it.

    Raises:
        ValueError: if the adapter there is another one.
    """
    targets, tensors = adapter_targets(model), read_adapter_tensors(folder)
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in targets.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if differ := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        name = differ[0]
        raise ValueError(
            f"{folder} holds another adapter than the model has: {len(differ)} tensors differ, "
            f"{name} is {found.get(name, 'missing')} there and {shapes.get(name, 'missing')} here"
        )
    for name, parameter in targets.items():
        with gathered(parameter) as writes:
            if writes:
                parameter.copy_(tensors[name])


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Puts the adapter of a folder into a model, active and frozen.

    Raises:
        ValueError: if files are missing or corrupt, the model has an adapter, or the adapter does not fit it. The model
            is then unchanged.
    """
    peft = _import_peft()
    try:
        values = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        values.pop(MARKER, None)
        config = peft.PeftConfig.from_peft_type(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG_FILE} cannot be read: {error}") from error
    read_adapter_tensors(folder)
    config.inference_mode = False
    add_adapter(model, config)
    try:
        read_adapter(model, folder)
    except ValueError:
        remove_adapter(model)
        raise
    for parameter in adapter_targets(model).values():
        parameter.requires_grad_(False)
    for module in model.modules():
        # New modules are born in training mode, with dropout.
        if not model.training:
            module.eval()


def check_adapter(model: nn.Module, folder: Path) -> None:
    """Raises ValueError if the adapter that the model has is not the folder's."""
    targets, tensors = adapter_targets(model), read_adapter_tensors(folder)
    same = set(targets) == set(tensors) and all(
        torch.allclose(p.detach().float().cpu(), tensors[name].float(), rtol=2e-2, atol=1e-6)  # bf16 rounds by 2^-8
        for name, p in targets.items()
        if not p.is_meta
    )
    if not same:
        raise ValueError(
            f"the model has a LoRA adapter, but not the one of {folder}; sparsify the base model, which gets that "
            "adapter too, or pass head masks and a SparseConfig instead of an artefact"
        )


def save_adapter(
    model: Any, folder: Path, *, base_model_name_or_path: str, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the adapter of a model as peft does, marked as one that needs its masks.

    Args:
        model: a `PeftModel`, or a transformers model with an adapter in it.
        folder: where to.
        base_model_name_or_path: of the base model; also what peft loads it on.
        state_dict: whole weights, of a model that an engine shards.

    Raises:
        ValueError: for the model inside a `PeftModel`, which does not know how to save the adapter.
    """
    if unwrapped(model) is model and not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("this model is inside a PeftModel and cannot save its adapter; pass the PeftModel")
    _single(list(adapters) if not callable(adapters := model.active_adapters) else list(adapters()))
    with warnings.catch_warnings():
        # Whether the vocabulary grew, which peft asks the base model's configuration on the Hub.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
    path = folder / ADAPTER_CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"base_model_name_or_path": base_model_name_or_path, "inference_mode": True, MARKER: True}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove_adapter(model: PreTrainedModel) -> None:
    """Takes the adapter off: the same modules as before it came."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
                setattr(parent, name, base_module(child))
    vars(model).pop("peft_config", None)
    vars(model)["_hf_peft_config_loaded"] = False
