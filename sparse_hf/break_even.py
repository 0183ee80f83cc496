"""From which length on sparse attention is never slower than dense: what `min_seq_len: auto` stands for on a device.

The lengths are measured, by `sparse-hf tune break-even`. The user's file goes before the one that ships:
`SPARSE_HF_BREAK_EVEN` names it (empty: none), otherwise it is `break_even.json` in the cache folder, if it is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from sparse_hf.config import AUTO, SparseConfig, reject_unknown
from sparse_hf.methods import Dense, Method
from sparse_hf_kernels.tuned import read_entries, user_file

logger = logging.getLogger(__name__)

VARIABLE = "SPARSE_HF_BREAK_EVEN"
FILE_NAME = "break_even.json"
COMMAND = "sparse-hf tune break-even"
ALWAYS_DENSE = 2**31 - 128
"""Rows of an attention that stays dense at any length; a multiple of the kernels' 128."""

_KEYS = ("arch", "method", "parameters", "head_dim", "tokens")
_ABOUT = (
    "longest",
    "num_heads",
    "num_kv_heads",
    "dtype",
    "ratios",
    "deployed_ratios",
    "device",
    "software",
    "commit",
)


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """A measured length.

    Args:
        arch: such as "sm_90".
        method: its name.
        parameters: its parameters, as `Method.to_dict` has them.
        head_dim: of the heads.
        tokens: at this length and all longer ones measured, sparse took no longer than dense; 0 if it did so at the
            shortest, None if not even at the longest.
        device: the GPU it was measured on.
    """

    arch: str
    method: str
    parameters: Mapping[str, Any]
    head_dim: int
    tokens: int | None
    device: str = "an unnamed device"

    @property
    def num_dense_rows(self) -> int:
        return ALWAYS_DENSE if self.tokens is None else self.tokens

    def is_of(self, method: Method) -> bool:
        """Measured with this method's parameters."""
        return (self.method, dict(self.parameters)) == (method.name, _parameters(method))


def architecture_name(device: torch.device) -> str:
    """Such as "sm_90"; the device's type where it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def checked_entry(entry: Any, where: str) -> BreakEven:
    """A length from an entry of a file.

    Raises:
        ValueError: for unknown or missing keys, or wrong values.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: an entry is a mapping, got {entry!r}; `{COMMAND}` writes right ones")
    reject_unknown(where, entry, (*_KEYS, *_ABOUT))
    if missing := [name for name in _KEYS if name not in entry]:
        raise ValueError(f"{where}: keys {missing} are missing; `{COMMAND}` writes them")
    for name in ("arch", "method"):
        if not isinstance(entry[name], str):
            raise ValueError(f"{where}: {name} must be a text, got {entry[name]!r}")
    if not isinstance(entry["parameters"], Mapping):
        raise ValueError(f"{where}: parameters must be a mapping, got {entry['parameters']!r}")
    for name, lowest in (("head_dim", 1), ("tokens", 0)):
        value = entry[name]
        if name == "tokens" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise ValueError(f"{where}: {name} must be an integer >= {lowest}, got {value!r}")
    values = {name: entry[name] for name in _KEYS}
    return BreakEven(**values, device=str(entry.get("device", BreakEven.device)))


@lru_cache(maxsize=1)
def measured() -> tuple[BreakEven, ...]:
    """All lengths in force, the user's first; read once.

    Raises:
        ValueError: if a file cannot be read or is malformed.
    """
    with as_file(files("sparse_hf") / "data" / FILE_NAME) as path:
        found = _read(path)
    own = user_path()
    return found if own is None else (*_read(own), *found)


def user_path() -> Path | None:
    """Where the user's file lies; None if there is none.

    Raises:
        ValueError: if `SPARSE_HF_BREAK_EVEN` names no file.
    """
    return user_file(VARIABLE, FILE_NAME, COMMAND)


def _read(path: Path) -> tuple[BreakEven, ...]:
    entries = read_entries(path)
    return tuple(checked_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries))


def break_even(arch: str, method: Method, head_dim: int) -> BreakEven:
    """The measured length of a method; with these parameters, else the longest with others, which the entry names.

    Raises:
        ValueError: if there is none, with what there is and how to measure.
    """
    of_method = [entry for entry in measured() if entry.method == method.name]
    found = [entry for entry in of_method if (entry.arch, entry.head_dim) == (arch, head_dim)]
    exact = [entry for entry in found if entry.is_of(method)]
    if exact:
        return exact[0]
    if found:
        return max(found, key=lambda entry: entry.num_dense_rows)
    known = sorted({f"{entry.arch} with head_dim {entry.head_dim}" for entry in of_method})
    raise ValueError(
        f"no break-even length of {method.name!r} is known for {arch} with head_dim {head_dim} "
        f"(known: {', '.join(known) or 'none'}); {_measure(method)}"
    )


def _measure(method: Method) -> str:
    """How a user gets the length of a method."""
    try:
        is_default = type(method)() == method
    except ValueError:  # it has no defaults
        is_default = False
    named = method.name if is_default else f"'{_short(method.to_dict())}'"
    return f"measure it with `{COMMAND} --method {named}`, or give min_seq_len a number"


def _short(values: Mapping[str, Any]) -> str:
    """JSON; of long lists, such as parameters per head, only how long they are."""
    cut = {k: f"{len(v)} values" if isinstance(v, list) and len(v) > 8 else v for k, v in values.items()}
    return json.dumps(cut)


def _parameters(method: Method) -> dict[str, Any]:
    return {name: value for name, value in method.to_dict().items() if name != "method"}


def sparse_methods(config: SparseConfig) -> list[Method]:
    """The methods that a configuration names, dense apart, each once."""
    rules = [method for rule in config.rules for method in (rule.full, rule.sparse) if method is not None]
    named = (config.full, config.sparse, *rules)
    return [method for method in dict.fromkeys(named) if not isinstance(method, Dense)]


def resolve_min_seq_len(config: SparseConfig, *, device: torch.device, head_dim: int) -> SparseConfig:
    """The configuration with `min_seq_len` as a number: if it is "auto", the longest break-even length of its methods.

    Says once from which length on attention is sparse; once what has no measured length there and is sparse from the
    first token on; and once what is measured with other parameters alone, of which the longest length counts.
    """
    if config.min_seq_len != AUTO:
        return config
    arch = architecture_name(device)
    found: list[BreakEven] = []
    for method in sparse_methods(config):
        try:
            entry = break_even(arch, method, head_dim)
        except ValueError as error:
            _say(f"min_seq_len is 'auto', but {error}. Without it, {method.name} is sparse from the first token on.")
            continue
        found.append(entry)
        if not entry.is_of(method):
            _say(_differs(entry, method))
    longest = max(found, key=lambda entry: entry.num_dense_rows, default=None)
    if longest is not None and longest.num_dense_rows:
        _say(_starts(longest))
    return replace(config, min_seq_len=0 if longest is None else longest.num_dense_rows)


def _differs(entry: BreakEven, method: Method) -> str:
    length = "no length at all" if entry.tokens is None else f"{entry.tokens} tokens"
    return (
        f"min_seq_len is 'auto', and {method.name} is not measured with {_short(_parameters(method))} on {entry.arch} "
        f"with head_dim {entry.head_dim}; the longest of its measured lengths counts, {length}, with "
        f"{_short(entry.parameters)}; {_measure(method)}"
    )


def _starts(entry: BreakEven) -> str:
    measured_on = f"{entry.method} {_short(entry.parameters)}, head_dim {entry.head_dim}, measured on {entry.device}"
    if entry.tokens is None:
        return f"attention stays dense: sparse was not faster at any length measured ({measured_on})"
    return f"sparse attention starts at {entry.tokens} tokens; queries before are dense ({measured_on})"


_said: set[str] = set()


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def described(min_seq_len: int | str) -> str:
    """For tables: what a `min_seq_len` does."""
    if min_seq_len == AUTO:
        return "the break-even length of the device"
    return "every length" if min_seq_len == ALWAYS_DENSE else f"{min_seq_len} tokens"


def break_even_tokens(ratios: Sequence[tuple[int, float]], limit: float = 1.0) -> int | None:
    """The break-even length from time ratios sparse / dense by length.

    Args:
        ratios: (tokens, ratio).
        limit: what counts as no slower.

    Returns:
        The shortest length from which every ratio is at most `limit`; 0 if all are; None if the last is not.
    """
    ordered = sorted(ratios)
    start = len(ordered)
    while start and ordered[start - 1][1] <= limit:
        start -= 1
    if start == len(ordered):
        return None
    return ordered[start][0] if start else 0
