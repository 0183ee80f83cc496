"""A small Llama or Qwen3 from nothing, that recalls over its whole context: text mixed with recall samples, one GPU."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sparse_hf_training.data import (
    MixedDataset,
    PackedTextDataset,
    RecallDataset,
    Row,
    ShuffledDataset,
    collate,
    pack_documents,
)
from sparse_hf_training.objectives import LossHead, ObjectiveConfig, label_positions
from sparse_hf_training.tasks import Filler, RecallTask

Family = Literal["llama", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class SmallModelConfig:
    """The model and how it is trained.

    Args:
        family: `llama` or `qwen3`.
        vocab_size: of the byte-level tokenizer, which keeps digits apart.
        hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: of the model.
        seq_len: its context.
        steps, batch_size: optimizer steps, and rows of each.
        short_share: share of the steps, at the start, with rows of an eighth of the context: retrieval is learned there
            and carried on to the whole length.
        recall_ratio: share of the rows that are recall samples.
        recall_weight: factor on the loss of questions and answers.
        learning_rate: at its peak, after a hundredth of the steps; then down to a tenth by a cosine.
        seed: of weights and rows.
    """

    family: Family = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    seq_len: int = 2048
    steps: int = 6000
    batch_size: int = 16
    short_share: float = 0.6
    recall_ratio: float = 0.35
    recall_weight: float = 4.0
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(f"family must be one of {list(get_args(Family))}, got {self.family!r}")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads or self.head_dim % 8:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads and head_dim one of 8, got {self.num_heads}, "
                f"{self.num_kv_heads} and {self.head_dim}"
            )
        for name in ("short_share", "recall_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def phases(self) -> tuple[tuple[int, int, int], ...]:
        """First step, steps and tokens a row of each phase; a short row holds an eighth, and batches as many tokens."""
        short = round(self.short_share * self.steps)
        parts = ((0, short, max(self.seq_len // 8, 2)), (short, self.steps - short, self.seq_len))
        return tuple(part for part in parts if part[1])

    def build(self) -> PreTrainedModel:
        """The model with random weights, in fp32."""
        torch.manual_seed(self.seed)
        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
        return AutoModelForCausalLM.from_config(config)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, `<s>` and `</s>`; any text goes through it and back.

    Raises:
        ValueError: for fewer tokens than bytes and marks.
    """
    if vocab_size < 260:
        raise ValueError(f"vocab_size must be 260 or more, 256 of which are bytes, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


class _Mixture(Dataset[tuple[Row, bool]]):
    """Rows of one phase, and whether each is a recall sample. Row i depends on the seed and i alone."""

    def __init__(
        self,
        config: SmallModelConfig,
        documents: Any,
        tokenizer: PreTrainedTokenizerFast,
        filler: Filler,
        tasks: Sequence[RecallTask],
        seq_len: int,
        length: int,
        seed: int,
    ) -> None:
        text = ShuffledDataset(PackedTextDataset(pack_documents(documents, seq_len)[0]), seed=seed, length=length)
        fitting = _fitting(tasks, filler, tokenizer, seq_len)
        if not fitting or not config.recall_ratio:
            self.rows: Any = text
            self.mixed = None
            return
        recall = RecallDataset(
            tasks=fitting, filler=filler, tokenizer=tokenizer, seq_len=seq_len, seed=seed, length=length
        )
        ratios = [1 - config.recall_ratio, config.recall_ratio]
        self.rows = self.mixed = MixedDataset([text, recall], ratios, seed=seed, length=length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, bool]:
        return self.rows[index], self.mixed is not None and self.mixed.source_of(index)[0] == 1


def _fitting(
    tasks: Sequence[RecallTask], filler: Filler, tokenizer: PreTrainedTokenizerFast, seq_len: int
) -> list[RecallTask]:
    """The tasks that rows of this length have room for."""
    fitting = []
    for task in tasks:
        try:
            task.sample(random.Random(0), filler, tokenizer, seq_len)
        except ValueError:
            continue
        fitting.append(task)
    return fitting


def pretrain(
    config: SmallModelConfig,
    documents: Any,
    tokenizer: PreTrainedTokenizerFast,
    filler: Filler,
    tasks: Sequence[RecallTask],
    device: torch.device,
    *,
    progress: Callable[[int, float, float, float], None] = lambda step, text, recall, seconds: None,
) -> PreTrainedModel:
    """Trains a model on text and recall samples, with AdamW and, on a GPU, bf16 autocast.

    Args:
        config: model and schedule.
        documents: tokenised training text, as `pack_documents` takes it.
        tokenizer, filler: of the same text.
        tasks: recall tasks of the mixture; those that short rows have no room for wait for the long ones.
        device: to train on.
        progress: called after each step with its number, the losses of text and recall rows, and the seconds so far.

    Raises:
        ValueError: if the text is shorter than a row, no task fits the whole context, or the loss is not finite.
    """
    if config.recall_ratio and not _fitting(tasks, filler, tokenizer, config.seq_len):
        raise ValueError(f"no task fits into {config.seq_len} tokens; raise seq_len or ask for fewer facts")
    model = config.build().to(device).train()  # type: ignore[arg-type]
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    head, begin = LossHead(model), time.monotonic()
    for number, (first, steps, seq_len) in enumerate(config.phases):
        batch = config.batch_size * config.seq_len // seq_len
        rows = _Mixture(config, documents, tokenizer, filler, tasks, seq_len, steps * batch, config.seed + number)
        for step in range(first, first + steps):
            start = (step - first) * batch
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate(step, config.steps)
            losses = _step(model, head, [rows[n] for n in range(start, start + batch)], config, device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(step + 1, *losses, time.monotonic() - begin)
    return model.eval()


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up over a hundredth of the steps, then down to a tenth by a cosine."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _step(
    model: PreTrainedModel,
    head: LossHead,
    rows: Sequence[tuple[Row, bool]],
    config: SmallModelConfig,
    device: torch.device,
) -> tuple[float, float]:
    """Adds the gradient of one batch; returns the losses of text and recall rows, NaN without such rows."""
    found = []
    for recall, weight in ((False, 1.0), (True, config.recall_weight)):
        chosen = [row for row, of_recall in rows if of_recall is recall]
        if not chosen:
            found.append(float("nan"))
            continue
        batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
        kept, targets = label_positions(batch.pop("labels"))
        autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        with autocast:
            value = head.loss(
                partial(model, **batch, use_cache=False),
                kept,
                targets,
                ObjectiveConfig(lm=1.0, kl=0.0),
                scale=weight * len(chosen) / (len(rows) * max(targets.numel(), 1)),
            )
        value.loss.backward()
        found.append(value.terms["lm"].item() / max(targets.numel(), 1))
    _check_finite(found)
    return found[0], found[1]


def _check_finite(losses: Sequence[float]) -> None:
    if any(math.isinf(loss) for loss in losses) or all(math.isnan(loss) for loss in losses):
        raise ValueError(f"the loss is not finite ({list(losses)}); lower the learning rate")


def save_small_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Writes bf16 weights and the tokenizer; the folder appears whole or not at all.

    Raises:
        ValueError: if the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    staging = folder.with_name(f".{folder.name}.tmp")
    model.to(torch.bfloat16).save_pretrained(staging)  # type: ignore[arg-type]
    tokenizer.save_pretrained(staging)
    if folder.exists():
        folder.rmdir()
    os.rename(staging, folder)
    return folder
