"""A teacher beside the trained model: loaded whole, and comparable with the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from sparse_hf_training.objectives.config import ObjectiveConfig


@contextmanager
def outside_zero3() -> Iterator[None]:
    """Models made inside have whole weights, also in a ZeRO-3 run, whose configuration would split them.

    No engine gathers the teacher's parts: it is not trained, and each process runs a copy of its own.
    """
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            integration.set_hf_deepspeed_config(config)


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, objective: ObjectiveConfig) -> None:
    """Whether the terms can compare the two models.

    Raises:
        ValueError: if the KL term meets other vocabulary sizes, or the hidden term other hidden sizes, or the teacher's
            weights are split by ZeRO-3.
    """
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    for term, name in (("kl", "vocab_size"), ("hidden", "hidden_size")):
        if getattr(objective, term) and getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"objective.{term} needs a teacher of the student's {name} {getattr(ours, name)}, "
                f"got {getattr(theirs, name)}"
            )
    if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        raise ValueError("the teacher's weights are split by ZeRO-3; load it inside objectives.outside_zero3()")
