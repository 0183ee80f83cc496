"""Documents: where the loss is taken in text and in chats."""

from __future__ import annotations

import copy

import pytest

from sparse_hf_training.data import IGNORE_INDEX, TextSource, chat_document, read_documents, text_document

CHAT = [
    {"role": "user", "content": "Where is the ship?"},
    {"role": "assistant", "content": "In the harbor."},
    {"role": "user", "content": "Where is the ship now?"},
    {"role": "assistant", "content": "In the harbor. Still 12."},
]


def _trained(tokenizer, document) -> str:
    return tokenizer.decode([token for token in document.labels if token != IGNORE_INDEX])


def test_text_gets_loss_everywhere_and_one_end_token(tokenizer) -> None:
    document = text_document("The ship sailed.", tokenizer)
    assert tokenizer.decode(document.input_ids) == "The ship sailed.</s>"
    assert document.labels == document.input_ids
    assert text_document("The ship sailed.</s>", tokenizer) == document


def test_empty_text_is_an_empty_document(tokenizer) -> None:
    assert len(text_document("", tokenizer).input_ids) == 0


def test_chat_trains_on_answers_alone(tokenizer) -> None:
    document = chat_document(CHAT, tokenizer)
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert _trained(tokenizer, document) == "In the harbor.</s>\nIn the harbor. Still 12.</s>\n"
    pairs = zip(document.input_ids, document.labels, strict=True)
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)


def test_chat_template_that_renders_the_last_answer_differently(tokenizer) -> None:
    thinking = copy.copy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    document = chat_document(CHAT, thinking)
    assert _trained(thinking, document) == "In the harbor.</s>\n<think></think>In the harbor. Still 12.</s>\n"


def test_chat_template_that_rewrites_answers_is_refused(tokenizer) -> None:
    shouting = copy.copy(tokenizer)
    shouting.chat_template = "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}"
    with pytest.raises(ValueError, match="message 1 is not where the chat template puts"):
        chat_document(CHAT, shouting)


def test_chat_template_that_refuses_is_reported(tokenizer) -> None:
    strict = copy.copy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate; check its roles"):
        chat_document(CHAT, strict)


@pytest.mark.parametrize("messages", ["hello", [], None])
def test_chat_needs_messages(tokenizer, messages) -> None:
    with pytest.raises(ValueError, match="expected a list of messages"):
        chat_document(messages, tokenizer)


def test_chat_needs_roles_and_a_template(tokenizer) -> None:
    with pytest.raises(ValueError, match="mappings with role and content"):
        chat_document([{"content": "x"}], tokenizer)
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_document(CHAT, plain)


def test_read_documents_follows_the_source_and_names_a_bad_row(tokenizer) -> None:
    rows = [{"text": "The ship", "chat": CHAT}, {"text": None, "chat": CHAT}]
    chats = list(read_documents(rows, TextSource(path="memory", chat_column="chat"), tokenizer))
    assert chats == [chat_document(CHAT, tokenizer)] * 2
    texts = read_documents(rows, TextSource(path="memory"), tokenizer)
    assert next(texts) == text_document("The ship", tokenizer)
    with pytest.raises(ValueError, match="'memory', row 1, column 'text': expected text, got NoneType"):
        next(texts)
