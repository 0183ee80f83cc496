"""The engine a run got, and refusals where it is not the one that was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

REPLICATED = ("single", "ddp")
"""Engines under which every process holds all weights and all of the optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What trains the weights.

    Args:
        name: `single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`.
        num_processes: processes of the run.
        device: device type, such as `cuda`.
        offload: what lies in CPU memory between uses: of `optimizer` and `param`.
    """

    name: str
    num_processes: int
    device: str
    offload: tuple[str, ...] = ()

    @classmethod
    def of(cls, accelerator: Accelerator) -> Engine:
        """The engine that accelerate made.

        Raises:
            ValueError: for one that this trainer does not support.
        """
        from accelerate.utils import DistributedType
        from torch.distributed.fsdp import CPUOffloadPolicy

        kind = accelerator.distributed_type
        offload: tuple[str, ...] = ()
        if kind == DistributedType.DEEPSPEED:
            zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
            if zero.get("stage") not in (1, 2, 3):
                raise ValueError(
                    f"DeepSpeed's zero_optimization.stage must be 1, 2 or 3, got {zero.get('stage')}; "
                    "without ZeRO, leave DeepSpeed out"
                )
            name = f"zero{zero['stage']}"
            offload = tuple(
                part
                for part in ("optimizer", "param")
                if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
            )
        elif kind == DistributedType.FSDP:
            plugin = accelerator.state.fsdp_plugin
            if plugin.fsdp_version != 2:
                raise ValueError(f"FSDP must be version 2, got {plugin.fsdp_version}; set fsdp_version: 2")
            name = "fsdp2"
            offload = ("optimizer", "param") if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else ()
        elif kind == DistributedType.NO:
            name = "single"
        elif str(getattr(kind, "value", kind)).startswith("MULTI_"):
            name = "ddp"
        else:
            raise ValueError(f"{kind} is not supported; use DDP, FSDP2 or DeepSpeed ZeRO")
        return cls(name=name, num_processes=accelerator.num_processes, device=accelerator.device.type, offload=offload)

    @classmethod
    def replicated(cls, num_processes: int, device: str) -> Engine:
        """Of processes that each hold the whole model."""
        return cls(name="ddp" if num_processes > 1 else "single", num_processes=num_processes, device=device)

    @property
    def is_deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """No process holds whole weights, so that every process must take part in each forward pass."""
        return self.name in ("fsdp2", "zero3")

    def check(self, accelerator: Accelerator) -> None:
        """Raises ValueError for settings of the engine under which a run would go wrong, late or silently."""
        if self.is_deepspeed:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            if "optimizer" in config:
                raise ValueError(
                    "the DeepSpeed configuration has an `optimizer`, which would decay biases and norms as well; take "
                    "it out and use trainer.optim, trainer.learning_rate and trainer.weight_decay (configs/deepspeed/)"
                )
            gathers = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
            if self.name == "zero3" and not gathers:
                raise ValueError(
                    "ZeRO-3 cannot give whole weights for the artefact; set "
                    "zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
                )
        if self.name == "fsdp2" and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "under cpu_ram_efficient_loading only one process reads the weights, before masks and teacher need "
                "them; set fsdp_cpu_ram_efficient_loading to false"
            )
        counted = torch.distributed.get_world_size() if _in_group() else 1
        if counted != self.num_processes:
            raise ValueError(
                f"{counted} processes joined, but accelerate counts {self.num_processes} and would train each on the "
                "same rows; on the CPU, set trainer.use_cpu=true"
            )

    def __str__(self) -> str:
        names = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        text = names.get(self.name, f"DeepSpeed ZeRO-{self.name[-1]}")
        if self.name != "single":
            text += f", {self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        return f"{text}, {self.device}" + (f", {' and '.join(self.offload)} offloaded" if self.offload else "")


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_processes(
    num_processes: int, *, expected: int | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Refuses a run that got fewer processes than its configuration or its launcher was asked for.

    Args:
        num_processes: that take part.
        expected: the number that the configuration asks for, or None for any.
        environment: by default this process's.

    Raises:
        ValueError: with what was asked for, what came, and the launch command to use.
    """
    environment = os.environ if environment is None else environment
    if expected is not None and num_processes != expected:
        raise ValueError(
            f"num_processes is {expected}, but the run got {num_processes}; start it with `torchrun --nproc_per_node "
            f"{expected} scripts/train.py CONFIG` or `accelerate launch` (scripts/launch/stage.sh)"
        )
    # accelerate's launcher for one process names a meeting place only when it was asked for several.
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in environment
    if by_accelerate and "MASTER_PORT" in environment and num_processes == 1 and "WORLD_SIZE" not in environment:
        raise ValueError(
            "accelerate launch was asked for several processes and started one (on the CPU it does, whatever "
            "--num_processes says); use `torchrun --nproc_per_node N scripts/train.py CONFIG`"
        )


def check_engine(engine: Engine, *, environment: Mapping[str, str] | None = None) -> None:
    """Refuses a run that got another engine than its launcher was asked for.

    Args:
        engine: what the run got.
        environment: by default this process's.

    Raises:
        ValueError: with what was asked for and what came.
    """
    environment = os.environ if environment is None else environment
    for variable, prefix, name in (
        ("ACCELERATE_USE_DEEPSPEED", "zero", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "fsdp", "FSDP"),
    ):
        if environment.get(variable, "false").lower() == "true" and not engine.name.startswith(prefix):
            raise ValueError(
                f"the launcher asked for {name}, but the run got {engine}: accelerate leaves {name} out where the "
                "CPU is asked for (ACCELERATE_USE_CPU) or one process is left; launch it without"
            )
