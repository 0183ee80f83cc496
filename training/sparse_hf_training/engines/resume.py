"""What of a checkpoint another launch can take up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from sparse_hf_training.engines.engine import REPLICATED, Engine
from sparse_hf_training.engines.weights import has_whole_weights

ENGINE_FILE = "engine.json"

ResumePlan = Literal["state", "weights", "masks"]
"""Read the engine's own state; or whole weights; or, where no weight trains, the gates alone."""


def record_engine(engine: Engine, checkpoint: Path) -> None:
    """Writes which engine wrote the checkpoint."""
    (checkpoint / ENGINE_FILE).write_text(json.dumps(asdict(engine), indent=1) + "\n", encoding="utf-8")


def resume_plan(engine: Engine, checkpoint: Path) -> ResumePlan:
    """`state` where the engine reads its own weights and optimizer state, `weights` where only whole weights fit.

    A replicated optimizer (one process, DDP) fits any number of processes, and FSDP2's sharded checkpoints are
    resharded; DeepSpeed's optimizer state is read by as many processes as wrote it.

    Raises:
        ValueError: if the checkpoint fits in neither way.
    """
    try:
        wrote = json.loads((checkpoint / ENGINE_FILE).read_text(encoding="utf-8"))
        name, num_processes = str(wrote["name"]), int(wrote["num_processes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / ENGINE_FILE} cannot be read ({error}); choose another checkpoint") from error
    if name == engine.name == "fsdp2" or (name in REPLICATED and engine.name in REPLICATED):
        return "state"
    if name == engine.name and num_processes == engine.num_processes:
        return "state"
    if has_whole_weights(checkpoint):
        return "weights"
    raise ValueError(
        f"{checkpoint} was written under {name} with {num_processes} processes and holds no whole weights that "
        f"{engine} could read; go on under {name} (any number of processes), or begin a new run from an artefact"
    )
