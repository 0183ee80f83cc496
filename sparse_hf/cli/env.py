"""`sparse-hf env`: versions, devices, and which backend would compute what, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from sparse_hf import break_even
from sparse_hf.cli.output import table, write, write_json
from sparse_hf_kernels import AttentionRequest, available_backends, select_backend, tuned
from sparse_hf_kernels.ptxas import Ptxas, ptxas_in_use, ptxas_of_wheel, remedy

PACKAGES = (
    "sparse-hf",
    "torch",
    "transformers",
    "triton",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "wandb",
)
VARIABLES = ("SPARSE_HF_BACKEND", tuned.VARIABLE, break_even.VARIABLE, "TRITON_PTXAS_PATH", "TRITON_INTERPRET")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
MISSING = "-"


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and the backend that each kind of call would use, with the reason."""
    report: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "backends": backends(),
        "ptxas": assemblers(),
        "tables": tables(),
        "variables": {name: os.environ.get(name, MISSING) for name in VARIABLES},
    }
    if as_json:
        write_json(report)
        return
    write(table("Versions", ("package", "version"), report["versions"].items()))
    write(table("Devices", ("device", "what"), report["devices"].items()))
    columns = ("device", "dtype", "head_dim", "backend", "reason")
    rows = ([str(row[column]) for column in columns] for row in report["backends"])
    write(table(f"Backends (asked in this order: {', '.join(available_backends())})", columns, rows))
    write("Assembler of the kernels (ptxas)", *(f"  {name}: {what}" for name, what in report["ptxas"].items()), "")
    write("Tables", *(f"  {name}: {what}" for name, what in report["tables"].items()), "")
    write(table("Variables", ("variable", "value"), report["variables"].items()))


def versions() -> dict[str, str]:
    """Installed versions; `-` for what is missing."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    found["cuda (torch)"] = torch.version.cuda or MISSING
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def devices() -> dict[str, str]:
    """Devices that torch sees, by their torch name."""
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = platform.machine()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type not in ("cuda", "mps"):
        found[accelerator.type] = f"{torch.accelerator.device_count()} devices"
    return found


def assemblers() -> dict[str, str]:
    """Which ptxas Triton runs, the one of the wheel nvidia-cuda-nvcc, and what to type if the former is unsafe."""

    def described(ptxas: Ptxas | None) -> str:
        return MISSING if ptxas is None else str(ptxas)

    return {
        "in use": described(ptxas_in_use()),
        "nvidia-cuda-nvcc": described(ptxas_of_wheel()),
        "needed for sm_90": remedy() or "nothing",
    }


def tables() -> dict[str, str]:
    """Which measured tables are in force, or what is wrong with them."""
    return {"tile configurations": _tile_table(), "break-even lengths": _break_even_table()}


def _tile_table() -> str:
    try:
        active = tuned.active_table()
    except ValueError as error:
        return f"refused: {error}"
    if active is tuned.SHIPPED:
        return "shipped with the package; `sparse-hf tune kernels` measures your own"
    measured_on = ", ".join(sorted({str(entry.get("device", "an unnamed device")) for entry in active.entries}))
    return f"{active.source}, {len(active.configs)} entries of {measured_on or 'no device'}; others as shipped"


def _break_even_table() -> str:
    try:
        path, lengths = break_even.user_path(), break_even.measured()
    except ValueError as error:
        return f"refused: {error}"
    known = ", ".join(dict.fromkeys(f"{entry.method} on {entry.device}" for entry in lengths))
    source = "shipped with the package" if path is None else f"{path}, then the shipped one"
    return f"{source} ({known or 'no entries; `sparse-hf tune break-even` measures your own'})"


def backends() -> list[dict[str, str | int]]:
    """For each kind of device, dtype and head size: the backend that would serve sparse attention, and why."""
    kinds = dict.fromkeys(name.split(":")[0] for name in devices())
    return [_choice(kind, dtype, head_dim) for kind in kinds for dtype in DTYPES for head_dim in HEAD_DIMS]


def _choice(device: str, dtype: torch.dtype, head_dim: int) -> dict[str, str | int]:
    request = AttentionRequest(
        op="sparse_attention", device_type=device, dtype=dtype, head_dim=head_dim, needs_lse=False
    )
    try:
        selection = select_backend(request)
    except ValueError as error:  # SPARSE_HF_BACKEND names one that cannot serve this
        name, reason = MISSING, str(error)
    else:
        name, reason = selection.backend.name, selection.reason
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "backend": name,
        "reason": reason,
    }
