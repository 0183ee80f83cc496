"""Conversations through a chat template, with the loss on the assistant's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them belong to an answer; both of shape [num_tokens].

    Where the template marks answers with `{% generation %}`, its marks are taken. Otherwise the conversation is
    rendered up to each answer and through it, and the difference is the answer with its end-of-turn marker.

    Raises:
        ValueError: malformed messages, no chat template, a slow tokenizer, marks that miss an answer, or a template
            that refuses the conversation or rewrites its answers.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"expected a list of messages with role and content, got {messages!r:.80}")
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(f"expected messages that are mappings with role and content, got {messages!r:.80}")
    template = tokenizer.chat_template
    if not template:
        raise ValueError("the tokenizer has no chat template; use the tokenizer of an instruction-tuned model")
    if not tokenizer.is_fast:
        raise ValueError("a fast tokenizer is needed to locate the answers; load it with use_fast=True")
    plain = [dict(message) for message in messages]
    if isinstance(template, str) and _GENERATION_TAG.search(template):
        return _encode_marked(plain, tokenizer)
    text, spans = _render(plain, tokenizer)
    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [any(start <= begin < end <= stop for start, stop in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], answers


def _encode_marked(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    encoded = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    answers = [bool(mark) for mark in encoded["assistant_masks"]]
    marked = sum(now and not before for before, now in zip([False, *answers], answers, strict=False))
    roles = [message["role"] for message in messages]
    # Answers that follow each other directly may be marked as one.
    expected = sum(now == "assistant" != before for before, now in zip(["", *roles], roles, strict=False))
    if marked < expected:
        raise ValueError(
            f"the chat template's generation tags mark {marked} answers of {expected}; "
            "mend the template, or use one without tags"
        )
    return list(encoded["input_ids"]), answers


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text and the character spans of the assistant's answers."""

    def render(count: int, prompt: bool) -> str:
        return str(_apply(tokenizer, messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole = render(len(messages), prompt=False)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1, prompt=False)
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise ValueError(
                f"message {index} must have text as content, got {type(content).__name__}; join its parts, or use a "
                "chat template with generation tags"
            )
        answer = content.strip()
        # Templates may render an answer differently when it is the last one (Qwen3 drops empty thoughts from
        # history), so its place is looked up in the whole text and only its ending is taken from `after`.
        start, last = whole.find(answer, len(before)), after.find(answer, len(before))
        if not (whole.startswith(before) and after.startswith(before)) or start < 0 or last < 0:
            raise ValueError(
                f"message {index} is not where the chat template puts the generation prompt, or not word for word, "
                "so its loss cannot be placed; use another chat_template"
            )
        stop = start + len(answer)
        # Thoughts before the answer may hold its words too: what follows them is no ending that the whole text has.
        while last >= 0 and not whole.startswith(after[last + len(answer) :], stop):
            last = after.find(answer, last + 1)
        spans.append((len(before), stop if last < 0 else stop + len(after) - last - len(answer)))
    return whole, spans


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError) as error:  # TypeError: it joins text with what is none
        raise ValueError(f"the chat template refuses the conversation: {error}; check roles and contents") from error
