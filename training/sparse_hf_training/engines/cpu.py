"""FSDP2 on the CPU, where accelerate would silently train with DDP."""

from __future__ import annotations

from transformers import TrainingArguments


def allow_fsdp_on_cpu(arguments: TrainingArguments) -> None:
    """Lets accelerate prepare FSDP2 over gloo as it does over NCCL, where `arguments` ask for FSDP and the CPU.

    accelerate (1.15) reads FSDP's settings only where it counts GPUs, so its process-wide state is told so. Everything
    after that is the code that runs on GPUs. Call it before the trainer is made.
    """
    if not arguments.fsdp or arguments.device.type != "cpu" or arguments.world_size == 1:
        return
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
