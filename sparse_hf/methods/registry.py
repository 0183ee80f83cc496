"""Methods by name: one dict and one function that validates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparse_hf.methods.base import Method
from sparse_hf.methods.bigbird import BigBird
from sparse_hf.methods.dense import Dense
from sparse_hf.methods.dilated import Dilated
from sparse_hf.methods.explicit import Explicit
from sparse_hf.methods.fixed import Fixed
from sparse_hf.methods.flexprefill import FlexPrefill
from sparse_hf.methods.local_global import LocalGlobal
from sparse_hf.methods.minference import MInference
from sparse_hf.methods.sliding_window import SlidingWindow
from sparse_hf.methods.streaming import Streaming
from sparse_hf.methods.strided import Strided
from sparse_hf.methods.tri_shape import TriShape
from sparse_hf.methods.triangle import Triangle
from sparse_hf.methods.xattention import XAttention

_STATIC: tuple[type[Method], ...] = (
    Dense,
    SlidingWindow,
    Streaming,
    TriShape,
    Triangle,
    BigBird,
    Dilated,
    Strided,
    Fixed,
    LocalGlobal,
    Explicit,
)
_DYNAMIC: tuple[type[Method], ...] = (XAttention, FlexPrefill, MInference)
_METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (*_STATIC, *_DYNAMIC)}


def available_methods() -> dict[str, type[Method]]:
    """Every method's configuration class by its name."""
    return dict(_METHODS)


def method_class(name: str) -> type[Method]:
    """The configuration class of a method.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(_METHODS)}")
    return _METHODS[name]


def method_from_dict(values: Mapping[str, Any] | str | Method) -> Method:
    """A method from its name, or from `{"method": name, **parameters}`.

    Raises:
        ValueError: for an unknown method or parameter, listing the known ones.
    """
    if isinstance(values, Method):
        return values
    if isinstance(values, str):
        values = {"method": values}
    if not isinstance(values, Mapping) or "method" not in values:
        raise ValueError(f'a method is a name or a mapping with the key "method", got {values!r}')
    cls = method_class(values["method"])
    parameters = {key: value for key, value in values.items() if key != "method"}
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"{cls.name}: unknown keys {unknown}; known: {known or 'none'}")
    return cls(**parameters)
