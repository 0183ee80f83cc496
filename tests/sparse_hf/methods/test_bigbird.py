"""`bigbird`: global, window and random blocks; the random ones a function of seed, layer, head and row alone."""

from collections.abc import Callable

import pytest
import torch

from sparse_hf import BigBird, HeadPlace


def random_blocks(method: BigBird, place: HeadPlace, row: int) -> set[int]:
    """What a row keeps beyond the definition's global and window blocks."""
    rule = method.pattern(place).blocks
    assert rule is not None
    kept = {k for k in range(row + 1) if bool(rule.keeps(torch.tensor(row), torch.tensor(k)))}
    fixed = set(range(min(method.num_global_blocks, row + 1)))
    fixed |= set(range(max(row - method.num_window_blocks + 1, 0), row + 1))
    assert fixed <= kept
    return kept - fixed


@pytest.mark.parametrize(("first", "window", "count"), [(1, 2, 3), (0, 1, 2), (2, 3, 0), (3, 1, 5)])
def test_definition(check: Callable, first: int, window: int, count: int) -> None:
    size, place = 4, HeadPlace(layer=3, kv_head=1)
    method = BigBird(
        block_size=size, num_global_blocks=first, num_window_blocks=window, num_random_blocks=count, seed=7
    )
    chosen = {}
    for row in range(20):
        chosen[row] = random_blocks(method, place, row)
        candidates = range(first, row - window + 1)
        assert chosen[row] <= set(candidates), "random blocks lie between the global and the window ones"
        assert len(chosen[row]) == min(count, len(candidates)), "as many as asked for, without repeats"

    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        return block < first or row - block < window or block in chosen[row]

    check(method, reads, [1, 5, 31, 80], place=place)


@pytest.mark.parametrize("size", [64, 128])
def test_block_sizes_of_the_kernels(check: Callable, size: int) -> None:
    method = BigBird(block_size=size, num_random_blocks=1)
    chosen = {row: random_blocks(method, HeadPlace(), row) for row in range(6)}

    def reads(i: int, j: int, n: int) -> bool:
        row, block = i // size, j // size
        return block == 0 or row - block < 2 or block in chosen[row]

    check(method, reads, [size + 1, 5 * size + 3])


def test_the_draw_never_changes() -> None:
    """Artefacts depend on these numbers: they must be the same on every device and in every release."""
    rule = BigBird(seed=5).pattern(HeadPlace(layer=2, kv_head=3)).blocks
    drawn = torch.stack(rule.random_blocks(torch.tensor([3, 4, 10, 100, 2047, 16383])), 1)
    expected = [[-1, -1, 1], [-1, 1, 2], [5, 7, 8], [68, 14, 61], [1838, 446, 107], [10559, 14159, 8796]]
    assert drawn.tolist() == expected  # row 3 has block 1 alone to draw from


def test_layers_heads_and_seeds_draw_differently() -> None:
    places = [HeadPlace(layer=layer, kv_head=head) for layer in range(4) for head in range(4)]
    rows = torch.arange(200)
    tables = [BigBird(seed=seed).pattern(place).blocks.block_mask(200) for seed in (0, 1) for place in places]
    for a, one in enumerate(tables):
        for other in tables[a + 1 :]:
            # Independent draws of 3 among ~100 candidates meet seldom.
            assert int((one & other).sum() - (rows + 1).clamp_max(3).sum()) < 120
    assert torch.equal(tables[0], BigBird(seed=0).pattern(places[0]).blocks.block_mask(200))


def test_every_candidate_is_as_likely() -> None:
    """Counts over 4000 heads of 3 draws among 10 candidates: 1200 each, standard deviation 29."""
    counts = torch.zeros(20, dtype=torch.long)
    for head in range(4000):
        for drawn in BigBird().pattern(HeadPlace(kv_head=head)).blocks.random_blocks(torch.tensor([12])):
            counts[drawn] += 1
    assert counts[:1].sum() == counts[11:].sum() == 0
    assert (counts[1:11] - 1200).abs().max() < 5 * 29


def test_no_block_counts_twice() -> None:
    """A peer's evaluation mode draws block 0 for each random block, which then weighs 1 + r times in the softmax."""
    from sparse_hf_kernels import AttentionLayout, sparse_attention

    layout = AttentionLayout(patterns=(BigBird(block_size=4).pattern(),))
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    v = torch.zeros(1, 1, 64, 8)
    v[:, :, :4] = 1.0  # block 0
    share = sparse_attention(q, k, v, layout)[0, 0, 63, 0]
    assert share == pytest.approx(4 / (6 * 4))  # one global, two window and three random blocks, all of 4 keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_window_blocks": 0}, "num_window_blocks must be a positive integer"),
        ({"block_size": 0}, "block_size must be a positive integer"),
        ({"num_random_blocks": -1}, "num_random_blocks must be an integer >= 0"),
        ({"num_global_blocks": 0.5}, "num_global_blocks must be an integer >= 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_wrong_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"bigbird: {message}"):
        BigBird(**values)
