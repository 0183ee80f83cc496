"""From a `RunConfig` to the things that a run is made of."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.adapters import adapter_for
from sparse_hf.config import SparseConfig
from sparse_hf.sparsify import sparsify
from sparse_hf_training.config import EvaluationConfig, RunConfig
from sparse_hf_training.data import PackedTextDataset, pack_documents
from sparse_hf_training.data.training_data import TrainingData, build_training_data, filler_of, read_sources
from sparse_hf_training.evaluation import Judge
from sparse_hf_training.peft import Quantization, load_base

__all__ = [
    "TrainingData",
    "build_judge",
    "build_training_data",
    "filler_of",
    "load_model",
    "read_sources",
    "sparsify_for",
]


def load_model(
    name: str,
    dtype: str,
    *,
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or Hub id, which may be an adapter's; arguments as `load_base`.

    Raises:
        ValueError: if neither is found, or the adapter does not fit its base model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = load_base(name, getattr(torch, dtype), quantization=quantization, device=device)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, tokenizer


def sparsify_for(model: PreTrainedModel, config: RunConfig) -> None:
    """Sparsifies a model as a run begins: `sft` under the head masks that are named, other stages with all heads full.

    Raises:
        ValueError: if what `sparse` names cannot be read or does not fit.
    """
    spec = SparseConfig.from_dict(config.sparse) if isinstance(config.sparse, dict) else config.sparse
    shape = adapter_for(model).shape(model.config)
    masks = None if config.stage == "sft" else torch.ones(shape.num_layers, shape.num_kv_heads)
    sparsify(model, spec, head_masks=masks)


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
