"""The operators by themselves: masked softmax over what a method chose, any mask, and files of knobs."""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_hf
from sparse_hf import (
    FlexPrefill,
    MInference,
    MInferenceHead,
    Streaming,
    XAttention,
    flexprefill_prefill,
    full_prefill,
    load_prefill_config,
    minference_prefill,
    prefill,
    xattention_prefill,
)
from sparse_hf.methods import DynamicMethod

SIZE = 64
CASES: dict[str, tuple[Callable, dict[str, Any], DynamicMethod]] = {
    "xattention": (
        xattention_prefill,
        {"stride": 8, "threshold": 0.3, "block_size": SIZE},
        XAttention(stride=8, threshold=0.3, block_size=SIZE),
    ),
    "xattention_per_head": (
        xattention_prefill,
        {"threshold": [0.2, 0.5, 0.9, 0.0], "block_size": SIZE},
        XAttention(threshold=(0.2, 0.5, 0.9, 0.0), block_size=SIZE),
    ),
    "sparsity_ratio": (
        xattention_prefill,
        {"sparsity_ratio": 0.6, "block_size": SIZE},
        XAttention(sparsity_ratio=0.6, block_size=SIZE),
    ),
    "flexprefill": (
        flexprefill_prefill,
        {"gamma": 0.3, "tau": 0.4, "min_budget": 64, "max_budget": 256, "block_size": SIZE},
        FlexPrefill(gamma=0.3, tau=0.4, min_budget=64, max_budget=256, block_size=SIZE),
    ),
    "minference": (
        minference_prefill,
        {"vertical_size": 35, "slash_size": 100, "block_size": SIZE},
        MInference(vertical_size=35, slash_size=100, block_size=SIZE),
    ),
    "minference_heads": (
        minference_prefill,
        {"heads": [MInferenceHead(kind="block_sparse", top_k=n) for n in (2, 3, 4, 5)], "block_size": SIZE},
        MInference(heads=tuple(MInferenceHead(kind="block_sparse", top_k=n) for n in (2, 3, 4, 5)), block_size=SIZE),
    ),
    "adaptive_budget": (
        minference_prefill,
        {"adaptive_budget": 0.2, "block_size": SIZE},
        MInference(adaptive_budget=0.2, block_size=SIZE),
    ),
}


def tensors(q_len: int, kv_len: int, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(q_len)
    shapes = (2, 4, q_len, 16), (2, 2, kv_len, 16), (2, 2, kv_len, 16)
    return tuple((1.5 * torch.randn(shape)).requires_grad_(requires_grad) for shape in shapes)


def token_mask(method: DynamicMethod, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Boolean `[batch, num_heads, q_len, kv_len]`."""
    kv_len, offset = k.shape[2], k.shape[2] - q.shape[2]
    chosen = method.select(q, k, scale=scale, q_offset=offset)
    i, j = torch.arange(offset, kv_len)[:, None], torch.arange(kv_len)[None]
    keep = torch.zeros(*q.shape[:3], kv_len, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in chosen.counts.shape)).tolist():
        for block in chosen.indices[b, h, row, : chosen.counts[b, h, row]].tolist():
            keep[b, h] |= (i // SIZE == offset // SIZE + row) & (j // SIZE == block)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        for column in [] if chosen.columns is None else chosen.columns[b, h].tolist():
            keep[b, h] |= j == column
    return keep & (j <= i)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    """Softmax attention and log-sum-exp; rows without keys give 0 and -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(500, 500), (130, 500), (256, 512)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_over_what_was_chosen(case: str, q_len: int, kv_len: int, scale: float | None) -> None:
    function, knobs, method = CASES[case]
    q, k, v = tensors(q_len, kv_len, requires_grad=True)
    mask = token_mask(method, q.detach(), k.detach(), scale or 0.25)
    assert mask.float().mean() < 0.95 * torch.ones(q_len, kv_len).tril(kv_len - q_len).mean(), "everything is kept"
    out, lse = function(q, k, v, scale=scale, return_lse=True, **knobs)
    truth, true_lse = masked(q, k, v, mask, scale or 0.25)
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-4, atol=1e-5)
    assert torch.equal(function(q, k, v, scale=scale, **knobs), out) and torch.equal(
        prefill(q, k, v, method, scale=scale), out
    )
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v)),
        torch.autograd.grad((truth * weight).sum() + true_lse.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_single_query_reads_every_key(case: str) -> None:
    function, knobs, _ = CASES[case]
    q, k, v = tensors(1, 500)
    out = function(q, k, v, **knobs)
    torch.testing.assert_close(out, masked(q, k, v, torch.ones(1, 500).bool())[0], rtol=1e-4, atol=1e-5)


def test_transposed_inputs_and_half_precision() -> None:
    """Tensors as transformers gives them: [batch, length, heads, head_dim] in memory."""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(400, 400))
        for function, knobs, method in CASES.values():
            out = function(q, k, v, **knobs)
            mask = token_mask(method, q, k, 0.25)
            truth, _ = masked(q.float(), k.float(), v.float(), mask)
            assert out.dtype == dtype and (out.float() - truth).abs().max() < 0.03


def test_any_method_and_what_it_reads() -> None:
    q, k, v = tensors(100, 200)
    i, j = torch.arange(100, 200)[:, None], torch.arange(200)[None]
    out, lse = prefill(q, k, v, Streaming(num_sink_tokens=3, window_size=10), return_lse=True)
    truth, true_lse = masked(q, k, v, (j <= i) & ((j < 3) | (i - j < 10)))
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-4, atol=1e-5)


MASKS = {
    "all": ((2, 4, 150, 300), False),
    "of the batch": ((2, 1, 150, 300), False),
    "of heads": ((4, 150, 300), False),
    "of pairs": ((150, 300), False),
    "of keys": ((2, 1, 1, 300), False),
    "and causal": ((4, 150, 300), True),
}


@pytest.mark.parametrize("name", MASKS)
def test_full_prefill_with_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_hf.functional, "QUERY_CHUNK", 64)
    shape, is_causal = MASKS[name]
    q, k, v = tensors(150, 300, requires_grad=True)
    mask = torch.rand(shape) < 0.3
    mask[..., 5:9, :] = mask[..., 5:9, :] & (torch.tensor(shape[-2]) == 1)  # rows without any key
    allowed = mask.expand(2, 4, 150, 300)
    if is_causal:
        allowed = allowed & torch.ones(150, 300).tril(150).bool()
    out, lse = full_prefill(q, k, v, attn_mask=mask, is_causal=is_causal, return_lse=True)
    truth, true_lse = masked(q, k, v, allowed)
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full_prefill(q, k, v, attn_mask=mask, is_causal=is_causal), out)
    weight = torch.randn_like(out)
    actual = torch.autograd.grad((out * weight).sum(), (q, k, v))
    some = allowed.any(-1, keepdim=True)
    again, _ = masked(q, k, v, allowed | ~some)
    for ours, theirs in zip(actual, torch.autograd.grad((again * weight * some).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_causal", [None, True, False])
def test_full_prefill_without_a_mask(is_causal: bool | None) -> None:
    q, k, v = tensors(150, 300)
    allowed = torch.ones(150, 300).tril(150).bool() if is_causal is not False else torch.ones(150, 300).bool()
    truth, true_lse = masked(q, k, v, allowed)
    out, lse = full_prefill(q, k, v, is_causal=is_causal, return_lse=True)
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, true_lse, rtol=1e-4, atol=1e-5)


def test_what_masks_must_be() -> None:
    q, k, v = tensors(20, 30)
    with pytest.raises(ValueError, match=r"broadcast to \[2, 4, 20, 30\], got torch.bool of \[20, 20\]"):
        full_prefill(q, k, v, attn_mask=torch.ones(20, 20).bool())
    with pytest.raises(ValueError, match="must be boolean"):
        full_prefill(q, k, v, attn_mask=torch.zeros(20, 30))
    out = full_prefill(q[:, :, :0], k, v, attn_mask=torch.ones(0, 30).bool())
    assert out.shape == (2, 4, 0, 16)


def test_knobs_go_by_name() -> None:
    """A peer hands its block size to the argument before it; here nothing after v can be given by position."""
    for function in (xattention_prefill, flexprefill_prefill, minference_prefill, full_prefill):
        kinds = [parameter.kind.name for parameter in inspect.signature(function).parameters.values()]
        assert kinds[:3] == ["POSITIONAL_OR_KEYWORD"] * 3 and set(kinds[3:]) == {"KEYWORD_ONLY"}


@pytest.mark.parametrize("case", CASES)
def test_functions_have_the_defaults_of_their_methods(case: str) -> None:
    function, _, method = CASES[case]
    parameters = inspect.signature(function).parameters
    for name, default in vars(type(method)()).items():
        if name in parameters:
            assert parameters[name].default == default, name


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_knobs_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prefill.{suffix}"
    for _, _, method in CASES.values():
        path.write_text(json.dumps(method.to_dict()))  # JSON is YAML too
        assert load_prefill_config(path) == method
    path = tmp_path / "hand.yaml"
    path.write_text("method: flexprefill\ngamma: 0.95\nmin_budget: 1024\n")
    assert load_prefill_config(path) == FlexPrefill(gamma=0.95, min_budget=1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "xattention", "treshold": 0.8}', "unknown keys .*'treshold'.*known: .*'threshold'"),
        ('{"method": "xatention"}', "unknown method 'xatention'"),
        ('{"stride": 8}', 'the key "method"'),
        ('{"method": "xattention", "stride"', "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prefill_config(tmp_path / "a.json")
    with pytest.raises(ValueError, match="no such file"):
        load_prefill_config(tmp_path / "b.json")


def test_inputs_that_are_refused() -> None:
    q, k, v = tensors(20, 30)
    with pytest.raises(ValueError, match="4 query heads"):
        xattention_prefill(q, k, v, threshold=[0.5] * 3)
    with pytest.raises(ValueError, match="q_len <= kv_len"):
        xattention_prefill(q, k[:, :, :10], v[:, :, :10])
    with pytest.raises(ValueError):
        xattention_prefill(q, k, v[:, :, :10])
    assert math.isfinite(xattention_prefill(q, k, v).sum())
    assert xattention_prefill(q[:, :, :0], k, v).shape == (2, 4, 0, 16)
