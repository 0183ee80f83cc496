"""transformers' own `layer_types` and `sliding_window`: layer-wise windows that run without sparse_hf."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from sparse_hf.adapters import adapter_for_config
from sparse_hf.artefact import replace_folder
from sparse_hf.config import SparseConfig
from sparse_hf.interop.layers import reject_min_seq_len, resolve_source
from sparse_hf.methods import Dense, Method, SlidingWindow
from sparse_hf_kernels import UNBOUNDED

LAYER_WISE = ("qwen2", "qwen3", "ministral")
"""Families whose attention masks follow `layer_types`."""
ONE_WINDOW = ("mistral",)
"""Families with one window for all layers or none."""
SAME_WEIGHTS = {"llama": "ministral", "mistral": "ministral"}
"""Families whose weights another, layer-wise one loads unchanged and computes alike."""
CONFIG_FILE = "config.json"


def native_config(
    source: str | Path | SparseConfig, model_config: PretrainedConfig, *, model_type: str | None = None
) -> PretrainedConfig:
    """The model's configuration with which plain transformers computes what the sparsified model computes.

    Give it to `from_pretrained(base, config=...)`; weights stay as they are. transformers' cache then keeps a window's
    keys alone, as ours does.

    Args:
        source: an artefact's folder, or a configuration: each layer's heads all dense or all `sliding_window`, with one
            size for all layers that have a window (the model's own windows included).
        model_config: the base model's.
        model_type: "ministral" to change the family of a `llama` or `mistral` model, whose weights it loads unchanged;
            by default the family stays.

    Raises:
        ValueError: for what transformers cannot express, naming the layer or what would do.
    """
    adapter = adapter_for_config(model_config)
    found = resolve_source(source, model_config)
    reject_min_seq_len(found.config, "transformers")
    shape = adapter.shape(model_config)
    if found.shape != shape:
        raise ValueError(f"the artefact was made for {found.shape.to_dict()}, the model is {shape.to_dict()}")
    own = [adapter.native_window(model_config, layer) for layer in range(shape.num_layers)]
    windows = [min(_window(row, layer), own[layer]) for layer, row in enumerate(found.methods)]
    sizes = {size for size in windows if size < UNBOUNDED}
    if len(sizes) > 1:
        raise ValueError(f"transformers has one sliding_window for all layers, and these have {sorted(sizes)}")
    size = sizes.pop() if sizes else None
    family = model_config.model_type
    if model_type in (None, family):
        changed = copy.deepcopy(model_config)
        if family in ONE_WINDOW and size is not None and UNBOUNDED in windows:
            raise ValueError(f"{family} has one window for all layers, and some are dense here; {_remedy(family)}")
        if family not in (*ONE_WINDOW, *LAYER_WISE) and size is not None:
            raise ValueError(f"{family} knows no sliding window; {_remedy(family)}")
    elif SAME_WEIGHTS.get(family) == model_type:
        changed = _converted(model_config, str(model_type))
    else:
        raise ValueError(f"{family} weights do not load as {model_type!r}; {_remedy(family)}")
    if size is not None or getattr(changed, "sliding_window", None) is not None:
        changed.sliding_window = size
    if changed.model_type in LAYER_WISE:
        changed.layer_types = ["full_attention" if w == UNBOUNDED else "sliding_attention" for w in windows]
        if hasattr(changed, "use_sliding_window"):
            changed.use_sliding_window = size is not None
    return changed


def _window(methods: list[Method], layer: int) -> int:
    """Tokens that the layer reads, UNBOUNDED for a dense one."""
    if len(set(methods)) > 1:
        raise ValueError(
            f"transformers' masks are layer-wise, and the heads of layer {layer} follow "
            f"{sorted({str(method.to_dict()) for method in methods})}; give them one method"
        )
    if isinstance(methods[0], Dense):
        return UNBOUNDED
    if isinstance(methods[0], SlidingWindow):
        return methods[0].window_size
    raise ValueError(f"transformers' masks are dense or sliding windows; layer {layer} follows {methods[0].name!r}")


def _remedy(family: str) -> str:
    if family in SAME_WEIGHTS:
        return f'its weights load unchanged as {SAME_WEIGHTS[family]!r}: pass model_type="{SAME_WEIGHTS[family]}"'
    return f"families that would do: {', '.join((*LAYER_WISE, *ONE_WINDOW))}"


def _converted(config: PretrainedConfig, model_type: str) -> PretrainedConfig:
    """The configuration in a family that computes the same from the same weights.

    Raises:
        ValueError: if the base model has what that family lacks.
    """
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{model_type} has no biases, and this {config.model_type} model has {name}=True")
    if getattr(config, "pretraining_tp", 1) != 1:
        raise ValueError(f"{model_type} has no pretraining_tp, and this model has {config.pretraining_tp}")
    values = config.to_dict()
    names = AutoConfig.for_model(model_type).to_dict().keys() - {"model_type", "architectures", "layer_types"}
    known = {name: values[name] for name in names if name in values}
    known["head_dim"] = adapter_for_config(config).shape(config).head_dim
    known.setdefault("sliding_window", None)
    return AutoConfig.for_model(model_type, **known)


def export_native(
    source: str | Path | SparseConfig,
    out: str | Path,
    model_config: PretrainedConfig,
    *,
    model_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `native_config` as the `config.json` of a folder: `AutoConfig.from_pretrained(out)`.

    Args:
        source, model_config, model_type: as in `native_config`.
        out: the folder.
        overwrite: replace a folder with a config.json and no weights; put weights beside it afterwards.

    Raises:
        ValueError: as `native_config`, or if `out` exists, or holds weights.
    """
    config = native_config(source, model_config, model_type=model_type)
    with replace_folder(Path(out), overwrite=overwrite, marker=CONFIG_FILE) as staging:
        config.save_pretrained(staging)
    return Path(out)
