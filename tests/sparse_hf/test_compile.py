"""`torch.compile(fullgraph=True)` of a sparsified model, and what its forward passes ask the device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors
from transformers import DynamicCache, StaticCache

from sparse_hf import SparseCache
from sparse_hf.forward_plan import ForwardPlan
from sparse_hf_kernels import TokenPositions
from sparse_hf_kernels.kv_cache import store_tokens


@pytest.fixture(params=["llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["mixed"])
def mix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compiled() -> Iterator[Callable[[Any], Any]]:
    """`torch.compile` into one graph, where a second compilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model: torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()


def loss_and_gradients(model: Any, run: Callable[..., Any], **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = run(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_trains_alike(model: Any, run: Callable[..., Any], **inputs: Any) -> None:
    expected, actual = (loss_and_gradients(model, function, **inputs) for function in (model, run))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    for a, b in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral_native"])
def test_training_over_lengths(case: Any, compiled: Callable) -> None:
    run = compiled(case.model.train())
    for length in (30, 17, 45):
        assert_trains_alike(case.model, run, input_ids=torch.randint(1, 99, (2, length)))


def test_training_on_padded_batches(case: Any, compiled: Callable, pad: Callable) -> None:
    """A batch without padding goes through the same graph."""
    run = compiled(case.model)
    for lengths in ((30, 19), (25, 25), (11, 40)):
        batch = pad(case.tokens(*lengths), "left")
        assert_trains_alike(case.model, run, input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def test_training_on_packed_sequences(case: Any, compiled: Callable) -> None:
    run = compiled(case.model)
    for lengths in ((10, 12), (30,), (3, 20, 9)):
        ids = torch.cat(case.tokens(*lengths))[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        assert_trains_alike(case.model, run, input_ids=ids, position_ids=positions)


def test_mask_learning(case: Any, compiled: Callable) -> None:
    gates = [torch.nn.Parameter(torch.tensor(values)) for values in ([0.0, 0.7], [1.0, 0.2])]
    for state, gate in zip(case.model._sparse_hf_handle.states, gates, strict=True):
        state.gate, state.skip_saturated = (lambda gate=gate: gate), True
    run = compiled(case.model)
    for length in (30, 17):
        ids, found = torch.randint(1, 99, (2, length)), []
        for function in (case.model, run):
            for gate in gates:
                gate.grad = None
            _, grads = loss_and_gradients(case.model, function, input_ids=ids)
            found.append([*grads, *(gate.grad.clone() for gate in gates)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding(case: Any, kind: str) -> None:
    """Prefill, a chunk and single tokens with transformers' caches: at most one graph for each of the three."""
    config, tokens = case.model.config, torch.randint(1, 99, (1, 30))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(case.model, fullgraph=True, dynamic=True, backend=counter)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
    expected, compilations = case.expected(tokens[0]), []
    for begin, end in ((0, 12), (12, 20), *((n, n + 1) for n in range(20, 30))):
        logits = run(tokens[:, begin:end], past_key_values=cache).logits[0]
        case.assert_logits(logits, expected[begin:end])
        compilations.append(counter.frame_count)
    assert len(set(compilations[3:])) == 1, "a token more compiles again"
    torch._dynamo.reset()


@torch.no_grad()
def test_a_sparse_cache_is_left_out_of_graphs(case: Any) -> None:
    """What it holds is the same as without graphs, and its own functions are in none."""
    tokens, steps = torch.randint(1, 99, (1, 30)), ((0, 12), (12, 20), *((n, n + 1) for n in range(20, 30)))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(case.model, dynamic=True, backend=counter)
    cache, eager = SparseCache.for_model(case.model), SparseCache.for_model(case.model)
    compilations = []
    for begin, end in steps:
        logits = run(tokens[:, begin:end], past_key_values=cache).logits
        torch.testing.assert_close(logits, case.model(tokens[:, begin:end], past_key_values=eager).logits)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations[3:])) == 1, "a token more compiles again"
    for mine, theirs in zip(cache.storages(), eager.storages(), strict=True):
        assert torch.equal(mine.state, theirs.state) and mine.capacity == theirs.capacity
        for group in mine.layout.groups:
            filled = (0, min(30, group.slots(mine.capacity)))
            torch.testing.assert_close(mine.read(group, filled), theirs.read(group, filled))
    torch._dynamo.reset()


@torch.no_grad()
def test_set_head_masks_is_noticed(case: Any) -> None:
    from sparse_hf import set_head_masks

    torch._dynamo.reset()
    run = torch.compile(case.model, fullgraph=True, dynamic=True, backend="aot_eager")
    ids = torch.randint(1, 99, (1, 30))
    before = run(ids, use_cache=False).logits
    set_head_masks(case.model, torch.ones(2, 2))
    after = run(ids, use_cache=False).logits
    assert torch.equal(after, case.model(ids, use_cache=False).logits) and not torch.equal(after, before)
    torch._dynamo.reset()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every read of a tensor's value by Python, which on a GPU waits for it.

    Not in the plain form of storing tokens, which a GPU's kernel stands in for.
    """
    noted: list[str] = []

    def storing(*args: Any, **kwargs: Any) -> None:
        before = len(noted)
        store_tokens(*args, **kwargs)
        del noted[before:]

    monkeypatch.setattr("sparse_hf.cache_layer.store_tokens", storing)
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        original = getattr(Tensor, name)

        def noting(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            noted.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, noting)
    return noted


def closed_form(positions: TokenPositions) -> tuple[int | None, int]:
    return positions.offset, positions.k_offset


@pytest.fixture
def seen_positions(monkeypatch: pytest.MonkeyPatch) -> list[TokenPositions]:
    """The positions that the operator got, one per call; nothing is computed, so every wait is the model's own."""
    seen: list[TokenPositions] = []

    def noting(q: Tensor, *args: Any, positions: TokenPositions, **kwargs: Any) -> Tensor:
        seen.append(positions)
        return torch.zeros_like(q)

    for module in ("attend", "cached_attention"):
        monkeypatch.setattr(f"sparse_hf.{module}.sparse_attention", noting)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_unpadded_passes_have_a_closed_form(
    case: Any, seen_positions: list[TokenPositions], waits: list[str], masked: bool
) -> None:
    """Prefill, a chunk and a token: integers for the kernels.

    Only a mask, or position ids that a caller gave, are looked at: one wait a pass for both.
    """
    cache, tokens = DynamicCache(config=case.model.config), torch.randint(1, 99, (2, 30))
    for begin, end in ((0, 12), (12, 29), (29, 30)):
        seen_positions.clear()
        mask = torch.ones(2, end, dtype=torch.long) if masked else None
        plain = {"input_ids": tokens[:, begin:end], "attention_mask": mask, "past_key_values": cache}
        waits.clear()
        case.model(**plain)
        assert len(seen_positions) == 2 and seen_positions[0] is seen_positions[1]
        assert closed_form(seen_positions[0]) == (begin, 0)
        assert (seen_positions[0].q_len, seen_positions[0].kv_len) == (end - begin, end)
        assert waits == (["__bool__"] if masked else [])
        if end - begin > 1:
            waits.clear()
            ids = torch.arange(begin, end).expand(2, -1)
            case.model(**plain | {"position_ids": ids, "past_key_values": None, "use_cache": False})
            assert "__bool__" in waits and "tolist" not in waits


@torch.no_grad()
def test_padding_and_packing_have_none(case: Any, seen_positions: list[TokenPositions], pad: Callable) -> None:
    case.model(**pad(case.tokens(12, 7), "left").inputs, use_cache=False)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    case.model(torch.randint(1, 99, (1, 12)), position_ids=positions, use_cache=False)
    assert [closed_form(each) for each in seen_positions] == [(None, 0)] * 4
    assert seen_positions[0].q_segments is None and seen_positions[2].q_segments is not None


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mix", "expected"),
    [
        # Layer 0: two sinks and five recent keys, which stand as a run behind each other; then a full head. Layer 1:
        # both heads keep every key.
        ("llama", "mixed", [(7, 0), (12, 0), (12, 0)]),
        # Positions 7 to 11 and the new token fill a window of 6.
        ("llama", "sliding_window", [(12, 7)] * 2),
        ("mistral_native", "sliding_window", [(12, 7)] * 2),
        # The model's own window hides sinks by their true distance.
        ("mistral_native", "streaming", [(None, 0)] * 2),
    ],
)
def test_a_sparse_cache_has_a_closed_form(
    case: Any, seen_positions: list[TokenPositions], waits: list[str], expected: list[tuple[int | None, int]]
) -> None:
    """Integers for the kernels, and nothing is waited for."""
    cache, tokens = SparseCache.for_model(case.model), torch.randint(1, 99, (2, 13))
    case.model(tokens[:, :12], past_key_values=cache)
    assert [closed_form(each) for each in seen_positions] == [(0, 0)] * 2, "all heads of a layer at once"
    seen_positions.clear()
    waits.clear()
    case.model(tokens[:, 12:], past_key_values=cache)
    assert [closed_form(each) for each in seen_positions] == expected
    assert waits == []
    if expected[0] == (None, 0):
        assert seen_positions[0].q_positions.tolist() == [[12]]
        assert seen_positions[0].k_positions.tolist() == [[0, 1, *range(7, 13)]]


@torch.no_grad()
def test_a_padded_batch_in_a_sparse_cache_never_has_one(
    case: Any, seen_positions: list[TokenPositions], pad: Callable
) -> None:
    batch, cache = pad(case.tokens(12, 7), "left"), SparseCache.for_model(case.model)
    case.model(**batch.upto(10), past_key_values=cache)
    case.model(**batch.upto(12, start=10), past_key_values=cache)
    assert {each.offset for each in seen_positions} == {None}


def test_keys_after_the_newest_query_are_no_closed_form() -> None:
    """A cache of a fixed size hands out its empty slots too."""
    sizes = {"q_len": 3, "q_offset": 4, "kv_offset": 0, "padding_mask": None, "device": torch.device("cpu")}
    assert ForwardPlan(**sizes, kv_len=7).compute_positions(None).offset == 4
    found = ForwardPlan(**sizes, kv_len=9).compute_positions(None)
    assert found.offset is None and found.k_positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, -1, -1]]


def test_a_plan_survives_the_cast_of_inputs() -> None:
    """FSDP2 under mixed precision casts what layers are given, and copies dataclasses on the way."""
    plan = ForwardPlan(q_len=4, kv_len=4, q_offset=0, kv_offset=0, padding_mask=None, device=torch.device("cpu"))
    given = {"attention_mask": plan, "hidden_states": torch.ones(2)}
    cast = _apply_to_tensors(lambda x: x.to(torch.bfloat16), given)
    assert cast["attention_mask"] is plan and cast["hidden_states"].dtype == torch.bfloat16
