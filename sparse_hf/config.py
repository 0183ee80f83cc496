"""`SparseConfig`: what is sparse in a model, as one frozen value that goes to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sparse_hf.layer_ranges import parse_ranges
from sparse_hf.methods import Dense, Method, Streaming, method_from_dict

CachePolicy = Literal["per_head", "full"]
HeadMaskRows = tuple[tuple[int, ...], ...]
HEAD_MASK_KEYWORDS = ("all_sparse", "all_full")
HEAD_MASKS_FILE = "head_masks.safetensors"
AUTO: Literal["auto"] = "auto"


def reject_unknown(kind: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{kind}: unknown keys {unknown}; known: {list(known)}")


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Other methods for some layers or KV heads. Of several rules that match a head, the last one counts.

    Args:
        layers: ranges such as "0-3", "16-", "-2", "0-3,8", "*".
        kv_heads: ranges of KV heads, by default all.
        full: method of the matching retrieval heads.
        sparse: method of the matching sparse heads.
    """

    layers: str
    kv_heads: str = "*"
    full: Method | None = None
    sparse: Method | None = None

    def __post_init__(self) -> None:
        for text in (self.layers, self.kv_heads):
            parse_ranges(text, None)
        for name in ("full", "sparse"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, method_from_dict(value))
        if self.full is None and self.sparse is None:
            raise ValueError(f"the rule for layers {self.layers!r} changes nothing: give `full`, `sparse` or both")

    def to_dict(self) -> dict[str, Any]:
        methods = {k: m.to_dict() for k, m in (("full", self.full), ("sparse", self.sparse)) if m is not None}
        return {"layers": self.layers, "kv_heads": self.kv_heads, **methods}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerRule:
        if not isinstance(values, Mapping) or "layers" not in values:
            raise ValueError(f'a rule is a mapping with the key "layers", got {values!r}')
        reject_unknown("rule", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Which method each head follows.

    Args:
        full: method of retrieval heads (head mask 1).
        sparse: method of sparse heads (head mask 0).
        rules: other methods by ranges of layers and KV heads.
        head_masks: rows of 0 and 1 `[num_layers][num_kv_heads]`; or "all_sparse", "all_full"; or "file", the
            `head_masks.safetensors` beside `sparse_config.json`.
        cache_policy: "per_head" lets sparse heads free what they cannot read any more; "full" keeps every key.
        min_seq_len: break-even length. Queries at positions below it read densely, in every path alike; a sequence that
            is no longer is dense as a whole. "auto": the longest length that is measured for the methods on the model's
            device (`sparse-hf tune break-even`), looked up when the model is sparsified; it stays "auto" here.
    """

    full: Method = field(default_factory=Dense)
    sparse: Method = field(default_factory=Streaming)
    rules: tuple[LayerRule, ...] = ()
    head_masks: HeadMaskRows | str = "all_sparse"
    cache_policy: CachePolicy = "per_head"
    min_seq_len: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "full", method_from_dict(self.full))
        object.__setattr__(self, "sparse", method_from_dict(self.sparse))
        if isinstance(self.rules, str) or not isinstance(self.rules, Sequence):
            raise ValueError(f"rules must be a list of rules, got {self.rules!r}")
        rules = tuple(r if isinstance(r, LayerRule) else LayerRule.from_dict(r) for r in self.rules)
        object.__setattr__(self, "rules", rules)
        if isinstance(self.head_masks, str):
            if self.head_masks not in (*HEAD_MASK_KEYWORDS, "file"):
                raise ValueError(
                    f"head_masks must be rows of 0 and 1 or one of {[*HEAD_MASK_KEYWORDS, 'file']}, "
                    f"got {self.head_masks!r}"
                )
        else:
            object.__setattr__(self, "head_masks", _checked_rows(self.head_masks))
        if self.cache_policy not in get_args(CachePolicy):
            raise ValueError(f"cache_policy must be one of {get_args(CachePolicy)}, got {self.cache_policy!r}")
        # JSON's true would be a length of 1.
        if self.min_seq_len != AUTO and (type(self.min_seq_len) is not int or self.min_seq_len < 0):
            raise ValueError(f'min_seq_len must be an integer >= 0 or "auto", got {self.min_seq_len!r}')

    @property
    def num_dense_rows(self) -> int:
        """`min_seq_len` once it is a number.

        Raises:
            ValueError: if it is still "auto".
        """
        if self.min_seq_len == AUTO:
            raise ValueError('min_seq_len is "auto"; resolve_min_seq_len(config, ...) looks it up for a device')
        return self.min_seq_len

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain; `from_dict` is its inverse."""
        rows = self.head_masks if isinstance(self.head_masks, str) else [list(row) for row in self.head_masks]
        return {
            "full": self.full.to_dict(),
            "sparse": self.sparse.to_dict(),
            "rules": [rule.to_dict() for rule in self.rules],
            "head_masks": rows,
            "cache_policy": self.cache_policy,
            "min_seq_len": self.min_seq_len,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """The configuration that `to_dict` described; missing keys take their defaults.

        Raises:
            ValueError: for unknown keys (listing the known ones) or invalid values.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a SparseConfig is a mapping, got {type(values).__name__}")
        reject_unknown("SparseConfig", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    @classmethod
    def preset(cls, name: str, model: str | None = None) -> SparseConfig:
        """A preset by its name, or what is published for a method on a model: `preset("triangle", "qwen3-8b")`.

        Raises:
            ValueError: for an unknown name, or a model for which nothing is published; it says how to find settings.
        """
        from sparse_hf.presets import preset

        return preset(name, model)

    @classmethod
    def from_file(cls, path: str | Path) -> SparseConfig:
        """From a `.json`, `.yaml` or `.yml` file.

        Raises:
            ValueError: if the file is missing, is not JSON or YAML, or does not describe a configuration.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
        return cls.from_dict(read_mapping(path))

    def resolve(self, head_masks: Sequence[Sequence[int]]) -> list[list[Method]]:
        """The method of every head, `[num_layers][num_kv_heads]`, under these head masks.

        Raises:
            ValueError: if a rule names a layer or head that the model does not have.
        """
        num_layers, num_heads = len(head_masks), len(head_masks[0])
        methods = [[self.full if kept else self.sparse for kept in row] for row in head_masks]
        for rule in self.rules:
            for layer in parse_ranges(rule.layers, num_layers, what="layer"):
                for head in parse_ranges(rule.kv_heads, num_heads, what="KV head"):
                    chosen = rule.full if head_masks[layer][head] else rule.sparse
                    methods[layer][head] = chosen or methods[layer][head]
        return methods


def _checked_rows(rows: Any) -> HeadMaskRows:
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    try:
        checked = tuple(tuple(int(x) if x in (0, 1) else x for x in row) for row in rows)
    except TypeError as error:
        raise ValueError(f"head_masks must be rows of 0 and 1, got {rows!r}") from error
    if not checked or not checked[0] or any(len(row) != len(checked[0]) for row in checked):
        raise ValueError("head_masks must be rows of equal length, one per layer")
    if bad := [x for row in checked for x in row if x not in (0, 1)]:
        raise ValueError(f"head_masks must hold 0 (sparse) and 1 (full) only, got {bad[:4]}")
    return checked


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A JSON or YAML file as a mapping.

    Raises:
        ValueError: if it cannot be parsed or holds something else.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: its lists or mappings are nested too deep") from error
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({first}); it is truncated or not JSON or YAML") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values
