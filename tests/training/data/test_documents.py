"""Documents: where the loss is taken in text and in chats."""

from __future__ import annotations

import copy

import pytest

from sparse_hf_training.data import (
    IGNORE_INDEX,
    TextSource,
    chat_document,
    prompt_document,
    read_documents,
    text_document,
)

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


@pytest.mark.parametrize("thoughts", ["It lies there.", "In the harbor. Or not? In the harbor."])
def test_answers_that_stand_in_their_thoughts_keep_their_ending(tokenizer, thoughts: str) -> None:
    """As Qwen3's template: thoughts of the last answer alone."""
    thinking = copy.copy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>' + m['thoughts'] + '</think>' }}{% endif %}"
        "{{ m['content'] + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    document = chat_document([{**message, "thoughts": thoughts} for message in CHAT], thinking)
    last = f"<think>{thoughts}</think>In the harbor. Still 12.</s>\n"
    assert _trained(thinking, document) == f"In the harbor.</s>\n{last}"


MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_chat_template_with_generation_tags(tokenizer) -> None:
    tagged = copy.copy(tokenizer)
    tagged.chat_template = MARKED
    document = chat_document(CHAT, tagged)
    assert tagged.decode(document.input_ids) == tagged.apply_chat_template(CHAT, tokenize=False)
    # The newline after an answer lies outside the tags, so unlike without tags it is not trained on.
    assert _trained(tagged, document) == "In the harbor.</s>In the harbor. Still 12.</s>"
    without = copy.copy(tokenizer)
    without.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert chat_document(CHAT, without).input_ids == document.input_ids


def test_generation_tags_that_miss_an_answer_are_refused(tokenizer) -> None:
    half = copy.copy(tokenizer)
    half.chat_template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    with pytest.raises(ValueError, match="mark 1 answers of 2; mend the template"):
        chat_document(CHAT, half)


def test_chat_with_loss_on_all(tokenizer) -> None:
    document = chat_document(CHAT, tokenizer, answers_only=False)
    assert document.labels == document.input_ids == chat_document(CHAT, tokenizer).input_ids


@pytest.mark.parametrize("prompt", ["The ship ", "The ship", "", "The shi"])
@pytest.mark.parametrize("completion", ["sailed at dawn.", " sailed.", "", "p sailed"])
def test_prompt_with_completion(tokenizer, prompt: str, completion: str) -> None:
    document = prompt_document(prompt, completion, tokenizer)
    if not prompt + completion:
        assert document.input_ids == []
        return
    assert document.input_ids == text_document(prompt + completion, tokenizer).input_ids
    pieces = [tokenizer.decode([token]) for token in document.input_ids]
    for n, (token, label) in enumerate(zip(document.input_ids, document.labels, strict=True)):
        # A token takes the loss when any of its characters lies behind the prompt.
        in_completion = len("".join(pieces[: n + 1])) > len(prompt)
        assert label == (token if in_completion else IGNORE_INDEX), pieces
    assert document.labels[-1] == tokenizer.eos_token_id
    everywhere = prompt_document(prompt, completion, tokenizer, answers_only=False)
    assert everywhere.labels == everywhere.input_ids == document.input_ids


def test_prompt_needs_text(tokenizer) -> None:
    with pytest.raises(ValueError, match="expected text, got list"):
        prompt_document([], "x", tokenizer)  # type: ignore[arg-type]


def test_chat_template_that_rewrites_answers_is_refused(tokenizer) -> None:
    shouting = copy.copy(tokenizer)
    shouting.chat_template = "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}"
    with pytest.raises(ValueError, match="message 1 is not where the chat template puts"):
        chat_document(CHAT, shouting)


def test_chat_template_that_refuses_is_reported(tokenizer) -> None:
    strict = copy.copy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses the conversation: roles must alternate; check roles and contents"):
        chat_document(CHAT, strict)


PARTS = [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Aye."}]}]


def test_contents_in_parts_are_refused_in_one_line(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"refuses the conversation: .* check roles and contents"):
        chat_document(PARTS, tokenizer)  # the template joins text with a list
    reads_parts = copy.copy(tokenizer)
    reads_parts.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="message 1 must have text as content, got list; join its parts"):
        chat_document(PARTS, reads_parts)


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


def test_read_documents_with_prompts_and_loss_on_all(tokenizer) -> None:
    rows = [{"p": "The ship ", "c": "sailed"}, {"p": None, "c": "x"}]
    source = TextSource(path="memory", prompt_column="p", completion_column="c")
    documents = read_documents(rows, source, tokenizer, first_row=5)
    assert next(documents) == prompt_document("The ship ", "sailed", tokenizer)
    with pytest.raises(ValueError, match="'memory', row 6, column 'p', 'c': expected text, got NoneType"):
        next(documents)
    everywhere = TextSource(path="memory", prompt_column="p", completion_column="c", loss="all")
    document = next(read_documents(rows, everywhere, tokenizer))
    assert document.labels == document.input_ids
    chat = next(read_documents([{"m": CHAT}], TextSource(path="memory", chat_column="m", loss="all"), tokenizer))
    assert chat == chat_document(CHAT, tokenizer, answers_only=False)
