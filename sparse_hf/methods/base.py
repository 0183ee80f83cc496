"""What every method is: a frozen, keyword-only configuration that states which keys a head reads."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class HeadPlace:
    """Which KV head of a model a pattern is for; methods that differ from head to head ask."""

    layer: int = 0
    kv_head: int = 0
    num_layers: int = 1
    num_kv_heads: int = 1


FIRST_HEAD = HeadPlace()
"""Where no model is at hand."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. A subclass adds its parameters as fields and says what they mean to a kernel."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    is_static: ClassVar[bool] = True
    """True when the pattern needs shapes only, not q and k."""

    @abstractmethod
    def pattern(self, place: HeadPlace = FIRST_HEAD) -> HeadPattern:
        """What the head at `place` reads under this method."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain, with the method's name under `"method"`; `method_from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


LARGEST = 2**63 - 1
"""No tensor holds a larger integer."""


def require_positive(method: Method, *fields: str) -> None:
    """Raises ValueError unless these fields are positive integers that fit 64 bits."""
    for field in fields:
        value = getattr(method, field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise ValueError(f"{method.name}: {field} must be a positive integer of 64 bits, got {value!r}")


def require_not_negative(method: Method, *fields: str) -> None:
    """Raises ValueError unless these fields are integers from 0 that fit 64 bits."""
    for field in fields:
        value = getattr(method, field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
            raise ValueError(f"{method.name}: {field} must be an integer >= 0 of 64 bits, got {value!r}")
