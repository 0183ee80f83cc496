"""Which engine trains the weights (DDP, FSDP2, DeepSpeed ZeRO), and what differs between them."""

from sparse_hf_training.engines.engine import Engine, check_engine, check_processes
from sparse_hf_training.engines.resume import ENGINE_FILE, ResumePlan, record_engine, resume_plan
from sparse_hf_training.engines.weights import all_finite, load_whole_weights, whole_weights

__all__ = [
    "ENGINE_FILE",
    "Engine",
    "ResumePlan",
    "all_finite",
    "check_engine",
    "check_processes",
    "load_whole_weights",
    "record_engine",
    "resume_plan",
    "whole_weights",
]
