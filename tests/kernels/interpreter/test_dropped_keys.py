"""Block rules over keys of which a cache dropped the oldest: positions go beyond the number of keys."""

import pytest
import torch

from sparse_hf_kernels import AttentionLayout, BlockList, HeadPattern, TokenPositions, sparse_attention
from sparse_hf_kernels.sparse_attention.reference import sparse_attention_reference

BAND = torch.ones(40, 40).tril().triu(-2).bool()
LAYOUT = AttentionLayout(patterns=(HeadPattern(blocks=BlockList.from_mask(BAND, 16)), HeadPattern(window=40)))


@pytest.mark.parametrize("turned", [False, True])
def test_block_rules_over_what_a_cache_kept(turned: bool) -> None:
    kept, new, seen = 64, 24, 500
    old = torch.arange(seen - kept, seen)
    keys = torch.cat([old.roll(20) if turned else old, torch.arange(seen, seen + new)])[None]
    positions = TokenPositions(q_positions=keys[:, kept:], k_positions=keys)
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, new), (2, kept + new), (2, kept + new)))
    expected, _ = sparse_attention_reference(q, k, v, LAYOUT, positions=positions, scale=0.25)
    actual = sparse_attention(q, k, v, LAYOUT, positions=positions, scale=0.25)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
