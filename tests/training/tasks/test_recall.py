"""Recall tasks: exact wording, exact spans, facts that really answer the questions."""

from __future__ import annotations

import random
import re
from dataclasses import FrozenInstanceError

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparse_hf_training.tasks import (
    ChainTask,
    Filler,
    KeyValueTask,
    NeedleTask,
    RecallTask,
    available_tasks,
    make_task,
)
from sparse_hf_training.tasks.base import encode

SEQ_LEN = 1500
TASKS = [
    NeedleTask(),
    NeedleTask(num_needles=5, num_questions=4),
    KeyValueTask(),
    KeyValueTask(num_pairs=6, num_questions=6),
    ChainTask(),
    ChainTask(num_variables=5),
]
NEEDLE = r" One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\. "
PAIR = r' "(\d{7})": "(\d{7})", '
FIRST = r" VAR ([A-Z]{2}) = (\d{5})\. "
COPY = r" VAR ([A-Z]{2}) = VAR ([A-Z]{2})\. "


def _texts(tokenizer, sample, spans) -> list[str]:
    return [tokenizer.decode(list(sample.input_ids[start:end])) for start, end in spans]


def _context(tokenizer, sample) -> str:
    return tokenizer.decode(list(sample.input_ids[: sample.question_spans[0][0]]))


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_length_and_layout(task: RecallTask, filler, tokenizer) -> None:
    for seed in range(5):
        sample = task.sample(random.Random(seed), filler, tokenizer, SEQ_LEN + seed)
        assert sample.task == task.name
        assert len(sample.input_ids) == SEQ_LEN + seed
        assert len(sample.answer_spans) == len(sample.question_spans)
        # Questions stand one after the other and end the sequence; each holds its answer.
        ends = [end for _, end in sample.question_spans]
        assert ends[-1] == len(sample.input_ids)
        assert [start for start, _ in sample.question_spans[1:]] == ends[:-1]
        for (start, end), (answer_start, answer_end) in zip(sample.question_spans, sample.answer_spans, strict=True):
            assert start < answer_start < answer_end < end


@pytest.mark.parametrize("num_questions", [1, 4])
def test_needle(num_questions: int, filler, tokenizer) -> None:
    sample = NeedleTask(num_questions=num_questions).sample(random.Random(3), filler, tokenizer, SEQ_LEN)
    facts = re.findall(NEEDLE, _context(tokenizer, sample))
    assert len(facts) == len(dict(facts)) == 8
    answers = _texts(tokenizer, sample, sample.answer_spans)
    asked = set()
    for answer, question in zip(answers, _texts(tokenizer, sample, sample.question_spans), strict=True):
        key = re.search(r"for ([a-z]+-[a-z]+) mentioned", question)[1]
        asked.add(key)
        assert answer == f" {dict(facts)[key]}"
        assert question == (
            f"\nWhat is the special magic number for {key} mentioned in the provided text? "
            f"The special magic number for {key} mentioned in the provided text is{answer}."
        )
    assert len(asked) == num_questions


@pytest.mark.parametrize("num_questions", [1, 6])
def test_key_value(num_questions: int, filler, tokenizer) -> None:
    sample = KeyValueTask(num_questions=num_questions).sample(random.Random(4), filler, tokenizer, SEQ_LEN)
    facts = re.findall(PAIR, _context(tokenizer, sample))
    assert len(facts) == 16
    assert len({number for pair in facts for number in pair}) == 32
    answers = _texts(tokenizer, sample, sample.answer_spans)
    asked = set()
    for answer, question in zip(answers, _texts(tokenizer, sample, sample.question_spans), strict=True):
        key = re.search(r'up "(\d+)"', question)[1]
        asked.add(key)
        assert answer == dict(facts)[key]
        assert question == f'\nLook up "{key}": "{answer}".'
    assert len(asked) == num_questions


@pytest.mark.parametrize("num_variables", [2, 3, 4])
def test_chain(num_variables: int, filler, tokenizer) -> None:
    sample = ChainTask(num_variables=num_variables).sample(random.Random(5), filler, tokenizer, SEQ_LEN)
    context = _context(tokenizer, sample)
    ((first, value),) = re.findall(FIRST, context)
    names = [first]
    for name, source in re.findall(COPY, context):
        assert source == names[-1], "each variable copies the one before it, in the order of the text"
        names.append(name)
    assert len(set(names)) == num_variables
    assert context.index(f"VAR {first} =") < context.index(f"VAR {names[1]} =")
    assert _texts(tokenizer, sample, sample.answer_spans) == ["".join(f" {name}" for name in names)]
    assert _texts(tokenizer, sample, sample.question_spans) == [
        f"\nFind all variables that are assigned the value {value}: {' '.join(names)}."
    ]


def test_the_rest_of_the_context_is_one_slice_of_the_text(filler, tokenizer, story) -> None:
    sample = KeyValueTask().sample(random.Random(6), filler, tokenizer, SEQ_LEN)
    assert re.sub(PAIR, "", _context(tokenizer, sample)) in story


def test_facts_never_cut_a_word(filler, tokenizer, story) -> None:
    words = set(story.split())
    for seed in range(10):
        context = _context(tokenizer, KeyValueTask().sample(random.Random(seed), filler, tokenizer, SEQ_LEN))
        pieces = re.split(r' "\d{7}": "\d{7}",', context)
        # The slice itself may begin and end inside a word; every other place is whole words.
        inner = " ".join(pieces).split()[1:-1]
        assert set(inner) <= words


def test_facts_spread_over_the_text(filler, tokenizer) -> None:
    places = []
    for seed in range(30):
        context = _context(tokenizer, NeedleTask().sample(random.Random(seed), filler, tokenizer, SEQ_LEN))
        places += [match.start() / len(context) for match in re.finditer(NEEDLE, context)]
    counts = [sum(low <= 4 * place < low + 1 for place in places) for low in range(4)]
    assert min(counts) > len(places) / 4 * 0.6


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_same_rng_state_same_sample(task: RecallTask, filler, tokenizer) -> None:
    one, two, other = (task.sample(random.Random(seed), filler, tokenizer, SEQ_LEN) for seed in ("a", "a", "b"))
    assert one == two
    assert one.input_ids != other.input_ids


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_too_short_says_need_and_got_and_need_is_enough(task: RecallTask, filler, tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"task '{task.name}' needs seq_len >= \d+ .*got seq_len=40") as error:
        task.sample(random.Random(0), filler, tokenizer, 40)
    need = int(re.search(r">= (\d+)", str(error.value))[1])
    assert len(task.sample(random.Random(0), filler, tokenizer, need).input_ids) == need
    with pytest.raises(ValueError, match=f"got seq_len={need - 1}"):
        task.sample(random.Random(0), filler, tokenizer, need - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleTask(num_needles=0), "num_needles must be between 1 and .* got 0"),
        (lambda: NeedleTask(num_needles=2, num_questions=3), "num_questions must be between 1 and 2, got 3"),
        (lambda: KeyValueTask(num_pairs=0), "num_pairs must be between 1"),
        (lambda: KeyValueTask(num_questions=0), "num_questions must be between 1 and 16, got 0"),
        (lambda: ChainTask(num_variables=1), "num_variables must be between 2 and 676, got 1"),
    ],
)
def test_counts_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_registry() -> None:
    assert {"chain", "key_value", "needle", "niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"} <= set(
        available_tasks()
    )
    assert [make_task(name).name for name in available_tasks()] == list(available_tasks())
    assert make_task("needle", num_needles=3) == NeedleTask(num_needles=3)
    with pytest.raises(
        ValueError, match="unknown task 'haystack'; known tasks: chain, copy, cwe, fwe, instruction, key_value, "
    ):
        make_task("haystack")
    with pytest.raises(ValueError, match="'chain' has no option num_needles; known options: num_variables"):
        make_task("chain", num_needles=3)
    assert make_task("niah_single_2", depth="0.5") == make_task("niah_single_2", depth=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_needles": "4"}, "task 'needle': num_needles must be of type int, got '4'"),
        ({"num_needles": 2.5}, "num_needles must be of type int, got 2.5"),
        ({"num_needles": True}, "num_needles must be of type int, got True"),
        ({"num_questions": None}, "num_questions must be of type int, got None"),
    ],
)
def test_options_of_another_type_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task("needle", **options)


def test_tasks_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        NeedleTask().num_needles = 4
    with pytest.raises(TypeError):
        NeedleTask(4)


def _sentencepiece(story: str, prepend: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before what it is given: Llama 2's and Mistral's normalizer, or Metaspace."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = digits
    else:
        space = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([space, digits])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
        initial_alphabet=list('0123456789".:,=ABCDEFGHIJKLMNOPQRSTUVWXYZ?'),
        show_progress=False,
    )
    backend.train_from_iterator(story.split(". "), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prepend", ["normalizer", "first", "always"])
@pytest.mark.parametrize("task", [NeedleTask(), KeyValueTask()], ids=lambda task: task.name)
def test_the_context_holds_the_answer_token_by_token(task: RecallTask, prepend: str, story: str) -> None:
    tokenizer = _sentencepiece(story, prepend)
    text = Filler.from_texts([story], tokenizer)
    for seed in range(5):
        sample = task.sample(random.Random(seed), text, tokenizer, SEQ_LEN)
        ((start, end),) = sample.answer_spans
        answer, context = sample.input_ids[start:end], sample.input_ids[: sample.context_length]
        assert answer in [context[n : n + len(answer)] for n in range(len(context))]


def test_a_text_is_tokenised_as_it_stands_within_others(story: str) -> None:
    tokenizer = _sentencepiece(story, "normalizer")
    texts = ["7654321", " 7654321", "", ".", " the ship", '".']
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in encode(tokenizer, texts)]
    assert ["".join(each) for each in tokens] == ["7654321", "▁7654321", "", ".", "▁the▁ship", '".']
