"""`capture`: densities and masks of static methods are the oracle's on every path, and nothing is left behind.

test_capture_dynamic.py has the methods that choose by q and k. (test_capture.py is about CUDA graphs.)
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_hf import (
    SlidingWindow,
    SparseConfig,
    Streaming,
    XAttention,
    capture,
    dense,
    set_head_masks,
    sparsify,
    sparsity_summary,
    unsparsify,
)
from sparse_hf.patching import get_handle

STREAMING = Streaming(num_sink_tokens=2, window_size=30)
XATTENTION = XAttention(stride=4, threshold=(0.2, 0.5, 0.3, 0.1), block_size=64)

# Static methods, by definition.


@pytest.fixture(params=["llama", "qwen2_native"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["streaming", "mixed", "block_rules", "min_seq_len", "local_global", "last_rows", "explicit"])
def mix(request: pytest.FixtureRequest) -> str:
    return request.param


def oracle(case: Any, layer: int, query_head: int, length: int, ends: Sequence[int] = ()) -> Tensor:
    rule = case.oracle.model.layers[layer].self_attn.oracle_rule
    rule.ends = tuple(ends)
    return case.mask(layer, query_head // 2, length)


def test_plain_batch(case: Any, counts: Any) -> None:
    ids = torch.stack(case.tokens(41, 41))
    with capture(case.model, masks=True) as stats:
        case.model(ids, use_cache=False)
    assert len(stats) == 1 and stats.density.shape == (case.num_layers, 4)
    for layer in stats.layers:
        for head in layer.heads:
            truth = oracle(case, layer.layer, head.head, 41)
            (branch,) = head.branches
            assert torch.equal(stats.mask(layer.layer)[:, head.head], truth.expand(2, -1, -1))
            assert (branch.kept_pairs, branch.causal_pairs) == (2 * int(truth.sum()), 2 * counts.triangle(41))
            assert branch.queries == 82 and head.density == int(truth.sum()) / counts.triangle(41)
            assert stats.density[layer.layer, head.head] == head.density
            if branch.block_size is not None:
                assert branch.kept_blocks == 2 * counts.tiles(truth, branch.block_size)
                assert branch.causal_blocks == 2 * counts.triangle(-(-41 // branch.block_size))
    summary = sparsity_summary(case.model, 41)
    assert [layer.density for layer in stats.layers] == pytest.approx([x.attention_density for x in summary.layers])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(case: Any, pad: Callable, side: str, counts: Any) -> None:
    sequences = case.tokens(33, 3, 21)
    batch = pad(sequences, side)
    with capture(case.model, masks=True) as stats:
        case.model(**batch.inputs, use_cache=False)
    for layer in stats.layers:
        for head in layer.heads:
            truths = [oracle(case, layer.layer, head.head, len(tokens)) for tokens in sequences]
            whole = torch.zeros(3, 33, 33, dtype=torch.bool)
            for row, real, truth in zip(whole, batch.attention_mask.bool(), truths, strict=True):
                row[real[:, None] & real] = truth.flatten()
            (branch,) = head.branches
            assert torch.equal(stats.mask(layer.layer)[:, head.head], whole)
            assert branch.kept_pairs == sum(int(truth.sum()) for truth in truths)
            assert (branch.queries, branch.causal_pairs) == (57, sum(map(counts.triangle, (33, 3, 21))))
            if branch.block_size is not None:
                assert branch.kept_blocks == sum(counts.tiles(truth, branch.block_size) for truth in truths)


def test_packed(case: Any, pack: Callable, counts: Any) -> None:
    lengths = [[30, 1, 17], [9, 39]]
    with capture(case.model, masks=True) as stats:
        case.model(**pack([case.tokens(*row) for row in lengths]), use_cache=False)
    for layer in stats.layers:
        for head in layer.heads:
            truths = [[oracle(case, layer.layer, head.head, length) for length in row] for row in lengths]
            whole = torch.stack([torch.block_diag(*(truth.int() for truth in row)).bool() for row in truths])
            (branch,) = head.branches
            assert torch.equal(stats.mask(layer.layer)[:, head.head], whole)
            assert branch.kept_pairs == int(whole.sum())
            assert branch.causal_pairs == sum(counts.triangle(length) for row in lengths for length in row)
            if branch.block_size is not None:
                tiles = (counts.tiles(truth, branch.block_size) for row in truths for truth in row)
                assert branch.kept_blocks == sum(tiles)


@pytest.mark.parametrize("cache", ["sparse", "dynamic", "static"])
@pytest.mark.parametrize("lengths", [(50, 50), (50, 31)], ids=["plain", "padded"])
def test_chunks_and_decoding(
    case: Any, pad: Callable, cache: str, lengths: tuple[int, int], counts: Any, new_cache: Callable
) -> None:
    """Each call apart; with a SparseCache masks are by position, so that padding has no column."""
    borders = [13, 40, 48, 49]
    batch = pad(case.tokens(*lengths), "left")
    with capture(case.model, masks=True) as stats:
        batch.run(case.model, new_cache(cache, case.model), borders)
    assert len(stats) == 5
    gaps = [50 - length for length in lengths]
    for layer in range(case.num_layers):
        for head in range(4):
            truths = []
            for length, gap in zip(lengths, gaps, strict=True):
                ends = [border - gap for border in [*borders, 50] if border > gap]
                truths.append(oracle(case, layer, head, length, ends))
            total = 0
            for one, (start, end) in zip(stats, pairwise([0, *borders, 50]), strict=True):
                kept = [t[max(start - g, 0) : max(end - g, 0)] for t, g in zip(truths, gaps, strict=True)]
                (branch,) = one.layers[layer].heads[head].branches
                assert branch.kept_pairs == sum(int(part.sum()) for part in kept)
                assert branch.queries == sum(map(len, kept))
                assert int(one.mask(layer)[:, head].sum()) == branch.kept_pairs
                if branch.block_size is not None:
                    tiles = (
                        counts.tiles(part, branch.block_size, max(start - gap, 0))
                        for part, gap in zip(kept, gaps, strict=True)
                    )
                    assert branch.kept_blocks == sum(tiles)
                if cache == "sparse":  # no slot of the padding, and keys that were dropped keep their columns
                    mask = one.mask(layer)[:, head]
                    assert mask.shape[-1] == end
                    for row, part in zip(mask, kept, strict=True):
                        assert torch.equal(row[len(row) - len(part) :, : part.shape[1]], part[:, :end])
                total += branch.kept_pairs
            (branch,) = stats.layers[layer].heads[head].branches
            assert branch.kept_pairs == total == sum(int(truth.sum()) for truth in truths)
            assert branch.causal_pairs == sum(map(counts.triangle, lengths))


# Gates, and what is left behind.


@pytest.mark.parametrize("skip_saturated", [False, True])
@pytest.mark.parametrize("full", [XATTENTION, "dense"], ids=["dynamic", "static"])
def test_gates(make_model: Callable, full: Any, skip_saturated: bool, counts: Any) -> None:
    """Both branches and their blend; a branch that was not computed is missing."""
    model = sparsify(make_model("llama"), SparseConfig(full=full, sparse=STREAMING)).train()
    for state, values in zip(get_handle(model).states, ([0.25, 1.0], [0.0, 0.75]), strict=True):
        state.gate, state.skip_saturated = (lambda values=values: torch.tensor(values)), skip_saturated
    with capture(model, masks=True) as stats:
        model(torch.randint(1, 99, (1, 200)), use_cache=False).logits.sum().backward()
    counts.assert_those_of_masks(stats)
    streamed = sum(min(i + 1, 32) for i in range(200)) / counts.triangle(200)
    first, last = stats.layers[0].heads[0], stats.layers[0].heads[3]
    assert [branch.branch for branch in first.branches] == ["full", "sparse"]
    assert [head.gate for head in stats.layers[0].heads] == [0.25, 0.25, 1.0, 1.0]
    full_density = first.branches[0].density
    assert first.density == pytest.approx(0.25 * full_density + 0.75 * streamed)
    assert first.branches[1].density == pytest.approx(streamed)
    assert full_density == 1 if full == "dense" else 0 < full_density < 1
    assert [branch.branch for branch in last.branches] == (["full"] if skip_saturated else ["full", "sparse"])
    assert last.density == pytest.approx(last.branches[0].density)
    assert stats.mask(0, "sparse")[:, 3].any() != skip_saturated
    assert stats.layers[1].heads[0].density == pytest.approx(streamed)
    with pytest.raises(ValueError, match=r"one of \['full', 'sparse'\], got None"):
        stats.mask(0)


def test_gates_are_averaged_over_passes(make_model: Callable, counts: Any) -> None:
    model = sparsify(make_model("llama"), SparseConfig(sparse=STREAMING))
    with capture(model) as stats:
        for value, length in ((0.2, 40), (0.6, 50)):
            for state in get_handle(model).states:
                state.gate = lambda value=value: torch.full((2,), value)
            model(torch.randint(1, 99, (1, length)), use_cache=False)
        for state in get_handle(model).states:
            state.gate = None
        model(torch.randint(1, 99, (1, 9)), use_cache=False)
    one, two, deployed = (x.layers[0].heads[0] for x in stats)
    both, weights = stats[:2].layers[0].heads[0], (counts.triangle(40), counts.triangle(50))
    assert deployed.gate is None and stats.layers[0].heads[0].gate == both.gate
    assert both.gate == pytest.approx((0.2 * weights[0] + 0.6 * weights[1]) / sum(weights))
    assert both.density == pytest.approx((one.density * weights[0] + two.density * weights[1]) / sum(weights))


def test_nested_captures_and_two_models(make_model: Callable) -> None:
    models = [sparsify(make_model("llama"), SparseConfig(sparse=SlidingWindow(window_size=w))) for w in (5, 9)]
    ids = torch.randint(1, 99, (1, 40))
    with capture(models[0]) as outer, capture(models[1]) as other:
        models[0](ids)
        with capture(models[0], masks=True) as inner:
            models[0](ids[:, :20])
            models[1](ids)
        models[0](ids[:, :30])
    assert [one.layers[0].heads[0].branches[0].queries for one in outer] == [40, 20, 30]
    assert [one.layers[0].heads[0].branches[0].queries for one in inner] == [20]
    assert len(other) == 1 and other.layers[1].heads[2].branches[0].window == 9
    assert inner.mask(0).shape == (1, 4, 20, 20)
    with pytest.raises(ValueError, match="no masks were kept"):
        outer[1].mask(0)


def test_nothing_stays(make_model: Callable) -> None:
    model = sparsify(make_model("llama"), SparseConfig(sparse=STREAMING))
    ids = torch.randint(1, 99, (1, 40))
    states = get_handle(model).states
    with pytest.raises(RuntimeError, match="stop"), capture(model) as stats:
        model(ids)
        with dense(model):
            model(ids)
        raise RuntimeError("stop")
    assert all(state.recorders == () for state in states)
    model(ids)
    assert len(stats) == 1
    with capture(model) as stats:
        unsparsify(model)
        model(ids)
    assert len(stats) == 0 and stats.density.isnan().all() and all(state.recorders == () for state in states)
    with pytest.raises(ValueError, match="not sparsified"), capture(model):
        pass


def test_a_pass_that_failed(make_model: Callable) -> None:
    """Its layers up to the failure are there, and the next pass is one of its own."""
    model = sparsify(make_model("llama"), SparseConfig(sparse=STREAMING))

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    ids = torch.randint(1, 99, (1, 40))
    with capture(model) as stats:
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(ids)
        hook.remove()
        model(ids)
    assert len(stats) == 2 and stats[0].density.isnan().tolist() == [[False] * 4, [True] * 4]
    assert stats[1].density.isfinite().all() and stats[0].layers[1].heads == ()
    with pytest.raises(ValueError, match="layer 1 did not run; layers that did: \\[0\\]"):
        stats[0].mask(1)
    with pytest.raises(ValueError, match="these are 2"):
        stats.mask(0)


def test_methods_that_change_are_kept_apart(make_model: Callable, counts: Any) -> None:
    model = sparsify(make_model("llama"), SparseConfig(sparse=STREAMING, head_masks="all_full"))
    ids = torch.randint(1, 99, (1, 40))
    with capture(model) as stats:
        model(ids)
        set_head_masks(model, torch.tensor([[0, 1], [1, 1]]))
        model(ids)
        model(ids)
    assert [branch.method.name for branch in stats.layers[0].heads[0].branches] == ["dense", "streaming"]
    assert [branch.queries for branch in stats.layers[0].heads[0].branches] == [40, 80]
    streamed = sum(min(i + 1, 32) for i in range(40))
    assert stats.layers[0].heads[0].density == pytest.approx(
        (counts.triangle(40) + 2 * streamed) / (3 * counts.triangle(40))
    )
    assert [branch.queries for branch in stats.layers[1].heads[0].branches] == [120]


def test_masks_that_are_too_large(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify(make_model("llama"), SparseConfig(sparse=STREAMING))
    monkeypatch.setattr("sparse_hf.call_record.MAX_MASK_ELEMENTS", 2 * 4 * 20 * 20)
    ids = torch.randint(1, 99, (1, 21))
    with capture(model, masks=True) as stats:
        model(ids[:, :20])
        with pytest.raises(ValueError, match=r"keeps up to 3,200 elements.*one layer is \[1, 4, 20, 20\]"):
            model(ids[:, :20])
    assert len(stats) == 1
