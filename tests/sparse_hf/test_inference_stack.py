"""A sparsified model in what people generate with: pipelines, streamers, quantised weights, models spread by a map."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)

from sparse_hf import SparseCache, SparseConfig, Streaming, dense, sparsify
from sparse_hf.forward_plan import ForwardPlan

CONFIG = SparseConfig(
    sparse=Streaming(num_sink_tokens=2, window_size=14), head_masks=((0,) * 4, (0, 0, 1, 0), (0,) * 4, (0,) * 4)
)
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8
NEW = 16
CPU_AND_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def load(demo_model: Path) -> Callable[..., Any]:
    """`load(**options)`: the demo's model, sparse; in fp32 unless the options say more."""

    def make(**options: Any) -> Any:
        return sparsify(AutoModelForCausalLM.from_pretrained(demo_model, **{"dtype": torch.float32, **options}), CONFIG)

    return make


@pytest.fixture
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model, padding_side="left")


def greedy(model: Any, input_ids: Tensor, *, use_cache: bool = True, **tensors: Tensor) -> Tensor:
    """New tokens `[batch, NEW]` after the prompts; `tensors` may hold their attention mask."""
    inputs = {name: x.to(model.device) for name, x in {"input_ids": input_ids, **tensors}.items()}
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": use_cache, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options)
    if use_cache:
        assert isinstance(out.past_key_values, SparseCache)
    return out.sequences[:, input_ids.shape[1] :]


def test_pipeline(load: Callable[..., Any], tokenizer: Any) -> None:
    """Alone and in a padded batch: the texts of `generate`, which dense attention does not give."""
    model = load()
    prompts = [PROMPT, PROMPT[:200], PROMPT[100:500]]
    expected = [
        tokenizer.decode(greedy(model, tokenizer(text, return_tensors="pt").input_ids)[0], skip_special_tokens=True)
        for text in prompts
    ]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    for batch_size in (1, 3):
        found = [row[0]["generated_text"] for row in generator(prompts, batch_size=batch_size, **options)]
        assert found == expected, f"batch_size {batch_size}"
    with dense(model):
        assert generator(PROMPT, **options)[0]["generated_text"] != expected[0]


def test_text_iterator_streamer_in_a_thread(load: Callable[..., Any], tokenizer: Any) -> None:
    model, ids = load(), tokenizer(PROMPT, return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(
        target=model.generate, args=(ids,), kwargs={"streamer": streamer, "max_new_tokens": NEW, "do_sample": False}
    )
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == tokenizer.decode(greedy(model, ids)[0]) and len(pieces) > 3


def quantizations() -> dict[str, Callable[[], Any]]:
    def int8() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    return {
        "bitsandbytes": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        # Another class of weights; it computes in fp16 inside.
        "bitsandbytes 8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "torchao": int8,
    }


@pytest.mark.parametrize("name", quantizations())
def test_quantised_weights(load: Callable[..., Any], tokenizer: Any, name: str) -> None:
    """Cached decoding is what the same quantised model computes without a cache; dense answers otherwise."""
    package = name.split()[0]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = load(quantization_config=quantizations()[name](), device_map="cpu")
    plain = load()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype != torch.float32, "nothing was quantised"
    found = greedy(model, ids)
    assert torch.equal(found, greedy(model, ids, use_cache=False))
    with torch.no_grad(), dense(model):
        other = model(ids, use_cache=False).logits
    with torch.no_grad():
        ours, exact = (one(ids, use_cache=False).logits for one in (model, plain))
    error = (ours - exact).norm() / exact.norm()
    assert 0 < error < 0.2 < 2 * (ours - other).norm() / other.norm(), "the quantised model is another one"


@pytest.mark.parametrize("name", ["cpu", "cpu and disk"])
def test_device_map(load: Callable[..., Any], tokenizer: Any, name: str, tmp_path: Path) -> None:
    """accelerate's hooks, which read offloaded layers from disk, change nothing: padded batch, two turns."""
    device_map = {"": "cpu"} if name == "cpu" else CPU_AND_DISK
    spread, plain = load(device_map=device_map, offload_folder=tmp_path), load()
    offloaded = {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    assert offloaded == (name == "cpu and disk")
    batch = tokenizer([PROMPT, PROMPT[:200]], return_tensors="pt", padding=True)
    tokens = [greedy(model, **batch) for model in (spread, plain)]
    assert torch.equal(*tokens)
    assert_two_turns_agree(spread, plain, batch.input_ids[:1])


def assert_two_turns_agree(spread: Any, plain: Any, ids: Tensor) -> None:
    """Logits of a prompt and of a second chunk after it, each with a cache of its own model, are bitwise the same."""
    with torch.no_grad():
        caches = [SparseCache.for_model(model) for model in (spread, plain)]
        for chunk in (ids[:, :150], ids[:, 150:]):
            found = [
                model(chunk.to(model.device), past_key_values=cache).logits.cpu()
                for model, cache in zip((spread, plain), caches, strict=True)
            ]
            assert torch.equal(*found)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("device_map", ["auto", "by hand"])
def test_two_gpus(load: Callable[..., Any], tokenizer: Any, device_map: str) -> None:
    """Logits and tokens of a model spread over two GPUs are those of one GPU."""
    by_hand = {name: int(name.endswith((".2", ".3"))) for name in CPU_AND_DISK}
    spread = load(dtype=torch.bfloat16, device_map="auto" if device_map == "auto" else by_hand)
    plain = load(dtype=torch.bfloat16).to("cuda:0")
    assert {str(p.device) for p in spread.parameters()} == {"cuda:0", "cuda:1"}
    batch = tokenizer([PROMPT, PROMPT[:200]], return_tensors="pt", padding=True)
    tokens = [greedy(model, **batch).cpu() for model in (spread, plain)]
    assert torch.equal(*tokens)
    assert_two_turns_agree(spread, plain, batch.input_ids[:1])


def test_plans_move_once_per_device() -> None:
    """Layers elsewhere share one plan; on the "meta" device, which every machine has."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    plan = ForwardPlan(q_len=3, kv_len=5, q_offset=2, kv_offset=0, padding_mask=mask, device=torch.device("cpu"))
    assert plan.to("cpu") is plan
    moved = plan.to("meta", non_blocking=True)
    assert moved is plan.to(torch.device("meta")) and moved.padding_mask is not None
    assert moved.padding_mask.is_meta and moved.device.type == "meta" and (moved.q_len, moved.kv_len) == (3, 5)
