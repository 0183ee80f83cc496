"""Ulysses sequence parallelism for sparsified models: each rank holds a slice of every row and attends some heads."""

from sparse_hf_training.sequence_parallel.collectives import EXCHANGE_LABEL, ExchangeTimer, time_exchanges
from sparse_hf_training.sequence_parallel.deepspeed import deepspeed_parallelism, enable_deepspeed_sequence_parallel
from sparse_hf_training.sequence_parallel.enable import (
    disable_sequence_parallel,
    enable_sequence_parallel,
    get_sequence_group,
    is_sequence_parallel,
    sequence_parallel,
    sequence_parallel_disabled,
)
from sparse_hf_training.sequence_parallel.groups import SequenceGroup
from sparse_hf_training.sequence_parallel.shard import ShardingCollator, shard_batch

__all__ = [
    "EXCHANGE_LABEL",
    "ExchangeTimer",
    "SequenceGroup",
    "ShardingCollator",
    "deepspeed_parallelism",
    "disable_sequence_parallel",
    "enable_deepspeed_sequence_parallel",
    "enable_sequence_parallel",
    "get_sequence_group",
    "is_sequence_parallel",
    "sequence_parallel",
    "sequence_parallel_disabled",
    "shard_batch",
    "time_exchanges",
]
