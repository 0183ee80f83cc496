"""`tri_shape` and `triangle`: both edges of sinks, window and last rows."""

from collections.abc import Callable

import pytest

from sparse_hf import LayerRule, SparseConfig, Triangle, TriShape
from sparse_hf.retention import retention_groups
from sparse_hf_kernels import UNBOUNDED, AttentionLayout


@pytest.mark.parametrize("cls", [TriShape, Triangle])
@pytest.mark.parametrize(("sinks", "window", "last"), [(1, 1, 1), (2, 6, 5), (9, 2, 3), (3, 4, 60)])
def test_definition(check: Callable, cls: type[TriShape], sinks: int, window: int, last: int) -> None:
    method = cls(num_sink_tokens=sinks, window_size=window, num_last_tokens=last)
    lengths = [1, 2, last, last + 1, 21, 40]
    check(method, lambda i, j, n: j < sinks or i - j < window or i >= n - last, lengths, grows=False)


def test_edges_one_token_apart() -> None:
    """8 sinks are tokens 0 to 7, a window of 512 holds the distances 0 to 511, 128 last rows end at the last token."""
    pattern = Triangle().pattern()
    layout, n = AttentionLayout(patterns=(pattern,)), 2000
    counts = layout.row_counts(pattern, n).tolist()
    assert counts[519] == 520 and counts[520] == 520 and counts[1000] == 8 + 512
    assert counts[n - 129] == 520 and counts[n - 128] == n - 127 and counts[n - 1] == n


def test_the_papers_sections() -> None:
    """Streaming and Last, with the paper's inequalities for its own numbers, make up the triangle."""
    si, sl, last, n = 3, 5, 4, 30
    for i in range(n):
        for j in range(i + 1):
            streaming = j <= si or i - j <= sl
            in_last = j > si and i - j > sl and n - i < last
            method = Triangle(num_sink_tokens=si + 1, window_size=sl + 1, num_last_tokens=last - 1)
            pattern = method.pattern()
            kept = j < pattern.num_sink_tokens or i - j < pattern.window or i >= n - pattern.num_last_tokens
            assert kept == (streaming or in_last)


def test_defaults_are_the_papers_code() -> None:
    assert Triangle().to_dict() == {
        "method": "triangle",
        "num_sink_tokens": 8,
        "window_size": 512,
        "num_last_tokens": 128,
    }
    assert (TriShape().num_sink_tokens, TriShape().window_size, TriShape().num_last_tokens) == (128, 3968, 100)


@pytest.mark.parametrize("field", ["num_sink_tokens", "window_size", "num_last_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_wrong_values(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"triangle: {field} must be a positive integer"):
        Triangle(**{field: value})


def test_the_cache_keeps_what_a_last_row_reads() -> None:
    pattern = Triangle().pattern()
    ((retention, _),) = retention_groups(AttentionLayout(patterns=(pattern,)))
    assert retention.capacity == UNBOUNDED and retention.kept_tokens(100_000) == 100_000
    ((retention, _),) = retention_groups(AttentionLayout(patterns=(pattern,), max_distance=1000))
    assert retention.kept_tokens(100_000) == 999  # the model's own window bounds it


def test_heads_of_a_layer_share_their_last_rows(make_model: Callable) -> None:
    from sparse_hf import sparsify

    config = SparseConfig(sparse=Triangle(), rules=(LayerRule(layers="*", kv_heads="1", sparse=TriShape()),))
    with pytest.raises(ValueError, match="share num_last_tokens"):
        sparsify(make_model("llama"), config)
