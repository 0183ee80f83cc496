"""Which ranks share a row: those of one sequence-parallel group, neighbours in the world."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


def check_world(size: int) -> None:
    """Raises ValueError unless the processes that run can form groups of `size`."""
    if not dist.is_initialized():
        raise ValueError(
            f"seq_parallel_size={size} needs {size} processes; start them with "
            f"`accelerate launch --multi_gpu --num_processes {size} ...` or `torchrun --nproc_per_node {size} ...`"
        )
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise ValueError(
            f"seq_parallel_size must divide the number of processes, {world}, got {size}; choose another, or start "
            f"a multiple of {size} processes"
        )


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """This process's place. Holds names and numbers alone, so that what holds it can be copied and saved.

    Args:
        name: of the process group of `size` ranks.
        rank: in that group; the rank holds the `rank`-th part of each row.
        size: ranks per row.
        data_rank, data_size: which of how many groups, each with rows of its own.
    """

    name: str
    rank: int
    size: int
    data_rank: int
    data_size: int

    @classmethod
    def create(cls, size: int) -> SequenceGroup:
        """Makes the groups of ranks [k * size, (k + 1) * size). Every rank of the world must call it.

        Raises:
            ValueError: if no process group is initialised or `size` does not divide the world's size.
        """
        check_world(size)
        world, rank = dist.get_world_size(), dist.get_rank()
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        return cls(
            name=groups[rank // size].group_name,
            rank=rank % size,
            size=size,
            data_rank=rank // size,
            data_size=world // size,
        )

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceGroup:
        """A group that exists already, such as a dimension of a device mesh.

        Raises:
            ValueError: unless its ranks are neighbours, counted from a multiple of their number.
        """
        ranks = dist.get_process_group_ranks(group)
        size, first = len(ranks), ranks[0]
        if first % size or ranks != list(range(first, first + size)):
            raise ValueError(
                f"the ranks of a sequence-parallel group must be neighbours, got {ranks}; make it the last dimension "
                "of the device mesh"
            )
        return cls(
            name=group.group_name,
            rank=dist.get_rank(group),
            size=size,
            data_rank=first // size,
            data_size=dist.get_world_size() // size,
        )
