"""Training data: text from anywhere, packed rows, recall samples, and mixtures of them."""

from __future__ import annotations

from sparse_hf_training.data.collate import collate
from sparse_hf_training.data.documents import (
    IGNORE_INDEX,
    Document,
    chat_document,
    prompt_document,
    read_documents,
    text_document,
    text_documents,
)
from sparse_hf_training.data.packing import LongDocuments, PackedRows, Packing, PackingReport, pack_documents
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
from sparse_hf_training.data.streamed_rows import Journal, StreamedRows
from sparse_hf_training.data.text import TextSource, load_text

__all__ = [
    "IGNORE_INDEX",
    "DataReport",
    "Document",
    "DocumentStore",
    "DocumentStream",
    "Journal",
    "LongDocuments",
    "MixedDataset",
    "PackedRows",
    "PackedTextDataset",
    "Packing",
    "PackingReport",
    "RecallDataset",
    "Row",
    "ShuffledDataset",
    "SourceReport",
    "StreamedRows",
    "TextSource",
    "chat_document",
    "collate",
    "derive_seed",
    "load_text",
    "pack_documents",
    "prompt_document",
    "read_documents",
    "text_document",
    "text_documents",
    "tokenize_source",
]
