"""A `Trainer`'s rows under sequence parallelism, and what it divides the loss by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from sparse_hf_training.data.documents import IGNORE_INDEX
from sparse_hf_training.sequence_parallel.groups import SequenceGroup
from sparse_hf_training.sequence_parallel.shard import ShardingCollator


def train_dataloader(trainer: Trainer, group: SequenceGroup) -> DataLoader[Any]:
    """Training batches: the ranks of a group get slices of the same rows, the groups different rows.

    Row i goes to the group that would get it if each group were one process.
    """
    dataset, args = trainer.train_dataset, trainer.args
    if dataset is None:
        raise ValueError("training needs a train_dataset")
    options: dict[str, Any] = {
        "batch_size": args.train_batch_size,
        "persistent_workers": args.dataloader_persistent_workers,
    }
    if not isinstance(dataset, IterableDataset):
        options["sampler"] = trainer._get_train_sampler(dataset)
        options["worker_init_fn"] = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=group.data_rank)
    return _dataloader(trainer, group, dataset, options)


def eval_dataloader(trainer: Trainer, group: SequenceGroup, dataset: Dataset[Any]) -> DataLoader[Any]:
    """Batches of an evaluation, shared as training's are."""
    options: dict[str, Any] = {"batch_size": trainer.args.eval_batch_size}
    if not isinstance(dataset, IterableDataset):
        options["sampler"] = trainer._get_eval_sampler(dataset)
    return _dataloader(trainer, group, dataset, options)


def _dataloader(
    trainer: Trainer, group: SequenceGroup, dataset: Dataset[Any], options: dict[str, Any]
) -> DataLoader[Any]:
    args, accelerator = trainer.args, trainer.accelerator
    collate: Any = trainer.data_collator
    options = {
        "collate_fn": ShardingCollator(collate, group),
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "drop_last": args.dataloader_drop_last,
        **options,
    }
    loader: DataLoader[Any] = prepare_data_loader(
        DataLoader(dataset, **options),
        accelerator.device,
        num_processes=group.data_size,
        process_index=group.data_rank,
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types or ()),
        dispatch_batches=False,  # would send the first rank's slice to all
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
    )
    accelerator._dataloaders.append(loader)
    return loader


def count_shifted_labels(trainer: Trainer, batches: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
    """Label tokens of the step's micro-batches, of all ranks where gradients are averaged over them."""
    number = torch.stack([batch["shift_labels"].ne(IGNORE_INDEX).sum() for batch in batches]).sum().to(device)
    if trainer.args.average_tokens_across_devices:
        gathered: Tensor = trainer.accelerator.gather(number)
        number = gathered.sum()
    return number
