"""Compiles kernels for a GPU that is not there, and reads from the machine code what they would take of it.

    python tests/kernels/offline_compile.py sm_90 [gluon triton scoring cache] [--head-dims 64 128] [--dtypes bfloat16]

prints one line per configuration. Triton's bundled ptxas assembles, whatever TRITON_PTXAS_PATH says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMITS = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory a block may take."""

INSTRUCTIONS = (
    "HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "USETMAXREG", "LDGSTS", "LDL", "STL"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases compiled one after the other: a family (gluon, triton, scoring or cache) on one architecture."""

    family: str
    arch: int
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)
    names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        dims = "+".join(map(str, self.head_dims))
        return f"{self.family}-sm_{self.arch}-hd{dims}-{'+'.join(self.dtypes)}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one configuration takes. `error` tells why it did not compile, and all else is then empty.

    Args:
        kernel: name of the jit function.
        spilled: the largest of the stack frame and of the spill stores and loads that ptxas reports, bytes.
        shared: bytes of shared memory.
        counts: how often each of INSTRUCTIONS stands in the machine code.
        serialized: what ptxas says of WGMMAs that it could not leave asynchronous (C7510 to C7512).
    """

    label: str
    kernel: str
    arch: int
    seconds: float
    error: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    counts: dict[str, int]
    serialized: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kernel, and which form of it where one has several that differ much in what they take."""
        forms = {": decode ": "decode", ": general ": "general", " holes, ": "general"}
        return " ".join([self.kernel, *(form for sign, form in forms.items() if sign in self.label)])

    @property
    def head_dim(self) -> int | None:
        found = re.search(r" hd(\d+) ", self.label)
        return int(found[1]) if found else None


_REPORTS: dict[str, Report] = {}
"""Of this process, by kernel: Triton keeps what it compiled and hands it out again, then without a log."""


class CompileOnlyDriver:
    """What Triton asks of a driver before it compiles. Launching is impossible."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a jit function keeps kernels by device, so each architecture is one

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda

    def launcher_cls(self, *args: Any) -> None:
        return None


def isolate(folder: str) -> None:
    """Settings of a process that compiles, made before Triton is imported: an own cache, ptxas' log, bundled tools."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)  # else a cached kernel comes without the log
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    for variable in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        os.environ.pop(variable, None)


def compile_group(group: Group) -> list[Report]:
    return list(reports(group))


def kernel_names(group: Group) -> set[str]:
    """What `compile_group` would compile."""
    return {kernel.__name__ for kernel, *_ in _cases(group)}


def reports(group: Group) -> Iterator[Report]:
    """Compiles in this process, whose Triton driver it replaces; call `isolate` first."""
    import torch
    import triton

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(CompileOnlyDriver(group.arch))
    for kernel, args, options, label in _cases(group):
        start, log, name = time.perf_counter(), io.StringIO(), kernel.__name__
        about = dict(label=label, kernel=name, arch=group.arch)
        try:
            with contextlib.redirect_stdout(log):
                compiled = kernel.warmup(*args, grid=(1,), **options)
        except Exception as error:  # whatever it is, the other cases shall be heard
            seconds = time.perf_counter() - start
            yield Report(**about, seconds=seconds, error=f"{type(error).__name__}: {error}"[:1000], counts={})
            continue
        same = _REPORTS.get(compiled.hash)
        found = _resources(compiled, log.getvalue()) if same is None else vars(same)
        report = Report(**{**found, **about, "seconds": time.perf_counter() - start})
        _REPORTS[compiled.hash] = report
        yield report


def _cases(group: Group) -> Iterator[Any]:
    import compile_cases_cache
    import compile_cases_gluon
    import compile_cases_mixed
    import compile_cases_scoring
    import compile_cases_triton
    import torch

    dims, dtypes = group.head_dims, tuple(getattr(torch, dtype) for dtype in group.dtypes)
    if group.family == "gluon":
        yield from compile_cases_gluon.cases(dims, dtypes, group.names)
    elif group.family == "triton":
        yield from compile_cases_triton.cases(group.arch, dims, dtypes, group.names)
        yield from compile_cases_triton.column_cases(group.arch, dims, dtypes)
        yield from compile_cases_gluon.delta_cases(group.arch, dims, dtypes)
        yield from compile_cases_mixed.cases(group.arch, dims, dtypes)
    elif group.family == "cache":
        yield from compile_cases_cache.cases(group.arch, dims, dtypes)
    else:
        yield from compile_cases_scoring.cases(group.arch, dims, dtypes)


def _resources(compiled: Any, log: str) -> dict[str, Any]:
    """Fields of `Report` from a compiled kernel and what ptxas said of it."""
    import triton

    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not usage or not registers:
        raise RuntimeError(f"expected the log of ptxas with registers and spills, got {log!r}")
    # Code alone, a quarter of the text of `cuobjdump -sass`; ten patterns over all of that took as long as ptxas.
    command = [Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm", "-c", "-ndf"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
    words = Counter(sass.replace(".", " ").split())
    counts = {name: words[name] for name in INSTRUCTIONS}
    return dict(
        registers=max(map(int, registers)),
        spilled=max(int(number) for numbers in usage for number in numbers),
        shared=compiled.metadata.shared,
        counts={name: number for name, number in counts.items() if number},
        serialized=tuple(line.strip() for line in log.splitlines() if re.search(r"C751[0-2]", line)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=[f"sm_{arch}" for arch in SHARED_LIMITS])
    parser.add_argument("families", nargs="*", default=["triton", "scoring"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--names", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        isolate(folder)
        for family in options.families:
            group = Group(
                family=family,
                arch=int(options.arch[3:]),
                head_dims=tuple(options.head_dims),
                dtypes=tuple(options.dtypes),
                names=tuple(options.names) if options.names else None,
            )
            for r in reports(group):
                took = f"{r.registers} registers, {r.spilled} B spilled, {r.shared} B shared, {r.counts}"
                print(f"{r.seconds:4.1f} s {r.label} [{r.kind}]: {r.error or took}", *r.serialized, flush=True)


if __name__ == "__main__":
    main()
