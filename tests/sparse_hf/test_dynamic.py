"""Dynamic methods in models: every path agrees with per-sequence calls of an oracle.

The oracle's attention sees one unpadded sequence and loops over heads. It asks each method what one head reads (tested
by definition in methods/), call by call where a prefill comes in chunks, and computes a masked softmax.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from sparse_hf import (
    FlexPrefill,
    LayerRule,
    MInference,
    SparseCache,
    SparseConfig,
    Streaming,
    XAttention,
    set_head_masks,
    sparsify,
    sparsity_summary,
)
from sparse_hf.dynamic import split_sequences
from sparse_hf.methods import DynamicMethod, Method
from sparse_hf.patching import get_handle
from sparse_hf_kernels import TokenPositions, positions_as_data
from sparse_hf_kernels.kv_cache import slot_positions

ORACLE = "test_dynamic_oracle"
SIZE = 64
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
XATTENTION = XAttention(stride=4, threshold=(0.2, 0.5, 0.3, 0.1), block_size=SIZE)
FLEXPREFILL = FlexPrefill(gamma=0.3, tau=0.35, min_budget=64, block_size=SIZE)
STREAMING = Streaming(num_sink_tokens=2, window_size=30)
CONFIGS = {
    "xattention": SparseConfig(sparse=XATTENTION),
    "flexprefill": SparseConfig(sparse=FLEXPREFILL),
    "minference": SparseConfig(sparse=MINFERENCE),
    # Retrieval heads choose by q and k, the others stream; another method in one layer.
    "retrieval": SparseConfig(
        full=XATTENTION,
        sparse=STREAMING,
        rules=(LayerRule(layers="1", full=FLEXPREFILL),),
        head_masks=((1, 0), (0, 1)),
    ),
    "two_methods": SparseConfig(full=XATTENTION, sparse=MINFERENCE, head_masks=((1, 0), (0, 1))),
    "min_seq_len": SparseConfig(full=XATTENTION, sparse=STREAMING, head_masks=((1, 0), (1, 0)), min_seq_len=130),
}


@dataclass(kw_only=True)
class Rule:
    """One layer for the oracle; `borders` are those of the calls that a prefill comes in."""

    methods: list[Method]
    min_seq_len: int
    borders: Sequence[int] = ()
    frozen: list[Tensor] = field(default_factory=list)


def reads(rule: Rule, h: int, q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
    """Boolean `[q_len, kv_len]`: what head h of q, k `[1, heads, len, dim]` reads in a call that begins at `start`."""
    head, (q_len, kv_len) = h // (q.shape[1] // k.shape[1]), (q.shape[2], k.shape[2])
    i, j = torch.arange(start, kv_len)[:, None], torch.arange(kv_len)[None]
    method = rule.methods[head]
    if not isinstance(method, DynamicMethod):
        assert isinstance(method, Streaming)
        keep = (i - j < method.window_size) | (j < method.num_sink_tokens) | (i < rule.min_seq_len)
    elif q_len == 1 or kv_len <= rule.min_seq_len:
        keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    else:
        chosen = method.select(q[:, h : h + 1], k[:, head : head + 1], scale=scale, q_offset=start, heads=[h])
        keep = i // SIZE < -(-rule.min_seq_len // SIZE)
        keep = keep.expand(q_len, kv_len).clone()
        for row, count in enumerate(chosen.counts[0, 0].tolist()):
            for block in chosen.indices[0, 0, row, :count].tolist():
                keep |= (i // SIZE == start // SIZE + row) & (j // SIZE == block)
        for column in [] if chosen.columns is None else chosen.columns[0, 0].tolist():
            keep |= j == column
    return keep & (j <= i)


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    assert attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    rule, length, group = module.dynamic_rule, query.shape[2], query.shape[1] // key.shape[1]
    borders = [0, *(b for b in rule.borders if b < length), length]
    heads = []
    for h in range(query.shape[1]):
        allowed = torch.zeros(length, length, dtype=torch.bool)
        for start, end in pairwise(borders):
            call = query[:, :, start:end].detach(), key[:, :, :end].detach()
            allowed[start:end, :end] = reads(rule, h, *call, start, scaling)
        scores = query[0, h] @ key[0, h // group].T * scaling
        heads.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value[0, h // group])
        rule.frozen.append(allowed)
    return torch.stack(heads, 1)[None], None


@pytest.fixture(scope="module", autouse=True)
def register_dynamic_oracle() -> Iterator[None]:
    AttentionInterface.register(ORACLE, oracle_attention)
    AttentionMaskInterface.register(ORACLE, lambda *args, **kwargs: None)
    yield
    del AttentionInterface._global_mapping[ORACLE]
    del AttentionMaskInterface._global_mapping[ORACLE]


class DynamicCase:
    """A sparsified model and the oracle, with the same weights."""

    def __init__(self, make_model: Callable, family: str, name: str) -> None:
        torch.manual_seed(3)
        self.config = CONFIGS[name]
        self.model: PreTrainedModel = sparsify(make_model(family), self.config)
        self.oracle: PreTrainedModel = make_model(family)
        self.oracle.config._attn_implementation = ORACLE
        methods = get_handle(self.model).methods
        self.rules = []
        for layer, row in zip(self.oracle.model.layers, methods, strict=True):
            layer.self_attn.dynamic_rule = Rule(methods=row, min_seq_len=self.config.num_dense_rows)
            self.rules.append(layer.self_attn.dynamic_rule)

    def expected(self, tokens: Tensor, borders: Sequence[int] = ()) -> Tensor:
        """Logits `[length, vocab]` of one sequence; each layer then reads less than everything."""
        for rule in self.rules:
            rule.borders, rule.frozen = borders, []
        return self.oracle(tokens[None], use_cache=False).logits[0]

    def tokens(self, *lengths: int) -> list[Tensor]:
        return [torch.randint(1, 99, (length,)) for length in lengths]


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5, msg=lambda text: f"{what}: {text}")


@pytest.fixture(params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dynamic(make_model: Callable, family: str, name: str) -> DynamicCase:
    return DynamicCase(make_model, family, name)


def assert_trains(case: DynamicCase, actual: list[Tensor], sequences: list[Tensor]) -> None:
    """The gradients of the reference autograd through the same blocks."""
    weights = [torch.randn(len(tokens), 99) for tokens in sequences]
    count = sum(map(len, sequences))
    case.model.zero_grad()
    (sum((a * w).sum() for a, w in zip(actual, weights, strict=True)) / count).backward()
    case.oracle.zero_grad()
    for tokens, w in zip(sequences, weights, strict=True):
        ((case.expected(tokens) * w).sum() / count).backward()
    truth = dict(case.oracle.named_parameters())
    for key, parameter in case.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        scale = max(truth[key].grad.abs().max().item(), 0.1)
        torch.testing.assert_close(parameter.grad, truth[key].grad, rtol=1e-3, atol=5e-5 * scale, msg=key)


def test_batch_and_gradients(dynamic: DynamicCase) -> None:
    """q_norm models (Qwen3) too, which replacements of a whole attention forward get wrong."""
    sequences = dynamic.tokens(230, 230)
    dynamic.model.train()
    logits = dynamic.model(torch.stack(sequences), use_cache=False).logits
    for row, tokens in zip(logits, sequences, strict=True):
        close(row, dynamic.expected(tokens))
        for rule in dynamic.rules:
            kept = [mask.sum().item() / (230 * 231 / 2) for mask in rule.frozen]
            assert min(kept) < 0.95, "a layer reads everything: the test could not fail"
    assert_trains(dynamic, list(logits), sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama"])
def test_padded_batch_and_gradients(dynamic: DynamicCase, pad: Callable, side: str) -> None:
    sequences = dynamic.tokens(250, 40, 250, 201, 1)
    batch = pad(sequences, side)
    dynamic.model.train()
    logits = dynamic.model(**batch.inputs, use_cache=False).logits
    assert logits.isfinite().all()
    for row, tokens in zip(batch.real(logits), sequences, strict=True):
        close(row, dynamic.expected(tokens), f"{len(tokens)} tokens")
    assert_trains(dynamic, batch.real(logits), sequences)


@pytest.mark.parametrize("family", ["llama"])
def test_packed_rows(dynamic: DynamicCase, pack: Callable) -> None:
    rows = [dynamic.tokens(230, 1, 20), dynamic.tokens(21, 230)]
    dynamic.model.train()
    logits = dynamic.model(**pack(rows), use_cache=False).logits
    documents = [document for row in rows for document in row]
    parts = [part for row, line in zip(rows, logits, strict=True) for part in line.split([len(x) for x in row])]
    for part, tokens in zip(parts, documents, strict=True):
        close(part, dynamic.expected(tokens), f"{len(tokens)} tokens")
    assert_trains(dynamic, parts, documents)


@torch.no_grad()
def run_steps(case: DynamicCase, batch: Any, cache: Any, borders: Sequence[int]) -> Tensor:
    length, parts = batch.input_ids.shape[1], []
    for start, end in zip([0, *borders], [*borders, length], strict=True):
        parts.append(case.model(**batch.upto(end, start), past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


CACHES = {
    "sparse": SparseCache.for_model,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=256),
}


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("cache", CACHES)
def test_chunks_and_decoding(dynamic: DynamicCase, pad: Callable, cache: str) -> None:
    """Each call of a prefill chooses for itself; single queries read every key."""
    sequences = dynamic.tokens(240, 240)
    borders = [64, 100, 192, 236, 237, 238, 239]
    logits = run_steps(dynamic, pad(sequences, "left"), CACHES[cache](dynamic.model), borders)
    for row, tokens in zip(logits, sequences, strict=True):
        close(row, dynamic.expected(tokens, borders))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("cache", CACHES)
def test_padded_chunks_and_decoding(dynamic: DynamicCase, pad: Callable, cache: str) -> None:
    """The calls of a padded row begin amid its sequence; one may hold none of its tokens, or one alone."""
    sequences = dynamic.tokens(240, 177, 111)
    borders = [130, 200, 238, 239]
    logits = run_steps(dynamic, pad(sequences, "left"), CACHES[cache](dynamic.model), borders)
    for row, tokens in zip(range(3), sequences, strict=True):
        gap = 240 - len(tokens)
        own = [border - gap for border in borders if border > gap]
        close(logits[row, gap:], dynamic.expected(tokens, own), f"{len(tokens)} tokens")


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["xattention", "minference"])
@pytest.mark.parametrize("cache", ["sparse", "dynamic"])
def test_one_token_beside_a_chunk(dynamic: DynamicCase, slots: Callable, cache: str) -> None:
    """A row that decodes while another prefills: its single query reads every key."""
    mask = torch.ones(2, 230, dtype=torch.bool)
    mask[1, 201:] = False
    sequences = dynamic.tokens(230, 201)
    logits = run_steps(dynamic, slots(sequences, mask), CACHES[cache](dynamic.model), [200])
    close(logits[0], dynamic.expected(sequences[0], [200]))
    close(logits[1, :201], dynamic.expected(sequences[1], [200]))


def test_split_sequences() -> None:
    """Rows of two and one packed sequences with padding; queries that are not the last keys; a missing key."""
    positions = TokenPositions(
        q_positions=torch.tensor([[-1, 2, 0, 1, -1], [3, 4, 5, -1, -1]]),
        k_positions=torch.tensor([[0, 1, -1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]),
        q_segments=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]),
        k_segments=torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]),
    )
    found = [(x.queries.tolist(), x.keys.tolist()) for x in split_sequences(positions, 2)]
    assert found == [([[1]], [[0, 1, 3]]), ([[2, 3]], [[4, 5]]), ([[5, 6, 7]], [[7, 8, 9, 10, 11, 12]])]
    missing = TokenPositions(q_positions=torch.tensor([[3]]), k_positions=torch.tensor([[0, 2, 3]]))
    with pytest.raises(ValueError, match="need every key"):
        split_sequences(missing, 1)
    with positions_as_data(), pytest.raises(ValueError, match="cannot be read while a CUDA graph is captured"):
        split_sequences(missing, 1)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["xattention"])
@pytest.mark.parametrize("chunk", [64, 128, 192])
def test_chunks_of_whole_blocks_are_the_whole_prefill(dynamic: DynamicCase, pad: Callable, chunk: int) -> None:
    sequences = dynamic.tokens(256, 256)
    borders = list(range(chunk, 256, chunk))
    logits = run_steps(dynamic, pad(sequences, "left"), SparseCache.for_model(dynamic.model), borders)
    for row, tokens in zip(logits, sequences, strict=True):
        close(row, dynamic.expected(tokens))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["retrieval", "minference"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(dynamic: DynamicCase, pad: Callable, use_reentrant: bool) -> None:
    sequences = dynamic.tokens(220, 150)
    batch = pad(sequences, "left")
    dynamic.model.train()
    dynamic.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        dynamic.model.enable_input_require_grads()
    logits = dynamic.model(**batch.inputs, use_cache=False).logits
    assert_trains(dynamic, batch.real(logits), sequences)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["retrieval", "two_methods"])
def test_generate(dynamic: DynamicCase, pad: Callable) -> None:
    """`generate` prefills at once and decodes densely; heads that choose keep every key."""
    sequences = dynamic.tokens(200, 150)
    batch = pad(sequences, "left")
    out = dynamic.model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=5, do_sample=False
    )
    for row, tokens in zip(out, sequences, strict=True):
        grown = tokens
        for _ in range(5):
            steps = range(len(tokens), len(grown))
            grown = torch.cat([grown, dynamic.expected(grown, steps)[-1].argmax()[None]])
        assert row[-5:].tolist() == grown[-5:].tolist()
    cache = SparseCache.for_model(dynamic.model)
    dynamic.model(batch.input_ids, attention_mask=batch.attention_mask, past_key_values=cache)
    storage = cache._sparse_layers[0].storage
    assert storage is not None
    held = {}
    for group in storage.layout.groups:
        positions = slot_positions(group.ring, group.slots(storage.capacity), storage.lengths)
        held |= dict.fromkeys(group.heads, (positions >= 0).sum(-1).tolist())
    chooses = {head: isinstance(m, DynamicMethod) for head, m in enumerate(get_handle(dynamic.model).methods[0])}
    assert any(chooses.values())
    assert all(held[head] == [200, 150] for head, dynamic_head in chooses.items() if dynamic_head)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["retrieval", "two_methods"])
@pytest.mark.parametrize("skip_saturated", [False, True])
def test_mask_learning(dynamic: DynamicCase, make_model: Callable, pad: Callable, skip_saturated: bool) -> None:
    """A blend of both branches' outputs in every layer, and the gradient of the gates."""
    sequences = dynamic.tokens(200, 150)
    batch = pad(sequences, "left")
    gates = [torch.tensor(values, requires_grad=True) for values in ([0.3, 1.0], [0.0, 0.6])]
    handle = get_handle(dynamic.model)
    for state, gate in zip(handle.states, gates, strict=True):
        state.gate, state.skip_saturated = (lambda gate=gate: gate), skip_saturated
    logits = dynamic.model(**batch.inputs, use_cache=False).logits
    weights = [torch.randn(len(tokens), 99) for tokens in sequences]
    actual = torch.autograd.grad(sum((a * w).sum() for a, w in zip(batch.real(logits), weights, strict=True)), gates)

    # The oracle's two branches: heads follow the full methods, or the sparse ones.
    def blended(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any) -> Any:
        outs = []
        for methods in (handle.states[module.layer_idx].full_methods, handle.states[module.layer_idx].sparse_methods):
            module.dynamic_rule.methods = list(methods)
            outs.append(oracle_attention(module, query, key, value, mask, kwargs["scaling"])[0])
        z = gates[module.layer_idx].repeat_interleave(2)[:, None]
        return z * outs[0] + (1 - z) * outs[1], None

    AttentionInterface.register(ORACLE, blended)
    try:
        expected = [dynamic.expected(tokens) for tokens in sequences]
    finally:
        AttentionInterface.register(ORACLE, oracle_attention)
    for row, truth in zip(batch.real(logits), expected, strict=True):
        close(row, truth)
    truth = torch.autograd.grad(sum((a * w).sum() for a, w in zip(expected, weights, strict=True)), gates)
    for ours, theirs, gate in zip(actual, truth, gates, strict=True):
        counts = torch.ones_like(gate, dtype=torch.bool) if not skip_saturated else (gate > 0) & (gate < 1)
        torch.testing.assert_close(ours[counts], theirs[counts], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["retrieval"])
def test_compiled_models_break_their_graph(dynamic: DynamicCase, pad: Callable) -> None:
    torch._dynamo.reset()
    run = torch.compile(dynamic.model, backend="eager", dynamic=True)
    inputs = pad(dynamic.tokens(200, 150), "left").inputs
    close(run(**inputs, use_cache=False).logits, dynamic.model(**inputs, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", ["retrieval"])
@pytest.mark.parametrize("cache", [None, "sparse", "dynamic"])
def test_positions_are_read_once_for_all_layers(
    dynamic: DynamicCase, pad: Callable, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_hf import dynamic as module

    calls, split = [], module.split_sequences
    monkeypatch.setattr(module, "split_sequences", lambda *args: calls.append(1) or split(*args))
    past = {"use_cache": False} if cache is None else {"past_key_values": CACHES[cache](dynamic.model)}
    batch = pad(dynamic.tokens(200, 150), "left")
    dynamic.model(**batch.upto(199), **past)
    assert len(calls) == 1
    if cache is not None:
        dynamic.model(**batch.upto(200, 199), **past)
        assert len(calls) == 1, "decoding needs no reading"
    dynamic.model(torch.stack(dynamic.tokens(200, 200)), use_cache=False)
    assert len(calls) == 1, "a batch without padding needs no reading"


def test_what_does_not_fit_a_model(make_model: Callable) -> None:
    cases: list[tuple[str, SparseConfig, str]] = [
        ("llama", SparseConfig(sparse=XAttention(threshold=(0.5, 0.6))), "layer 0: .*2 values, the layer has 4"),
        ("llama", SparseConfig(sparse=MInference(heads=({"top_k": 2},))), "layer 0: .*1 entries"),
        ("qwen2_native", SparseConfig(sparse=XAttention()), "layer 1: xattention knows no sliding window"),
        (
            "llama",
            SparseConfig(full=XATTENTION, sparse=FlexPrefill(), head_masks=((1, 1), (0, 1))),
            "layer 1: .*share block_size",
        ),
    ]
    for family, config, message in cases:
        model = make_model(family)
        with pytest.raises(ValueError, match=message):
            sparsify(model, config)
        assert not hasattr(model, "_sparse_hf_handle")
    native = SparseConfig(sparse=XAttention(), rules=(LayerRule(layers="1-", sparse=STREAMING),))
    sparsify(make_model("qwen2_native"), native)


def test_head_masks_that_do_not_fit_change_nothing(make_model: Callable) -> None:
    config = SparseConfig(full=XATTENTION, sparse=FlexPrefill(), head_masks="all_sparse")
    model = sparsify(make_model("llama"), config)
    with pytest.raises(ValueError, match="share block_size"):
        set_head_masks(model, torch.tensor([[1, 1], [0, 1]]))
    assert get_handle(model).head_masks.sum() == 0 and model(torch.ones(1, 9, dtype=torch.long)).logits.isfinite().all()
    set_head_masks(model, torch.tensor([[1, 1], [0, 0]]))
    assert [state.methods[0].name for state in get_handle(model).states] == ["xattention", "flexprefill"]


def test_summary_counts_them_as_dense(make_model: Callable) -> None:
    summary = sparsity_summary(sparsify(make_model("llama"), CONFIGS["retrieval"]), seq_len=200)
    streaming = sparsity_summary(sparsify(make_model("llama"), SparseConfig(sparse=STREAMING)), seq_len=200)
    assert summary.attention_density == pytest.approx((1 + streaming.attention_density) / 2)
    assert summary.kv_bytes == (summary.dense_kv_bytes + streaming.kv_bytes) // 2
