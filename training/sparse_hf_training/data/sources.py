"""Map-style data sets whose item `i` depends on the seed and `i` alone: a resumed run sees what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from sparse_hf_training.data.documents import IGNORE_INDEX
from sparse_hf_training.data.packing import PackedRows
from sparse_hf_training.tasks import Filler, RecallSample, RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, torch.Tensor]
"""`input_ids`, `labels` (unshifted) and `position_ids`, int64 tensors of shape [seq_len]."""


class PackedTextDataset(Dataset[Row]):
    """The rows of `pack_documents`, in their order."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows.row(_check_index(index, len(self)))
        return {key: torch.from_numpy(array.astype(np.int64)) for key, array in row.items()}


class ShuffledDataset(Dataset[Row]):
    """A data set read in a random order, as often as needed; each pass has an order of its own.

    Args:
        dataset: map-style data set, not empty.
        seed: the order of a pass depends on the seed and its number alone.
        length: number of items.

    Raises:
        ValueError: the data set is empty, or `length` below 1.
    """

    def __init__(self, dataset: Dataset[Row], *, seed: int, length: int) -> None:
        self._size = len(dataset)  # type: ignore[arg-type]
        if not self._size:
            raise ValueError("a data set without items cannot be shuffled")
        _check_length(length)
        self.dataset, self.seed, self.length = dataset, seed, length
        self._order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        epoch, rank = divmod(_check_index(index, self.length), self._size)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self._order = epoch, torch.randperm(self._size, generator=generator)
        return self.dataset[int(self._order[1][rank])]


class RecallDataset(Dataset[Row]):
    """Recall samples made on the fly, each of a task drawn at random from `tasks`.

    Args:
        tasks: tasks to draw from, each equally likely.
        filler: text to hide the facts in.
        tokenizer: tokenizer of the facts, the same as the filler's.
        seq_len: tokens per row.
        seed: items with the same seed and index are identical.
        length: number of items.
        question_loss: take the loss on questions with their answers; False takes it on the answers alone.

    Raises:
        ValueError: no tasks, `length` below 1, or `seq_len` too small for a task.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[RecallTask],
        filler: Filler,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        seed: int,
        length: int,
        question_loss: bool = True,
    ) -> None:
        if not tasks:
            raise ValueError("a RecallDataset needs at least one task, got none")
        _check_length(length)
        self.tasks = tuple(tasks)
        self.filler = filler
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.length = length
        self.question_loss = question_loss
        # Fail here, not hours later in a data loader's worker, when a task does not fit.
        for task in self.tasks:
            task.sample(random.Random(0), filler, tokenizer, seq_len)

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> RecallSample:
        """Item `index` with its spans, as evaluation needs it."""
        index = _check_index(index, self.length)
        # A string seed goes through SHA-512: stable across processes, unlike hash(), and neighbours are unrelated.
        rng = random.Random(f"{self.seed}:{index}")
        return rng.choice(self.tasks).sample(rng, self.filler, self.tokenizer, self.seq_len)

    def __getitem__(self, index: int) -> Row:
        sample = self.sample(index)
        return sample_row(sample, sample.question_spans if self.question_loss else sample.answer_spans)


def sample_row(sample: RecallSample, spans: Iterable[tuple[int, int]]) -> Row:
    """The row of a recall sample whose loss is taken on the spans [start, end)."""
    input_ids = torch.tensor(sample.input_ids, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    # With no fact and no filler before it, a question would start the row; nothing predicts the first token.
    labels[0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels, "position_ids": torch.arange(len(input_ids))}


class MixedDataset(Dataset[Row]):
    """Several data sets interleaved at random by ratio.

    Each source is read in its own order without repeats until it is used up, then from its start again.

    Args:
        datasets: map-style data sets, none empty.
        ratios: one positive weight per data set; they need not sum to 1.
        seed: fixes the interleaving; it does not depend on `length`.
        length: number of items.

    Raises:
        ValueError: the counts differ, a ratio is not positive and finite, a source is empty, or `length` below 1.
    """

    def __init__(self, datasets: Sequence[Dataset[Row]], ratios: Sequence[float], *, seed: int, length: int) -> None:
        if not datasets or len(datasets) != len(ratios):
            raise ValueError(f"expected one ratio per data set, got {len(datasets)} data sets and {len(ratios)} ratios")
        if not all(0 < ratio < float("inf") for ratio in ratios):
            raise ValueError(f"ratios must be positive and finite, got {list(ratios)}; leave out a source with ratio 0")
        self._sizes = [len(dataset) for dataset in datasets]  # type: ignore[arg-type]
        if 0 in self._sizes:
            raise ValueError(f"data set {self._sizes.index(0)} of the mixture is empty")
        _check_length(length)
        self.datasets = tuple(datasets)
        self.ratios = tuple(ratio / sum(ratios) for ratio in ratios)
        picks = random.Random(f"{seed}:mixture").choices(range(len(datasets)), weights=self.ratios, k=length)
        self._picks = np.array(picks, dtype=np.int32)
        # Item i is the rank-th one that its source gives.
        self._ranks = np.zeros(length, dtype=np.int64)
        for source in range(len(datasets)):
            chosen = self._picks == source
            self._ranks[chosen] = np.arange(int(chosen.sum()))

    def __len__(self) -> int:
        return len(self._picks)

    @property
    def counts(self) -> list[int]:
        """Items that come from each data set."""
        return np.bincount(self._picks, minlength=len(self.datasets)).tolist()

    def source_of(self, index: int) -> tuple[int, int]:
        """Which data set item `index` comes from, and its index there."""
        index = _check_index(index, len(self))
        source = int(self._picks[index])
        return source, int(self._ranks[index]) % self._sizes[source]

    def __getitem__(self, index: int) -> Row:
        source, inner = self.source_of(index)
        return self.datasets[source][inner]


def derive_seed(seed: int, number: int) -> int:
    """A seed for the `number`-th of several things under one seed: the seed itself for the first."""
    return seed if number == 0 else random.Random(f"{seed}:part:{number}").getrandbits(63)


def _check_index(index: int, length: int) -> int:
    # IndexError, not ValueError: it is what ends a plain `for row in dataset`.
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length} items")
    return index % length


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
