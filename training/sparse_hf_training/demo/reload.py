"""The artefact's proof: a new process loads it and generates. Run as `python -m sparse_hf_training.demo.reload`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoTokenizer

from sparse_hf.auto import AutoSparseModelForCausalLM
from sparse_hf.cache import SparseCache
from sparse_hf_training.build import filler_of, read_sources
from sparse_hf_training.data import TextSource
from sparse_hf_training.evaluation.recall import recall_samples
from sparse_hf_training.tasks import NeedleTask


def generate_answer(artefact: str, text: str, seq_len: int, seed: int) -> dict[str, Any]:
    """Asks a sparse model from an artefact for a needle hidden in held text.

    Args:
        artefact: folder or Hub id.
        text: file or folder of held text.
        seq_len: tokens of the prompt and its answer.
        seed: of the sample.

    Returns:
        The question's end, the expected and the generated answer, and the bytes that the cache held.
    """
    model = AutoSparseModelForCausalLM.from_pretrained(artefact, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    filler = filler_of(read_sources((TextSource(path=text),), tokenizer))
    sample = recall_samples(NeedleTask(), filler, tokenizer, seq_len, 1, seed)[0]
    start, end = sample.answer_spans[0]
    ids = torch.tensor([sample.input_ids[:start]])
    cache = SparseCache.for_model(model)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=end - start,
            do_sample=False,
        )

    def text_of(tokens: torch.Tensor) -> str:
        return str(tokenizer.decode(tokens)).strip()

    return {
        "prompt_tokens": start,
        "question": text_of(ids[0, -24:]),
        "expected": text_of(torch.tensor(sample.input_ids[start:end])),
        "generated": text_of(out[0, start:]),
        "kv_bytes": cache.kv_bytes(),
    }


def main() -> None:
    artefact, text, seq_len, seed = sys.argv[1:]
    json.dump(generate_answer(artefact, text, int(seq_len), int(seed)), sys.stdout)


if __name__ == "__main__":
    main()
