"""While a CUDA graph is captured a forward reads nothing from the device; here a CPU pretends to be capturing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from sparse_hf import SparseCache, attend, cached_attention, forward_plan
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf_kernels import TokenPositions, positions_as_data, sparse_attention
from sparse_hf_kernels.tiles import RowGeometry

READS = ("tolist", "item", "__bool__", "__int__")


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A `with` block that looks like a capture, in which reading a tensor's value is an error.

    Not in the reference, which a GPU's kernels stand in for.
    """
    computing: list[bool] = []

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        computing.append(True)
        out = sparse_attention(*args, **kwargs)
        computing.pop()
        return out

    @contextmanager
    def block() -> Iterator[None]:
        def guarded(read: Callable[..., Any]) -> Callable[..., Any]:
            def reader(self: Tensor, *args: Any) -> Any:
                assert computing, "a tensor was read during the capture"
                return read(self, *args)

            return reader

        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            for name in READS:
                patch.setattr(Tensor, name, guarded(getattr(Tensor, name)))
            for module in (attend, cached_attention):
                patch.setattr(module, "sparse_attention", compute)
            yield

    return block


def plan(q_len: int = 6, q_offset: int | Tensor = 0, mask: Tensor | None = None, kv_offset: int = 0) -> ForwardPlan:
    total = q_len + (q_offset if isinstance(q_offset, int) else 4)
    return ForwardPlan(
        q_len=q_len, kv_len=total - kv_offset, q_offset=q_offset, kv_offset=kv_offset, padding_mask=mask,
        device=torch.device("cpu"),
    )  # fmt: skip


def same(a: TokenPositions, b: TokenPositions) -> bool:
    """The same pairs are visible, at the same positions."""
    everything = slice(None)
    pairs = (
        (a.visible(everything), b.visible(everything)),
        (a.q_positions, b.q_positions),
        (a.k_positions, b.k_positions),
    )
    return all(torch.equal(*torch.broadcast_tensors(*pair)) for pair in pairs)


@pytest.mark.parametrize("q_offset", [0, 4])
@pytest.mark.parametrize("ids", [None, torch.arange(6)[None] + 3], ids=["none", "arange"])
def test_sequences_without_borders_have_a_closed_form(capturing: Callable, q_offset: int, ids: Tensor | None) -> None:
    with capturing():
        found = plan(q_offset=q_offset).compute_positions(ids)
    assert found.offset == q_offset and found.kv_len == q_offset + 6


def test_position_ids_that_restart_fail_the_recorded_assertion(capturing: Callable) -> None:
    with capturing(), pytest.raises(RuntimeError, match=r"position_ids that restart.*positions_as_data"):
        plan().compute_positions(torch.tensor([[0, 1, 2, 0, 1, 2]]))


@pytest.mark.parametrize("q_offset", [0, 4])
@pytest.mark.parametrize(
    "ids", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 0, 1, 2, 0]], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]]], ids=str
)
def test_borders_as_data(capturing: Callable, ids: list[list[int]], q_offset: int) -> None:
    """What is worked out without a look equals what a look finds."""
    given = torch.tensor(ids)
    expected = plan(q_offset=q_offset).compute_positions(given)
    with capturing(), positions_as_data():
        found = plan(q_offset=q_offset).compute_positions(given)
        geometry = RowGeometry.of(found)
    assert found.offset is None and same(found, expected) and geometry.k_pos is not None


@pytest.mark.parametrize("as_data", [True, False])
def test_padding_is_data(capturing: Callable, as_data: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whether or not anything is padded; said once."""
    forward_plan._say_slow.cache_clear()
    for mask in (torch.ones(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])):
        mask = mask.bool()
        ids = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = plan(mask=mask).compute_positions(ids)
        with caplog.at_level(logging.WARNING), capturing(), positions_as_data() if as_data else nullcontext():
            found = plan(mask=mask).compute_positions(ids)
        assert same(found, expected)
    assert [record.getMessage()[:7] for record in caplog.records] == ["padding"]


def test_what_cannot_be_known_is_refused(capturing: Callable) -> None:
    mask = torch.ones(1, 10, dtype=torch.bool)
    with capturing():
        with pytest.raises(ValueError, match=r"sliding-window cache .* leave attention_mask out"):
            plan(q_offset=4, kv_offset=2, mask=mask).compute_positions(None)
        with pytest.raises(ValueError, match=r"static cache's length .* leave attention_mask out"):
            plan(q_offset=torch.tensor(4), mask=mask).compute_positions(None)
        with pytest.raises(ValueError, match=r"give q_offset or TokenPositions.causal"):
            _ = TokenPositions.from_padding_mask(mask).max_seq_len


def test_a_static_cache_is_data_already(capturing: Callable) -> None:
    ids = torch.arange(6)[None]
    expected = plan(q_offset=torch.tensor(4)).compute_positions(ids)
    for where in (nullcontext, positions_as_data):
        with capturing(), where():
            assert same(plan(q_offset=torch.tensor(4)).compute_positions(ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache, SparseCache])
@pytest.mark.parametrize("as_data", [True, False])
def test_a_model_reads_nothing(make_case: Callable, capturing: Callable, cache: type | None, as_data: bool) -> None:
    """Prefill, a chunk and a decode step; the reference computes them, so that all else is the forward's own doing."""
    case = make_case("llama", "streaming")
    (tokens,) = case.tokens(14)
    expected = case.expected(tokens)
    made = {
        None: lambda: None,
        DynamicCache: DynamicCache,
        StaticCache: lambda: StaticCache(case.model.config, max_cache_len=20),
        SparseCache: lambda: SparseCache.for_model(case.model),
    }[cache]()
    found, pieces = [], [tokens] if cache is None else tokens.split([9, 4, 1])
    for piece in pieces:
        with capturing(), positions_as_data() if as_data else nullcontext():
            found.append(case.model(piece[None], past_key_values=made, use_cache=cache is not None).logits[0])
    case.assert_logits(torch.cat(found), expected)


def test_a_sparse_cache_asserts_that_nothing_is_packed(make_case: Callable, capturing: Callable) -> None:
    case = make_case("llama", "streaming")
    given = {"input_ids": case.tokens(4)[0][None], "position_ids": torch.tensor([[0, 1, 0, 1]])}
    for where in (nullcontext, positions_as_data):
        with capturing(), where(), pytest.raises(RuntimeError, match="position_ids that restart"):
            case.model(**given, past_key_values=SparseCache.for_model(case.model))


def test_a_sparse_cache_of_a_fixed_length_takes_no_chunk(make_case: Callable, capturing: Callable) -> None:
    """Its count is on the device, where decode steps alone need not read it; the chunk may come after the capture."""
    case = make_case("llama", "streaming")
    cache, (tokens,) = SparseCache.for_model(case.model, max_length=20), case.tokens(12)
    with torch.no_grad():
        case.model(tokens[None, :9], past_key_values=cache)
        with capturing(), pytest.raises(ValueError, match="capture decode steps of one token"):
            case.model(tokens[None, 9:], past_key_values=cache)
    assert int(cache.get_seq_length()) == 9
    with torch.no_grad():
        logits = case.model(tokens[None, 9:], past_key_values=cache).logits[0]
    case.assert_logits(logits, case.expected(tokens)[9:])
