"""`sparsify` touches one model at call time, refuses what it cannot serve, and leaves no trace when undone."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparse_hf import (
    LayerRule,
    SparseCache,
    SparseConfig,
    Streaming,
    dense,
    is_sparsified,
    set_head_masks,
    sparsify,
    sparsity_summary,
    unsparsify,
)
from sparse_hf.patching import dense_heads, get_handle

STREAMING = SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=6))
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 99, (2, 40))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def attributes(model: Any) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_undone_without_a_trace(make_model: Callable, family: str, ids: Tensor) -> None:
    model = make_model(family)
    config, names, keys = model.config, attributes(model), list(model.state_dict())
    described = config.to_dict()
    before = logits(model, ids)
    assert sparsify(model, STREAMING) is model
    assert is_sparsified(model)
    assert list(model.state_dict()) == keys
    assert (logits(model, ids) - before).abs().max() > 0.1
    with dense(model) as inside:
        assert inside is model
        assert torch.equal(logits(model, ids), before)
    assert unsparsify(model) is model
    assert not is_sparsified(model)
    assert torch.equal(logits(model, ids), before)
    assert model.config is config and config.to_dict() == described
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
    assert attributes(model) == names
    sparsify(model, STREAMING)
    assert (logits(model, ids) - before).abs().max() > 0.1


def test_changes_made_meanwhile_survive(make_model: Callable, family: str, ids: Tensor, tmp_path: Path) -> None:
    model = sparsify(make_model(family), STREAMING)
    model.resize_token_embeddings(120)
    model.config.use_cache = False
    unsparsify(model)
    assert (model.config.vocab_size, model.config.use_cache) == (120, False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(model, ids))


def test_exceptions_leave_the_model_as_it_was(make_model: Callable, family: str, ids: Tensor) -> None:
    model = make_model(family)
    before = logits(model, ids)
    sparsify(model, STREAMING)
    sparse = logits(model, ids)
    with pytest.raises(KeyError), dense(model):
        raise KeyError
    assert torch.equal(logits(model, ids), sparse)
    with pytest.raises(IndexError), dense(model):
        model(ids + 1000)
    assert torch.equal(logits(model, ids), sparse)
    with pytest.raises(ValueError, match="2-D padding mask"):
        model(ids, attention_mask=torch.ones(2, 1, 40, 40))
    assert torch.equal(logits(model, ids), sparse)
    assert torch.equal(logits(unsparsify(model), ids), before)


def test_dense_may_be_nested_and_end_after_unsparsify(make_model: Callable, ids: Tensor) -> None:
    model = make_model("llama")
    before = logits(model, ids)
    sparsify(model, STREAMING)
    sparse = logits(model, ids)
    with dense(model), dense(model):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), sparse)
    with dense(model):
        unsparsify(model)
    assert torch.equal(logits(model, ids), before)
    for function in (unsparsify, lambda m: dense(m).__enter__(), lambda m: sparsity_summary(m, 10)):
        with pytest.raises(ValueError, match="not sparsified"):
            function(model)


def test_a_model_that_shares_the_configuration_is_untouched(family: str, make_model: Callable, ids: Tensor) -> None:
    first = make_model(family)
    second = copy.deepcopy(first, {id(first.config): first.config})
    assert second.config is first.config
    before = logits(second, ids)
    sparsify(first, STREAMING)
    assert (logits(first, ids) - before).abs().max() > 0.1
    assert torch.equal(logits(second, ids), before)
    generated = second.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    assert type(generated.past_key_values) is DynamicCache


def test_deepcopy_is_independent(make_model: Callable, family: str, ids: Tensor) -> None:
    model = make_model(family)
    before = logits(model, ids)
    sparsify(model, STREAMING)
    sparse = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), sparse)
    set_head_masks(twin, torch.ones_like(model._sparse_hf_handle.head_masks))
    torch.testing.assert_close(logits(twin, ids), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), sparse)
    generated = twin.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert generated.past_key_values.kv_bytes() == sparsity_summary(twin, 42, batch_size=2).kv_bytes
    assert torch.equal(logits(unsparsify(twin), ids), before)
    assert torch.equal(logits(model, ids), sparse)
    assert torch.equal(logits(unsparsify(model), ids), before)


READ_A_PICKLE = """
import sys, torch
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
generated = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
assert torch.equal(generated.sequences, expected), "other tokens than before"
assert type(generated.past_key_values).__name__ == "SparseCache"
"""


def test_a_pickle_is_as_sparse_in_another_process(make_model: Callable, ids: Tensor, tmp_path: Path) -> None:
    """`torch.save(model)`, and what multiprocessing and Ray hand over; the reader has sparsified nothing itself."""
    model = make_model("llama")
    before = logits(model, ids)
    sparsify(model, STREAMING)
    path = tmp_path / "model.pt"
    torch.save((model, ids, model.generate(ids, max_new_tokens=3, do_sample=False)), path)
    done = subprocess.run([sys.executable, "-c", READ_A_PICKLE, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    twin = torch.load(path, weights_only=False)[0]
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert torch.equal(logits(unsparsify(twin), ids), before)
    assert is_sparsified(model)


def test_twice_is_refused(make_model: Callable, ids: Tensor) -> None:
    model = sparsify(make_model("llama"), STREAMING)
    sparse = logits(model, ids)
    with pytest.raises(ValueError, match="unsparsify"):
        sparsify(model, SparseConfig(head_masks="all_full"))
    assert torch.equal(logits(model, ids), sparse)


def test_saved_model_is_the_plain_one(make_model: Callable, family: str, ids: Tensor, tmp_path: Path) -> None:
    model = make_model(family)
    before = logits(model, ids)
    sparsify(model, STREAMING).save_pretrained(tmp_path)
    assert "sparse" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not is_sparsified(loaded)
    assert torch.equal(logits(loaded, ids), before)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16)),
        lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
    ],
)
def test_unsupported_family_names_the_supported(build: Callable) -> None:
    with pytest.raises(ValueError, match=r"supported: llama, qwen2, qwen3, mistral, gpt2"):
        sparsify(build(), STREAMING)


def test_only_transformers_models(make_model: Callable) -> None:
    with pytest.raises(ValueError, match="expected a transformers model"):
        sparsify(torch.nn.Sequential(make_model("llama")), STREAMING)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)).double(), "dtype must be one of float32, bfloat16, float16"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=12)), "multiple of 8 up to 256, the model has 12"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=264)), "multiple of 8 up to 256, the model has 264"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, add_cross_attention=True)), "cross"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, reorder_and_upcast_attn=True)), "upcast"),
    ],
)
def test_unsupported_models(build: Callable, message: str) -> None:
    model = build()
    names = attributes(model)
    with pytest.raises(ValueError, match=message):
        sparsify(model, STREAMING)
    assert not is_sparsified(model) and attributes(model) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_model: Callable, dtype: torch.dtype, family: str, ids: Tensor) -> None:
    truth = logits(sparsify(make_model(family), STREAMING), ids)
    model = sparsify(make_model(family).to(dtype), STREAMING)
    cache = SparseCache.for_model(model)
    with torch.no_grad():
        cached = torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 40))], 1)
    for result in (logits(model, ids), cached):
        assert result.dtype == dtype
        assert (result.float() - truth).norm() / truth.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert cache.kv_bytes() == sparsity_summary(model, 40, batch_size=2).kv_bytes


def test_too_long_a_sequence(make_model: Callable) -> None:
    model = sparsify(make_model("llama"), STREAMING)
    ids = torch.randint(1, 99, (1, 257))
    assert logits(model, ids[:, :256]).isfinite().all()
    for cached in (False, True):
        with pytest.raises(ValueError, match=r"257 tokens.*made for 256"):
            model(ids, use_cache=cached)
    cache = SparseCache.for_model(model)
    with torch.no_grad():
        model(ids[:, :250], past_key_values=cache)
        with pytest.raises(ValueError, match=r"257 tokens.*made for 256"):
            model(ids[:, 250:], past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "qwen2_native", "qwen3", "mistral"])
def test_attention_weights_are_refused(make_model: Callable, family: str, ids: Tensor) -> None:
    model = sparsify(make_model(family), STREAMING)
    with pytest.raises(ValueError, match=r'with dense.*set_attn_implementation\("eager"\)'):
        model(ids, output_attentions=True)
    with dense(model):  # what the message says
        model.set_attn_implementation("eager")
        assert len(model(ids, output_attentions=True).attentions) == model.config.num_hidden_layers
    assert model.config._attn_implementation == "sparse_hf"


def test_four_dimensional_masks_are_refused(make_model: Callable, family: str, ids: Tensor) -> None:
    model = sparsify(make_model(family), STREAMING)
    with pytest.raises(ValueError, match="no 4-D attention_mask"):
        model(ids, attention_mask=torch.zeros(2, 1, 40, 40))


def test_attention_dropout_is_refused_in_training_only(
    make_model: Callable, family: str, ids: Tensor, tmp_path: Path
) -> None:
    model = make_model(family)
    name = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    setattr(model.config, name, 0.1)
    model.save_pretrained(tmp_path)
    model = sparsify(type(model).from_pretrained(tmp_path), STREAMING)
    assert logits(model.eval(), ids).isfinite().all()
    with pytest.raises(ValueError, match=rf"dropout is not supported, got 0\.1; load .*{name}=0\.0"):
        model.train()(ids)
    remedied = sparsify(type(model).from_pretrained(tmp_path, **{name: 0.0}), STREAMING)
    assert remedied.train()(ids).logits.isfinite().all()


BAD_MASKS = [
    (torch.ones(3, 2), "num_layers"),
    (torch.ones(2, 4), "num_layers"),
    (torch.ones(2), "num_layers"),
    (torch.tensor([[1.0, float("nan")], [0, 1]]), "NaN"),
    (torch.tensor([[1, 2], [0, 1]]), "0 .sparse. and 1 .full. only"),
    (torch.tensor([[0.3, 1.0], [0, 1]]), "0 .sparse. and 1 .full. only"),
    (torch.ones(2, 2, dtype=torch.complex64), "complex"),
    ([["a", "b"], ["c", "d"]], "tensor or rows of numbers"),
    ([[1, 0], [1]], "tensor or rows of numbers"),
    ("all_full", "tensor or rows of numbers"),
]


@pytest.mark.parametrize(("masks", "message"), BAD_MASKS)
def test_wrong_head_masks(make_model: Callable, ids: Tensor, masks: Any, message: str) -> None:
    model = make_model("llama")
    names, before = attributes(model), logits(model, ids)
    with pytest.raises(ValueError, match=message):
        sparsify(model, STREAMING, head_masks=masks)
    assert not is_sparsified(model) and attributes(model) == names and torch.equal(logits(model, ids), before)
    sparsify(model, STREAMING)
    sparse = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        set_head_masks(model, masks)
    assert torch.equal(logits(model, ids), sparse)


def test_rules_beyond_the_model_are_refused(make_model: Callable) -> None:
    model = make_model("llama")
    for rule in (LayerRule(layers="2", sparse="dense"), LayerRule(layers="*", kv_heads="0-2", sparse="dense")):
        with pytest.raises(ValueError, match="goes beyond the last"):
            sparsify(model, SparseConfig(rules=(rule,)))
        assert not is_sparsified(model)


@pytest.mark.parametrize(
    "make_masks", [torch.tensor, lambda x: torch.tensor(x).bool(), lambda x: torch.tensor(x) * 1.0, list]
)
def test_set_head_masks(make_model: Callable, ids: Tensor, make_masks: Callable) -> None:
    masks = [[1, 0], [0, 1]]
    expected = logits(sparsify(make_model("llama"), STREAMING, head_masks=masks), ids)
    model = sparsify(make_model("llama"), STREAMING)
    assert (logits(model, ids) - expected).abs().max() > 0.1
    set_head_masks(model, make_masks(masks))
    assert torch.equal(logits(model, ids), expected)
    assert sparsity_summary(model, 40).head_sparsity == 0.5
    with pytest.raises(ValueError, match="not sparsified"):
        set_head_masks(make_model("llama"), masks)


def test_masks_from_a_file_need_the_file(make_model: Callable) -> None:
    with pytest.raises(ValueError, match="takes its head masks from a file"):
        sparsify(make_model("llama"), SparseConfig(head_masks="file"))


def test_unsparsified_model_with_the_name_set_explains_itself(make_model: Callable, ids: Tensor) -> None:
    sparsify(make_model("llama"), STREAMING)  # registers the name
    model = make_model("llama")
    model.config._attn_implementation = "sparse_hf"
    with pytest.raises(ValueError, match="not sparsified"):
        model(ids)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_dense_heads_compute_what_the_model_did(make_model: Callable, family: str, ids: Tensor, packed: bool) -> None:
    model = make_model(family)
    positions = torch.arange(40)
    inputs = {"position_ids": (positions % 23 if packed else positions)[None], "use_cache": False}
    expected = model(ids, **inputs).logits
    sparsify(model, STREAMING)
    set_head_masks(model, torch.zeros_like(get_handle(model).head_masks))
    sparse = model(ids, **inputs).logits
    with dense_heads(model):
        torch.testing.assert_close(model(ids, **inputs).logits, expected)
    assert torch.equal(model(ids, **inputs).logits, sparse) and not torch.allclose(sparse, expected)
