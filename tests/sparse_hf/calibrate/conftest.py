"""A Llama and a tokenizer small enough to be calibrated in a second, with attention that is not uniform."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sparse_hf.calibrate.framework import Target, calibrate
from sparse_hf.calibrate.registry import calibrator_class

VOCAB = 97


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """2 layers, 4 query and 2 KV heads of 16; nobody may change it."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._name_or_path = "test/tiny"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def sequences() -> torch.Tensor:
    """int64 ids `[4, 512]`."""
    return torch.randint(VOCAB, (4, 512), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word `w0` to `w95`; the last id is the end of a sequence."""
    words = {f"w{n}": n for n in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def model_folder(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of 1200 words."""
    ids = torch.randint(VOCAB - 1, (1200,), generator=torch.Generator().manual_seed(5)).tolist()
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"w{n}" for n in ids))
    return file


@pytest.fixture
def assert_cpu_and_gpu_agree(
    tiny_model: PreTrainedModel, sequences: torch.Tensor, tmp_path: Path
) -> Callable[[str, dict[str, Any], Sequence[str]], None]:
    """`assert_cpu_and_gpu_agree(method, options, statistics)`: these of the calibrator's statistics, within 2%."""

    def check(name: str, options: dict[str, Any], statistics: Sequence[str]) -> None:
        kind, found = calibrator_class(name), {}
        for device in ("cpu", "cuda"):
            model = copy.deepcopy(tiny_model).to(device)
            calibrator = kind(kind.Options(**options), Target.of(model, 512))
            calibrate(model, sequences[:2], calibrator, tmp_path / device)
            found[device] = calibrator.state()
        for key in statistics:
            ours, theirs = found["cuda"][key], found["cpu"][key]
            # What nearly ties, or lies on the border of a threshold, may fall to either side.
            assert (ours - theirs).abs().sum() <= 0.02 * theirs.abs().sum() + 1e-6, key

    return check


@pytest.fixture
def make_8b_shape() -> Callable[[int], PreTrainedModel]:
    """`make_8b_shape(num_layers)`: layers of Llama-3.1-8B's shape in bf16 on the GPU, but for the MLP; 32768 tokens."""

    def make(num_layers: int) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=4096,
            intermediate_size=1024,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            eos_token_id=None,
            bos_token_id=None,
        )
        config._name_or_path = "test/8b"
        torch.manual_seed(0)
        with torch.device("cuda"):
            return LlamaForCausalLM(config).to(torch.bfloat16).eval()

    return make
