from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import BadOption, BadText, LowbitError, NotFound
from lowbit.measure.tasks import TaskOptions, open_tasks, sets
from lowbit.measure.tasks.base import Task, spread
from lowbit.measure.tasks.exact_match import graded
from lowbit.measure.tasks.facts import outcome_of as facts_outcome
from lowbit.measure.tasks.multiple_choice import letter_in, outcome_of

CHOICE = {"question": "Which is red?", "choices": ["a rose", "grass"], "answer": 0}
PROMPT = {"prompt": "Two and two make", "answers": ["four", "4"]}


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """opened(*lines, **options): the task of a JSONL file of these objects (or raw lines)."""

    def write(*lines: Any, **options: Any) -> Task:
        path = tmp_path / "set.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return open_tasks(TaskOptions(tasks=[str(path)], **options))[0]

    return write


def test_the_kind_is_known_by_the_keys(opened: Any) -> None:
    assert opened(CHOICE).kind == "multiple_choice"
    assert opened(PROMPT).kind == "exact_match"
    assert opened({"true": "Snow is cold.", "false": "Snow is hot."}).kind == "facts"
    assert opened({"settings": {"shots": 1}}, CHOICE, CHOICE).shots == 1


@pytest.mark.parametrize("answer", [1, "B", "grass"])
def test_an_answer_is_an_index_a_letter_or_a_choice(opened: Any, answer: object) -> None:
    assert opened({**CHOICE, "answer": answer}).items[0].fields["answer"] == 1


def test_a_choice_that_looks_like_a_letter_is_the_choice(opened: Any) -> None:
    assert (
        opened({"question": "Which comes first?", "choices": ["B", "A"], "answer": "A"}).items[0].fields["answer"] == 1
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([CHOICE, {**CHOICE, "answer": 2}], 'line 2: bad "answer"; found 2; expected an index from 0 to 1'),
        ([CHOICE, {**CHOICE, "answer": True}], 'line 2: bad "answer"'),
        ([{**CHOICE, "choices": ["one"]}], 'line 1: bad "choices"'),
        ([{**CHOICE, "choices": ["x", "x"]}], "line 1: a choice is empty or there twice"),
        ([{**CHOICE, "choices": [f"c{i}" for i in range(27)]}], "line 1: too many choices; found 27"),
        ([{**CHOICE, "question": " "}], 'line 1: bad "question"'),
        ([CHOICE, "{"], "line 2: not JSON"),
        ([CHOICE, "[1]"], "line 2: not an object"),
        ([CHOICE, "", "[" * 100_000], "line 3: not JSON"),
        ([{**CHOICE, "id": "x"}, {**CHOICE, "id": "x"}], "line 2: an id is used twice"),
        ([{**CHOICE, "id": []}], 'line 1: bad "id"'),
        ([{**CHOICE, "group": 3}], 'line 1: bad "group"'),
        ([{"settings": {"shot": 1}}, CHOICE], "line 1: unknown setting; found 'shot'; expected prompt, delimiter"),
        ([{"settings": {"shots": True}}, CHOICE], 'line 1: bad "shots"'),
        ([{"settings": {"shots": 1}}, CHOICE], "too few lines for the worked examples"),
        ([{"settings": {"normalize": "loud"}}, PROMPT], "unknown normalisation; found 'loud'; expected words, case"),
        ([{"prompt": "x", "answers": []}], 'line 1: bad "answers"'),
        ([{"prompt": "x", "answers": ["the"]}], "nothing is left of an answer"),
        ([{"colour": "red"}], "line 1: no kind of task has such questions"),
        ([{"true": "x", "false": "x"}], "line 1: \"true\" and \"false\" are the same"),
        ([{"question": "x", "right": "a", "wrong": ["a"]}], "line 1: the right answer is among the wrong ones"),
        (['{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}'], "line 1: a string has a lone surrogate"),
        ([], "no kind of task has such questions"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_line(opened: Any, lines: list[Any], says: str) -> None:
    with pytest.raises(LowbitError) as caught:
        opened(*lines)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(BadText, match="line 1: not UTF-8"):
        open_tasks(TaskOptions(tasks=[str(path)]))
    path.write_bytes(b'{"question": "' + b"x" * (5 << 20) + b'"}\n')
    with pytest.raises(BadText, match="line 1: this line is too long"):
        open_tasks(TaskOptions(tasks=[str(path)]))


@pytest.mark.parametrize("name", ["no-such-set", "no-such-file.jsonl", "no/such/file.yaml"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(NotFound):
        open_tasks(TaskOptions(tasks=[name]))


@pytest.mark.parametrize("options", [{"tasks": []}, {"tasks": [""]}, {"tasks": ["facts"], "limit": 0}])
def test_impossible_options(options: Any) -> None:
    with pytest.raises(BadOption):
        TaskOptions(**options)


def test_a_limit_spreads_over_the_set(opened: Any) -> None:
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(3), 5) == [0, 1, 2]
    task = opened(*({**CHOICE, "id": f"q{i}"} for i in range(10)), limit=5)
    assert [item.id for item in task.items] == ["q0", "q2", "q4", "q6", "q8"] and task.total == 10


def test_scores_are_lm_evals_rules() -> None:
    """The longer choice is likelier a character, the shorter one as a whole."""
    found = outcome_of([-3.0, -4.0], ["abc", "abcdefgh"], 1)
    assert found["scores"] == {"acc": 0.0, "acc_norm": 1.0, "margin": -1.0} and found["answer"] == "abc"
    assert facts_outcome([-2.0, -2.0], ["x", "y"])["scores"] == {"acc": 0.0, "margin": 0.0}  # a tie is not right


@pytest.mark.parametrize(
    ("said", "answers", "normalize", "scores"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], "words", (1, 1)),
        ("It is the Eiffel Tower!", ["Eiffel Tower"], "words", (0, 1)),
        ("Eiffel Towers", ["Eiffel Tower"], "words", (0, 0)),
        ("PARIS ", ["paris"], "case", (1, 1)),
        ("paris.", ["paris"], "case", (0, 1)),
        ("so 3 and 4 make 1,007.50", ["1007.5"], "number", (1, 1)),
        ("no idea", ["7"], "number", (0, 0)),
        (" Paris", ["Paris"], "none", (1, 1)),
        ("paris", ["Paris"], "none", (0, 0)),
    ],
)
def test_exact_match_after_normalisation(said: str, answers: list[str], normalize: str, scores: Any) -> None:
    assert tuple(graded(said, answers, normalize)["scores"].values()) == scores


@pytest.mark.parametrize(
    ("said", "index"), [("B", 1), ("(b) or C.", 2), ("The answer is A.", 0), ("Because of D", None), ("", None)]
)
def test_the_letter_in_an_answer(said: str, index: int | None) -> None:
    assert letter_in(said, string.ascii_uppercase[:3]) == index


def test_own_sets_are_whole() -> None:
    tasks = {task.name: task for task in open_tasks(TaskOptions(tasks=["facts"]))}
    facts = tasks["facts"]
    assert len(facts.items) == facts.total >= 100
    assert len({item.group for item in facts.items}) >= 8
    texts = [option for item in facts.items for option in item.fields["options"] if not item.fields["context"]]
    assert len(set(texts)) == len(texts)
    assert set(sets()) >= {"facts"}


def test_the_key_is_of_everything_that_an_outcome_depends_on(opened: Any) -> None:
    keys = {
        opened(CHOICE).key,
        opened({**CHOICE, "answer": 1}).key,
        opened(CHOICE, chat=True).key,
        opened({"settings": {"description": "Choose."}}, CHOICE).key,
        opened(CHOICE, {**CHOICE, "id": "b"}, shots=1).key,
    }
    assert len(keys) == 5 and opened(CHOICE).key == opened(CHOICE).key
