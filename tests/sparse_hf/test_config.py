"""`SparseConfig`: JSON and back, errors that name what is known, ranges, and which rule counts."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_hf import (
    BigBird,
    Dense,
    Dilated,
    Explicit,
    Fixed,
    FlexPrefill,
    LayerRule,
    LocalGlobal,
    MInference,
    SlidingWindow,
    SparseConfig,
    Streaming,
    Strided,
    Triangle,
    TriShape,
    XAttention,
    available_methods,
)
from sparse_hf.layer_ranges import parse_ranges
from sparse_hf.methods import method_from_dict

BLOCKS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]]).bool()
EXPLICIT = Explicit.from_block_mask(BLOCKS, block_size=16)
METHODS = [
    Dense(),
    SlidingWindow(window_size=7),
    Streaming(num_sink_tokens=3, window_size=9),
    TriShape(num_last_tokens=7),
    Triangle(num_sink_tokens=1),
    BigBird(seed=9),
    Dilated(num_sink_blocks=1),
    Dilated.longnet(num_levels=3),
    Strided(stride_blocks=5),
    Fixed(num_summary_blocks=2),
    LocalGlobal(global_ratio=0.3),
    EXPLICIT,
    XAttention(stride=8),
    FlexPrefill(gamma=0.8),
    MInference(vertical_size=100),
]


def test_every_method_is_here() -> None:
    assert {method.name for method in METHODS} == set(available_methods())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("head_masks", ["all_sparse", "all_full", "file", ((1, 0), (0, 1))])
def test_json_round_trip(method: Any, head_masks: Any, tmp_path: Path) -> None:
    config = SparseConfig(
        full=method,
        sparse=method,
        rules=(
            LayerRule(layers="0-1", sparse=method),
            LayerRule(layers="-2", kv_heads="1", full=Dense(), sparse=method),
        ),
        head_masks=head_masks,
        cache_policy="full",
        min_seq_len=33,
    )
    text = json.dumps(config.to_dict())
    assert SparseConfig.from_dict(json.loads(text)) == config
    for name, content in (("a.json", text), ("a.yaml", text), ("b.yml", text)):  # JSON is YAML too
        (tmp_path / name).write_text(content)
        assert SparseConfig.from_file(tmp_path / name) == config
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(config) == hash(SparseConfig.from_dict(config.to_dict()))


def test_defaults_and_short_forms() -> None:
    assert SparseConfig.from_dict({}) == SparseConfig()
    assert SparseConfig.from_dict({"sparse": "sliding_window"}).sparse == SlidingWindow()
    assert SparseConfig(head_masks=torch.tensor([[1, 0]])).head_masks == ((1, 0),)
    assert SparseConfig(rules=[{"layers": "*", "sparse": "dense"}]).rules == (LayerRule(layers="*", sparse=Dense()),)


@pytest.mark.parametrize("value", [SparseConfig(), Streaming(), EXPLICIT, LayerRule(layers="*", full="dense")])
def test_frozen(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": 3}, r"unknown keys \['windows'\]; known: \['full', 'sparse', 'rules', 'head_masks'"),
        ({"sparse": {"method": "streaming", "window": 3}}, r"unknown keys \['window'\].*num_sink_tokens.*window_size"),
        ({"sparse": {"method": "dense", "window_size": 3}}, r"unknown keys \['window_size'\]; known: none"),
        (
            {"rules": [{"layers": "*", "sparse": "dense", "x": 1}]},
            r"unknown keys .*x.*; known: .*layers.*kv_heads",
        ),
        ({"rules": [{"sparse": "dense"}]}, "layers"),
        ({"rules": [{"layers": "*"}]}, "changes nothing"),
        ({"rules": ["dense"]}, "rule"),
        ({"min_seq_len": True}, "min_seq_len must be an integer"),
        ({"sparse": {"method": "dilated", "segments": 5}}, "segments must be a list"),
        ({"sparse": {"method": "minference", "heads": 7}}, "heads must be a list"),
        ({"sparse": {"method": "xattention", "stride": 16.0}}, "stride must be one of"),
        ({"sparse": {"method": "xattention", "block_size": 128.0}}, "block_size must be one of"),
        ({"rules": "dense"}, "rule"),
        ({"sparse": "nonesuch"}, "unknown method 'nonesuch'; known: dense, sliding_window, streaming, tri_shape"),
        ({"full": {"method": "xx"}}, "unknown method 'xx'; known: dense"),
        ({"full": {"window_size": 3}}, "method"),
        ({"full": None}, "method"),
        ({"head_masks": "some"}, "all_sparse.*all_full.*file"),
        ({"head_masks": [[0, 2]]}, "0 .sparse. and 1 .full. only"),
        ({"head_masks": [[0, float("nan")]]}, "0 .sparse. and 1 .full. only"),
        ({"head_masks": [[0, 1], [1]]}, "equal length"),
        ({"head_masks": []}, "equal length"),
        ({"head_masks": [0, 1]}, "rows of 0 and 1"),
        ({"cache_policy": "half"}, "per_head.*full"),
        ({"min_seq_len": -1}, "min_seq_len"),
        ({"min_seq_len": 1.5}, "min_seq_len"),
        ([], "mapping"),
    ],
)
def test_wrong_values(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_dict(values)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
def test_windows_and_sinks_are_positive_integers(value: Any) -> None:
    for build in (
        lambda: SlidingWindow(window_size=value),
        lambda: Streaming(window_size=value),
        lambda: Streaming(num_sink_tokens=value),
    ):
        with pytest.raises(ValueError, match="must be a positive integer"):
            build()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "row_ptr"),
        ({"row_ptr": [0, 1], "indices": [0], "block_size": 0}, "block_size must be a positive integer"),
        ({"row_ptr": [0, 1, 2], "indices": [1, 1]}, "causal"),
        ({"row_ptr": [0, 1], "indices": [1]}, "must lie in"),
        ({"row_ptr": [0, 1], "indices": [-1]}, "must lie in"),
        ({"row_ptr": [0, 1, 3], "indices": [0, 1, 0]}, "ascend"),
        ({"row_ptr": [0, 1, 3], "indices": [0, 1, 1]}, "ascend"),
        ({"row_ptr": [0, 2, 1], "indices": [0]}, "row_ptr"),
        ({"row_ptr": [1, 1], "indices": [0]}, "row_ptr"),
        ({"row_ptr": [0, 1], "indices": [0, 1]}, "row_ptr"),
    ],
)
def test_wrong_explicit_patterns(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explicit(**values)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_explicit_from_masks() -> None:
    assert (EXPLICIT.row_ptr, EXPLICIT.indices) == ((0, 1, 1, 3), (0, 0, 2))
    assert Explicit.from_csr(BLOCKS.float().to_sparse_csr(), block_size=16) == EXPLICIT
    assert torch.equal(EXPLICIT.pattern().blocks.mask, BLOCKS)
    for mask, message in (
        (torch.ones(2, 2).bool(), "after the diagonal"),
        (torch.ones(2, 3).bool(), "square boolean"),
        (torch.ones(2, 2), "square boolean"),
    ):
        with pytest.raises(ValueError, match=message):
            Explicit.from_block_mask(mask, block_size=16)
    with pytest.raises(ValueError, match="sparse_csr"):
        Explicit.from_csr(BLOCKS, block_size=16)
    with pytest.raises(ValueError, match="causal"):
        Explicit.from_csr(torch.ones(2, 2).to_sparse_csr(), block_size=16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("5", [5]),
        ("0-3", [0, 1, 2, 3]),
        ("7-", [7, 8, 9]),
        ("-2", [0, 1, 2]),
        ("0-3,8", [0, 1, 2, 3, 8]),
        ("8, 0-1, 1-2", [0, 1, 2, 8]),
        ("9-9", [9]),
        (4, [4]),
    ],
)
def test_ranges(text: Any, expected: list[int]) -> None:
    assert parse_ranges(text, 10) == expected


@pytest.mark.parametrize("text", ["", "-", "a", "1:3", "3-1", "1,,2", "0-3-5", "1.5", "--2", "* 1"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ValueError, match=r"not understood|falls"):
        parse_ranges(text, 10)
    with pytest.raises(ValueError, match=r"not understood|falls"):
        LayerRule(layers=text, sparse="dense")
    with pytest.raises(ValueError, match=r"not understood|falls"):
        LayerRule(layers="*", kv_heads=text, sparse="dense")


@pytest.mark.parametrize("text", ["10", "8-10", "10-", "0,12"])
def test_ranges_beyond_the_last(text: str) -> None:
    with pytest.raises(ValueError, match="goes beyond the last layer, 9"):
        parse_ranges(text, 10, what="layer")


def test_the_last_matching_rule_counts() -> None:
    config = SparseConfig(
        full=Dense(),
        sparse=Streaming(),
        rules=(
            LayerRule(layers="1-", sparse=SlidingWindow(window_size=1)),
            LayerRule(layers="1", kv_heads="1", sparse=SlidingWindow(window_size=2)),
            LayerRule(layers="*", full=SlidingWindow(window_size=3)),
            LayerRule(layers="2", kv_heads="0", full=Dense()),
        ),
    )
    window = {n: SlidingWindow(window_size=n) for n in (1, 2, 3)}
    assert config.resolve([[0, 1], [0, 0], [1, 0]]) == [
        [Streaming(), window[3]],
        [window[1], window[2]],
        [Dense(), window[1]],  # a rule without a sparse method leaves sparse heads to the rules before it
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"sparse": {"method": "stre', "truncated"),
        (b"", "truncated"),
        (b"[1, 2]", "must hold a mapping"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
    ],
)
def test_from_file_errors(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        SparseConfig.from_file(path)
    assert str(path) in str(error.value)


def test_from_file_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sparse:\n  method: streaming\n  window_size: 12\nmin_seq_len: 4\n")
    assert SparseConfig.from_file(path) == SparseConfig(sparse=Streaming(window_size=12), min_seq_len=4)
    path.write_text("sparse: [unclosed")
    with pytest.raises(ValueError, match="cannot be read"):
        SparseConfig.from_file(path)
    with pytest.raises(ValueError, match="no such file"):
        SparseConfig.from_file(tmp_path)


def test_sparsify_takes_names_files_and_configurations(make_model: Callable, tmp_path: Path) -> None:
    from sparse_hf import is_sparsified, sparsify

    path = tmp_path / "config.json"
    path.write_text(json.dumps(SparseConfig(sparse=SlidingWindow(window_size=3)).to_dict()))
    handles = [
        sparsify(make_model("llama"), spec)._sparse_hf_handle for spec in ("streaming", path, str(path), SparseConfig())
    ]
    assert [handle.config.sparse.name for handle in handles] == [
        "streaming",
        "sliding_window",
        "sliding_window",
        "streaming",
    ]
    model = make_model("llama")
    with pytest.raises(ValueError, match="no such file"):
        sparsify(model, str(tmp_path / "absent.json"))
    assert not is_sparsified(model)
