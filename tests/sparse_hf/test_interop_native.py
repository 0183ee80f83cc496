"""Layer-wise windows in transformers' own words: the exported configuration computes what the sparsified model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from sparse_hf import (
    Dense,
    LayerRule,
    SlidingWindow,
    SparseConfig,
    Streaming,
    save_artefact,
    sparsify,
)
from sparse_hf.cli import build_app
from sparse_hf.interop import export_native, native_config

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 9
LAYERS = SparseConfig(sparse=SlidingWindow(window_size=WINDOW), rules=(LayerRule(layers="0,2", sparse=Dense()),))
EVERY = SparseConfig(sparse=SlidingWindow(window_size=WINDOW))
NATIVE = {**COMMON, "use_sliding_window": True, "max_window_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

Case = tuple[Callable[[], PreTrainedModel], SparseConfig, str | None]
CASES: dict[str, Case] = {
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)), LAYERS, None),
    "qwen2_every": (lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)), EVERY, None),
    # Layers 2 and 3 have a window of their own, which a dense head keeps.
    "qwen2_native": (lambda: Qwen2ForCausalLM(Qwen2Config(**NATIVE, sliding_window=WINDOW)), LAYERS, None),
    "qwen2_narrower": (lambda: Qwen2ForCausalLM(Qwen2Config(**NATIVE, sliding_window=30)), EVERY, None),
    "qwen2_dense": (lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)), SparseConfig(sparse=Dense()), None),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)), LAYERS, None),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)), EVERY, None),
    "mistral_native": (lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=30)), EVERY, None),
    "mistral_layers": (
        lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
        LAYERS,
        "ministral",
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE)), LAYERS, "ministral"),
}


def batch() -> tuple[Tensor, Tensor]:
    """Two sequences of 40 tokens, the first padded on the left by 11."""
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    return ids * mask, mask


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids, mask = batch()
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    make, config, model_type = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    before = model.config.to_dict()
    out = export_native(config, tmp_path / "out", model.config, model_type=model_type)
    assert model.config.to_dict() == before, "the model's own configuration is left alone"
    # A round trip through config.json and the base's weights; nothing of sparse_hf takes part.
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=AutoConfig.from_pretrained(out)).eval()
    assert native.config.model_type == (model_type or model.config.model_type)
    dense = logits(model)
    sparse = logits(sparsify(model, config))
    torch.testing.assert_close(logits(native), sparse, rtol=1e-4, atol=1e-5)
    if name == "qwen2_dense":
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-5)
    else:
        assert (dense - sparse).abs().max() > 1e-2, "the window must matter"
    ids, mask = batch()
    texts = [
        m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for m in (model, native)
    ]
    assert torch.equal(*texts), "cached decoding too"


def config_of(family: str, **more: Any) -> PretrainedConfig:
    if family == "gpt2":
        return GPT2Config(n_embd=64, n_layer=4, n_head=4)
    return AutoConfig.for_model(family, **{**COMMON, **more})


@pytest.mark.parametrize(
    ("family", "config", "options", "words"),
    [
        ("llama", EVERY, {}, 'llama knows no sliding window.*pass model_type="ministral"'),
        ("gpt2", EVERY, {}, "gpt2 knows no sliding window; families that would do: qwen2, qwen3"),
        ("mistral", LAYERS, {"sliding_window": None}, 'one window for all layers.*model_type="ministral"'),
        ("qwen2", SparseConfig(sparse=Streaming()), {}, "layer 0 follows 'streaming'"),
        (
            "qwen2",
            SparseConfig(sparse=SlidingWindow(window_size=3), head_masks=[[0, 0], [0, 1], [0, 0], [0, 0]]),
            {},
            "heads of layer 1",
        ),
        (
            "qwen2",
            SparseConfig(
                sparse=SlidingWindow(window_size=3), rules=(LayerRule(layers="1", sparse=SlidingWindow(window_size=4)),)
            ),
            {},
            r"one sliding_window for all layers.*\[3, 4\]",
        ),
        (
            "qwen2",
            SparseConfig(sparse=SlidingWindow(window_size=3), rules=(LayerRule(layers="3", sparse=Dense()),)),
            {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 3},
            r"\[3, 50\]",
        ),
        ("qwen2", SparseConfig(sparse=SlidingWindow(window_size=3), min_seq_len=10), {}, "no min_seq_len"),
    ],
)
def test_what_transformers_cannot_say(family: str, config: SparseConfig, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        native_config(config, config_of(family, **options))


def test_families_that_share_no_weights() -> None:
    with pytest.raises(ValueError, match="qwen2 weights do not load as 'ministral'"):
        native_config(EVERY, config_of("qwen2"), model_type="ministral")
    with pytest.raises(ValueError, match="has no biases, and this llama model has attention_bias"):
        native_config(EVERY, config_of("llama", attention_bias=True), model_type="ministral")


def test_native_on_the_command_line(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**COMMON))
    model.save_pretrained(tmp_path / "base")
    folder = save_artefact(
        sparsify(model, LAYERS), tmp_path / "artefact", base_model_name_or_path=str(tmp_path / "base")
    )
    args = ["export", str(folder), "--format", "native", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), args)
    assert result.exit_code == 0, result.output + repr(result.exception)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2 and config.sliding_window == WINDOW
    other = Qwen3Config(**{**COMMON, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="the artefact was made for"):
        native_config(folder, other)


def test_a_model_folder_keeps_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(ValueError, match="holds weights"):
        export_native(SparseConfig(sparse=SlidingWindow(window_size=8)), tmp_path / "model", config, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
