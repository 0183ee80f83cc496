"""From a `RunConfig` to the things that a run is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf_training.config import DataConfig, EvaluationConfig
from sparse_hf_training.data import (
    Document,
    MixedDataset,
    PackedTextDataset,
    PackingReport,
    RecallDataset,
    Row,
    TextSource,
    load_text,
    pack_documents,
    read_documents,
)
from sparse_hf_training.evaluation import Judge
from sparse_hf_training.tasks import Filler


def load_model(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or Hub id.

    Raises:
        ValueError: if neither is found.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training rows and what packing made of the text."""

    rows: Dataset[Row]
    packing: PackingReport


def build_training_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> TrainingData:
    """`num_rows` rows: packed text and recall samples, mixed by ratio.

    Raises:
        ValueError: if a source is missing or empty, or shorter than a row.
    """
    documents = read_sources(config.text, tokenizer)
    packed, report = pack_documents(documents, config.seq_len)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(packed), generator=generator).tolist()
    text = torch.utils.data.Subset(PackedTextDataset(packed), order)
    datasets: list[Dataset[Row]] = []
    ratios: list[float] = []
    recall = config.recall
    if recall is None or recall.ratio < 1:
        datasets.append(text)
        ratios.append(1.0 if recall is None else 1 - recall.ratio)
    if recall is not None and recall.ratio > 0:
        datasets.append(
            RecallDataset(
                tasks=recall.built,
                filler=filler_of(documents),
                tokenizer=tokenizer,
                seq_len=config.seq_len,
                seed=config.seed,
                length=num_rows,
                question_loss=recall.question_loss,
            )
        )
        ratios.append(recall.ratio)
    return TrainingData(rows=MixedDataset(datasets, ratios, seed=config.seed, length=num_rows), packing=report)


def build_judge(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> Judge | None:
    """The judge that the evaluation section describes, or None without held text.

    Raises:
        ValueError: if the text is missing, empty or shorter than a row.
    """
    if config.text is None:
        return None
    documents = read_sources((config.text,), tokenizer)
    rows, _ = pack_documents(documents, config.seq_len)
    return Judge(
        tokenizer=tokenizer,
        tasks=config.built,
        filler=filler_of(documents),
        rows=PackedTextDataset(rows),
        seq_len=config.seq_len,
        num_samples=config.num_samples,
        num_rows=config.num_rows,
        seed=config.seed,
    )


def read_sources(sources: tuple[TextSource, ...], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """All documents of all sources, tokenised."""
    return [document for source in sources for document in read_documents(load_text(source), source, tokenizer)]


def filler_of(documents: list[Document]) -> Filler:
    """The documents' tokens as one running text."""
    return Filler(torch.cat([torch.as_tensor(document.input_ids) for document in documents]).numpy())
