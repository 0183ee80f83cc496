"""`sparse-hf methods`: what a `SparseConfig` can name."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from sparse_hf.adapters import available_families
from sparse_hf.cli.output import table, write, write_json
from sparse_hf.methods import Method, available_methods
from sparse_hf.presets import available_presets


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List methods with their parameters, presets, and the model families that are supported."""
    rows = [describe(cls) for cls in available_methods().values()]
    presets, families = available_presets(), available_families()
    if as_json:
        write_json({"methods": rows, "presets": presets, "families": list(families)})
        return
    cells = [
        (
            row["name"],
            "\n".join(f"{name} = {json.dumps(value)}" for name, value in row["parameters"].items()) or "-",
            "static" if row["static"] else "dynamic",
            f"{row['summary']}\n{row['source']}",
        )
        for row in rows
    ]
    write(table("Methods", ("method", "parameters", "kind", "what it reads, and whence it comes"), cells, fixed=3))
    write(table("Presets", ("preset", "what it is"), presets.items()))
    write("A static method needs shapes only, a dynamic one q and k.", f"Model families: {', '.join(families)}")


def describe(cls: type[Method]) -> dict[str, Any]:
    """A method's name, parameters with defaults, kind, summary and source."""
    parameters = {}
    for field in dataclasses.fields(cls):
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = made if field.default is dataclasses.MISSING else field.default
        parameters[field.name] = list(default) if isinstance(default, tuple) else default
    return {
        "name": cls.name,
        "parameters": parameters,
        "static": cls.is_static,
        "summary": cls.summary,
        "source": cls.source,
    }
