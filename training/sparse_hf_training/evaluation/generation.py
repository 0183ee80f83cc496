"""Exact match by `generate`: what a model with its cache really writes, dense and sparse by the same code.

Keys that a cache has freed are gone when the answer is decoded, and dynamic methods prefill in another way than they
decode; a single forward pass over question and answer would see neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sparse_hf.attention import ATTENTION_NAME
from sparse_hf.cache import SparseCache
from sparse_hf_training.tasks import RecallSample


def is_sparse_now(model: PreTrainedModel) -> bool:
    """Whether the model's attention is sparse at the moment: sparsified, and not inside `dense(model)`."""
    return bool(model.config._attn_implementation == ATTENTION_NAME)


def new_cache(model: PreTrainedModel) -> Cache:
    """The empty cache that `generate` would make for the model as it is now."""
    return SparseCache.for_model(model) if is_sparse_now(model) else DynamicCache(config=model.config)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache, chunk: int | None = None) -> None:
    """Reads `input_ids [batch, num_tokens]` into a cache, which frees what its heads drop, in chunks or at once."""
    step = chunk or max(input_ids.shape[1], 1)
    for start in range(0, input_ids.shape[1], step):
        piece = input_ids[:, start : start + step]
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def exact_by_generation(
    model: PreTrainedModel,
    samples: Sequence[RecallSample],
    *,
    context_first: bool = False,
    chunk: int | None = None,
    batch_size: int = 1,
) -> Iterator[tuple[int, bool]]:
    """Which samples are answered word for word, as they are done: number and outcome.

    A prompt is every token up to an answer. The next question is another call with the same cache; a sample that gave a
    wrong answer is wrong, whatever follows.

    Args:
        model: in evaluation mode, dense or sparse.
        samples: of one task.
        context_first: the context goes through the model, and the cache frees what it frees, before a question comes.
        chunk: tokens per forward pass of a prefill; None for all at once.
        batch_size: samples whose answers lie at the same places are answered side by side, so that nothing is padded.
    """
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        # Where a question begins matters only where the context goes first.
        alike[(sample.answer_spans, sample.context_length if context_first else None)].append(number)
    for numbers in alike.values():
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            exact = _answer(model, [samples[n] for n in batch], context_first, chunk)
            yield from zip(batch, exact.tolist(), strict=True)


@torch.no_grad()
def _answer(model: PreTrainedModel, samples: Sequence[RecallSample], context_first: bool, chunk: int | None) -> Tensor:
    """Booleans `[batch]` of samples that have their answers at the same places."""
    last = samples[0].answer_spans[-1][1]
    ids = torch.tensor([sample.input_ids[:last] for sample in samples], device=model.device)
    exact = torch.ones(len(samples), dtype=torch.bool, device=ids.device)
    cache = new_cache(model)
    spans = samples[0].answer_spans
    if context_first:
        prefill(model, ids[:, : samples[0].context_length], cache, chunk)
    elif chunk is not None:
        prefill(model, ids[:, : spans[0][0] - 1], cache, chunk)
    for start, end in spans:
        exact &= _writes(model, ids[:, :start], ids[:, start:end], cache)
        if not bool(exact.any()):
            break
    return exact


class _UntilWrong(StoppingCriteria):
    """Ends a row with the first token that is not the answer's: the outcome is known."""

    def __init__(self, answer: Tensor, start: int) -> None:
        self.answer, self.start = answer, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[:, self.start :]
        return (new != self.answer[:, : new.shape[1]]).any(1)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Takes away what a model comes with for `generate`, which fills what we leave open from it.

    A repetition penalty (Qwen2.5 has one) forbids what a question asks for, to repeat the context; an end of sequence
    would end an answer that has it within, such as a passage over the end of a document.
    """
    own: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _writes(model: PreTrainedModel, prompt: Tensor, answer: Tensor, cache: Cache) -> Tensor:
    """Booleans `[batch]`: whether greedy decoding goes on with the answer `[batch, count]`."""
    count, start = answer.shape[1], prompt.shape[1]
    generate: Any = model.generate
    with _plain_generation(model):
        out: Tensor = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0),
            stopping_criteria=StoppingCriteriaList([_UntilWrong(answer, start)]),
        )
    new = out[:, start:]
    return (torch.nn.functional.pad(new, (0, count - new.shape[1]), value=-1) == answer).all(1)
