"""Settings that papers and their authors' code published for a method on a model, each with its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CALIBRATED_METHODS = ("triangle", "xattention", "flexprefill", "minference")
"""Methods whose settings `sparse-hf calibrate` finds for a model."""

_TRIANGLE_MIX = "TriangleMix, arXiv 2507.21526, starting_layer of its speed_test.py"
_FLEXPREFILL = "FlexPrefill, arXiv 2502.20766, settings of its experiments"


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A published setting.

    Args:
        method: by name.
        model: family and size, as `model_key` writes them.
        about: what it is, in words.
        source: who published it, and where.
        parameters: of the method; its defaults otherwise.
        layers: ranges of layers that follow the method, all others being dense.
    """

    method: str
    model: str
    about: str
    source: str
    parameters: Mapping[str, Any]
    layers: str = "*"

    @property
    def name(self) -> str:
        return f"{self.method}:{self.model}"

    def to_config(self) -> dict[str, Any]:
        """What `SparseConfig.from_dict` takes: every head of these layers follows the method."""
        method = {"method": self.method, **self.parameters}
        return {"sparse": "dense", "rules": [{"layers": self.layers, "sparse": method}], "head_masks": "all_sparse"}


def _triangle(model: str, layers: str, source: str = _TRIANGLE_MIX) -> ModelPreset:
    return ModelPreset(
        method="triangle",
        model=model,
        about=f"layers {layers}: 8 sinks, a window of 512, the last 128 queries dense",
        source=source,
        parameters={"num_sink_tokens": 8, "window_size": 512, "num_last_tokens": 128},
        layers=layers,
    )


def _flexprefill(model: str, gamma: float) -> ModelPreset:
    return ModelPreset(
        method="flexprefill",
        model=model,
        about=f"gamma {gamma}, tau 0.1, at least 1024 tokens",
        source=_FLEXPREFILL,
        parameters={"gamma": gamma, "tau": 0.1, "min_budget": 1024},
    )


MODEL_PRESETS: tuple[ModelPreset, ...] = (
    _triangle("llama-3.1-8b", "16-31"),
    _triangle("llama-3-8b-262k", "16-31"),
    _triangle("qwen2.5-7b", "20-27"),
    _triangle("qwen3-8b", "5,7,10,15-35", "vllm-ascend, pull request 13331"),
    _flexprefill("llama-3.1-8b", 0.95),
    _flexprefill("qwen2-7b", 0.9),
    _flexprefill("yi-9b-200k", 0.9),
    ModelPreset(
        method="minference",
        model="llama-3.1-8b",
        about="512 columns and 2048 diagonals on every head",
        source="MInference, arXiv 2407.02490, second best-pattern file for the model",
        parameters={"kind": "vertical_slash", "vertical_size": 512, "slash_size": 2048},
    ),
    ModelPreset(
        method="sliding_window",
        model="mistral-7b-v0.1",
        about="every head a window of 4096 tokens",
        source="Mistral 7B, arXiv 2310.06825, table 1",
        parameters={"window_size": 4096},
    ),
)


def model_key(model: str) -> str:
    """A model's family and size from its name or Hub id: "meta-llama/Llama-3.1-8B-Instruct" is "llama-3.1-8b"."""
    name = model.strip().rsplit("/", 1)[-1].lower().replace("_", "-")
    return re.sub(r"^meta-|-(instruct|chat|base|hf)\b", "", name)


def model_preset(method: str, model: str) -> ModelPreset:
    """What is published for the method on the model.

    Raises:
        ValueError: if nothing is; it says what is, and how to get settings of one's own.
    """
    of_method = {preset.model: preset for preset in MODEL_PRESETS if preset.method == method}
    key = model_key(model)
    if key in of_method:
        return of_method[key]
    if method in CALIBRATED_METHODS:
        remedy = f"calibrate it: sparse-hf calibrate {method} --model {model} --data TEXT --out DIR"
    else:
        remedy = f"it needs none: give SparseConfig(sparse={method!r}) the parameters you want"
    known = f" (but for {', '.join(of_method)})" if of_method else ""
    raise ValueError(f"no settings of {method} are published for {key!r}{known}; {remedy}")
