"""Rows of each recall task and of text, kinds apart: for what compares losses by kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.utils.data import ConcatDataset, Dataset

from sparse_hf_training.data.sources import RecallDataset, Row, derive_seed
from sparse_hf_training.data.training_data import TrainingData, build_training_data, training_filler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class RowsByKind:
    """Rows that are read once each.

    Args:
        tasks: rows of each recall task, labelled on the answers alone.
        text: packed text, in a random order.
        everything: all of them one after the other, and what became of the text.
    """

    tasks: tuple[Dataset[Row], ...]
    text: Dataset[Row]
    everything: TrainingData


def build_rows_by_kind(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int, *, num_text_rows: int
) -> RowsByKind:
    """Row i of a kind depends on the configuration and i alone.

    Args:
        config: the data section, with recall tasks. Their `ratio` and `question_loss` say nothing here, nor do
            `length_schedule` and `max_epochs`.
        tokenizer: of the model.
        num_rows: of each task.
        num_text_rows: of text, 1 or more.

    Raises:
        ValueError: if a source is missing or empty, shorter than a row, or holds too few rows.
    """
    assert config.recall is not None
    once = 1 if any(source.streaming for source in config.text) else None  # stored rows are counted below
    plain = replace(config, recall=None, length_schedule=(), max_epochs=once)
    text = build_training_data(plain, tokenizer, num_text_rows)
    for use in text.uses:
        if use.packing is not None and use.rows_used > use.packing.rows:
            raise ValueError(
                f"{use.rows_used} rows of {use.source.name!r} are to be read, each once, and it holds "
                f"{use.packing.rows} of {use.seq_len} tokens; give more text, or lower data.seq_len"
            )
    filler = training_filler(config, tokenizer, [use.source for use in text.uses])
    tasks = tuple(
        RecallDataset(
            tasks=[task],
            filler=filler,
            tokenizer=tokenizer,
            seq_len=config.seq_len,
            seed=derive_seed(config.seed, number),
            length=num_rows,
            question_loss=False,
        )
        for number, task in enumerate(config.recall.built)
    )
    everything = TrainingData(
        rows=ConcatDataset([*tasks, text.rows]),
        uses=text.uses,
        recall_rows=len(tasks) * num_rows,
        filler_tokens=len(filler),
    )
    return RowsByKind(tasks=tasks, text=text.rows, everything=everything)
