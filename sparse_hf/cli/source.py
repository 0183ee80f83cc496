"""Where a command's sparse model comes from: a model and what makes it sparse, or an artefact that says both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_hf.artefact import CONFIG_FILE, load_artefact
from sparse_hf.cli.output import RUN_ARTEFACT, find_artefact
from sparse_hf.config import SparseConfig
from sparse_hf.hub import has_weights
from sparse_hf.sparsify import resolve_spec, sparsify


@dataclass(frozen=True, kw_only=True)
class SparseSource:
    """Weights, by folder or Hub id, and what `sparsify` takes to make them sparse; `own_weights`: the artefact's."""

    base: str
    revision: str
    spec: SparseConfig | Path
    own_weights: bool = False

    @classmethod
    def find(cls, target: str, sparse: str | None = None, revision: str | None = None) -> SparseSource:
        """Reads the configuration, and no weights.

        Args:
            target: a model; without `sparse` an artefact, a training run's folder, or the Hub id of an artefact.
            sparse: preset, `.json` or `.yaml` file, artefact, training run, or Hub id.
            revision: of the target on the Hub.

        Raises:
            ValueError: if one of them is not what it should be.
        """
        if not Path(target).is_dir() and (target.startswith((".", "/", "~")) or target.count("/") > 1):
            raise ValueError(f"{target!r} is no folder here and cannot be a Hub id, which looks like user/name")
        if sparse is None:
            check_artefact(target)
            folder = find_artefact(target, revision)
            artefact = load_artefact(folder)
            holder = str(folder) if Path(target).is_dir() else target
            if artefact.adapter or not has_weights(holder, revision=revision):
                return cls(base=artefact.base_model_name_or_path, revision="main", spec=folder)
            return cls(base=holder, revision=revision or "main", spec=folder, own_weights=True)
        inner = Path(sparse) / RUN_ARTEFACT
        config, given = resolve_spec(inner if inner.is_dir() else sparse)
        if given is None:
            return cls(base=target, revision=revision or "main", spec=config)
        assert given.folder is not None
        return cls(base=target, revision=revision or "main", spec=given.folder)

    def load(self, dtype: str, device: str) -> PreTrainedModel:
        """The sparse model, for evaluation.

        Args:
            dtype: of the weights, or "auto" for their own.
            device: such as "cuda" or "cpu"; "auto" spreads the model over all GPUs, which needs accelerate.

        Raises:
            ValueError: if the model does not fit the configuration, or the device is not there.
        """
        options: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, revision=self.revision, dtype=dtype, **options)
        if device != "auto":
            move(model, device)
        return self.apply(model.eval())

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Makes the model that was loaded sparse, in place.

        Raises:
            ValueError: if it does not fit the configuration.
        """
        return sparsify(model, self.spec, check_base_model=not self.own_weights)


def move(model: Any, device: str) -> Any:
    """The model on its device.

    Raises:
        ValueError: for a device that is unknown or not there.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"the model cannot be put on {device!r} ({cause}); `sparse-hf env` shows devices") from error


def check_artefact(target: str) -> None:
    """Raises ValueError for a model's folder."""
    if (Path(target) / "config.json").is_file() and not (Path(target) / CONFIG_FILE).is_file():
        raise ValueError(f"{target} is a model and no artefact; say how it shall be sparse with --sparse")
