"""Tiny models of every family, the configurations they are tested with, and an oracle that shares no code with them.

The oracle is an attention function of its own: one unpadded sequence, a loop over heads, and an N x N mask written from
each method's definition. Every path of the library must reproduce it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from sparse_hf import (
    BigBird,
    CaptureStats,
    Dense,
    Dilated,
    Explicit,
    Fixed,
    HeadPlace,
    LayerRule,
    LocalGlobal,
    SlidingWindow,
    SparseCache,
    SparseConfig,
    Streaming,
    Strided,
    Triangle,
    TriShape,
    is_sparsified,
    sparsify,
)

VOCAB = 99
NATIVE_WINDOW = 12
BLOCK = 8
BLOCK_ROWS = 8  # the explicit pattern covers 64 tokens
ORACLE = "test_oracle"

NO_ENDS = {"eos_token_id": None, "bos_token_id": None}
COMMON = {**NO_ENDS, "vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0}
ROPE = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
QWEN2_NATIVE = {**ROPE, "num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROPE)),
    "qwen2_native": lambda: Qwen2ForCausalLM(Qwen2Config(**QWEN2_NATIVE, sliding_window=NATIVE_WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**ROPE, sliding_window=None)),
    "mistral_native": lambda: MistralForCausalLM(MistralConfig(**ROPE, sliding_window=NATIVE_WINDOW)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    ),
}
NATIVE_LAYERS = {"qwen2_native": (1, 2), "mistral_native": (0, 1)}
MIXES = ("dense", "sliding_window", "streaming", "explicit", "mixed", "min_seq_len", "block_rules", "local_global")
NUM_LAST = 5  # of the mix "last_rows", whose rows depend on where a call ends; test_last_rows.py has its paths

Keep = Callable[[Tensor, Tensor], Tensor]  # (i, j), which broadcast -> may i read j, causality apart


def block_mask() -> Tensor:
    """A random lower-triangular block mask with two empty rows."""
    mask = (torch.rand(BLOCK_ROWS, BLOCK_ROWS, generator=torch.Generator().manual_seed(7)) < 0.5).tril()
    mask[0, 0] = mask[4, 1] = True
    mask[2] = mask[5] = False
    return mask


def keep_dense(i: Tensor, j: Tensor) -> Tensor:
    return (i >= 0) & (j >= 0)


def keep_window(i: Tensor, j: Tensor) -> Tensor:
    return i - j < 6


def keep_streaming(i: Tensor, j: Tensor) -> Tensor:
    return (i - j < 6) | (j < 2)


def keep_explicit(i: Tensor, j: Tensor) -> Tensor:
    return block_mask()[i // BLOCK, j // BLOCK]


BIGBIRD = BigBird(block_size=BLOCK, num_random_blocks=1, num_window_blocks=1, seed=3)
LOCAL_GLOBAL = LocalGlobal(
    block_size=4,
    num_local_heads=1,
    num_global_heads=1,
    window_size=4,
    min_window_size=2,
    max_window_size=10,
    global_ratio=0.25,
)


def keep_bigbird(layer: int, head: int) -> Keep:
    """The first block, the own one, and the one that was drawn for this head (test_bigbird.py has the draw itself)."""
    rule = BIGBIRD.pattern(HeadPlace(layer=layer, kv_head=head)).blocks
    drawn = [int(rule.random_blocks(torch.tensor(row))[0]) for row in range(BLOCK_ROWS)]

    def keep(i: Tensor, j: Tensor) -> Tensor:
        row, block = i // BLOCK, j // BLOCK
        return (block == 0) | (block == row) | (block == torch.tensor(drawn)[row])

    return keep


def keep_dilated(i: Tensor, j: Tensor) -> Tensor:
    distance = i // 4 - j // 4
    return sum((distance == offset for offset in (0, 1, 2, 4, 8)), torch.zeros(()).bool())


def keep_strided(i: Tensor, j: Tensor) -> Tensor:
    distance = i // BLOCK - j // BLOCK
    return (distance < 2) | (distance % 2 == 0)


def keep_fixed(i: Tensor, j: Tensor) -> Tensor:
    return (i // 12 == j // 12) | (j % 12 >= 8)


def keep_local(i: Tensor, j: Tensor) -> Tensor:
    """Blocks of 4; windows of sqrt(4 n) tokens between 2 and 10: 1 block at n = 4, 2 up to 16, then 3."""
    row = i // 4
    count = 1 + (row >= 1).long() + (row >= 4).long()
    return row - j // 4 < count


def keep_global(i: Tensor, j: Tensor) -> Tensor:
    return keep_local(i, j) | (j // 4 % 4 == 0)


def keep_triangle(i: Tensor, j: Tensor) -> Tensor:
    return (i - j < 4) | (j < 1)


def mixed_head_masks(num_layers: int, num_heads: int) -> list[list[int]]:
    return [[(layer + head) % 2 for head in range(num_heads)] for layer in range(num_layers)]


def make_config(mix: str, num_layers: int, num_heads: int) -> SparseConfig:
    explicit = Explicit.from_block_mask(block_mask(), block_size=BLOCK)
    streaming = Streaming(num_sink_tokens=2, window_size=6)
    window = SlidingWindow(window_size=6)
    if mix == "mixed":  # the last layer's sparse heads are explicit; the last head's full method is a window there
        last = str(num_layers - 1)
        rules = (
            LayerRule(layers=last, sparse=explicit),
            LayerRule(layers=last, kv_heads=str(num_heads - 1), full=window),
        )
        masks = mixed_head_masks(num_layers, num_heads)
        return SparseConfig(full=Dense(), sparse=streaming, rules=rules, head_masks=tuple(map(tuple, masks)))
    if mix == "block_rules":  # the first layer strided and dilated, the last one bigbird and fixed
        first, last = "0", str(num_layers - 1)
        rules = (
            LayerRule(layers=first, sparse=Dilated(block_size=4)),
            LayerRule(layers=first, kv_heads="0", sparse=Strided(block_size=BLOCK, stride_blocks=2)),
            LayerRule(layers=last, sparse=Fixed(block_size=4, stride_blocks=3)),
            LayerRule(layers=last, kv_heads="0", sparse=BIGBIRD),
        )
        return SparseConfig(sparse=streaming, rules=rules)
    if mix == "last_rows":
        triangle = Triangle(num_sink_tokens=1, window_size=4, num_last_tokens=NUM_LAST)
        masks = mixed_head_masks(num_layers, num_heads)
        tri_shape = TriShape(num_sink_tokens=2, window_size=6, num_last_tokens=NUM_LAST)
        return SparseConfig(full=tri_shape, sparse=triangle, head_masks=tuple(map(tuple, masks)))
    methods = {"dense": Dense(), "sliding_window": window, "explicit": explicit, "local_global": LOCAL_GLOBAL}
    return SparseConfig(sparse=methods.get(mix, streaming), min_seq_len=16 if mix == "min_seq_len" else 0)


def keep_of(mix: str, layer: int, head: int, num_layers: int, num_heads: int) -> Keep:
    """What `make_config` means for one head, written out by hand."""
    if mix == "mixed":
        is_full = mixed_head_masks(num_layers, num_heads)[layer][head]
        if layer == num_layers - 1:
            return (keep_window if head == num_heads - 1 else keep_dense) if is_full else keep_explicit
        return keep_dense if is_full else keep_streaming
    if mix == "last_rows":
        return keep_streaming if mixed_head_masks(num_layers, num_heads)[layer][head] else keep_triangle
    if mix == "block_rules" and layer == 0:
        return keep_strided if head == 0 else keep_dilated
    if mix == "block_rules" and layer == num_layers - 1:
        return keep_bigbird(layer, head) if head == 0 else keep_fixed
    if mix == "local_global":
        return keep_global if head % 2 else keep_local
    table = {"dense": keep_dense, "sliding_window": keep_window, "explicit": keep_explicit}
    return table.get(mix, keep_streaming)


@dataclass(kw_only=True)
class OracleRule:
    """One layer for the oracle."""

    keeps: list[Keep]
    native_window: int | None
    min_seq_len: int
    num_last: int = 0
    ends: tuple[int, ...] = ()
    """Where calls end: the last `num_last` positions before each end read all; by default the whole sequence's."""


def oracle_mask(rule: OracleRule, head: int, length: int) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = rule.keeps[head](i, j) | (i < rule.min_seq_len)
    if rule.num_last:
        ends = torch.tensor(rule.ends or (length,))
        allowed = allowed | (i >= ends[torch.searchsorted(ends, i, right=True)] - rule.num_last)
    if rule.native_window is not None:
        allowed = allowed & (i - j < rule.native_window)
    return allowed & (j <= i)


def oracle_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    assert attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    rule, group = module.oracle_rule, query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        allowed = oracle_mask(rule, h // group, query.shape[2])
        some = allowed.any(-1, keepdim=True)
        scores = query[0, h].float() @ key[0, h // group].float().T * scaling
        # A row without keys is made dense for the softmax and then blanked.
        weights = scores.masked_fill(~(allowed | ~some), float("-inf")).softmax(-1)
        heads.append(torch.where(some, weights @ value[0, h // group].float(), 0.0))
    return torch.stack(heads, 1)[None].to(query.dtype), None


def make_weights_matter(model: PreTrainedModel) -> PreTrainedModel:
    """Larger random weights than transformers' 0.02, which make every softmax nearly uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def register_oracle() -> Iterator[None]:
    AttentionInterface.register(ORACLE, oracle_attention)
    AttentionMaskInterface.register(ORACLE, lambda *args, **kwargs: None)
    yield
    del AttentionInterface._global_mapping[ORACLE]
    del AttentionMaskInterface._global_mapping[ORACLE]


@pytest.fixture(scope="session")
def prototypes() -> dict[str, PreTrainedModel]:
    torch.manual_seed(1)
    return {name: make_weights_matter(build()) for name, build in FAMILIES.items()}


@pytest.fixture
def make_model(prototypes: dict[str, PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """A fresh dense model of a family; equal weights at every call."""
    return lambda family: copy.deepcopy(prototypes[family])


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MIXES)
def mix(request: pytest.FixtureRequest) -> str:
    return request.param


class Case:
    """A sparsified model, and its oracle: the same weights behind the oracle's attention."""

    def __init__(self, dense_model: PreTrainedModel, family: str, mix: str) -> None:
        self.family, self.mix = family, mix
        config = dense_model.config
        self.num_layers = config.num_hidden_layers
        self.num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.model = copy.deepcopy(dense_model)
        self.config = make_config(mix, self.num_layers, self.num_heads)
        sparsify(self.model, self.config)
        self.oracle = copy.deepcopy(dense_model)
        assert not is_sparsified(self.oracle)
        self.oracle.config._attn_implementation = ORACLE
        layers = self.oracle.transformer.h if family == "gpt2" else self.oracle.model.layers
        self.oracle_modules = [layer.attn if family == "gpt2" else layer.self_attn for layer in layers]
        for n, module in enumerate(self.oracle_modules):
            module.oracle_rule = OracleRule(
                keeps=[keep_of(mix, n, h, self.num_layers, self.num_heads) for h in range(self.num_heads)],
                native_window=NATIVE_WINDOW if n in NATIVE_LAYERS.get(family, ()) else None,
                min_seq_len=16 if mix == "min_seq_len" else 0,
                num_last=NUM_LAST if mix == "last_rows" else 0,
            )

    def expected(self, tokens: Tensor, ends: Iterable[int] = ()) -> Tensor:
        """The oracle's logits `[length, vocab]` of one sequence; `ends` are those of the calls that it came in."""
        for module in self.oracle_modules:
            module.oracle_rule.ends = tuple(ends)
        return self.oracle(tokens[None], use_cache=False).logits[0]

    def mask(self, layer: int, head: int, length: int) -> Tensor:
        """What the oracle lets a KV head read: boolean `[length, length]`."""
        return oracle_mask(self.oracle_modules[layer].oracle_rule, head, length)

    def tokens(self, *lengths: int) -> list[Tensor]:
        return [torch.randint(1, VOCAB, (length,)) for length in lengths]

    def assert_logits(self, actual: Tensor, expected: Tensor, what: str = "logits") -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5, msg=lambda text: f"{what}: {text}")

    def assert_gradients(self, actual: list[Tensor], sequences: list[Tensor]) -> None:
        """`actual`, logits per sequence, have the oracle's gradients in every parameter."""
        weights = [torch.randn(len(tokens), VOCAB) for tokens in sequences]
        count = sum(map(len, sequences))
        self.model.zero_grad()
        self.oracle.zero_grad()
        (sum((a * w).sum() for a, w in zip(actual, weights, strict=True)) / count).backward()
        for tokens, w in zip(sequences, weights, strict=True):
            ((self.expected(tokens) * w).sum() / count).backward()
        truth = dict(self.oracle.named_parameters())
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            scale = truth[name].grad.abs().max().item()
            torch.testing.assert_close(
                parameter.grad,
                truth[name].grad,
                rtol=1e-4,
                atol=2e-5 * max(scale, 0.1),
                msg=lambda t, n=name: f"{n}: {t}",
            )


@pytest.fixture
def make_case(make_model: Callable[[str], PreTrainedModel]) -> Callable[[str, str], Case]:
    return lambda family, mix: Case(make_model(family), family, mix)


@pytest.fixture
def case(make_case: Callable[[str, str], Case], family: str, mix: str) -> Case:
    return make_case(family, mix)


@pytest.fixture(params=[*MIXES, "last_rows"])
def any_case(make_case: Callable[[str, str], Case], family: str, request: pytest.FixtureRequest) -> Case:
    """With "last_rows" too, for paths of a single call."""
    return make_case(family, request.param)


@pytest.fixture
def new_cache() -> Callable[[str, PreTrainedModel], Cache]:
    """`new_cache(name, model)`: an empty "sparse", "dynamic" or "static" one."""
    kinds: dict[str, Callable[[PreTrainedModel], Cache]] = {
        "sparse": SparseCache.for_model,
        "dynamic": lambda model: DynamicCache(config=model.config),
        "static": lambda model: StaticCache(config=model.config, max_cache_len=256),
    }
    return lambda name, model: kinds[name](model)


class Counts:
    """What captured figures are checked with."""

    @staticmethod
    def triangle(length: int) -> int:
        return length * (length + 1) // 2

    @staticmethod
    def tiles(mask: Tensor, size: int, start: int = 0) -> int:
        """Blocks with a pair of one row's mask `[q_len, kv_len]` whose first query stands at `start`."""
        i, j = mask.nonzero(as_tuple=True)
        return len(set(zip(((i + start) // size).tolist(), (j // size).tolist(), strict=True)))

    @staticmethod
    def assert_those_of_masks(stats: CaptureStats) -> None:
        """Pairs of every branch, in each pass and layer."""
        for one in stats:
            for layer in one.layers:
                for head in layer.heads:
                    for branch in head.branches:
                        mask = one.mask(layer.layer, branch.branch)[:, head.head]
                        assert branch.kept_pairs == int(mask.sum()), (layer.layer, head.head, branch)


@pytest.fixture(scope="session")
def counts() -> type[Counts]:
    return Counts


@dataclass(kw_only=True)
class Batch:
    """Sequences padded to one length; `position_ids` as generate makes them."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def upto(self, length: int, start: int = 0) -> dict[str, Tensor]:
        """A forward's arguments for the slots from `start` to `length`."""
        return {
            "input_ids": self.input_ids[:, start:length],
            "attention_mask": self.attention_mask[:, :length],
            "position_ids": self.position_ids[:, start:length],
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.upto(self.input_ids.shape[1])

    @torch.no_grad()
    def run(self, model: PreTrainedModel, cache: Cache, borders: Iterable[int]) -> Tensor:
        """Logits `[rows, slots, vocab]` of calls that end at each border and at the last slot."""
        ends = [0, *borders, self.input_ids.shape[1]]
        steps = (self.upto(end, start) for start, end in pairwise(ends))
        return torch.cat([model(**step, past_key_values=cache, use_cache=True).logits for step in steps], 1)

    def real(self, output: Tensor) -> list[Tensor]:
        """What belongs to each row's real tokens."""
        return [row[mask] for row, mask in zip(output, self.attention_mask.bool(), strict=True)]


def batch_from_slots(sequences: list[Tensor], mask: Tensor) -> Batch:
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.cat(sequences)
    positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)
    return Batch(input_ids=ids, attention_mask=mask.long(), position_ids=positions)


@pytest.fixture
def pad() -> Callable[..., Batch]:
    """`pad(sequences, side)`: a padded batch."""

    def make(sequences: list[Tensor], side: str) -> Batch:
        longest = max(map(len, sequences))
        slots = torch.arange(longest)
        rows = [slots < len(s) if side == "right" else slots >= longest - len(s) for s in sequences]
        return batch_from_slots(sequences, torch.stack(rows))

    return make


@pytest.fixture
def slots() -> Callable[[list[Tensor], Tensor], Batch]:
    """`slots(sequences, mask)`: a batch whose real tokens lie where the boolean mask says."""
    return batch_from_slots


@pytest.fixture
def pack() -> Callable[[list[list[Tensor]]], dict[str, Tensor]]:
    """`pack(rows)`: documents behind each other in rows of equal length, position ids restarting."""

    def make(rows: list[list[Tensor]]) -> dict[str, Tensor]:
        positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
        return {"input_ids": torch.stack([torch.cat(row) for row in rows]), "position_ids": torch.stack(positions)}

    return make
