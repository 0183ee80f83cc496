"""The model card: what an artefact holds and how to load it, for people and for the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sparse_hf.artefact import Artefact, load_artefact
from sparse_hf.break_even import described
from sparse_hf.hub import is_hub_id
from sparse_hf.methods import Dense, Method
from sparse_hf.plots import has_matplotlib, plot_head_masks

CARD_FILE = "README.md"
IMAGE_FILE = "head_masks.png"
FULL_MARK, SPARSE_MARK = "█", "·"
_KNOWN_TRAINING = ("stage", "objective", "data", "steps", "head_sparsity")


def write_model_card(folder: Path, heat_map: bool = True) -> Path:
    """Writes `README.md` into an artefact's folder from what the folder holds.

    Args:
        folder: an artefact.
        heat_map: also draw the heads: as text, and as `head_masks.png` where matplotlib is installed.

    Returns:
        The card.

    Raises:
        ValueError: if the folder is no valid artefact.
    """
    folder = Path(folder)
    artefact = load_artefact(folder)
    image = heat_map and has_matplotlib()
    if image:
        plot_head_masks(artefact.head_masks, folder / IMAGE_FILE, artefact.scores)
    blocks = [
        _front_matter(artefact),
        *_overview(artefact),
        *_heads(artefact, heat_map=heat_map, image=image),
        *_training(artefact.training),
        *_usage(artefact, has_weights=(folder / "config.json").is_file()),
    ]
    card = folder / CARD_FILE
    card.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return card


def _front_matter(artefact: Artefact) -> str:
    values: dict[str, Any] = {"library_name": "sparse_hf"}
    if is_hub_id(artefact.base_model_name_or_path):
        values["base_model"] = artefact.base_model_name_or_path
    values["tags"] = ["sparse-attention"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _overview(artefact: Artefact) -> Iterator[str]:
    config, shape = artefact.config, artefact.shape
    name = Path(artefact.base_model_name_or_path).name or artefact.base_model_name_or_path
    sparsity = _sparsity(artefact.head_masks)
    num_sparse = int((artefact.head_masks == 0).sum())
    yield f"# Sparse attention for {name}"
    dense = isinstance(config.full, Dense) and all(rule.full is None for rule in config.rules)
    yield (
        f"{num_sparse} of {artefact.head_masks.numel()} KV heads ({sparsity:.1%}) are sparse heads, the others "
        f"{'read every key' if dense else 'full heads, with methods of their own'}. Prefill skips what heads do not "
        "read, and the cache frees what they cannot read any more."
    )
    rows = [
        ["base model", f"`{artefact.base_model_name_or_path}`"],
        ["shape", f"{shape.num_layers} layers, {shape.num_heads} heads, {shape.num_kv_heads} KV heads"],
        ["full heads", _method(config.full)],
        ["sparse heads", _method(config.sparse)],
        ["cache", f"`{config.cache_policy}`"],
    ]
    if config.min_seq_len:
        rows.append(["dense below", described(config.min_seq_len)])
    rows += [[f"rule {number}", _code(rule.to_dict())] for number, rule in enumerate(config.rules, 1)]
    yield markdown_table(["", ""], rows)


def _heads(artefact: Artefact, *, heat_map: bool, image: bool) -> Iterator[str]:
    yield "## Heads"
    if heat_map:
        yield f"One row per layer, one column per KV head: `{FULL_MARK}` full, `{SPARSE_MARK}` sparse."
    yield _fence(head_map_text(artefact.head_masks, marks=heat_map), "text")
    if image:
        colour = "Colour is the learned score." if artefact.scores is not None else "Bright heads are full."
        yield f"![Map of full and sparse heads]({IMAGE_FILE})\n\n{colour}"


def head_map_text(masks: Tensor, *, marks: bool = True) -> str:
    """The heads as text: per layer its number, a mark per KV head, and its share of sparse heads."""
    width = max(len("heads"), masks.shape[1])
    lines = [f"layer  {'heads'.ljust(width) + '  ' if marks else ''}sparse"]
    for layer, row in enumerate(masks):
        text = "".join(FULL_MARK if kept else SPARSE_MARK for kept in row.tolist())
        lines.append(f"{layer:5d}  {text.ljust(width) + '  ' if marks else ''}{_sparsity(row):6.1%}")
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> Iterator[str]:
    if not training:
        return
    yield "## What was learned"
    names = [name for name in _KNOWN_TRAINING if name in training]
    names += [name for name in training if name not in (*_KNOWN_TRAINING, "figures")]
    if names:
        yield markdown_table(["", ""], [[name.replace("_", " "), _value(training[name])] for name in names])
    figures = training.get("figures")
    if figures:
        yield "## Figures"
        yield _figures(figures)


def _figures(figures: Any) -> str:
    rows = list(figures) if isinstance(figures, Sequence) and not isinstance(figures, str) else []
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        return _fence(json.dumps(figures, indent=2, ensure_ascii=False, default=str), "json")
    present = dict.fromkeys(str(key) for row in rows for key in row)
    columns: list[str] = [name for name in ("case", "value", "unit") if name in present]
    columns += [name for name in present if name not in columns]
    return markdown_table(columns, [[_value(row[name]) if name in row else "" for name in columns] for row in rows])


def _usage(artefact: Artefact, *, has_weights: bool) -> Iterator[str]:
    base = json.dumps(artefact.base_model_name_or_path, ensure_ascii=False)
    yield "## Use"
    lines = [
        "from sparse_hf import AutoSparseModelForCausalLM",
        "",
        'artefact = "..."  # this repository\'s id, or the folder',
        "model = AutoSparseModelForCausalLM.from_pretrained(artefact)",
    ]
    if artefact.adapter:
        yield (
            "It holds a LoRA adapter that was trained under these head masks: adapter and masks belong together. "
            "Loaded by peft on the dense model, without the masks, it computes something else than was trained."
        )
    elif has_weights:
        yield "The weights were trained with the masks and are included."
    else:
        yield "It holds masks alone; the base model's weights are loaded from where they are."
        lines[0] = "from transformers import AutoModelForCausalLM\n\n" + lines[0] + ", sparsify"
        lines += [
            "",
            "# or on a model that is loaded already",
            f"model = AutoModelForCausalLM.from_pretrained({base})",
            "model = sparsify(model, artefact)",
        ]
    yield _fence("\n".join(lines), "python")
    yield "`pip install sparse-hf`; `generate` then needs no other change, and `unsparsify(model)` undoes it."


def _sparsity(masks: Tensor) -> float:
    return 1 - masks.float().mean().item()


def _method(method: Method) -> str:
    parameters = {key: value for key, value in method.to_dict().items() if key != "method"}
    text = ", ".join(f"{key} = {_value(value)}" for key, value in parameters.items())
    return f"`{method.name}`: {method.summary}" + (f" ({text})" if text else "")


def _value(value: Any) -> str:
    """A JSON value in a table cell: plain text and figures as they are, structures as code, long ones cut."""
    if isinstance(value, bool) or value is None or isinstance(value, (Mapping, list, tuple)):
        return _code(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _code(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"`{text if len(text) <= 300 else text[:297] + '...'}`"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain text."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
