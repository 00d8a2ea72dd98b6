"""Task scores on answers as models write them, on wild text, and the user's file of held-out rows."""

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield import lab
from gradshield.errors import DataError, EmptyDataError, UnknownNameError, UsageError
from gradshield.evaluation import metrics
from gradshield.evaluation.metrics import METRICS, Choice, guess, metric, normalised, number
from gradshield.evaluation.task_files import task_file, utility

NAMES = [*METRICS, r"regex:answer:?\s*(\w+)"]
WILD = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="0123456789,.-+−$#/eE \n", max_size=200),
    st.text(alphabet="ABCDE()*. isanwerth:/\n\x00\ud800", max_size=200),
)


# ---- every metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(reference=WILD, answer=WILD)
def test_wild_text_scores_and_never_raises(name: str, reference: str, answer: str) -> None:
    score = metric(name, [reference, "A", "B"])
    assert 0.0 <= score(reference, answer) <= 1.0
    assert score(reference, answer) == score(reference, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_endless_answer_is_bounded(name: str) -> None:
    score = metric(name, ["A", "B"])
    began = time.process_time()
    for piece in ("1", "1,", "A ", "answer answer ", "((((", "####"):
        score("the answer is 7", piece * 1_000_000)
    assert time.process_time() - began < 30


@pytest.mark.parametrize("name", list(METRICS))
def test_a_metric_says_what_it_is(name: str) -> None:
    assert metric(name, ["A"]).name == name
    assert 20 < len(METRICS.summary(name)) <= 130 and METRICS.summary(name).endswith(".")


def test_unknown_names() -> None:
    with pytest.raises(
        UnknownNameError, match="unknown metric 'bleu': choose one of exact, contains, number"
    ) as caught:
        metric("bleu")
    assert str(caught.value).endswith("likelihood, regex:PATTERN")
    with pytest.raises(UsageError, match="give it with --metric"):
        metric("likelihood")


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "contains"),
    [
        ("the dog", "The  dog.", 1, 1),
        ("the dog", '"the dog"', 1, 1),
        ("dog", "a dog barks", 0, 1),
        ("dog", "a dogma", 0, 0),
        ("Paris", "ＰＡＲＩＳ", 1, 1),
        ("ß", "ss", 1, 1),
        ("C++", "I like C++ most", 0, 1),
        ("yes", "", 0, 0),
        ("", "", 1, 0),
        ("!", "?", 0, 0),
    ],
)
def test_exact_and_contains(reference: str, answer: str, exact: float, contains: float) -> None:
    assert metric("exact")(reference, answer) == exact
    assert metric("contains")(reference, answer) == contains


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 plus 3 makes 5. #### 5", "5"),
        ("#### 1,234", "1234"),
        ("#### 5 and then 7", "5"),
        ("#### none, so 7", "7"),
        ("first #### 1 then #### 2", "2"),
        ("The total is $1,234.50.", "1234.5"),
        ("so -3", "-3"),
        ("−7 degrees", "-7"),
        ("5-3", "3"),
        ("12,34", "34"),
        ("1,2,3", "3"),
        ("3/4", "3/4"),
        ("on 10/05/2023", "2023"),
        ("1e5", "100000"),
        ("10%", "10"),
        ("x = .5", "1/2"),
        ("-.5", "-1/2"),
        ("the end.5", "5"),
        ("seven", None),
        ("9" * 500, None),
        ("٣", None),
    ],
)
def test_the_number_that_an_answer_ends_on(text: str, value: str | None) -> None:
    assert number(text) == (None if value is None else Fraction(value))


def test_numbers_are_compared_by_value() -> None:
    score = metric("number")
    assert score("#### 72", "It makes 72.0 in all") == 1 and score("1,000", "1000") == 1 and score("0.75", "3/4") == 1
    assert score("72", "The answer is 27") == 0 and score("none", "none") == 0


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc .:,\n", max_size=30))
def test_a_number_is_found_however_it_is_written(value: int, before: str) -> None:
    for written in (str(value), f"{value:,}", f"{value}.0", f"{value:,}."):
        assert number(f"{before} {written}") == value
        assert number(f"{before} 8 #### {written} and 9") == value


# ---- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        *(
            (text, "b")
            for text in ("B", "b", "(B)", "**B**", "B) Paris", "B. Paris", "B: Paris", "Option B", "It is B")
        ),
        ("The answer is (C).", "c"),
        ("The answer is C, not A. Answer: D", "d"),
        ("Answer: C because A is wrong", "c"),
        ("The correct answer is **B**.", "b"),
        ("A. Paris", "a"),
        ("A cat: C", "c"),
        ("A dog barks", None),
        ("A or B", None),
        ("A/B", None),
        ("Both A and B", None),
        ("B's", None),
        ("Before", None),
        ("E", "e"),  # an option that is never right can be chosen
        ("", None),
    ],
)
def test_letters(answer: str, label: str | None) -> None:
    choice = Choice(["A", "B", "C", "D"])
    assert choice.label(answer) == label
    assert choice("B", answer) == (label == "b")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("sports.", "sports"),
        ("Sci/Tech", "sci/tech"),
        ("The category is Business", "business"),
        ("Topic: the Sports page", "sports"),
        ("It is not spam", "not spam"),
        ("It is spam.", "spam"),
        ("sports news about business", "sports"),
        ("This is about sports and business", None),
        ("worldwide", None),
    ],
)
def test_words_as_labels(answer: str, label: str | None) -> None:
    assert Choice(["World", "Sports", "Business", "Sci/Tech", "not spam", "spam"]).label(answer) == label


# ---- overlap --------------------------------------------------------------------------------------------------------


def slow_lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + slow_lcs(a[:-1], b[:-1])
    return max(slow_lcs(a[:-1], b), slow_lcs(a, b[:-1]))


@settings(deadline=None)
@given(*(st.lists(st.sampled_from(["cat", "dog", "sat", "the"]), min_size=1, max_size=6),) * 2)
def test_rouge_as_its_definition(first: list[str], second: list[str]) -> None:
    shared = sum(min(first.count(w), second.count(w)) for w in set(first))
    for name, common in (("rouge-l", slow_lcs(first, second)), ("rouge-1", shared)):
        found = metric(name)(" ".join(first), " ".join(second))
        assert found == pytest.approx(2 * common / (len(first) + len(second)))


@settings(deadline=None)
@given(*(st.text(alphabet=st.characters(max_codepoint=127), max_size=60),) * 2)
def test_rouge_on_ascii_is_the_librarys_own(reference: str, answer: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    own = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(reference, answer)
    assert metric("rouge-l")(reference, answer) == own["rougeL"].fmeasure
    assert metric("rouge-1")(reference, answer) == own["rouge1"].fmeasure


def test_rouge_reads_other_scripts() -> None:
    assert metric("rouge-1")("Привет мир", "привет, мир!") == 1.0
    assert 0 < metric("rouge-l")("日本語です", "日本です") < 1


# ---- patterns -------------------------------------------------------------------------------------------------------


def test_a_pattern_takes_the_last_match_and_cuts_the_reference_too() -> None:
    score = metric(r"regex:\((\w)\)")
    assert score.name == r"regex:\((\w)\)"
    assert score("B", "it is (A), no, (B)") == 1 and score("so (b)", "(B)") == 1
    assert score("A", "it is (A), no, (B)") == 0 and score("B", "B") == 0
    assert metric(r"regex:\d+$")("7", "1\n7\nx") == 1  # $ ends a line


def test_an_invalid_or_slow_pattern_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="an invalid pattern"):
        metric("regex:(")
    monkeypatch.setattr(metrics, "PATTERN_SECONDS", 0.05)
    with pytest.raises(UsageError, match="nested repeats"):
        metric("regex:(a|aa)+$")("a", "a" * 60 + "b")


# ---- files ----------------------------------------------------------------------------------------------------------


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "held-out.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_every_shape_becomes_prompt_and_reference(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there to you, friend"}]
    parts = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]}]
    rows = [
        {"prompt": "P", "reference": "R"},
        {"prompt": chat[:1], "reference": "R", "metric": "exact", "note": 3},
        {"messages": chat},
        {"messages": [*chat, *chat]},
        {"messages": parts},
        {"prompt": "P", "completion": " R"},
        {"instruction": "Do", "output": "Done"},
        {"prompt": "P", "chosen": "good", "rejected": "bad"},
    ]
    task = task_file(written(tmp_path, rows))
    assert task.rows == (
        {"prompt": "P", "reference": "R"},
        {"prompt": chat[:1], "reference": "R", "metric": "exact"},
        {"prompt": chat[:1], "reference": chat[1]["content"]},
        {"prompt": [*chat, chat[0]], "reference": chat[1]["content"]},
        {"prompt": chat[:1], "reference": "Ho"},
        {"prompt": "P", "reference": "R"},
        {"prompt": [{"role": "user", "content": "Do"}], "reference": "Done"},
        {"prompt": "P", "reference": "good"},
    )
    assert not task.set_aside and task.guessed and task.metric == "rouge-l"
    # The row that names its own metric is not scored by words shared.
    assert task.score(task.rows[1], "R it is") == 0 and 0 < task.score(task.rows[0], "R it is") < 1


def test_rows_that_cannot_be_used_are_set_aside_with_their_line(tmp_path: Path) -> None:
    rows = [
        "not json",
        {"prompt": "P", "reference": "5"},
        {"text": "a plain text"},
        {"prompt": "P", "reference": ["a", "b"]},
        {"messages": [{"role": "assistant", "content": "alone"}]},
        {"prompt": "P", "reference": "6", "metric": 3},
        {"strange": 1},
        {"prompt": "P", "reference": "7"},
    ]
    task = task_file(written(tmp_path, rows), metric="number")
    assert [row["reference"] for row in task.rows] == ["5", "7"]
    assert [bad.line for bad in task.set_aside] == [1, 3, 4, 5, 6, 7] and all(bad.reason for bad in task.set_aside)
    assert task.metric == "number" and not task.guessed


def test_files_without_a_task_are_reported(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match="no row with a prompt and a reference"):
        task_file(written(tmp_path, [{"text": "plain"}]))
    with pytest.raises(DataError, match=r"held-out\.jsonl"):
        task_file(written(tmp_path, [{"strange": 1}]))
    with pytest.raises(UnknownNameError, match="unknown metric"):
        task_file(tmp_path / "there-is-none.jsonl", metric="bleu")
    with pytest.raises(UnknownNameError, match="unknown metric"):
        task_file(written(tmp_path, [{"prompt": "P", "reference": "R", "metric": "bleu"}]))


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["so 3. #### 3", "#### 4"], "number"),
        (["3", "1,000", "-2.5"], "number"),
        (list("ABCD") * 3, "choice"),
        (["World", "Sci/Tech"] * 3, "choice"),
        (["the dog", "the cat"], "exact"),
        (["yes"] * 9, "exact"),
        (["3 apples and 4 pears lie here"], "rouge-l"),
    ],
)
def test_guesses(references: list[str], name: str) -> None:
    assert guess(references) == name


@pytest.mark.parametrize(("task", "name"), [("topic", "choice"), ("arithmetic", "number"), ("choice", "exact")])
def test_a_file_of_the_labs_tasks_scores_as_the_lab_does(tmp_path: Path, task: str, name: str) -> None:
    """The lab's own scores are the twin: right answers, another row's answers, and none at all."""
    rows = lab.utility(task)
    found = task_file(written(tmp_path, rows))
    assert (found.metric, found.guessed, len(found.rows)) == (name, True, len(rows))
    answers = [
        r["reference"] if i % 3 == 0 else rows[i - 1]["reference"] if i % 3 == 1 else "" for i, r in enumerate(rows)
    ]
    result = utility(lambda prompts: answers, found.rows, found.score)
    wanted = [lab.score(task, answer, row["reference"]) for row, answer in zip(rows, answers, strict=True)]
    assert [row["score"] for row in result.outputs] == wanted and 0.3 < result.rates["utility"].rate < 0.6


def test_normalised_is_idempotent() -> None:
    for text in ("  A  b. ", "“Quoted”", "...", "(x)"):
        assert normalised(normalised(text)) == normalised(text)
