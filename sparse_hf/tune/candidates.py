"""Which configurations are tried: fixed lists, and of them what differs little from the shipped one with `quick`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, cast

from sparse_hf_kernels.tuned import FIELDS, Config, Key

_TRITON_FORWARD = (
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 32, 4, 3),
    (128, 32, 8, 4),
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 64, 8, 2),
    (64, 32, 4, 3),
    (64, 32, 8, 2),
)
"""rows, columns, num_warps, num_stages. dQ walks keys under rows as the forward does."""

_TRITON_DKDV = (
    (128, 128, 8, 2),
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 8, 2),
    (32, 128, 8, 2),
    (32, 128, 8, 3),
    (32, 128, 4, 3),
    (32, 64, 4, 2),
    (32, 64, 4, 3),
    (32, 64, 8, 2),
    (32, 32, 8, 1),
)
_TRITON_DECODE = tuple(product((16,), (32, 64, 128), (2, 4, 8), (2, 3, 4)))

_REGISTERS = ((240, 24), (232, 40))
"""Of consumers and producer. Two consumer warpgroups and a producer share what a multiprocessor has."""

_CANDIDATES: dict[tuple[str, str], Sequence[tuple[int, ...]]] = {
    ("triton", "forward"): _TRITON_FORWARD,
    ("triton", "dq"): _TRITON_FORWARD,
    ("triton", "dkdv"): _TRITON_DKDV,
    ("triton", "decode"): _TRITON_DECODE,
    ("gluon", "forward"): [
        (128, columns, slots, query_slots, *registers)
        for columns, slots, query_slots, registers in product((64, 128), (2, 3, 4), (1, 2), _REGISTERS)
    ],
    ("gluon", "backward"): [
        (rows, 128, slots, *registers)
        for (rows, slots), registers in product(((64, 2), (64, 3), (64, 4), (128, 2)), _REGISTERS)
    ],
}
"""By backend and kind, in the order of `FIELDS`."""


def shipped(key: Key) -> Config:
    """The configuration that the package ships for a key.

    Raises:
        ValueError: if it ships none.
    """
    if key.backend == "gluon":
        from sparse_hf_kernels.sparse_attention.gluon import configs

        table: Mapping[int, Any] = configs.FORWARD if key.kind == "forward" else configs.BACKWARD
        if key.head_dim not in table:
            raise ValueError(
                f"gluon has no {key.kind} kernel for head_dim {key.head_dim}; `--backend triton` tunes the one that "
                "serves it"
            )
        return tuple(asdict(table[key.head_dim]).items())
    from sparse_hf_kernels.sparse_attention.triton.configs import Pass, shipped_config

    return tuple(shipped_config(key.arch, key.head_dim, key.dtype, cast(Pass, key.kind))._asdict().items())


def candidates(key: Key, *, quick: bool = False) -> list[Config]:
    """What is tried besides the shipped configuration; with `quick` what differs from it in one field only.

    Shared memory and registers decide on the device which of them run.
    """
    names, base = tuple(FIELDS[key.backend, key.kind]), shipped(key)
    configs = [tuple(zip(names, values, strict=True)) for values in _CANDIDATES[key.backend, key.kind]]
    if quick:
        configs = [config for config in configs if _steps_apart(config, base) == 1]
    return [config for config in configs if config != base]


def _steps_apart(a: Config, b: Config) -> int:
    """Fields that differ; the two register counts go together."""
    names = {name.replace("producer_", "consumer_") for (name, x), (_, y) in zip(a, b, strict=True) if x != y}
    return len(names)
