"""`sliding_window` and `streaming` against their definitions."""

from collections.abc import Callable

import pytest
import torch

from sparse_hf import SlidingWindow, Streaming
from sparse_hf_kernels import AttentionLayout, HeadPattern, TokenPositions, sparse_attention


@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_sliding_window(check: Callable, window: int) -> None:
    check(SlidingWindow(window_size=window), lambda i, j, n: i - j < window, [1, 2, 7, 8, 33])


@pytest.mark.parametrize(("sinks", "window"), [(1, 1), (2, 6), (9, 2), (40, 3)])
def test_streaming(check: Callable, sinks: int, window: int) -> None:
    method = Streaming(num_sink_tokens=sinks, window_size=window)
    check(method, lambda i, j, n: j < sinks or i - j < window, [1, 2, 9, 33])


def test_the_bidirectional_window_of_the_operator() -> None:
    """Keys on both sides, clipped at the edges, as encoders read them."""
    window, length = 4, 19
    layout = AttentionLayout(patterns=(HeadPattern(window=window),), causal=False)
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (2, 1, 1))
    mask = torch.tensor([[abs(i - j) < window for j in range(length)] for i in range(length)])
    truth = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    out = sparse_attention(q, k, v, layout, positions=TokenPositions.causal(length, length))
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-5)
