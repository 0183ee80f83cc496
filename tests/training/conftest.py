"""Fixtures of the training tests: a tokenizer trained in a moment and text for it."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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
def load() -> Callable[[str], ModuleType]:
    """The program of this name under scripts/, as a module."""

    def module(name: str) -> ModuleType:
        file = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return module


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama of 2 layers with 2 KV heads, and the tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, story: str) -> Path:
    """The story in five documents."""
    folder = tmp_path_factory.mktemp("text")
    step = len(story) // 5
    for number in range(5):
        (folder / f"{number}.txt").write_text(story[number * step : (number + 1) * step], encoding="utf-8")
    return folder


@pytest.fixture
def run_values(model_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The values of a small run's configuration; keywords replace sections, `trainer` is merged."""

    def values(trainer: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        task = {"task": "needle", "num_needles": 2}
        return {
            "model": str(model_folder),
            "output_dir": str(tmp_path / "run"),
            "sparse": {"sparse": {"method": "streaming", "num_sink_tokens": 2, "window_size": 8}},
            "data": {
                "text": [{"path": str(text_file)}],
                "seq_len": 256,
                "recall": {"ratio": 0.5, "tasks": [task]},
            },
            "masks": {"end_head_sparsity": 0.5, "mask_learning_rate": 0.3, "init_log_alpha": 1.0},
            "evaluation": {
                "text": {"path": str(text_file)},
                "seq_len": 256,
                "num_samples": 2,
                "num_rows": 2,
                "tasks": [task],
            },
            **sections,
            "trainer": {
                "max_steps": 4,
                "logging_steps": 1,
                "save_steps": 2,
                "use_cpu": True,
                "learning_rate": 1e-2,
                **(trainer or {}),
            },
        }

    return values


@pytest.fixture
def elimination_values(run_values: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Of a run of head elimination on that model: 4 heads, 3 rounds."""
    section = {"end_head_sparsity": 0.75, "row_passes": 4, "min_rows": 1}
    values = run_values(stage="head_elimination", head_elimination=section, evaluation={})
    return {**values, "dtype": "float32", "trainer": {"use_cpu": True}}


@pytest.fixture
def run_yaml(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """The same as a YAML file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(run_values(**changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def wandb_rows() -> Callable[[Path], Iterator[dict[str, Any]]]:
    """Reads wandb's own file."""
    block, full, first, last = 32768, 1, 2, 4

    def rows(path: Path) -> Iterator[dict[str, Any]]:
        """The logged rows of an offline run: a 7-byte header, then LevelDB's log format with protobuf records.

        What lies inside a value has its path as its name, joined by dots.
        """
        from wandb.proto import wandb_internal_pb2

        data = path.read_bytes()
        assert data[:4] == b":W&B"
        offset, buffer = 7, b""
        while offset + 7 <= len(data):
            if (room := block - offset % block) < 7:
                offset += room
                continue
            _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
            piece = data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            buffer = piece if kind in (full, first) else buffer + piece
            if kind in (full, last):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(buffer)
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    return rows
