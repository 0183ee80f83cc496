"""`AutoSparseModelForCausalLM`: base weights and masks in one call, as peft's Auto classes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_hf.artefact import load_artefact
from sparse_hf.hub import has_weights, resolve_artefact_folder
from sparse_hf.patching import apply_config
from sparse_hf.sparsify import apply_with_adapter


class AutoSparseModelForCausalLM:
    """Loads the base model that an artefact names and sparsifies it."""

    def __init__(self) -> None:
        raise OSError("use AutoSparseModelForCausalLM.from_pretrained(artefact)")

    @classmethod
    def from_pretrained(
        cls, artefact: str | Path, *, revision: str | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """A sparsified model from an artefact's folder or Hub id.

        Weights come from the artefact when it carries some, else from its `base_model_name_or_path`; an artefact's
        LoRA adapter is put into them.

        Args:
            artefact: folder or Hub id.
            revision: of the artefact on the Hub.
            token: Hub token, for the artefact and the base model.
            **kwargs: go to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...). `cache_dir` and
                `local_files_only` also say where the artefact comes from.

        Raises:
            ValueError: if the artefact is invalid or does not fit the model.
        """
        options = {name: kwargs[name] for name in ("cache_dir", "local_files_only") if name in kwargs}
        folder = resolve_artefact_folder(str(artefact), revision=revision, token=token, **options)
        loaded = load_artefact(folder)
        if loaded.adapter:
            model = AutoModelForCausalLM.from_pretrained(loaded.base_model_name_or_path, token=token, **kwargs)
            loaded.check_base_model(model)
            return apply_with_adapter(model, loaded.config, loaded.head_masks, loaded)
        if has_weights(str(artefact), revision=revision, token=token, **options):
            model = AutoModelForCausalLM.from_pretrained(artefact, revision=revision or "main", token=token, **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(loaded.base_model_name_or_path, token=token, **kwargs)
            loaded.check_base_model(model)
        return apply_config(model, loaded.config, loaded.head_masks)
