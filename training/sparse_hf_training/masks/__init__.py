"""Learning which heads may be sparse: gates, their regulariser and target, and the module that ties them to a model."""

from sparse_hf_training.masks.budgets import Budgets, LayerBudget
from sparse_hf_training.masks.config import MaskLearningConfig
from sparse_hf_training.masks.gates import BinarySTEGates, DuoGates, Gates, HardConcreteGates
from sparse_hf_training.masks.learning import MaskLearning, attach_mask_learning, detach_mask_learning
from sparse_hf_training.masks.regularizers import L1, AbsoluteGap, Lagrangian, Regularizer
from sparse_hf_training.masks.schedule import SparsitySchedule

__all__ = [
    "L1",
    "AbsoluteGap",
    "BinarySTEGates",
    "Budgets",
    "DuoGates",
    "Gates",
    "HardConcreteGates",
    "Lagrangian",
    "LayerBudget",
    "MaskLearning",
    "MaskLearningConfig",
    "Regularizer",
    "SparsitySchedule",
    "attach_mask_learning",
    "detach_mask_learning",
]
