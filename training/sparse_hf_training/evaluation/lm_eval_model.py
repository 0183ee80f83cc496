"""The model class `sparse-hf` of lm-evaluation-harness (`--model_args pretrained=...,sparse=...`).

Generation goes through the per-head cache, loglikelihoods through sparse prefill: both read what a deployed model
reads. What a cache has freed shows in generation alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sparse_hf.artefact import CONFIG_FILE, load_artefact
from sparse_hf.cli.output import find_artefact
from sparse_hf.hub import has_weights
from sparse_hf.sparsify import sparsify

NAME = "sparse-hf"


@register_model(NAME)
class SparseLM(HFLM):
    """transformers' models as lm_eval's `hf` loads them, made sparse before anything is asked.

    Args:
        pretrained: model folder or Hub id; without `sparse` also an artefact's folder or a training run's, which names
            its model.
        sparse: anything that `sparsify` takes: preset, artefact (folder or Hub id), JSON or YAML file.
        **kwargs: as lm_eval's `hf`.

    Raises:
        ValueError: if nothing says what is sparse, or it does not fit the model.
    """

    def __init__(self, pretrained: str, sparse: str | None = None, **kwargs: Any) -> None:
        if not isinstance(pretrained, str):
            raise ValueError(f"pretrained must name a model or an artefact, got {type(pretrained).__name__}")
        if sparse is None:
            pretrained, sparse = _from_artefact(pretrained)
        self.sparse = sparse
        super().__init__(pretrained=pretrained, **kwargs)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        sparsify(self._model, self.sparse)

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "sparse": Path(self.sparse).name}


def _from_artefact(place: str) -> tuple[str, str]:
    """The model that an artefact's masks belong to, and the artefact."""
    folder = Path(place)
    if not folder.is_dir() or not any((folder / part / CONFIG_FILE).is_file() for part in ("", "artefact")):
        raise ValueError(
            f"nothing says what is sparse in {place!r}: give --model_args pretrained=MODEL,sparse=PRESET_OR_ARTEFACT, "
            "or an artefact's folder as pretrained"
        )
    artefact = find_artefact(place)
    base = str(artefact) if has_weights(str(artefact)) else load_artefact(artefact).base_model_name_or_path
    return base, str(artefact)
