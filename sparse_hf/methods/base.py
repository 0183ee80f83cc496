"""What every method is: a frozen, keyword-only configuration that states which keys a head reads."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_hf_kernels import HeadPattern


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. A subclass adds its parameters as fields and says what they mean to a kernel."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    is_static: ClassVar[bool] = True
    """True when the pattern needs shapes only, not q and k."""

    @abstractmethod
    def pattern(self) -> HeadPattern:
        """What a head of this method reads."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain, with the method's name under `"method"`; `method_from_dict` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"method": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def require_positive(method: Method, *fields: str) -> None:
    """Raises ValueError unless these fields are positive integers."""
    for field in fields:
        value = getattr(method, field)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{method.name}: {field} must be a positive integer, got {value!r}")
