"""One answer of a model through plain `generate`: its text as it comes, its times, and the KV bytes that were held."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel, TextStreamer, set_seed

from sparse_hf.cache import SparseCache


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came, and what it took.

    Args:
        text: without the prompt and special tokens.
        prompt_tokens, new_tokens: counts.
        seconds_to_first_token: from the call of `generate` on.
        tokens_per_second: of the tokens after the first one; None if there are none.
        kv_bytes: of memory that the cache took at the end, measured.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _ClockedStreamer(TextStreamer):
    """Hands text on as it is complete, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.times, self.parts = on_text, [time.perf_counter()], list[str]()

    def put(self, value: Tensor) -> None:
        # The prompt comes first; `generate` gives tokens once they are on the host, so that the device is done.
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.on_text(text)


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] = lambda text: None,
) -> Answer:
    """Generates after one prompt.

    Args:
        model: any causal language model; a sparsified one answers from a `SparseCache`.
        tokenizer: the model's.
        inputs: `input_ids` and `attention_mask`, both `[1, tokens]`.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        on_text: called with each piece of text.

    Raises:
        ValueError: if the prompt is empty, or prompt and answer go beyond the model's positions.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    _check_length(model, prompt_tokens, max_new_tokens)
    # Greedy decoding warns of the sampling options that many models' own generation configurations hold.
    sampling = {"do_sample": True, "temperature": temperature}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    set_seed(seed)
    streamer = _ClockedStreamer(tokenizer, on_text)
    run: Any = model.generate
    output = run(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()},
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        **(sampling if temperature else greedy),
    )
    start, first, *rest = streamer.times
    return Answer(
        text="".join(streamer.parts),
        prompt_tokens=prompt_tokens,
        new_tokens=output.sequences.shape[1] - prompt_tokens,
        seconds_to_first_token=first - start,
        tokens_per_second=len(rest) / (rest[-1] - first) if rest else None,
        kv_bytes=cache_bytes(output.past_key_values),
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache takes: a `SparseCache`, spare room included, or one of transformers' own."""
    if isinstance(cache, SparseCache):
        return cache.allocated_bytes()
    layers: list[Any] = list(cache.layers)
    tensors = (x for layer in layers if layer.is_initialized for x in (layer.keys, layer.values))
    return sum(x.untyped_storage().nbytes() for x in tensors)


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    if not prompt_tokens:
        raise ValueError("the prompt is empty; give some text")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and {max_new_tokens} new ones go beyond the model's {limit} positions; "
            "shorten the prompt or ask for fewer new tokens"
        )
