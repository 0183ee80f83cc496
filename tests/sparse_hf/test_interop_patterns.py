"""MInference's and XAttention's files and Model-Optimizer's configuration: read, checked, written back exactly."""

from __future__ import annotations

import ast
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from sparse_hf import (
    Dense,
    LayerRule,
    MInference,
    MInferenceHead,
    SparseConfig,
    Streaming,
    XAttention,
    load_artefact,
    save_artefact,
    sparsify,
)
from sparse_hf.adapters import ModelShape
from sparse_hf.cli import build_app
from sparse_hf.interop import (
    export_minference,
    export_model_optimizer,
    export_xattention,
    import_minference,
    import_xattention,
)
from sparse_hf.layer_ranges import format_ranges, parse_ranges

SHAPE = ModelShape(model_type="llama", num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def dump(path: Path, value: Any) -> Path:
    return write(path, json.dumps(value))


def invoke(*args: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(build_app(), [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def best_pattern() -> list[dict[str, list[Any]]]:
    """All types; the last layer has every head alike."""
    rng = random.Random(0)

    def vertical(first: int, second: int) -> list[Any]:
        return ["vertical_and_slash", first, second, rng.random()]

    return [
        {
            "0": vertical(1000, 6096),
            "1": ["stream_llm", 100, 800, 0.96484375],
            "2": vertical(30, 800),
            "3": vertical(3500, 100),
        },
        {"0": vertical(500, 700), "1": vertical(500, 700), "2": ["block_sparse", 100, 1, 1 / 3], "3": vertical(7, 8)},
        {str(head): vertical(512, 2048) for head in range(4)},
    ]


@pytest.mark.parametrize("numbers", [[], [3], [0, 1, 2, 3, 8], [5, 7, 10, 15, 16, 17], [1, 0]])
def test_ranges_come_back(numbers: list[int]) -> None:
    if numbers:
        assert parse_ranges(format_ranges(numbers), 32) == sorted(numbers)
    assert format_ranges([5, 7, 10, *range(15, 36)]) == "5,7,10,15-35"


@pytest.mark.parametrize("block_size", [64, 128])
def test_minference_is_exact(tmp_path: Path, block_size: int) -> None:
    layers = best_pattern()
    found = import_minference(dump(tmp_path / "a.json", layers), SHAPE, block_size=block_size)
    methods = found.config.resolve([[0, 0]] * 3)
    first, second, third = (row[0] for row in methods)
    assert methods == [[first] * 2, [second] * 2, [third] * 2]
    assert first == MInference(
        heads=(
            MInferenceHead(vertical_size=1000, slash_size=6096),
            MInferenceHead(kind="a_shape", n_init=100, n_local=800),
            MInferenceHead(vertical_size=30, slash_size=800),
            MInferenceHead(vertical_size=3500, slash_size=100),
        ),
        block_size=block_size,
    )
    assert second.heads[2] == MInferenceHead(kind="block_sparse", top_k=6400 // block_size)
    assert third == MInference(vertical_size=512, slash_size=2048, block_size=block_size)
    assert found.scores.tolist() == [[row[str(head)][3] for head in range(4)] for row in layers]
    out = export_minference(found.config, tmp_path / "b.json", model_or_shape=SHAPE, scores=found.scores)
    assert json.loads(out.read_text()) == layers
    again = import_minference(out, SHAPE, block_size=block_size)
    assert again.config == found.config and torch.equal(again.scores, found.scores)
    with pytest.raises(ValueError, match="exists already"):
        export_minference(found.config, out, model_or_shape=SHAPE)


def test_minference_uniform_files_need_no_rules(tmp_path: Path) -> None:
    entry = ["vertical_and_slash", 512, 2048, 1.0]
    path = dump(tmp_path / "a.json", [{str(head): entry for head in range(4)}] * 3)
    assert import_minference(path, SHAPE).config == SparseConfig(
        sparse=MInference(vertical_size=512, slash_size=2048), head_masks="all_sparse"
    )


def test_minference_heads_that_a_layer_leaves_out(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.json", [{}, {"3": ["stream_llm", 9, 99, 0.5]}, {}])
    found = import_minference(path, SHAPE)
    default = MInferenceHead(vertical_size=1000, slash_size=6096)
    rows = found.config.resolve([[0, 0]] * 3)
    assert rows[0][0] == rows[2][1] == MInference(vertical_size=1000, slash_size=6096)
    assert rows[1][0].heads == (default,) * 3 + (MInferenceHead(kind="a_shape", n_init=9, n_local=99),)
    assert found.scores.tolist() == [[1.0] * 4, [1.0, 1.0, 1.0, 0.5], [1.0] * 4]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([{}] * 2, "expected 3 layers.*got 2"),
        ([{}, {"4": ["stream_llm", 1, 1, 1.0]}, {}], r"layer 1: unknown heads \['4'\]; the model has 4 query heads"),
        ([{"0": ["slash", 1, 1, 1.0]}, {}, {}], "layer 0, head 0: expected a type among.*'slash'"),
        ([{"0": ["stream_llm", 1, 1]}, {}, {}], r"expected \[type, vertical, slash, score\]"),
        ([{}, {"2": ["stream_llm", 0, 1, 1.0]}, {}], "layer 1, head 2: expected positive whole sizes, got 0"),
        ([{"0": ["stream_llm", 1.5, 1, 1.0]}, {}, {}], "whole sizes, got 1.5"),
        ([{"0": ["stream_llm", 1, 1, float("nan")]}, {}, {}], "finite score"),
        ([{"0": ["block_sparse", 5, 1, 1.0]}, {}, {}], "no whole number of blocks of 128; block_size=64"),
        ({"0": []}, "expected a list over layers"),
    ],
)
def test_malformed_best_patterns(tmp_path: Path, layers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        import_minference(dump(tmp_path / "a.json", layers), SHAPE)


def test_unreadable_best_patterns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        import_minference(write(tmp_path / "a.json", "[{"), SHAPE)
    with pytest.raises(ValueError, match="no such file"):
        import_minference(tmp_path / "b.json", SHAPE)


def test_minference_export_goes_by_query_heads_and_rules(tmp_path: Path) -> None:
    """KV heads with methods of their own: query heads 0, 1 follow the first, 2, 3 the second."""
    other = MInference(heads=tuple(MInferenceHead(vertical_size=100 + n, slash_size=200) for n in range(4)))
    config = SparseConfig(
        full=MInference(kind="a_shape", n_init=5, n_local=6),
        sparse=MInference(vertical_size=50, slash_size=150),
        rules=(LayerRule(layers="1", kv_heads="1", sparse=other),),
        head_masks=[[0, 0], [0, 0], [0, 1]],
    )
    rows = json.loads(export_minference(config, tmp_path / "a.json", model_or_shape=SHAPE).read_text())
    plain, streaming = ["vertical_and_slash", 50, 150, 1.0], ["stream_llm", 5, 6, 1.0]
    assert rows[0] == {str(head): plain for head in range(4)}
    assert rows[1] == {"0": plain, "1": plain} | {str(n): ["vertical_and_slash", 100 + n, 200, 1.0] for n in (2, 3)}
    assert rows[2] == {"0": plain, "1": plain, "2": streaming, "3": streaming}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SparseConfig(), "layer 0, head 0 follows 'streaming'"),
        (SparseConfig(sparse=MInference(adaptive_budget=0.3)), "adaptive_budget of 0.3"),
        (SparseConfig(sparse=MInference(), min_seq_len=9), "knows no min_seq_len"),
        (SparseConfig(sparse=MInference(), head_masks="file"), "from a file"),
    ],
)
def test_minference_export_refuses(tmp_path: Path, config: SparseConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_minference(config, tmp_path / "a.json", model_or_shape=SHAPE)
    with pytest.raises(ValueError, match="does not know its model"):
        export_minference(config, tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


def test_block_sparse_sizes_that_their_kernel_ignores(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SparseConfig(sparse=MInference(kind="block_sparse", top_k=50))
        export_minference(config, tmp_path / "a.json", model_or_shape=SHAPE)
    config = SparseConfig(sparse=MInference(kind="block_sparse", top_k=7))
    with pytest.warns(UserWarning, match=r"takes 100 blocks.*not the \[14\]"):
        out = export_minference(config, tmp_path / "b.json", model_or_shape=SHAPE)
    assert import_minference(out, SHAPE).config == config


def test_minference_on_the_command_line(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path / "model")
    source = dump(tmp_path / "a.json", best_pattern())
    artefact, out = tmp_path / "artefact", tmp_path / "b.json"
    invoke("import", "minference", source, "--model", tmp_path / "model", "--out", artefact)
    model = sparsify(LlamaForCausalLM(CONFIG).eval(), artefact)
    assert model(torch.arange(64)[None]).logits.isfinite().all()
    invoke("export", artefact, "--format", "minference", "--out", out)
    assert json.loads(out.read_text()) == json.loads(source.read_text()), "scores too"
    assert "is for xattention" in invoke(
        "import", "minference", source, "--model", tmp_path / "model", "--out", artefact, "--stride", "8", code=2
    ).output.replace("\n", " ")


def thresholds() -> list[list[float]]:
    rng = random.Random(1)
    return [[rng.random() for _ in range(4)], [0.0, 0.5, 0.5, 1.0], [0.9] * 4]


def test_xattention_is_exact(tmp_path: Path) -> None:
    rows = thresholds()
    config = import_xattention(dump(tmp_path / "a.json", rows), SHAPE, stride=8)
    methods = [row[0] for row in config.resolve([[0, 0]] * 3)]
    assert methods == [
        XAttention(stride=8, threshold=tuple(rows[0])),
        XAttention(stride=8, threshold=(0.0, 0.5, 0.5, 1.0)),
        XAttention(stride=8, threshold=0.9),
    ]
    for name in ("b.json", "b.py"):
        out = export_xattention(config, tmp_path / name, model_or_shape=SHAPE)
        assert import_xattention(out, SHAPE) == config
        with pytest.raises(ValueError, match="is for stride 8, not 16" if name == "b.py" else "stride 8, not 16"):
            import_xattention(out, SHAPE, stride=16)
    assert json.loads((tmp_path / "b.json").read_text()) == {"stride": 8, "thresholds": rows}
    assert ast.literal_eval((tmp_path / "b.py").read_text().removeprefix("thresholds_8 = ")) == rows


def test_xattention_tables_as_they_are_published(tmp_path: Path) -> None:
    """Python text with a table per stride; it is never run."""
    text = "import torch\nraise SystemExit\n" + "".join(
        f"llama_fuse_{stride} = {before}{[[stride / 20] * 4] * 3}{after}\n"
        for stride, before, after in ((4, "", ""), (8, "torch.tensor(", ")"), (16, "torch.Tensor(", ", device='cuda')"))
    )
    path = write(tmp_path / "llama_threshold.py", text)
    for stride in (4, 8, 16):
        expected = SparseConfig(sparse=XAttention(stride=stride, threshold=stride / 20, block_size=64))
        assert import_xattention(path, SHAPE, stride=stride, block_size=64) == expected
        assert import_xattention(path, SHAPE, table=f"llama_fuse_{stride}", block_size=64) == expected
    with pytest.raises(ValueError, match=r"holds the tables.*name one"):
        import_xattention(path, SHAPE)
    with pytest.raises(ValueError, match=r"no table 'x'"):
        import_xattention(path, SHAPE, table="x")
    assert import_xattention(write(tmp_path / "t.txt", str([[0.5] * 4] * 3)), SHAPE, stride=4).sparse == XAttention(
        stride=4, threshold=0.5
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[0.5] * 4] * 2, r"expected \[layers, heads\] = \[3, 4\], got 2 rows"),
        ([[0.5] * 4, [0.5] * 5, [0.5] * 4], "layer 1: expected 4 thresholds, one per query head, got 5"),
        ([[0.5] * 4, [0.5, 1.5, 0.5, 0.5], [0.5] * 4], r"layer 1, head 1: expected a threshold in \[0, 1\], got 1.5"),
        ([[0.5] * 4, [0.5, float("nan"), 0.5, 0.5], [0.5] * 4], "got nan"),
        ([[0.5] * 4, [0.5, None, 0.5, 0.5], [0.5] * 4], "got None"),
        ({"stride": 8, "rows": []}, "expected a list or the keys"),
        ("text", "got str rows"),
    ],
)
def test_malformed_threshold_tables(tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        import_xattention(dump(tmp_path / "a.json", rows), SHAPE, stride=8)


def test_unreadable_threshold_tables(tmp_path: Path) -> None:
    for name, text, words in (
        ("a.json", "[", "no JSON"),
        ("a.py", "x = [", "neither JSON"),
        ("b.py", "x = 3", "holds no table"),
        ("c.py", "x_8 = [[f()]]", "more than numbers"),
        ("d.json", json.dumps([[0.5] * 4] * 3), "does not say its stride"),
    ):
        with pytest.raises(ValueError, match=words):
            import_xattention(write(tmp_path / name, text), SHAPE)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SparseConfig(sparse=XAttention(sparsity_ratio=0.5)), "head 0 follows a sparsity_ratio"),
        (SparseConfig(), "head 0 follows 'streaming'"),
        (
            SparseConfig(sparse=XAttention(), rules=(LayerRule(layers="1", sparse=XAttention(stride=8)),)),
            r"one stride.*\[8, 16\]",
        ),
    ],
)
def test_xattention_export_refuses(tmp_path: Path, config: SparseConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_xattention(config, tmp_path / "a.json", model_or_shape=SHAPE)
    with pytest.raises(ValueError, match=r"a \.json or \.py file"):
        export_xattention(config, tmp_path / "a.csv", model_or_shape=SHAPE)


def test_xattention_on_the_command_line(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path / "model")
    source = write(tmp_path / "a.py", f"fuse_8 = {thresholds()}")
    artefact, out = tmp_path / "artefact", tmp_path / "b.py"
    invoke("import", "xattention", source, "--model", tmp_path / "model", "--out", artefact)
    sparsify(LlamaForCausalLM(CONFIG), artefact)
    invoke("export", artefact, "--format", "xattention", "--out", out)
    assert import_xattention(out, CONFIG) == import_xattention(source, CONFIG)


def test_model_optimizer(tmp_path: Path) -> None:
    """Read as Model-Optimizer's loader does: an algorithm per group, phases, and modules that stay dense."""
    config = SparseConfig(
        sparse=XAttention(sparsity_ratio=0.75),
        rules=(LayerRule(layers="0,2", sparse=Dense()),),
        head_masks="all_sparse",
    )
    out = export_model_optimizer(config, tmp_path / "a.json", coefficients=(7.93, 8.61), model_or_shape=SHAPE)
    found = json.loads(out.read_text())["sparse_attention_config"]
    assert found["config_groups"] == {
        "group_0": {
            "algorithm": "skip_softmax",
            "ignore": ["model.layers.0.self_attn", "model.layers.2.self_attn"],
            "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 7.93, "b": 8.61}},
            "target_sparsity": {"prefill": 0.75, "decode": 0.0},
        }
    }
    assert found["producer"]["name"] == "sparse-hf"
    modules = {name for name, _ in LlamaForCausalLM(CONFIG).named_modules()}
    assert modules.issuperset(found["config_groups"]["group_0"]["ignore"])
    options = {"coefficients": (1.0, 2.0), "target_sparsity": 0.5, "model_or_shape": SHAPE}
    out = export_model_optimizer(SparseConfig(sparse=XAttention()), tmp_path / "b.json", **options)
    group = json.loads(out.read_text())["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["ignore"] == [] and group["target_sparsity"]["prefill"] == 0.5


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (SparseConfig(sparse=Dense()), {}, "every layer is dense"),
        (SparseConfig(), {}, r"no words for 'streaming' \(layer 0\)"),
        (SparseConfig(sparse=MInference()), {}, "no words for 'minference'"),
        (SparseConfig(sparse=XAttention()), {}, "pass target_sparsity"),
        (SparseConfig(sparse=XAttention()), {"target_sparsity": 1.0}, r"in \[0, 1\)"),
        (SparseConfig(sparse=XAttention(), head_masks=[[0, 1]] * 3), {}, "heads of layer 0 follow"),
        (
            SparseConfig(
                sparse=XAttention(sparsity_ratio=0.5),
                rules=(LayerRule(layers="1", sparse=XAttention(sparsity_ratio=0.25)),),
            ),
            {},
            r"one share for all layers.*\[0.25, 0.5\]",
        ),
        (SparseConfig(sparse=XAttention(), min_seq_len=5), {}, "knows no min_seq_len"),
        (SparseConfig(sparse=XAttention()), {"coefficients": (0.0, 1.0)}, "finite numbers"),
    ],
)
def test_model_optimizer_refuses(tmp_path: Path, config: SparseConfig, options: dict[str, Any], words: str) -> None:
    options = {"coefficients": (1.0, 2.0), **options}
    with pytest.raises(ValueError, match=words):
        export_model_optimizer(config, tmp_path / "a.json", model_or_shape=SHAPE, **options)
    assert not (tmp_path / "a.json").exists()


def test_formats_on_the_command_line(tmp_path: Path) -> None:
    model = sparsify(LlamaForCausalLM(CONFIG), SparseConfig(sparse=XAttention(sparsity_ratio=0.5)))
    folder = save_artefact(model, tmp_path / "artefact", base_model_name_or_path="me/base")
    out = tmp_path / "a.json"
    invoke("export", folder, "--format", "modelopt", "--coefficients", "7.5,8.25", "--out", out)
    group = json.loads(out.read_text())["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["threshold_scale_factor"]["prefill"] == {"a": 7.5, "b": 8.25}
    for options, words in (
        (("--format", "modelopt", "--out", out), "needs --coefficients A,B"),
        (("--out", out, "--coefficients", "1,2"), "for --format modelopt"),
        (("--out", out, "--model-type", "ministral"), "for --format native"),
        (("--format", "duo", "--out", out, "--push", "me/a"), "--push is for artefacts"),
        (("--format", "duo"), "say where to"),
    ):
        assert words in " ".join(invoke("export", folder, *options, code=2).output.replace("│", " ").split())
    model = sparsify(LlamaForCausalLM(CONFIG), SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=5)))
    folder = save_artefact(model, tmp_path / "other", base_model_name_or_path="me/base")
    invoke("export", folder, "--format", "duo", "--out", tmp_path / "duo")
    assert load_artefact(folder).head_masks.sum() == 0 and (tmp_path / "duo" / "full_attention_heads.tsv").is_file()
