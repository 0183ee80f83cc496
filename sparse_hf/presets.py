"""Configurations by name, for a first look without learned masks; "method:model" names a published setting.

A method's name alone is every head under that method with its defaults.
"""

from __future__ import annotations

from sparse_hf.config import SparseConfig
from sparse_hf.methods import Dense, Explicit, Method, SlidingWindow, Streaming, available_methods, method_from_dict
from sparse_hf.model_presets import MODEL_PRESETS, model_preset

_PRESETS: dict[str, tuple[str, SparseConfig]] = {
    "dense": ("every head dense, through sparse_hf's own path", SparseConfig(head_masks="all_full")),
    "streaming": (
        "every head streaming: 64 sinks + 1024 tokens (StreamingLLM, arXiv 2309.17453)",
        SparseConfig(sparse=Streaming(num_sink_tokens=64, window_size=1024)),
    ),
    "sliding_window": (
        "every head a window of 4096 tokens (Mistral 7B v0.1, arXiv 2310.06825)",
        SparseConfig(sparse=SlidingWindow(window_size=4096)),
    ),
    "duo_attention": (
        "dense and streaming heads as DuoAttention deploys them, 64 sinks + 256 tokens; needs head masks",
        SparseConfig(full=Dense(), sparse=Streaming(num_sink_tokens=64, window_size=256), head_masks="file"),
    ),
    "prulong": (
        "dense and streaming heads as PruLong trains them, 128 sinks + 1024 tokens; needs head masks",
        SparseConfig(full=Dense(), sparse=Streaming(num_sink_tokens=128, window_size=1024), head_masks="file"),
    ),
}


def available_presets() -> dict[str, str]:
    """What each preset is, by name."""
    methods = {name: f"every head {name}: {kind.summary}" for name, kind in _plain_methods().items()}
    published = {preset.name: f"{preset.about} ({preset.source})" for preset in MODEL_PRESETS}
    return {**{name: text for name, (text, _) in _PRESETS.items()}, **methods, **published}


def _plain_methods() -> dict[str, type[Method]]:
    """Methods without a preset of their name that need no parameter."""
    return {name: kind for name, kind in available_methods().items() if name not in _PRESETS and kind is not Explicit}


def names_preset(text: str) -> bool:
    """Whether the text is a preset's name, or has the form "method:model" of one."""
    method, colon, _ = text.partition(":")
    return text in _PRESETS or text in _plain_methods() or bool(colon and method in available_methods())


def preset(name: str, model: str | None = None) -> SparseConfig:
    """A preset's configuration.

    Args:
        name: of a preset, "method:model" included; or of a method, with `model`.
        model: name or Hub id of a model for which something is published.

    Raises:
        ValueError: for an unknown name, listing the known ones, or a model for which nothing is published, saying how
            to find settings for it.
    """
    if model is None and ":" in name:
        name, _, model = name.partition(":")
    if model is None:
        if name in _plain_methods():
            return SparseConfig(sparse=method_from_dict(name))
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(available_presets())}")
        return _PRESETS[name][1]
    if name not in available_methods():
        raise ValueError(f"unknown method {name!r}; known: {', '.join(available_methods())}")
    return SparseConfig.from_dict(model_preset(name, model).to_config())
