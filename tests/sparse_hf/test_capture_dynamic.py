"""`capture` where methods choose by q and k: masks are what the operator used, and counts are those of the masks.

A dense copy of the model takes the captured masks: its masked softmax must give the sparse model's logits.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from sparse_hf import (
    CaptureStats,
    FlexPrefill,
    LayerRule,
    MInference,
    SparseConfig,
    Streaming,
    XAttention,
    capture,
    sparsify,
)
from sparse_hf import dynamic as dynamic_module
from sparse_hf.call_counts import selected_counts
from sparse_hf.patching import get_handle
from sparse_hf_kernels import BlockSelection

REPLAY = "test_capture_replay"
SIZE = 64
STREAMING = Streaming(num_sink_tokens=2, window_size=30)
XATTENTION = XAttention(stride=4, threshold=(0.2, 0.5, 0.3, 0.1), block_size=SIZE)
MINFERENCE = MInference(
    vertical_size=40,
    block_size=SIZE,
    heads=(
        {"kind": "vertical_slash", "slash_size": 100},
        {"kind": "block_sparse", "top_k": 2},
        {"kind": "a_shape", "n_init": 3, "n_local": 5},
        {"kind": "vertical_slash", "slash_size": 110},
    ),
)
DYNAMIC = {
    "retrieval": SparseConfig(
        full=XATTENTION,
        sparse=STREAMING,
        rules=(LayerRule(layers="1", full=FlexPrefill(gamma=0.3, tau=0.35, min_budget=64, block_size=SIZE)),),
        head_masks=((1, 0), (0, 1)),
    ),
    "minference": SparseConfig(sparse=MINFERENCE),
    "min_seq_len": SparseConfig(full=XATTENTION, sparse=STREAMING, head_masks=((1, 0), (1, 0)), min_seq_len=130),
}


def replay_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """A masked softmax over the masks that the module is given, one per call."""
    mask = module.replayed.pop(0)[..., : key.shape[2]]
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -1e9)
    out = scores.softmax(-1) @ value * mask.any(-1, keepdim=True)
    return out.transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def register_replay() -> Iterator[None]:
    AttentionInterface.register(REPLAY, replay_attention)
    AttentionMaskInterface.register(REPLAY, lambda *args, **kwargs: None)
    yield
    del AttentionInterface._global_mapping[REPLAY]
    del AttentionMaskInterface._global_mapping[REPLAY]


def replaying(make_model: Callable, stats: CaptureStats) -> PreTrainedModel:
    """The dense model that reads what was captured."""
    model = make_model("llama")
    model.config._attn_implementation = REPLAY
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.replayed = [one.mask(n) for one in stats]
    return model


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


@pytest.fixture(params=list(DYNAMIC))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[BlockSelection]:
    """What was chosen, in the order of the calls."""
    found, select = [], dynamic_module.select_blocks

    def spy(*args: Any, **kwargs: Any) -> BlockSelection:
        found.append(select(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(dynamic_module, "select_blocks", spy)
    return found


def test_dynamic_batch(make_model: Callable, name: str, selections: list[BlockSelection], counts: Any) -> None:
    model = sparsify(make_model("llama"), DYNAMIC[name])
    ids = torch.randint(1, 99, (2, 230))
    with capture(model, masks=True) as stats:
        logits = model(ids, use_cache=False).logits
    assert_close(replaying(make_model, stats)(ids, use_cache=False).logits, logits)
    counts.assert_those_of_masks(stats)
    assert all(layer.density < 0.95 for layer in stats.layers), "a layer reads everything: the test could not fail"
    for layer, selection in zip(stats.layers, selections, strict=True):
        for head in layer.heads:
            (branch,) = head.branches
            assert branch.causal_pairs == 2 * counts.triangle(230) and head.density == branch.density
            if branch.method == STREAMING:
                assert (branch.window, branch.num_sink_tokens, branch.kept_blocks) == (30, 2, None)
                continue
            assert branch.block_size == SIZE and branch.causal_blocks == 2 * (1 + 2 + 3 + 4)
            assert branch.kept_blocks == int(selection.counts[:, head.head].sum())
            columns = selection.columns
            assert branch.kept_columns == (0 if columns is None else int((columns[:, head.head] >= 0).sum()))
            assert branch.block_share == branch.kept_blocks / branch.causal_blocks
            if columns is None:
                tiles = (counts.tiles(mask, SIZE) for mask in stats.mask(layer.layer)[:, head.head])
                assert branch.kept_blocks == sum(tiles)


@pytest.mark.parametrize("side", ["left", "right"])
def test_dynamic_padded(make_model: Callable, name: str, pad: Callable, side: str, counts: Any) -> None:
    model = sparsify(make_model("llama"), DYNAMIC[name])
    sequences = [torch.randint(1, 99, (length,)) for length in (250, 40, 250, 201, 1)]
    batch = pad(sequences, side)
    with capture(model, masks=True) as stats:
        logits = model(**batch.inputs, use_cache=False).logits
    again = replaying(make_model, stats)(**batch.inputs, use_cache=False).logits
    for ours, theirs in zip(batch.real(logits), batch.real(again), strict=True):
        assert_close(theirs, ours)
    counts.assert_those_of_masks(stats)
    for head in (head for layer in stats.layers for head in layer.heads):
        assert head.causal_pairs == sum(counts.triangle(len(tokens)) for tokens in sequences)
        assert head.branches[0].queries == sum(map(len, sequences))


def test_dynamic_packed(make_model: Callable, name: str, pack: Callable, counts: Any) -> None:
    model = sparsify(make_model("llama"), DYNAMIC[name])
    lengths = [[230, 1, 20], [21, 230]]
    inputs = pack([[torch.randint(1, 99, (length,)) for length in row] for row in lengths])
    with capture(model, masks=True) as stats:
        logits = model(**inputs, use_cache=False).logits
    assert_close(replaying(make_model, stats)(**inputs, use_cache=False).logits, logits)
    counts.assert_those_of_masks(stats)
    assert stats.layers[0].heads[0].causal_pairs == sum(counts.triangle(length) for row in lengths for length in row)


@pytest.mark.parametrize("cache", ["sparse", "dynamic", "static"])
def test_dynamic_chunks_and_decoding(
    make_model: Callable, name: str, cache: str, pad: Callable, counts: Any, new_cache: Callable
) -> None:
    """Slots and positions are the same here, so that one replay serves all caches."""
    model = sparsify(make_model("llama"), DYNAMIC[name])
    batch, borders = pad([torch.randint(1, 99, (240,)) for _ in range(2)], "left"), [64, 100, 238, 239]
    with capture(model, masks=True) as stats:
        logits = batch.run(model, new_cache(cache, model), borders)
    counts.assert_those_of_masks(stats)
    dense_model = replaying(make_model, stats)
    assert_close(batch.run(dense_model, DynamicCache(config=dense_model.config), borders), logits)
    for layer in stats.layers:
        for head in layer.heads:
            assert head.causal_pairs == 2 * counts.triangle(240)
    # Decoding reads every key where heads choose, prefill does not; the sum has both.
    chosen = stats[1:3].layers[0].heads[1]
    assert stats[3:].layers[0].heads[1].density == 1 > chosen.density
    (whole,) = stats.layers[0].heads[0].branches
    assert whole.kept_pairs == sum(one.layers[0].heads[0].branches[0].kept_pairs for one in stats)
    decoded = stats[4].layers[0].heads[0].branches[0]
    assert (decoded.kept_blocks, decoded.causal_blocks, decoded.kept_columns) == (2 * 4, 2 * 4, 0)


@pytest.mark.parametrize("cache", ["sparse", "dynamic"])
def test_dynamic_padded_chunks(
    make_model: Callable, name: str, cache: str, pad: Callable, counts: Any, new_cache: Callable
) -> None:
    model = sparsify(make_model("llama"), DYNAMIC[name])
    batch = pad([torch.randint(1, 99, (length,)) for length in (240, 177, 111)], "left")
    with capture(model, masks=True) as stats:
        batch.run(model, new_cache(cache, model), [130, 200, 238, 239])
    counts.assert_those_of_masks(stats)
    assert stats.layers[1].heads[3].causal_pairs == sum(map(counts.triangle, (240, 177, 111)))


def test_parameters_per_head(make_model: Callable) -> None:
    model = sparsify(make_model("llama"), SparseConfig(sparse=XATTENTION))
    with capture(model) as stats:
        model(torch.randint(1, 99, (1, 230)), use_cache=False)
    heads = stats.layers[0].heads
    assert [head.branches[0].method.threshold for head in heads] == [0.2, 0.5, 0.3, 0.1]
    assert len({head.density for head in heads}) > 1, "heads choose for themselves"
    model = sparsify(make_model("llama"), SparseConfig(sparse=MINFERENCE))
    with capture(model) as stats:
        model(torch.randint(1, 99, (1, 230)), use_cache=False)
    methods = [head.branches[0].method for head in stats.layers[1].heads]
    assert [method.kind for method in methods] == ["vertical_slash", "block_sparse", "a_shape", "vertical_slash"]
    assert methods[3].slash_size == 110 and methods[1].vertical_size == 40
    values = stats.to_dict()
    assert values["methods"][values["layers"][1]["heads"][3]["branches"][0]["method"]]["slash_size"] == 110


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["retrieval"])
def test_checkpoints_count_once(make_model: Callable, name: str, use_reentrant: bool) -> None:
    model = sparsify(make_model("llama"), DYNAMIC[name]).train()
    ids = torch.randint(1, 99, (2, 200))
    with capture(model) as plain:
        model(ids, use_cache=False)
    calls: list[int] = []
    for module in get_handle(model).modules:
        module.register_forward_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with capture(model) as stats:
        for _ in range(2):
            model(ids, use_cache=False).logits.sum().backward()
    assert len(calls) > 4, "nothing was recomputed: the test could not fail"
    assert len(stats) == 2
    for one in stats:
        assert torch.equal(one.density, plain.density)
    assert stats.layers[0].heads[0].causal_pairs == 2 * plain.layers[0].heads[0].causal_pairs


class NoReading(TorchDispatchMode):
    """What would wait for a device is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("q_offset", "q_len"), [(0, 200), (70, 100), (64, 1)])
def test_selections_are_counted_without_reading_them(q_offset: int, q_len: int) -> None:
    """Also where a row lists neither its own block nor the first, and columns lie in listed blocks or after queries."""
    end = q_offset + q_len
    first, last = q_offset // SIZE, -(-end // SIZE)
    blocks = torch.rand(2, 3, last - first, last) < 0.4
    blocks &= torch.arange(last) <= torch.arange(first, last)[:, None]
    columns = torch.stack([torch.randperm(end)[:12] for _ in range(6)]).view(2, 3, 12).int()
    columns[..., 9:] = -1
    for given in (None, columns):
        selection = BlockSelection.from_mask(blocks, SIZE, given)
        keep = selection.keeps(slice(0, q_len), q_offset, end)
        keep &= torch.arange(end) <= torch.arange(q_offset, end)[:, None]
        with NoReading():
            pairs, listed, single = selected_counts(selection, q_offset, q_len)
        assert pairs.tolist() == keep.sum((0, 2, 3)).tolist()
        assert listed.tolist() == blocks.sum((0, 2, 3)).tolist()
        assert single.tolist() == [0 if given is None else 18] * 3


@pytest.mark.parametrize("name", ["retrieval"])
def test_compiled_models(make_model: Callable, name: str) -> None:
    torch._dynamo.reset()
    model = sparsify(make_model("llama"), DYNAMIC[name])
    run = torch.compile(model, backend="eager", dynamic=True)
    ids = torch.randint(1, 99, (1, 200))
    run(ids, use_cache=False)
    with capture(model) as compiled:
        run(ids, use_cache=False)
    run(ids, use_cache=False)
    with capture(model) as eager:
        model(ids, use_cache=False)
    torch._dynamo.reset()
    assert len(compiled) == 1 and torch.equal(compiled.density, eager.density)
