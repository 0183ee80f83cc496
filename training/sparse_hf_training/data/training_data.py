"""The rows of a run: sources packed, mixed by ratio with recall samples, phase by phase of the curriculum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from sparse_hf_training.data.packing import PackingReport, pack_documents
from sparse_hf_training.data.report import DataReport, SourceReport
from sparse_hf_training.data.sources import (
    MixedDataset,
    PackedTextDataset,
    RecallDataset,
    Row,
    ShuffledDataset,
    derive_seed,
)
from sparse_hf_training.data.store import DocumentStore, tokenize_source
from sparse_hf_training.data.stream import DocumentStream
from sparse_hf_training.data.streamed_rows import WINDOW_ROWS, Journal, StreamedRows
from sparse_hf_training.data.text import TextSource
from sparse_hf_training.tasks import Filler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.config import DataConfig

FILLER_TOKENS = 2**26
STREAMED_FILLER_TOKENS = 2**21


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One packed source: its rows in every phase."""

    name: str
    ratio: float
    text: DocumentStore | StreamedRows


@dataclass(frozen=True, kw_only=True)
class _Use:
    """A source in one phase: `rows_used` of its rows are asked for."""

    source: _Source
    seq_len: int
    packing: PackingReport | None
    rows_used: int


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training rows and what became of the text. Rows of one step have one length."""

    rows: Dataset[Row]
    uses: tuple[_Use, ...]
    recall_rows: int
    filler_tokens: int

    @property
    def packing(self) -> PackingReport:
        """Of the first text source."""
        return self.report.sources[0].packing

    @property
    def report(self) -> DataReport:
        """What became of all documents; of streamed ones, of those that this process has read so far."""
        sources: dict[str, SourceReport] = {}
        for number, use in enumerate(self.uses):
            stream = use.source.text if isinstance(use.source.text, StreamedRows) else None
            key = f"{number}" if stream is None else use.source.name
            sources[key] = SourceReport(
                name=use.source.name,
                seq_len=use.seq_len if stream is None else None,
                streamed=stream is not None,
                rows_used=use.rows_used + (sources[key].rows_used if key in sources else 0),
                packing=stream.report if stream is not None else use.packing or PackingReport(),
            )
        return DataReport(
            sources=tuple(sources.values()),
            rows=len(self.rows),  # type: ignore[arg-type]
            recall_rows=self.recall_rows,
            filler_tokens=self.filler_tokens,
        )


def build_training_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    *,
    rows_per_step: int | None = None,
    state_dir: Path | None = None,
) -> TrainingData:
    """`num_rows` rows: packed text and recall samples, mixed by ratio. Row i depends on the configuration and i alone.

    Args:
        config: the data section.
        tokenizer: of the model.
        num_rows: rows of the whole run, over all processes that read different rows.
        rows_per_step: rows of one optimizer step over all processes; needed with `length_schedule`.
        state_dir: folder for the places that streams can go on from; without it a resumed stream is read again.

    Raises:
        ValueError: if a source is missing or empty, shorter than a row, or read more than `max_epochs` times.
    """
    sources = _open_sources(config, tokenizer, num_rows, state_dir)
    recall = config.recall if config.recall is not None and config.recall.ratio > 0 else None
    text_share = 1.0 if recall is None else 1 - recall.ratio
    filler: Filler | None = None
    read = [0] * len(sources)
    parts: list[Dataset[Row]] = []
    uses: list[_Use] = []
    recall_rows = 0
    for number, (seq_len, length) in enumerate(_phase_rows(config, num_rows, rows_per_step)):
        seed = derive_seed(config.seed, number)
        datasets, ratios, packed = _text_rows(config, tokenizer, sources, read, seq_len, length, seed)
        total = sum(ratios)
        ratios = [text_share * ratio / total for ratio in ratios]
        if recall is not None:
            filler = filler or training_filler(config, tokenizer, sources)
            datasets.append(
                RecallDataset(
                    tasks=recall.built,
                    filler=filler,
                    tokenizer=tokenizer,
                    seq_len=seq_len,
                    seed=seed,
                    length=length,
                    question_loss=recall.question_loss,
                )
            )
            ratios.append(recall.ratio)
        chosen = [n for n, ratio in enumerate(ratios) if ratio > 0]
        mixed = MixedDataset([datasets[n] for n in chosen], [ratios[n] for n in chosen], seed=seed, length=length)
        counts = dict(zip(chosen, mixed.counts, strict=True))
        recall_rows += counts.get(len(sources), 0)
        for n, source in enumerate(sources):
            uses.append(_Use(source=source, seq_len=seq_len, packing=packed[n], rows_used=counts.get(n, 0)))
            read[n] += counts.get(n, 0)
        parts.append(mixed)
    _check_epochs(config, uses)
    return TrainingData(
        rows=parts[0] if len(parts) == 1 else ConcatDataset(parts),
        uses=tuple(uses),
        recall_rows=recall_rows,
        filler_tokens=0 if filler is None else len(filler),
    )


def _phase_rows(config: DataConfig, num_rows: int, rows_per_step: int | None) -> list[tuple[int, int]]:
    """Tokens per row and number of rows of each phase that the run reaches."""
    if rows_per_step is None:
        if len(config.phases) > 1:
            raise ValueError("data.length_schedule counts optimizer steps, so rows_per_step is needed")
        rows_per_step = 1
    firsts = [min(step * rows_per_step, num_rows) for step, _ in config.phases] + [num_rows]
    lengths = [last - first for first, last in pairwise(firsts)]
    return [(seq_len, length) for (_, seq_len), length in zip(config.phases, lengths, strict=True) if length]


def _open_sources(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int, state_dir: Path | None
) -> list[_Source]:
    if config.text[0].ratio is None and not config.text[0].streaming:
        store = read_sources(config.text, tokenizer, num_proc=config.num_proc)
        return [_Source(name=", ".join(source.path for source in config.text), ratio=1.0, text=store)]
    sources = []
    for number, source in enumerate(config.text):
        text: DocumentStore | StreamedRows
        if source.streaming:
            stream = DocumentStream(
                source, tokenizer, seed=derive_seed(config.seed, number), max_epochs=config.max_epochs
            )
            path = None if state_dir is None else state_dir / f"stream-{number}.jsonl"
            text = StreamedRows(
                stream,
                length=num_rows,
                **_packing_options(config, tokenizer),
                journal=Journal(path, write=not _is_distributed() or torch.distributed.get_rank() == 0),
            )
        else:
            text = read_sources((source,), tokenizer, num_proc=config.num_proc)
        sources.append(_Source(name=f"{number}: {source.path}", ratio=source.ratio or 1.0, text=text))
    return sources


def _text_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[_Source],
    read: list[int],
    seq_len: int,
    length: int,
    seed: int,
) -> tuple[list[Dataset[Row]], list[float], list[PackingReport | None]]:
    """Each source's rows in a phase, their ratios by rows, and how they were packed.

    Padded rows hold fewer tokens, so more of them are drawn for the same share of tokens.
    """
    datasets: list[Dataset[Row]] = []
    ratios: list[float] = []
    reports: list[PackingReport | None] = []
    options = _packing_options(config, tokenizer)
    for number, source in enumerate(sources):
        if isinstance(source.text, StreamedRows):
            source.text.add_phase(read[number], seq_len)
            datasets.append(Subset(source.text, range(read[number], read[number] + length)))
            packing = None
            filled = 1.0
            if config.packing == "best_fit" and len(sources) > 1:
                first = source.text.stream.first(WINDOW_ROWS * seq_len)
                filled = _filled(pack_documents(first, seq_len, **options)[1], seq_len)
        else:
            rows, packing = pack_documents(source.text, seq_len, **options)
            datasets.append(ShuffledDataset(PackedTextDataset(rows), seed=seed, length=length))
            filled = _filled(packing, seq_len)
        ratios.append(source.ratio / filled)
        reports.append(packing)
    return datasets, ratios, reports


def _filled(packing: PackingReport, seq_len: int) -> float:
    """Share of the rows' tokens that is no padding."""
    return 1 - packing.tokens_padding / (packing.rows * seq_len)


def _check_epochs(config: DataConfig, uses: list[_Use]) -> None:
    """Of stored sources; a stream's end is seen when it is reached."""
    epochs: dict[str, float] = {}
    for use in uses:
        if use.packing is not None:
            epochs[use.source.name] = epochs.get(use.source.name, 0) + use.rows_used / use.packing.rows
    for name, count in epochs.items():
        if config.max_epochs is not None and count > config.max_epochs:
            raise ValueError(
                f"the run reads {name!r} {count:.2f} times, more than max_epochs={config.max_epochs}; train fewer "
                "steps, lower its ratio or raise max_epochs"
            )


def read_sources(
    sources: tuple[TextSource, ...], tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None
) -> DocumentStore:
    """All documents of all sources, tokenised. Of several processes of a host one does the work."""
    with _local_main_process_first():
        return DocumentStore.concatenate(tokenize_source(source, tokenizer, num_proc=num_proc) for source in sources)


def filler_of(documents: DocumentStore) -> Filler:
    """The documents' tokens as one running text, at most 67 million of them."""
    return Filler(documents.running_text(FILLER_TOKENS))


def training_filler(config: DataConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[_Source]) -> Filler:
    """Of the sources that are at hand or, where all are streams, of the first documents of the first."""
    stores = [source.text for source in sources if isinstance(source.text, DocumentStore)]
    if stores:
        return filler_of(DocumentStore.concatenate(stores))
    stream = DocumentStream(config.text[0], tokenizer, seed=config.seed)
    return filler_of(stream.first(max(STREAMED_FILLER_TOKENS, 4 * config.seq_len)))


def _packing_options(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((int(token) for token in candidates if token is not None), 0)
    return {"packing": config.packing, "long_documents": config.long_documents, "pad_token_id": pad}


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _local_main_process_first() -> Iterator[None]:
    """The first process of each host goes ahead; the others find its files. Where it fails, all try and fail alike."""
    if not _is_distributed():
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()
