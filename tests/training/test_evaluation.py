"""Judging: exact match to the token, loss by hand with documents apart, bytes as the summary counts them."""

import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.summary import sparsity_summary
from sparse_hf_training.data import Document, PackedTextDataset, pack_documents
from sparse_hf_training.evaluation import evaluate_recall, evaluate_text_loss, measure_kv_bytes
from sparse_hf_training.evaluation.recall import recall_samples
from sparse_hf_training.tasks import Filler, KeyValueTask, NeedleTask, RecallTask

SEQ_LEN = 512


class Oracle(torch.nn.Module):
    """Predicts each next token of its input, but for some positions, where it predicts another."""

    def __init__(self, vocab: int, wrong: Iterable[int] = ()) -> None:
        super().__init__()
        self.vocab, self.wrong = vocab, tuple(wrong)
        self.device = torch.device("cpu")
        self.was_training: list[bool] = []

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
        self.was_training.append(self.training)
        following = input_ids.roll(-1, 1)  # the last position has no next token; it predicts the first
        for position in self.wrong:
            following[:, position] = (following[:, position] + 1) % self.vocab
        logits = F.one_hot(following, self.vocab).float()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def judged(
    task: RecallTask, filler: Filler, tokenizer: PreTrainedTokenizerFast, wrong: Iterable[int] = (), samples: int = 1
) -> int:
    model: Any = Oracle(len(tokenizer), wrong)
    calls: list[None] = []
    results = evaluate_recall(
        model,
        [task],
        filler,
        tokenizer,
        seq_len=SEQ_LEN,
        num_samples=samples,
        seed=3,
        progress=lambda: calls.append(None),
    )
    assert len(calls) == samples and not any(model.was_training) and model.training
    assert results[0].num_samples == samples and results[0].exact_match == results[0].num_exact / samples
    return results[0].num_exact


@pytest.mark.parametrize(
    "task", [NeedleTask(num_needles=2), KeyValueTask(num_pairs=3, num_questions=2)], ids=lambda task: task.name
)
def test_each_token_of_each_answer_counts_and_no_other(
    task: RecallTask, filler: Filler, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert judged(task, filler, tokenizer, samples=3) == 3
    sample = recall_samples(task, filler, tokenizer, SEQ_LEN, 1, 3)[0]
    predicting = {position - 1 for start, end in sample.answer_spans for position in range(start, end)}
    for position in sorted(predicting | {p + d for p in predicting for d in (-1, 1)}):
        expected = 0 if position in predicting else 1
        assert judged(task, filler, tokenizer, [position]) == expected, position
    others = set(range(SEQ_LEN)) - predicting
    assert judged(task, filler, tokenizer, others) == 1


def test_samples_depend_on_seed_and_number_alone(filler: Filler, tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(num_needles=2)
    many = recall_samples(task, filler, tokenizer, SEQ_LEN, 4, 1)
    random.random()
    assert recall_samples(task, filler, tokenizer, SEQ_LEN, 2, 1) == many[:2]
    assert recall_samples(task, filler, tokenizer, SEQ_LEN, 1, 2)[0] != many[0]
    assert len({sample.input_ids for sample in many}) == 4


def test_no_sample_is_refused(filler: Filler, tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = Oracle(len(tokenizer))
    with pytest.raises(ValueError, match="num_samples must be positive"):
        evaluate_recall(model, [NeedleTask()], filler, tokenizer, seq_len=SEQ_LEN, num_samples=0)


def sparse_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks=((1, 0), (0, 1)))
    return sparsify(model, config)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_text_loss_equals_documents_judged_alone(model_folder: Path, batch_size: int, sparse: bool) -> None:
    model = sparse_model(model_folder) if sparse else AutoModelForCausalLM.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 300, (n,), generator=generator) for n in (20, 44, 30, 34, 50)]
    documents = [Document(input_ids=text.tolist(), labels=text.tolist()) for text in texts]
    rows, _ = pack_documents(documents, 64)  # 20 + 44 | 30 + 34 | the rest is dropped
    assert len(rows) == 2
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in texts[:4]:
            logits = model(text[None]).logits[0, :-1]
            total += F.cross_entropy(logits, text[1:], reduction="sum").item()
            count += len(text) - 1
    model.train()
    loss = evaluate_text_loss(model, PackedTextDataset(rows), batch_size=batch_size)
    assert loss == pytest.approx(total / count, rel=1e-5) and model.training
    first = evaluate_text_loss(model, PackedTextDataset(rows), num_rows=1)
    assert first != pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_kv_bytes_equal_the_summary(model_folder: Path, chunk: int) -> None:
    model = sparse_model(model_folder)
    ids = torch.randint(2, 300, (1, 150), generator=torch.Generator().manual_seed(0))
    held, full = measure_kv_bytes(model, ids, chunk=chunk)
    summary = sparsity_summary(model, 150)
    assert (held, full) == (summary.kv_bytes, summary.dense_kv_bytes)
    assert full == 2 * 2 * 2 * 150 * 8 * 4 and held < full
