"""From rows of text, chats, or prompts with completions to token documents that say where the loss is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_hf_training.data.chat import encode_chat

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
    rows: Iterable[Mapping[str, Any]], source: TextSource, tokenizer: PreTrainedTokenizerBase, *, first_row: int = 0
) -> Iterator[Document]:
    """Tokenise the rows that `load_text(source)` gave, lazily and in order; the first one is row `first_row`.

    Raises:
        ValueError: a row does not hold what the source's columns say, or the chat template cannot be followed.
    """
    for index, row in enumerate(rows, first_row):
        try:
            yield _document(row, source, tokenizer)
        except ValueError as error:
            columns = ", ".join(map(repr, source.columns))
            raise ValueError(f"{source.path!r}, row {index}, column {columns}: {error}") from error


def _document(row: Mapping[str, Any], source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Document:
    values = [row[column] for column in source.columns]
    if source.kind == "text":
        return text_document(values[0], tokenizer)
    on_answers = source.loss != "all"
    if source.kind == "chat":
        return chat_document(values[0], tokenizer, answers_only=on_answers)
    return prompt_document(values[0], values[1], tokenizer, answers_only=on_answers)


def text_document(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document with loss everywhere, closed by the end-of-sequence token; an empty text gives an empty document.

    Raises:
        ValueError: `text` is not a string.
    """
    return text_documents([text], tokenizer)[0]


def text_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Each text as `text_document` makes it, tokenised side by side.

    Raises:
        ValueError: a text is not a string.
    """
    for text in texts:
        _check_text(text)
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    documents = []
    for text, tokens in zip(texts, encoded, strict=True):
        ids = _closed(list(tokens), tokenizer) if text else []
        documents.append(Document(input_ids=ids, labels=ids))
    return documents


def chat_document(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, answers_only: bool = True
) -> Document:
    """A conversation through the tokenizer's chat template, with loss on the assistant's answers alone or on all.

    The loss covers each answer with the template's end-of-turn marker, so that the model learns to stop.

    Raises:
        ValueError: as `encode_chat`.
    """
    ids, answers = encode_chat(messages, tokenizer)
    return Document(input_ids=ids, labels=_labels(ids, answers) if answers_only else ids)


def prompt_document(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, answers_only: bool = True
) -> Document:
    """Prompt and completion as one text, closed by the end-of-sequence token, with loss on the completion or on all.

    Both are tokenised together. A token that spans the border belongs to the completion, whose beginning would else
    not be learned.

    Raises:
        ValueError: not strings, or a slow tokenizer.
    """
    _check_text(prompt)
    _check_text(completion)
    if not prompt + completion:
        return Document(input_ids=[], labels=[])
    if not tokenizer.is_fast:
        raise ValueError("a fast tokenizer is needed to locate the completion; load it with use_fast=True")
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
    ids = _closed(list(encoded["input_ids"]), tokenizer)
    if not answers_only:
        return Document(input_ids=ids, labels=ids)
    # Special tokens have the span (0, 0): one before the text is no answer, the closing one is.
    answers = [end > len(prompt) for _, end in encoded["offset_mapping"]]
    answers += [True] * (len(ids) - len(answers))
    if ids[-1] == tokenizer.eos_token_id:
        answers[-1] = True
    return Document(input_ids=ids, labels=_labels(ids, answers))


def _labels(ids: Sequence[int], answers: Sequence[bool]) -> list[int]:
    return [token if answer else IGNORE_INDEX for token, answer in zip(ids, answers, strict=True)]


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}; clean the data or choose another column")
