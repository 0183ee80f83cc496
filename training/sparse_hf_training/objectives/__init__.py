"""What is learned for: language modelling, and staying close to the dense model, by logits or by hidden states.

All terms are means over the label tokens, and a run may use any weighted sum of them.
"""

from sparse_hf_training.objectives.chunked import TeacherStates
from sparse_hf_training.objectives.config import ObjectiveConfig
from sparse_hf_training.objectives.hidden_distillation import hidden_distillation_loss
from sparse_hf_training.objectives.labels import IGNORE_INDEX, label_positions
from sparse_hf_training.objectives.language_modeling import language_modeling_loss
from sparse_hf_training.objectives.logit_distillation import distillation_loss
from sparse_hf_training.objectives.loss_head import LossHead, ObjectiveValue
from sparse_hf_training.objectives.teacher import check_teacher, outside_zero3

__all__ = [
    "IGNORE_INDEX",
    "LossHead",
    "ObjectiveConfig",
    "ObjectiveValue",
    "TeacherStates",
    "check_teacher",
    "distillation_loss",
    "hidden_distillation_loss",
    "label_positions",
    "language_modeling_loss",
    "outside_zero3",
]
