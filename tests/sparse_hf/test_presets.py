"""Presets by name, and published settings by method and model."""

from collections.abc import Callable

import pytest

from sparse_hf import (
    Dense,
    FlexPrefill,
    MInference,
    SlidingWindow,
    SparseConfig,
    Streaming,
    Triangle,
    available_methods,
    available_presets,
    sparsify,
)
from sparse_hf.methods import method_class
from sparse_hf.model_presets import MODEL_PRESETS, model_key
from sparse_hf.sparsify import resolve_spec

HEADS = 2


def layers_of(config: SparseConfig, num_layers: int) -> dict[int, str]:
    """The layers that are not dense, with their method."""
    resolved = config.resolve([[0] * HEADS] * num_layers)
    return {layer: row[0].name for layer, row in enumerate(resolved) if row[0] != Dense()}


@pytest.mark.parametrize(
    ("model", "num_layers", "expected"),
    [
        ("llama-3.1-8b", 32, range(16, 32)),
        ("meta-llama/Llama-3.1-8B-Instruct", 32, range(16, 32)),
        ("meta-llama/Meta-Llama-3.1-8B", 32, range(16, 32)),
        ("gradientai/Llama-3-8B-Instruct-262k", 32, range(16, 32)),
        ("Qwen/Qwen2.5-7B-Instruct", 28, range(20, 28)),
        ("qwen3-8b", 36, [5, 7, 10, *range(15, 36)]),
    ],
)
def test_trianglemix(model: str, num_layers: int, expected: list[int]) -> None:
    config = SparseConfig.preset("triangle", model)
    assert layers_of(config, num_layers) == dict.fromkeys(expected, "triangle")
    assert config.rules[0].sparse == Triangle(num_sink_tokens=8, window_size=512, num_last_tokens=128)


def test_other_methods() -> None:
    def method(name: str, model: str) -> object:
        config = SparseConfig.preset(name, model)
        assert len(layers_of(config, 8)) == 8
        return config.rules[0].sparse

    assert method("flexprefill", "Llama-3.1-8B") == FlexPrefill(gamma=0.95, tau=0.1, min_budget=1024)
    assert method("flexprefill", "Qwen2-7B") == FlexPrefill(gamma=0.9, tau=0.1, min_budget=1024)
    assert method("minference", "Llama-3.1-8B") == MInference(vertical_size=512, slash_size=2048)
    assert method("sliding_window", "mistralai/Mistral-7B-v0.1") == SlidingWindow(window_size=4096)
    assert SparseConfig.preset("streaming") == SparseConfig(sparse=Streaming(num_sink_tokens=64, window_size=1024))


def test_every_preset_has_a_source_and_a_configuration() -> None:
    described = available_presets()
    for published in MODEL_PRESETS:
        assert published.source and published.source in described[published.name]
        assert published.method in available_methods() and model_key(published.model) == published.model
    for name in described:
        assert SparseConfig.from_dict(SparseConfig.preset(name).to_dict()) == SparseConfig.preset(name)


def test_sparsify_takes_the_name_of_a_published_setting(make_model: Callable) -> None:
    model = sparsify(make_model("llama"), "sliding_window:mistral-7b-v0.1")
    assert {method.name for row in model._sparse_hf_handle.methods for method in row} == {"sliding_window"}
    with pytest.raises(ValueError, match="goes beyond the last layer, 1"):
        sparsify(make_model("llama"), "triangle:llama-3.1-8b")
    with pytest.raises(ValueError, match="sparse-hf calibrate triangle --model qwen3-14b"):
        sparsify(make_model("llama"), "triangle:qwen3-14b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("triangle", "qwen3-14b"), "published for 'qwen3-14b' .but for llama-3.1-8b.*sparse-hf calibrate triangle"),
        (
            ("xattention", "me/Mine"),
            "published for 'mine'; calibrate it: sparse-hf calibrate xattention --model me/Mine",
        ),
        (("bigbird", "qwen3-8b"), "it needs none: give SparseConfig.sparse='bigbird'"),
        (("nonesuch", "qwen3-8b"), "unknown method 'nonesuch'; known: dense"),
        (("nonesuch",), "unknown preset 'nonesuch'; known: dense"),
        (("explicit",), "unknown preset 'explicit'; known: .*triangle:llama-3.1-8b"),
    ],
)
def test_what_is_not_published(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.preset(*arguments)


@pytest.mark.parametrize("name", ["triangle", "bigbird", "xattention"])
def test_a_method_alone_is_every_head_under_it(name: str) -> None:
    config, artefact = resolve_spec(name)
    assert artefact is None and config == SparseConfig(sparse=method_class(name)(), head_masks="all_sparse")
    assert name in available_presets()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-v0.1"),
        ("01-ai/Yi-9B-200K", "yi-9b-200k"),
        ("Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b-1m"),
    ],
)
def test_model_names(name: str, key: str) -> None:
    assert model_key(name) == key
