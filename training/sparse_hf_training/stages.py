"""The stages: select layers, eliminate heads, learn masks, learn masks and weights, fine-tune under frozen masks."""

from __future__ import annotations

from typing import Literal, get_args

from transformers import PreTrainedModel

from sparse_hf.patching import get_handle
from sparse_hf_training.masks import MaskLearning, MaskLearningConfig, attach_mask_learning
from sparse_hf_training.peft import set_trainable

Stage = Literal["layer_selection", "head_elimination", "masks", "masks_and_weights", "sft"]
STAGES = get_args(Stage)
UNTRAINED_STAGES: tuple[Stage, ...] = ("layer_selection", "head_elimination")
"""They look at the model as it is and choose."""


def prepare_stage(model: PreTrainedModel, stage: Stage, masks: MaskLearningConfig) -> MaskLearning | None:
    """Freezes and thaws what the stage says, and attaches gates where masks are learned.

    Args:
        model: a sparsified model. Where it has a LoRA adapter, "weights" are the adapter's alone.
        stage: `masks` freezes the weights and learns gates; `masks_and_weights` learns both; `sft` trains the weights
            while the attention reads what the deployed head masks say, as in evaluation.
        masks: how masks are learned; unused by `sft`.

    Returns:
        The gates, or None for `sft`.

    Raises:
        ValueError: for an unknown stage or one that trains nothing, a model that is not sparsified, quantised
            weights that were to train, or `sft` without a sparse head.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {list(STAGES)}, got {stage!r}")
    if stage in UNTRAINED_STAGES:
        raise ValueError(f"{stage} trains nothing: run it by run_training, and train from its artefact")
    handle = get_handle(model)
    set_trainable(model, stage != "masks")
    if stage == "sft":
        if all(state.layout.is_dense for state in handle.states):
            raise ValueError(
                "sft trains under head masks, but every head is dense; give `sparse:` an artefact, or masks with zeros"
            )
        return None
    return attach_mask_learning(model, masks)
