"""Learning which heads may be sparse: gates, their regulariser and target, and the module that ties them to a model."""

from sparse_hf_training.masks.gates import HardConcreteGates
from sparse_hf_training.masks.lagrangian import Lagrangian
from sparse_hf_training.masks.learning import (
    MaskLearning,
    MaskLearningConfig,
    attach_mask_learning,
    detach_mask_learning,
)
from sparse_hf_training.masks.schedule import SparsitySchedule

__all__ = [
    "HardConcreteGates",
    "Lagrangian",
    "MaskLearning",
    "MaskLearningConfig",
    "SparsitySchedule",
    "attach_mask_learning",
    "detach_mask_learning",
]
