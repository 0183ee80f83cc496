"""Kinds of gates: `hard_concrete`, `duo`, `binary_ste`."""

from sparse_hf_training.masks.gates.base import Gates, Granularity
from sparse_hf_training.masks.gates.binary_ste import BinarySTEGates
from sparse_hf_training.masks.gates.duo import DuoGates
from sparse_hf_training.masks.gates.hard_concrete import HardConcreteGates

__all__ = ["BinarySTEGates", "DuoGates", "Gates", "Granularity", "HardConcreteGates"]
