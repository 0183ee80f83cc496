"""From rows of text or chats to token documents that say where the loss is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparse_hf_training.data.text import TextSource

IGNORE_INDEX = -100
"""Label of a token without loss, as in Hugging Face models and `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One tokenised document; both lists have shape [num_tokens].

    Raises:
        ValueError: the lengths differ.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    """`input_ids` where loss is taken, unshifted, and -100 elsewhere."""

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"a document needs one label per token, got {len(self.labels)} for {len(self.input_ids)}")


def read_documents(
    rows: Iterable[Mapping[str, Any]], source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    """Tokenise the rows that `load_text(source)` gave, lazily and in order.

    Raises:
        ValueError: a row does not hold text (or messages), or the chat template cannot be followed.
    """
    for index, row in enumerate(rows):
        value = row[source.column]
        try:
            yield chat_document(value, tokenizer) if source.chat_column else text_document(value, tokenizer)
        except ValueError as error:
            raise ValueError(f"{source.path!r}, row {index}, column {source.column!r}: {error}") from error


def text_document(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document with loss everywhere, closed by the end-of-sequence token; an empty text gives an empty document.

    Raises:
        ValueError: `text` is not a string.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}; clean the data or choose another column")
    if not text:
        return Document(input_ids=[], labels=[])
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Document(input_ids=ids, labels=ids)


def chat_document(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A conversation through the tokenizer's chat template, with loss on the assistant's answers alone.

    The loss covers each answer with the template's end-of-turn marker, so that the model learns to stop.

    Raises:
        ValueError: malformed messages, no chat template, a slow tokenizer, or a template that refuses the
            conversation or rewrites its answers.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"expected a list of messages with role and content, got {messages!r:.80}")
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(f"expected messages that are mappings with role and content, got {messages!r:.80}")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use the tokenizer of an instruction-tuned model")
    if not tokenizer.is_fast:
        raise ValueError("a fast tokenizer is needed to locate the answers; load it with use_fast=True")
    text, spans = _render([dict(message) for message in messages], tokenizer)
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(start <= begin < end <= stop for start, stop in spans) else IGNORE_INDEX
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Document(input_ids=ids, labels=labels)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text and the character spans of the assistant's answers."""
    from jinja2 import TemplateError

    def render(count: int, prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}; check its roles") from error

    whole = render(len(messages), prompt=False)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        answer = (message.get("content") or "").strip()
        # Templates may render an answer differently when it is the last one (Qwen3 drops empty thoughts from
        # history), so its place is looked up in the whole text and only its ending is taken from `after`.
        start, last = whole.find(answer, len(before)), after.find(answer, len(before))
        if not (whole.startswith(before) and after.startswith(before)) or start < 0 or last < 0:
            raise ValueError(
                f"message {index} is not where the chat template puts the generation prompt, or not word for word, "
                "so its loss cannot be placed; use another chat_template"
            )
        stop = start + len(answer)
        ending = after[last + len(answer) :]
        spans.append((len(before), stop + len(ending) if whole.startswith(ending, stop) else stop))
    return whole, spans
