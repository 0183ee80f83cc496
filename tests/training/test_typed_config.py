"""From YAML to dataclasses: each error names its place, each value its type."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sparse_hf_training.typed_config import apply_overrides, build


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    steps: int = 1
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    items: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    spec: str | dict[str, Any] = "x"
    maybe: Inner | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def test_nested_values_take_their_types() -> None:
    built = build(
        Outer,
        {
            "name": "n",
            "inner": {"rate": 1, "on": True},
            "items": [{"steps": 3}, {}],
            "kind": "b",
            "limit": "1e-3",  # what YAML makes of 1e-3
            "spec": {"k": 1},
            "maybe": {"rate": 2.0},
            "extra": {"any": [1, "two"]},
        },
    )
    assert built == Outer(
        name="n",
        inner=Inner(rate=1.0, on=True),
        items=(Inner(steps=3), Inner()),
        kind="b",
        limit=1e-3,
        spec={"k": 1},
        maybe=Inner(rate=2.0),
        extra={"any": [1, "two"]},
    )
    assert isinstance(built.inner.rate, float)
    assert build(Outer, built) is built
    assert build(Outer, {"name": "n", "limit": None, "maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"config: missing keys \['name'\]"),
        ({"name": "n", "nam": 1}, r"config: unknown keys \['nam'\]; known: \[.*'name'"),
        (
            {"name": "n", "inner": {"rat": 1}},
            r"config\.inner: unknown keys \['rat'\]; known: \['on', 'rate', 'steps'\]",
        ),
        ({"name": "n", "inner": {"rate": "much"}}, r"config\.inner\.rate must be of type float, got 'much'"),
        ({"name": "n", "inner": {"rate": True}}, r"config\.inner\.rate must be of type float, got True"),
        ({"name": "n", "inner": {"steps": 1.5}}, r"config\.inner\.steps must be of type int, got 1\.5"),
        ({"name": "n", "inner": {"steps": True}}, r"config\.inner\.steps must be of type int"),
        ({"name": "n", "inner": {"on": 1}}, r"config\.inner\.on must be of type bool"),
        ({"name": "n", "inner": 3}, r"config\.inner must be a mapping, got 3"),
        ({"name": 3}, r"config\.name must be of type str, got 3"),
        ({"name": None}, r"config\.name must be of type str, got None"),
        ({"name": "n", "items": {"rate": 1}}, r"config\.items must be a list"),
        ({"name": "n", "items": "ab"}, r"config\.items must be a list"),
        ({"name": "n", "items": [{}, {"rate": []}]}, r"config\.items\[1\]\.rate must be of type float"),
        ({"name": "n", "kind": "c"}, r"config\.kind must be one of \['a', 'b'\], got 'c'"),
        ({"name": "n", "limit": "low"}, r"config\.limit must be of type float"),
        ({"name": "n", "spec": 4}, r"config\.spec must be a mapping, got 4"),
        ({"name": "n", "maybe": {"x": 1}}, r"config\.maybe: unknown keys \['x'\]"),
        ({"name": "n", "extra": [1]}, r"config\.extra must be a mapping"),
        ({"name": "n", 1: 2}, r"config: unknown keys \['1'\]"),
        ([], r"config must be a mapping, got \[\]"),
        (None, r"config must be a mapping, got None"),
    ],
)
def test_errors_name_the_place(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Outer, values)


def test_overrides_reach_into_sections_and_leave_the_source_alone() -> None:
    values = {"a": {"b": 1, "c": 2}, "d": [1]}
    result = apply_overrides(values, ["a.b=1e-3", "a.new.deep=true", "d=[2, {x: y}]", "e=", "f=a=b", "a.c=null"])
    assert result == {
        "a": {"b": "1e-3", "c": None, "new": {"deep": True}},
        "d": [2, {"x": "y"}],
        "e": None,
        "f": "a=b",
    }
    assert values == {"a": {"b": 1, "c": 2}, "d": [1]}
    assert build(Inner, apply_overrides({}, ["rate=1e-3"])).rate == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "overrides are written key=value or section.key=value, got 'a'"),
        ("=1", "overrides are written"),
        ("d.x=1", "'d' is no section"),
        ("n.x=1", "'n' is no section"),
        ("a=[", "is not YAML"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides({"a": {}, "d": [1], "n": None}, [override])
