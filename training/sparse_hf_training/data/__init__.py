"""Training data: text from anywhere, packed rows, recall samples, and mixtures of them."""

from __future__ import annotations

from sparse_hf_training.data.collate import collate
from sparse_hf_training.data.documents import IGNORE_INDEX, Document, chat_document, read_documents, text_document
from sparse_hf_training.data.packing import PackedRows, PackingReport, pack_documents
from sparse_hf_training.data.sources import MixedDataset, PackedTextDataset, RecallDataset, Row
from sparse_hf_training.data.text import TextSource, load_text

__all__ = [
    "IGNORE_INDEX",
    "Document",
    "MixedDataset",
    "PackedRows",
    "PackedTextDataset",
    "PackingReport",
    "RecallDataset",
    "Row",
    "TextSource",
    "chat_document",
    "collate",
    "load_text",
    "pack_documents",
    "read_documents",
    "text_document",
]
