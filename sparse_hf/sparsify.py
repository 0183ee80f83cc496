"""`sparsify`: one line from a dense model to a sparse one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparse_hf.artefact import Artefact, load_artefact
from sparse_hf.config import SparseConfig
from sparse_hf.hub import has_weights, resolve_artefact_folder
from sparse_hf.lora import check_adapter, has_adapter, load_adapter, remove_adapter, unwrapped
from sparse_hf.patching import apply_config, get_handle, is_sparsified
from sparse_hf.presets import names_preset, preset


def sparsify(
    model: PreTrainedModel,
    spec: SparseConfig | str | Path,
    *,
    head_masks: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    check_base_model: bool = True,
) -> PreTrainedModel:
    """Makes a model's attention sparse, in place, and returns it. `unsparsify` undoes it exactly.

    An artefact's LoRA adapter is loaded with its masks, and leaves with them. A model that has an adapter already keeps
    it; under an artefact that carries one, it must be the same. An artefact's own weights are left where they are, with
    a warning if the model was loaded from elsewhere: `AutoSparseModelForCausalLM` loads both.

    Args:
        model: a causal language model of a supported family, or a `peft.PeftModel` of one.
        spec: a preset's name, a `SparseConfig`, a `.json` or `.yaml` file of one, an artefact's folder, or a Hub id.
        head_masks: `[num_layers, num_kv_heads]` of 0 (sparse) and 1 (full); by default the artefact's or the
            configuration's own.
        revision: branch, tag or commit on the Hub.
        token: Hub token.
        check_base_model: refuse an artefact that was made for another base model, and warn of weights that it carries.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is sparsified already or unsupported, or the specification does not fit it. The model
            is then unchanged.
    """
    if is_sparsified(model):
        raise ValueError("the model is sparsified already; call unsparsify(model) first")
    config, artefact = resolve_spec(spec, revision=revision, token=token)
    if artefact is not None:
        if check_base_model:
            artefact.check_base_model(model)
            _warn_of_weights(model, str(spec), artefact, revision=revision, token=token)
        head_masks = artefact.head_masks if head_masks is None else head_masks
    if artefact is None or not artefact.adapter:
        return apply_config(model, config, head_masks)
    return apply_with_adapter(model, config, head_masks, artefact)


def _warn_of_weights(
    model: PreTrainedModel, spec: str, artefact: Artefact, *, revision: str | None, token: str | bool | None
) -> None:
    """Warns where masks were trained together with weights that the model does not come from.

    The probe cannot tell: it reads the embedding, which stays as it was where only other weights were trained.
    """
    if artefact.adapter or not has_weights(spec, revision=revision, token=token):
        return
    source = unwrapped(model).config._name_or_path
    same_folder = bool(source) and Path(spec).is_dir() and Path(source).resolve() == Path(spec).resolve()
    if source != spec and not same_folder:
        warnings.warn(
            f"{spec} carries weights that were trained with its masks, and the model has those of {source!r}; load "
            f"both by AutoSparseModelForCausalLM.from_pretrained({spec!r}), or pass check_base_model=False",
            stacklevel=3,
        )


def apply_with_adapter(
    model: PreTrainedModel, config: SparseConfig, head_masks: Any, artefact: Artefact
) -> PreTrainedModel:
    """`apply_config` and the artefact's LoRA adapter; both or, where it raises ValueError, neither."""
    assert artefact.folder is not None
    base = unwrapped(model)
    added = not has_adapter(base)
    if added:
        load_adapter(base, artefact.folder)
    else:
        check_adapter(base, artefact.folder)
    try:
        apply_config(model, config, head_masks)
    except ValueError:
        if added:
            remove_adapter(base)
        raise
    get_handle(model).added_adapter = added
    return model


def resolve_spec(
    spec: SparseConfig | str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[SparseConfig, Artefact | None]:
    """The configuration that `sparsify`'s argument names, and the artefact when it is one's.

    Raises:
        ValueError: if it names nothing that can be read.
    """
    if isinstance(spec, SparseConfig):
        return spec, None
    text = str(spec)
    if names_preset(text):
        return preset(text), None
    if text.endswith((".json", ".yaml", ".yml")):
        return SparseConfig.from_file(text), None
    artefact = load_artefact(resolve_artefact_folder(text, revision=revision, token=token))
    return artefact.config, artefact
