"""The kernel that writes the rows of selected patterns, against the same rows in plain torch."""

from __future__ import annotations

import pytest
import torch

from sparse_hf_kernels import BlockSelection, TokenPositions
from sparse_hf_kernels.tiles import RowGeometry
from sparse_hf_kernels.tiles.selected import SelectedLists, selected_rows_naive
from sparse_hf_kernels.tiles.selected_kernels import fill_rows

SIZE, HEADS, BATCH = 64, 4, 2


@pytest.mark.parametrize("tiles", [(64, 64), (32, 64), (64, 16)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(200, 200), (130, 322), (1, 65)])
def test_rows(q_len: int, kv_len: int, transposed: bool, tiles: tuple[int, int]) -> None:
    offset = kv_len - q_len
    own, blocks = torch.arange(offset // SIZE, -(-kv_len // SIZE))[:, None], torch.arange(-(-kv_len // SIZE))
    mask = (torch.rand(BATCH, HEADS, len(own), len(blocks)) < 0.5) & (blocks <= own)
    mask[0, 1] = False
    geometry = RowGeometry.of(TokenPositions.causal(q_len, kv_len))
    lists = SelectedLists.of(BlockSelection.from_mask(mask, SIZE), geometry, transposed)
    num_tiles = -(-kv_len // tiles[1]) if transposed else -(-q_len // tiles[0])
    fixed = torch.randint(100, (2, num_tiles, 16), dtype=torch.int32)
    patterns = torch.tensor([-1, 1, 0, -1], dtype=torch.int32)
    expected = selected_rows_naive(lists, fixed, patterns, geometry, *tiles, 7)
    found = fill_rows(
        lists.counts, lists.indices, fixed, patterns, num_tiles, size=SIZE, tile_m=tiles[0], tile_n=tiles[1],
        first_block=lists.first_block, q_len=q_len, list_base=7, transposed=transposed,
    )  # fmt: skip
    assert torch.equal(found, expected)
