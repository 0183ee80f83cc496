"""Which ptxas Triton assembles with, and a newer one where it is installed.

The one that Triton 3.6 brings (12.8) can reuse registers of a WGMMA in flight on sm_90: results are then silently
wrong. Kernels here keep operands alive across the waits; 13.3 and later need no such care.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "TRITON_PTXAS_PATH"
REQUIREMENT = "nvidia-cuda-nvcc>=13.3"
SAFE_VERSION = (13, 3)


@dataclass(frozen=True, kw_only=True)
class Ptxas:
    """An assembler: where it lies and its release, or None when running it did not tell."""

    path: Path
    version: tuple[int, int] | None

    @property
    def is_safe(self) -> bool:
        return self.version is not None and self.version >= SAFE_VERSION

    def __str__(self) -> str:
        return f"{self.path} ({'unknown release' if self.version is None else '{}.{}'.format(*self.version)})"


@lru_cache
def ptxas_at(path: Path) -> Ptxas:
    """Asks the program for its release."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = re.search(r"release (\d+)\.(\d+)", said)
    return Ptxas(path=path, version=(int(found[1]), int(found[2])) if found else None)


def ptxas_in_use() -> Ptxas | None:
    """The one that Triton runs for sm_90; None without Triton."""
    given = os.environ.get(VARIABLE)
    if given:
        return ptxas_at(Path(given))
    path = _in_package("triton", "backends/nvidia/bin/ptxas")
    return None if path is None else ptxas_at(path)


def ptxas_of_wheel() -> Ptxas | None:
    """The one that the wheel nvidia-cuda-nvcc installs; None when it is missing or no program."""
    path = _in_package("nvidia", "cu13/bin/ptxas")
    return ptxas_at(path) if path is not None and os.access(path, os.X_OK) else None


def _in_package(package: str, file: str) -> Path | None:
    """A file in an installed package, which is not imported."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, file)).is_file():
            return path
    return None


def remedy() -> str | None:
    """What to type so that Triton uses a safe ptxas; None if it does."""
    used = ptxas_in_use()
    if used is None or used.is_safe:
        return None
    wheel = ptxas_of_wheel()
    if wheel is not None and wheel.is_safe:
        return f"export {VARIABLE}={wheel.path}"
    return f'pip install "{REQUIREMENT}", then `sparse-hf env` for the line that sets {VARIABLE}'


@lru_cache(maxsize=1)
def warn_of_unsafe_ptxas() -> None:
    """Says once that kernels for sm_90 are about to be assembled by a ptxas known to miscompile."""
    advice = remedy()
    if advice is not None:
        logger.warning(
            "Triton assembles with %s; before %d.%d it can reuse registers of a WGMMA in flight on sm_90. Remedy: %s",
            ptxas_in_use(),
            *SAFE_VERSION,
            advice,
        )
