"""Positions that stay data, as in a captured CUDA graph: the coordinates and tables without a look at them."""

import pytest
import torch
from torch import Tensor

from sparse_hf_kernels import AttentionLayout, HeadPattern, TokenPositions, positions_as_data
from sparse_hf_kernels.tiles import RowGeometry, TileShape, forward_table

LAYOUT = AttentionLayout(patterns=(HeadPattern(window=3), HeadPattern()))


def packed(numbers: list[int], own: slice = slice(None)) -> TokenPositions:
    """Three sequences of 4, 1 and 5 tokens with these segment numbers, a padded slot amid the last."""
    segments = torch.tensor(numbers).repeat_interleave(torch.tensor([4, 1, 6]))[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, -1, 2, 3, 4]])
    return TokenPositions(
        q_positions=positions[:, own], k_positions=positions, q_segments=segments[:, own], k_segments=segments
    )


def readable(where: TokenPositions) -> Tensor:
    """Pairs of a causal kernel that compares coordinates: `[q_len, kv_len]`."""
    geometry = RowGeometry.of(where)
    assert geometry.q_pos is not None and geometry.q_start is not None and geometry.k_pos is not None
    row, start, key = geometry.q_pos[0][:, None], geometry.q_start[0][:, None], geometry.k_pos[0][None]
    return (row >= 0) & (key >= start) & (key <= row)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [7, 3, 10**12], [5, -4, 0]])
@pytest.mark.parametrize("own", [slice(None), slice(8, None)], ids=["prefill", "chunk"])
def test_any_segment_numbers(numbers: list[int], own: slice) -> None:
    where = packed(numbers, own)
    i, j = where.q_positions[0][:, None], where.k_positions[0][None]
    expected = where.visible(slice(None))[0] & (j <= i)
    with positions_as_data():
        assert torch.equal(readable(where), expected)


def test_a_segment_without_keys_reads_nothing() -> None:
    where = packed([4, 6, 8])
    strangers = TokenPositions(
        q_positions=where.q_positions, k_positions=where.k_positions, q_segments=where.q_segments + 1,
        k_segments=where.k_segments,
    )  # fmt: skip
    with positions_as_data():
        assert not readable(strangers).any()


def test_data_need_one_table_per_length() -> None:
    """A capture cannot make a table, but finds the one of the warm-up, whatever the positions were."""

    def table(mask: Tensor) -> object:
        with positions_as_data():
            geometry = RowGeometry.of(TokenPositions.from_padding_mask(mask))
        shape = TileShape(rows=4, columns=4)
        return forward_table(LAYOUT, geometry, shape, batch=2, num_heads=4, head_dim=16, device=torch.device("cpu"))

    full = table(torch.ones(2, 11))
    assert full is table(torch.rand(2, 11) < 0.5) and full is not table(torch.ones(2, 12))
