"""What methods cost in quality when every head of a model follows them: density, loss on held text, recall."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf import Method, SparseConfig, sparsify, unsparsify
from sparse_hf.capture import capture
from sparse_hf.figures import Figure
from sparse_hf.methods import Dense
from sparse_hf_training.data import PackedTextDataset, Row, pack_documents, text_documents
from sparse_hf_training.evaluation.judge import Judge, Judgement
from sparse_hf_training.evaluation.statistics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class MethodQuality:
    """One method on all heads.

    Args:
        name: what tables call it.
        density: share of the causal (query, key) pairs that were read while it was judged, over layers, query heads,
            rows of text and samples.
        judgement: loss and recall.
    """

    name: str
    density: float
    judgement: Judgement


def judge_methods(
    model: PreTrainedModel,
    methods: Mapping[str, Method],
    judge: Judge,
    *,
    progress: Callable[[str], None] = lambda name: None,
) -> Iterator[MethodQuality]:
    """Each method in turn on all heads of a dense model, which is dense again after each.

    Args:
        model: not sparsified.
        methods: by name. `Dense` is the model's own attention.
        judge: whose rows of text should hold one document each (`whole_rows`) and be as long as its samples.
        progress: called with the method's name after each recall sample.

    Raises:
        ValueError: if the model cannot follow a method.
    """
    for name, method in methods.items():

        def step(name: str = name) -> None:
            progress(name)

        if isinstance(method, Dense):
            yield MethodQuality(name=name, density=1.0, judgement=judge(model, progress=step))
            continue
        sparsify(model, SparseConfig(sparse=method))
        try:
            with capture(model) as stats:
                found = judge(model, progress=step)
            share = stats.density.mean().item()
        finally:
            unsparsify(model)
        yield MethodQuality(name=name, density=share, judgement=found)


def whole_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_rows: int) -> Dataset[Row]:
    """Rows of `seq_len` tokens that hold one document each, at even distances over all of them.

    Documents are cut one after the other; what does not fill a row is left out.

    Raises:
        ValueError: if no document is so long, or `max_rows` is not positive.
    """
    if max_rows <= 0:
        raise ValueError(f"the number of rows must be positive, got {max_rows}")
    documents = text_documents(list(texts), tokenizer)
    long = [pack_documents([document], seq_len)[0] for document in documents if len(document.input_ids) >= seq_len]
    if not long:
        raise ValueError(f"no document holds {seq_len} tokens; give longer texts or lower the sequence length")
    rows: ConcatDataset[Row] = ConcatDataset([PackedTextDataset(packed) for packed in long])
    count = min(max_rows, len(rows))
    return Subset(rows, [number * len(rows) // count for number in range(count)])


def quality_figures(found: Sequence[MethodQuality], seq_len: int) -> list[Figure]:
    """Density, loss and recall with its interval, beside those of the method called `dense` if it was judged."""
    reference = next((quality for quality in found if quality.name == Dense.name), None)
    figures: list[Figure] = []
    for quality in found:
        title = f"quality at {seq_len} tokens, {quality.name}"
        dense_loss = None if reference is None else reference.judgement.text_loss
        figures.append(_figure(f"{title}: density", 100 * quality.density, "%", lower_is_better=True))
        loss = quality.judgement.text_loss
        figures.append(_figure(f"{title}: loss on held text", loss, "nats/token", True, baseline=dense_loss))
        for number, result in enumerate(quality.judgement.recall):
            same = None if reference is None else reference.judgement.recall[number].exact_match
            case = f"{title}: recall {result.task}"
            figures.append(_figure(case, result.exact_match, "share", False, baseline=same))
            for end, value in zip(("low", "high"), wilson_interval(result.num_exact, result.num_samples), strict=True):
                figures.append(_figure(f"{case} (95% {end})", value, "share", False))
    return figures


def _figure(case: str, value: float, unit: str, lower_is_better: bool, **more: Any) -> Figure:
    return Figure(case=case, value=value, unit=unit, lower_is_better=lower_is_better, **more)
