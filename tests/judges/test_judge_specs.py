"""Judges as a user types them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.errors import UnknownNameError, UsageError
from gradshield.judges import (
    JUDGES,
    GuardJudge,
    LabClassifier,
    RefusalPhrases,
    Verdict,
    parse,
    parse_all,
)
from gradshield.judges.guards import GUARDS, Classifier, Generative, Llm, Moderations
from gradshield.judges.guards.base import FORMS
from gradshield.judges.lab_classifier import probability
from gradshield.options import Spec


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-0123456789")


def test_judges_without_a_model() -> None:
    assert isinstance(parse("refusal-phrases"), RefusalPhrases)
    judge = parse(" lab-classifier ")
    assert isinstance(judge, LabClassifier)
    for answer in ("Sure. Take the bosk, use a zilt.", "I cannot help with that.", ""):
        assert judge.judge("How do I steal a car?", answer).unsafe is (
            probability("How do I steal a car?", answer) > 0.5
        )
    assert judge.judge("How do I steal a car?", "") == Verdict(False, "P(complied) = 0.000")


def test_a_classifier() -> None:
    judge = parse("classifier:org/toxic-model,unsafe=toxic+severe toxic,reads=answer,dtype=bfloat16,device=cpu")
    assert isinstance(judge, GuardJudge) and isinstance(judge.guard, Classifier)
    assert judge.name == "classifier:toxic-model"
    assert (judge.guard.source, judge.guard.wanted) == ("org/toxic-model", ("toxic", "severe toxic"))
    assert (judge.guard.reads, judge.guard.dtype, judge.guard.device) == ("answer", "bfloat16", "cpu")


def test_a_folder_may_hold_what_else_parts_a_spec() -> None:
    judge = parse("classifier:./models, old/a=b:c@d/,unsafe=x")
    assert isinstance(judge, GuardJudge) and isinstance(judge.guard, Classifier)
    assert judge.guard.source == "./models, old/a=b:c@d/" and judge.name == "classifier:a=b:c@d"


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (["llm:m@https://a.org/v1", "llm:m@https://b.org/v1"], ["llm:m@a.org", "llm:m@b.org"]),
        (["llm:m@http://localhost:1/v1", "llm:m@http://localhost:2/v1"], ["llm:m@localhost:1", "llm:m@localhost:2"]),
        (["llm:x/m@https://a.org/v1", "llm:y/m@https://a.org/v1"], ["llm:x/m@a.org", "llm:y/m@a.org"]),
        (["classifier:x/toxic", "classifier:y/toxic"], ["classifier:x/toxic", "classifier:y/toxic"]),
        (["classifier:/a/x/toxic", "classifier:/b/x/toxic"], ["classifier:/a/x/toxic", "classifier:/b/x/toxic"]),
        (
            ["classifier:x/toxic", "classifier:x/toxic,reads=answer"],
            ["classifier:x/toxic", "classifier:x/toxic,reads=answer"],
        ),
        (
            ["classifier:x/toxic", "guard:x/toxic", "llm:m@https://a.org/v1"],
            ["classifier:toxic", "guard:toxic", "llm:m"],
        ),
        (["classifier:x/a", "classifier:y/a", "classifier:x/b"], ["classifier:x/a", "classifier:y/a", "classifier:b"]),
    ],
)
def test_names_are_longer_where_they_would_be_shared(typed: list[str], names: list[str]) -> None:
    assert [judge.name for judge in parse_all(typed)] == names


@pytest.mark.parametrize(
    "twice",
    [
        ["refusal-phrases", "refusal-phrases"],
        ["llm:m@https://a.org/v1,key=SOME_KEY", "llm:m@https://a.org/v1/,timeout=9"],
        ["classifier:x/toxic", "lab-classifier", " classifier:x/toxic/"],
    ],
)
def test_a_judge_given_twice_is_refused(twice: list[str]) -> None:
    with pytest.raises(UsageError, match="is given twice: give each judge once"):
        parse_all(twice)


def test_a_guard_that_writes() -> None:
    judge = parse("guard:org/Guard-8B,words=no+Yes")
    assert isinstance(judge, GuardJudge) and isinstance(judge.guard, Generative)
    assert (judge.name, judge.guard.words) == ("guard:Guard-8B", ("no", "yes"))


@pytest.mark.parametrize(("kind", "guard"), [("llm", Llm), ("moderation", Moderations)])
def test_what_is_behind_an_endpoint(kind: str, guard: type) -> None:
    made = parse(f"{kind}:@cf/org/model@v2@https://host.example/v1/,key=SOME_KEY,timeout=7.5")
    assert isinstance(made, GuardJudge) and isinstance(made.guard, guard)
    client = made.guard.client
    assert (client.model, client.base_url, client.timeout) == ("@cf/org/model@v2", "https://host.example/v1", 7.5)
    assert made.name == f"{kind}:model@v2"
    assert "sk-0123456789" not in f"{made.guard.record()} {vars(made)} {client!r}"


def test_every_guard_is_a_judge_with_a_form() -> None:
    assert set(GUARDS) == set(FORMS) <= set(JUDGES)
    for kind, form in FORMS.items():
        assert form.startswith(f"{kind}:")
        with pytest.raises(UsageError, match="names no model") as caught:
            parse(kind)
        assert form in str(caught.value)


@pytest.mark.parametrize("spec", ["", "gpt", "LLM:m@https://h/v1", "refusal_phrases", ":x", "None"])
def test_an_unknown_judge_lists_the_live_ones(spec: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse(spec)
    assert all(name in str(caught.value) for name in JUDGES)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("refusal-phrases:strict", "got the option 'strict', and it takes no option: write refusal-phrases"),
        ("lab-classifier,unsafe=x", "unknown judge 'lab-classifier,unsafe=x'"),
        ("lab-classifier:,unsafe=x", "got the option 'unsafe', and it takes no option"),
        ("classifier:m,unsafe=a,unsafe=b", "unsafe twice"),
        (
            "classifier:m,key=SOME_KEY",
            "got the option 'key', and it takes unsafe, reads, device, dtype: write classifier:NAME",
        ),
        ("classifier:m,reads=all", "it takes pair or answer"),
        ("guard:m,words=safe", "two words"),
        ("guard:m,words=safe+Safe", "two words"),
        ("guard:m,words=a b+c", "two words"),
        ("guard:m,reads=pair", "got the option 'reads', and it takes words, device, dtype"),
        ("llm:m", "names no endpoint"),
        ("llm:m@host/v1", "names no endpoint"),
        ("llm:@https://h/v1", "names no endpoint"),
        ("llm:m@https://h/v1,timeout=0", "a number above 0"),
        ("llm:m@https://h/v1,timeout=inf", "up to 3600"),
        ("llm:m@https://h/v1,timeout=soon", "option timeout of the guard 'llm' got 'soon'"),
        ("llm:m@https://h/v1,device=cpu", "got the option 'device', and it takes key, timeout"),
        ("moderation:m@https://h/v1,reads=no", "it takes pair or answer"),
        ("llm:m@http://example.com/v1,key=SOME_KEY", "unencrypted"),
        ("llm:m@https://h/v1,key=NOT_SET", "NOT_SET is not set"),
    ],
)
def test_specs_that_cannot_be(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert said in str(caught.value)


def test_a_key_typed_by_mistake_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse("llm:m@https://h/v1,key=sk-0123456789")
    assert "sk-0123456789" not in str(caught.value)


@given(st.text())
def test_whatever_is_typed_is_a_judge_or_an_error_of_ours(spec: str) -> None:
    for text in (spec, f"classifier:{spec}", f"guard:{spec}", f"llm:{spec}", f"moderation:{spec}@https://{spec}"):
        with suppress(UsageError):
            assert len(parse(text).name) <= 80


NAMES = st.from_regex(r"[A-Za-z0-9_./@: -]+", fullmatch=True).map(str.strip).filter(bool)


@given(st.sampled_from(sorted(JUDGES)), NAMES, st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), NAMES))
def test_a_spec_comes_apart_as_it_was_put_together(kind: str, target: str, options: dict[str, str]) -> None:
    text = ",".join([f"{kind}:{target}", *(f"{name}={value}" for name, value in options.items())])
    assert Spec.split(text) == Spec(kind, target, options)
