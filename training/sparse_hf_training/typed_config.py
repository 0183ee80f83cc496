"""From YAML to typed dataclasses: every key is known, every value has its type, every error names its place."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str = "config") -> T:
    """An instance of a dataclass from a mapping, nested dataclasses included.

    Args:
        cls: a dataclass.
        values: mapping of its fields.
        where: dotted place in the file, for messages.

    Raises:
        ValueError: for unknown or missing keys, or values of another type, naming the place.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(map(str, values)) - set(fields)):
        raise ValueError(f"{where}: unknown keys {unknown}; known: {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    given = {name: convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{where}: missing keys {missing}")
    return cls(**given)


def convert(hint: Any, value: Any, where: str) -> Any:
    """The value as its type hint says.

    Raises:
        ValueError: if it is of another type, naming the place.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {list(arguments)}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(convert(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return dict(value)
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[-1])


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    # YAML reads 1e-3 as text and 1 as an integer.
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping with `key.path=value` assignments applied; values are read as YAML.

    Raises:
        ValueError: if an assignment has no `=` or leads through something that is no mapping.
    """
    result: dict[str, Any] = _copy(values)
    for text in overrides:
        path, separator, raw = text.partition("=")
        if not separator or not path:
            raise ValueError(f"overrides are written key=value or section.key=value, got {text!r}")
        *parents, last = path.split(".")
        target = result
        for name in parents:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ValueError(f"override {text!r}: {name!r} is no section")
        try:
            target[last] = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ValueError(f"override {text!r}: the value is not YAML") from error
    return result


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values
