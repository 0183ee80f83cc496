"""Configurations by name, for a first look without learned masks."""

from __future__ import annotations

from sparse_hf.config import SparseConfig
from sparse_hf.methods import Dense, SlidingWindow, Streaming

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
    return {name: text for name, (text, _) in _PRESETS.items()}


def preset(name: str) -> SparseConfig:
    """A preset's configuration.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name][1]
