"""`explicit` against its list, and every static method as `torch.sparse` tensors and back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_hf import (
    BigBird,
    Dense,
    Dilated,
    Explicit,
    Fixed,
    HeadPlace,
    LocalGlobal,
    SlidingWindow,
    Streaming,
    Strided,
    Triangle,
    TriShape,
    XAttention,
    available_methods,
)
from sparse_hf.interop import to_bcsr, to_csr
from sparse_hf_kernels import AttentionLayout

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")

SIZE = 4
MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]).bool()
EXPLICIT = Explicit.from_block_mask(MASK, block_size=SIZE)
HEAD = HeadPlace(layer=1, kv_head=2)
METHODS: list[Any] = [
    Dense(),
    SlidingWindow(window_size=6),
    Streaming(num_sink_tokens=3, window_size=5),
    TriShape(num_sink_tokens=2, window_size=3, num_last_tokens=4),
    Triangle(num_sink_tokens=5, window_size=1, num_last_tokens=1),
    BigBird(block_size=SIZE, num_random_blocks=1),
    Dilated(block_size=SIZE),
    Strided(block_size=SIZE, stride_blocks=2),
    Fixed(block_size=SIZE, stride_blocks=2),
    LocalGlobal(block_size=SIZE, window_size=4, min_window_size=1),
    EXPLICIT,
]


def token_mask(method: Any, length: int) -> torch.Tensor:
    layout = AttentionLayout(patterns=(method.pattern(HEAD),))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return layout.allowed(layout.patterns[0], i, j, length - 1)


def test_definition(check: Callable) -> None:
    check(EXPLICIT, lambda i, j, n: bool(MASK[i // SIZE, j // SIZE]), [1, 4, 7, 16])


def test_every_static_method_is_here() -> None:
    static = {name for name, cls in available_methods().items() if cls.is_static}
    assert {method.name for method in METHODS} == static


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("length", [1, 14, 16])
@pytest.mark.parametrize("size", [1, 2, 3, SIZE])
def test_export(method: Any, length: int, size: int) -> None:
    mask = token_mask(method, length)
    pad = -length % size
    padded = torch.nn.functional.pad(mask, (0, pad, 0, pad))
    blocks = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
    csr = to_csr(method, length, block_size=size, place=HEAD)
    assert csr.layout == torch.sparse_csr and torch.equal(csr.to_dense(), blocks.float())
    assert len(csr.values()) == int(blocks.sum()), "only what is visited is stored"
    bcsr = to_bcsr(method, length, block_size=size, place=HEAD)
    assert bcsr.layout == torch.sparse_bsr and torch.equal(bcsr.to_dense(), padded.float())
    assert len(bcsr.values()) == int(blocks.sum())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_round_trip(method: Any) -> None:
    """Imported, the blocks are an `explicit` method; exported again, the same tensors."""
    length = 16
    imported = Explicit.from_csr(to_csr(method, length, block_size=SIZE, place=HEAD), block_size=SIZE)
    assert Explicit.from_csr(to_csr(imported, length), block_size=SIZE) == imported
    assert Explicit.from_bcsr(to_bcsr(imported, length)) == imported
    tokens = Explicit.from_csr(to_csr(method, length, block_size=1, place=HEAD), block_size=1)
    assert torch.equal(token_mask(tokens, length), token_mask(method, length))
    if method.pattern(HEAD).blocks is not None:
        assert Explicit.from_bcsr(to_bcsr(method, length, place=HEAD)) == imported
        assert torch.equal(token_mask(imported, length), token_mask(method, length))


def test_a_long_window_is_exported_without_its_mask() -> None:
    csr = to_csr(SlidingWindow(window_size=4096), 131072, block_size=128)
    assert len(csr.values()) == 33 * 1024 - 32 * 33 // 2


def test_imports_of_other_tensors() -> None:
    dense = torch.ones(8, 8).tril()
    assert Explicit.from_bcsr(dense.to_sparse_bsr((4, 4))) == Explicit.from_bcsr(
        torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).add(dense).to_sparse_bsr((4, 4))
    )
    window = to_bcsr(SlidingWindow(window_size=3), 16, block_size=4)
    for matrix, message in (
        (window, "7 of 7 stored blocks keep part of their pairs, the first at block row 0, column 0"),
        (torch.ones(8, 8).to_sparse_bsr((4, 4)), "causal"),
        (dense, "sparse_bsr"),
        (torch.ones(8, 8).to_sparse_bsr((4, 2)), "square blocks"),
        (torch.ones(8, 4).to_sparse_bsr((4, 4)), "square torch.sparse_bsr"),
    ):
        with pytest.raises(ValueError, match=message):
            Explicit.from_bcsr(matrix)


@pytest.mark.parametrize(
    ("method", "length", "size", "message"),
    [
        (XAttention(), 16, None, "xattention is dynamic"),
        (EXPLICIT, 17, None, "covers 16 tokens, got 17"),
        (Dense(), 0, None, "must be positive"),
        (Dense(), 4, 0, "must be positive"),
    ],
)
def test_what_cannot_be_exported(method: Any, length: int, size: int | None, message: str) -> None:
    for export in (to_csr, to_bcsr):
        with pytest.raises(ValueError, match=message):
            export(method, length, block_size=size)
