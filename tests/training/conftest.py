"""Fixtures of the training tests: a tokenizer trained in a moment and text for it."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparse_hf_training.tasks import Filler

_VOCABULARY = """
the ship sailed from harbor at dawn and her captain walked along the wet deck while gulls cried above
the masts nobody spoke of what they had left behind in town under grey hills where rain fell for many days
"""

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def story() -> str:
    """A few thousand words in sentences, the same in each run."""
    rng = random.Random(7)
    words = _VOCABULARY.split()
    sentences = (" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(400))
    return " ".join(sentences)


@pytest.fixture(scope="session")
def tokenizer(story: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, `</s>` as end of sequence and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([story], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def filler(story: str, tokenizer: PreTrainedTokenizerFast) -> Filler:
    return Filler.from_texts([story], tokenizer)
