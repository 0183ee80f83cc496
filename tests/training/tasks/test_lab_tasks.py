"""The lab's tasks: a solver of each, written from its rules alone, finds the answer in the prompt, and no other one."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparse_hf_training.demo.recipe import ASSETS, MODEL
from sparse_hf_training.tasks import (
    ChainTask,
    Filler,
    KeyValueTask,
    NeedleTask,
    RecallTask,
    available_tasks,
    make_task,
    task_label,
)

SEQ_LEN = 2500
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NAME = r"[a-z]+-[a-z]+"
SPECS: dict[str, list[dict[str, Any]]] = {
    "copy": [{}, {"num_tokens": 200, "depth": 0.5}],
    "cwe": [{}, {"num_common": 3, "common_count": 9, "rare_count": 4}],
    "fwe": [{}, {"alpha": 1.5}],
    "instruction": [{}],
    "mqar": [{}, {"num_pairs": 16, "num_questions": 1}],
    "niah_multikey_2": [{}, {"num_questions": 3}],
    "niah_multikey_3": [{}, {"depth": 0.25}],
    "niah_multiquery": [{}],
    "niah_multivalue": [{}, {"num_values": 2, "num_others": 0}],
    "niah_single_1": [{}, {"depth": 0.5}],
    "niah_single_2": [{}, {"depth": 0.9}],
    "two_turns": [{}],
    "vt": [{"num_hops": hops} for hops in (2, 4, 8)] + [{"num_hops": 3, "num_chains": 3}],
}
CASES = [(name, options) for name, several in SPECS.items() for options in several]


def needles(context: str) -> list[tuple[str, str]]:
    return re.findall(rf"One of the special magic numbers for ({NAME}) is: (\d{{7}})\.", context)


def one_needle(context: str, prompt: str) -> list[str]:
    (key,) = set(re.findall(rf"for ({NAME}) mentioned", prompt))
    return [f" {value}" for name, value in needles(context) if name == key]


def all_numbers(context: str, prompt: str) -> list[str]:
    (key,) = set(re.findall(rf"for ({NAME}) mentioned", prompt))
    return [",".join(f" {value}" for name, value in needles(context) if name == key)]


def one_uuid(context: str, prompt: str) -> list[str]:
    (key,) = set(re.findall(rf"uuid for ({UUID}) mentioned", prompt))
    pairs = re.findall(rf"magic uuids for ({UUID}) is: ({UUID})\.", context)
    return [f" {value}" for name, value in pairs if name == key]


def variables(context: str, prompt: str) -> list[str]:
    """Follows assignments until nothing is new; the text's order is the chain's."""
    value = re.search(r"the value (\d{5}):", prompt)[1]
    found = []
    for name, number, source in re.findall(r"VAR ([A-Z]{2}) = (?:(\d{5})|VAR ([A-Z]{2}))\.", context):
        if number == value or source in found:
            found.append(name)
    return ["".join(f" {name}" for name in found)]


def listed(context: str) -> list[str]:
    return re.findall(NAME, context.rpartition(":")[2])


def common(context: str, prompt: str) -> list[str]:
    counts = Counter(listed(context))
    number = int(re.search(r"What are the (\d+) most common", prompt)[1])
    ranked = sorted(counts.values(), reverse=True)
    assert ranked[number - 1] > ranked[number], "the common words stand out"
    return ["".join(f" {word}" for word, count in counts.items() if count >= ranked[number - 1])]


def frequent(context: str, prompt: str) -> list[str]:
    ranked = Counter(listed(context)).most_common()
    assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1], "the order is certain"
    return ["".join(f" {word}" for word, _ in ranked[:3])]


def associated(context: str, prompt: str) -> list[str]:
    (key,) = re.findall(rf"\n({NAME}) ->", prompt)
    return [f" {value}" for name, value in re.findall(rf" ({NAME}) -> ({NAME})\. ", context) if name == key]


def instructed(context: str, prompt: str) -> list[str]:
    word = re.search(rf"^.{{0,60}}Follow this instruction .* the code word ({NAME})\. ", context, re.DOTALL)[1]
    return [f"{value}, {word}" for value in one_needle(context, prompt)]


SOLVERS: dict[str, Callable[[str, str], list[str]]] = {
    "cwe": common,
    "fwe": frequent,
    "instruction": instructed,
    "mqar": associated,
    "niah_multikey_2": one_needle,
    "niah_multikey_3": one_uuid,
    "niah_multiquery": one_needle,
    "niah_multivalue": all_numbers,
    "niah_single_1": one_needle,
    "niah_single_2": one_needle,
    "two_turns": one_needle,
    "vt": variables,
}


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Filler]:
    """The shipped model's tokenizer and a novel."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (ASSETS / "text" / "train" / "lady_susan.txt").read_text(encoding="utf-8")
    return tokenizer, Filler.from_texts([text], tokenizer)


def test_every_task_has_a_case() -> None:
    assert set(available_tasks()) - set(SPECS) == {"needle", "key_value", "chain"}  # these have tests of their own
    assert set(SPECS) - set(SOLVERS) == {"copy"}
    assert all(make_task(name).summary for name in available_tasks())


@pytest.mark.parametrize("tokens", ["shipped", "tiny"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_independent_solver_finds_each_answer_once(
    name: str, options: dict[str, Any], tokens: str, shipped: Any, request: pytest.FixtureRequest
) -> None:
    if tokens == "shipped":
        tokenizer, filler, seq_len = *shipped, SEQ_LEN
    else:  # bytes and few merges: the same text is three times as many tokens
        tokenizer, filler = request.getfixturevalue("tokenizer"), request.getfixturevalue("filler")
        seq_len = 2 * SEQ_LEN
    task = make_task(name, **options)
    for seed in range(6):
        sample = task.sample(random.Random(seed), filler, tokenizer, seq_len + seed)
        assert len(sample.input_ids) == seq_len + seed and sample.task == name
        ids = list(sample.input_ids)
        context = ids[: sample.context_length]
        assert sample.question_spans[-1][1] == len(ids) and len(sample.question_spans) == len(sample.answer_spans)
        for (start, _), (first, last) in zip(sample.question_spans, sample.answer_spans, strict=True):
            if name == "copy":
                assert continued(context, ids[start:first], last - first) == [ids[first:last]]
                continue
            prompt, answer = tokenizer.decode(ids[start:first]), tokenizer.decode(ids[first:last])
            assert [found.lstrip() for found in SOLVERS[name](tokenizer.decode(context), prompt)] == [answer.lstrip()]


def continued(context: list[int], cue: list[int], length: int) -> list[list[int]]:
    starts = [n for n in range(len(context)) if context[n : n + len(cue)] == cue]
    return [context[n + len(cue) : n + len(cue) + length] for n in starts]


@pytest.mark.parametrize("name", ["copy", "niah_multikey_2", "niah_multikey_3", "niah_single_1", "niah_single_2"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_facts_lie_at_the_stated_depth(name: str, depth: float, shipped: Any) -> None:
    tokenizer, filler = shipped
    sample = make_task(name, depth=depth).sample(random.Random(3), filler, tokenizer, SEQ_LEN)
    (start, end), (length, (found,)) = sample.fact_spans[0], (sample.context_length, sample.depths)
    assert found == start / length
    # A fact begins at a word, a line where the list has one, and ends within the context.
    slack = 100 if name.startswith("niah_multikey") else 16
    assert abs(start - depth * (length - (end - start))) <= slack and end <= length
    text = tokenizer.decode(list(sample.input_ids[start:end]))
    if name != "copy":
        answer = tokenizer.decode(list(sample.input_ids[slice(*sample.answer_spans[0])])).strip()
        assert answer in text
    else:
        (first, last), (asked, _) = sample.answer_spans[0], sample.question_spans[0]
        assert sample.input_ids[start:end] == sample.input_ids[asked:first] + sample.input_ids[first:last]


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"copy"}))
def test_fact_spans_hold_facts(name: str, shipped: Any) -> None:
    tokenizer, filler = shipped
    sample = make_task(name).sample(random.Random(1), filler, tokenizer, SEQ_LEN)
    assert sample.fact_spans and sorted(sample.fact_spans) == list(sample.fact_spans)
    texts = [tokenizer.decode(list(sample.input_ids[start:end])) for start, end in sample.fact_spans]
    answers = [tokenizer.decode(list(sample.input_ids[start:end])) for start, end in sample.answer_spans]
    for word in re.findall(rf"{UUID}|{NAME}|\d+|[A-Z]{{2}}", " ".join(answers)):
        assert any(word in text for text in texts), word


def test_the_shape_of_the_haystacks(shipped: Any) -> None:
    tokenizer, filler = shipped

    def context(name: str, **options: Any) -> str:
        sample = make_task(name, **options).sample(random.Random(5), filler, tokenizer, SEQ_LEN)
        return tokenizer.decode(list(sample.input_ids[: sample.context_length]))

    assert context("niah_single_1").count("The grass is green.") > 60
    for name, pattern in (("niah_multikey_2", needles), ("niah_multikey_3", lambda c: re.findall(UUID, c))):
        text = context(name)
        facts = len(pattern(text)) if name == "niah_multikey_2" else len(pattern(text)) // 2
        before, first, rest = text.partition(" One of the special")
        line = len(tokenizer(first + rest)["input_ids"]) / facts
        assert facts > 15 and len(tokenizer(before)["input_ids"]) < 1.1 * line, "text fills less than a line"
    words = context("cwe")
    assert sorted(set(Counter(listed(words)).values())) == [2, 20]
    even, skewed = (
        [depth for seed in range(30) for depth in depths(make_task("mqar", power=power), seed, shipped)]
        for power in (1.0, 2.0)
    )
    assert abs(sorted(even)[len(even) // 2] - 0.5) < 0.06  # u ** 2 has its median at 1/4 from the end
    assert abs(sorted(skewed)[len(skewed) // 2] - 0.75) < 0.06


def depths(task: RecallTask, seed: int, shipped: Any) -> tuple[float, ...]:
    tokenizer, filler = shipped
    return task.sample(random.Random(seed), filler, tokenizer, 4096).depths


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_samples_are_a_function_of_the_seed(name: str, options: dict[str, Any], shipped: Any) -> None:
    tokenizer, filler = shipped
    task = make_task(name, **options)
    one, two, other = (task.sample(random.Random(seed), filler, tokenizer, SEQ_LEN) for seed in ("a", "a", "b"))
    assert one == two and one.input_ids != other.input_ids


@pytest.mark.parametrize("name", sorted(SPECS))
def test_too_short_a_length_is_refused(name: str, shipped: Any) -> None:
    tokenizer, filler = shipped
    with pytest.raises(ValueError, match=rf"task '{name}' needs .*seq_len"):
        make_task(name).sample(random.Random(0), filler, tokenizer, 60)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_the_length_that_a_list_asks_for_is_enough(name: str, shipped: Any) -> None:
    tokenizer, filler = shipped
    with pytest.raises(ValueError) as error:
        make_task(name).sample(random.Random(0), filler, tokenizer, 60)
    need = int(re.search(r">= (\d+)", str(error.value))[1])
    assert len(make_task(name).sample(random.Random(0), filler, tokenizer, need + 8).input_ids) == need + 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("niah_single_2", {"depth": 1.5}, "depth must be null or lie in .0, 1., got 1.5"),
        ("niah_multikey_2", {"num_questions": 0}, "num_questions must be between 1"),
        ("vt", {"num_hops": 1}, "num_hops must be between 2 and 8, got 1"),
        ("vt", {"num_hops": 9}, "num_hops must be between 2 and 8, got 9"),
        ("cwe", {"common_count": 2}, "common_count must be between 3"),
        ("fwe", {"alpha": 0.5}, "alpha must lie in"),
        ("mqar", {"power": 0.0}, "power must lie in"),
        ("copy", {"num_tokens": 0}, "num_tokens must be between 1"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


def test_a_text_that_repeats_itself_has_no_passage_to_copy(shipped: Any) -> None:
    tokenizer, _ = shipped
    with pytest.raises(ValueError, match="no passage of the text begins with 16 tokens"):
        make_task("copy").sample(random.Random(0), Filler.from_texts(["ab " * 9000], tokenizer), tokenizer, SEQ_LEN)


def test_labels_name_what_was_changed() -> None:
    assert task_label(make_task("vt")) == "vt" and task_label(make_task("needle")) == "needle"
    assert task_label(make_task("vt", num_hops=8, num_chains=2)) == "vt(num_hops=8, num_chains=2)"


def test_samples_of_the_first_tasks_are_what_models_were_trained_on(shipped: Any) -> None:
    """Digests taken before the lab's tasks came: the shipped models and the demo depend on every token."""
    tokenizer, filler = shipped
    expected = {
        NeedleTask(): "e5bd5afbec5c8fb8",
        NeedleTask(num_questions=3): "783aec4514881453",
        KeyValueTask(): "fada634baedbf31e",
        ChainTask(num_variables=4): "2a82e7241cd1615e",
    }
    for task, known in expected.items():
        digest = hashlib.sha256()
        for number in range(8):
            sample = task.sample(random.Random(f"{number}"), filler, tokenizer, 1024)
            digest.update(repr((sample.input_ids, sample.answer_spans, sample.question_spans)).encode())
        assert digest.hexdigest()[:16] == known, task
