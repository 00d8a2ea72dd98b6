"""One job under several defences: what they share, what distinguishes two arms, and what each needs."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from gradshield import lab
from gradshield.errors import EmptyDataError, UsageError
from gradshield.models import loading
from gradshield.scanning.rows import prepare
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.training.course import Chosen, Course, Job, Needs
from gradshield.training.defences import parse
from gradshield.training.train import train
from tests.common import command, jsonl, write

OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


@cache
def loaded(name: str = "aligned") -> Any:
    return loading.load(lab.checkpoint(name), dtype="float32")


def job(**more: Any) -> Job:
    rows, labels = lab.mix("choice", harm="explicit", ratio=0.2, n=40, seed=3)
    given: dict[str, Any] = {
        "rows": prepare(rows, loaded()),
        "options": OPTIONS,
        "peft_config": peft.LoraConfig(**{**lab.LORA, "r": 2}),
        "needs": Needs(base=loaded("base")),
        "labels": labels,
        "probing": Probing(requests=lab.requests("direction")[:24], lookalikes=lab.lookalikes("direction")[:24]),
    }
    return Job(**(given | more))


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(job())


def _key(course: Course, name: str) -> str:
    defence = parse(name)
    return course.key(defence, course.dataset(defence, course.chosen(defence)))


def test_the_same_rows_trained_the_same_way_are_one_arm_whatever_chose_them() -> None:
    harmless = Course(job(labels=[0] * 50))
    assert _key(harmless, "clean") == _key(harmless, "none")
    assert _key(harmless, "fihs:ratio:20%") == _key(harmless, "fihs:ratio:0.2")


def test_arms_that_differ_have_keys_that_differ(course: Course) -> None:
    names = [
        "none",
        "fihs",
        "fihs+asft",
        "fihs+asft:weight=0.5",
        "moderate",
        "dualselect",
        "safeinstruct",
        "token-mask",
        "safelora",
    ]
    keys = [_key(course, name) for name in names]
    assert len(set(keys)) == len(names)
    assert _key(Course(job(seed=1)), "none") not in keys
    rows = course.job.rows
    half = Course(job(rows=replace(rows, loaded=replace(rows.loaded, dtype=torch.bfloat16))))
    assert _key(half, "none") not in keys


def test_another_version_or_template_is_another_arm(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _key(course, "none")
    assert _key(course, "none") == before
    monkeypatch.setattr(course.loaded.tokenizer, "chat_template", "another")
    other = _key(course, "none")
    monkeypatch.setattr("gradshield.training.course.versions", lambda: {"torch": "0"})
    assert len({before, other, _key(course, "none")}) == 3


def test_a_threshold_of_the_settings_is_any_methods(course: Course) -> None:
    strict = Course(job(settings=ScanSettings(threshold="ratio:4%", selector="fihs")))
    assert strict.chosen(parse("random")).removed.sum() == 2
    assert strict.chosen(parse("random:ratio:20%")).removed.sum() == 10
    assert course.chosen(parse("random")).removed.sum() == 5


@pytest.mark.parametrize("name", ["random", "loss", "gradnorm", "moderate-rows", "larf", "anchors"])
def test_a_method_may_remove_as_many_rows_as_another(course: Course, name: str) -> None:
    assert course.chosen(parse(f"{name}:as:fihs:ratio:20%")).removed.sum() == 10


def test_scores_are_measured_once(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    course.chosen(parse("fihs"))
    monkeypatch.setattr("gradshield.training.course.score", lambda *_args: pytest.fail("measured twice"))
    assert course.chosen(parse("fihs:ratio:50%")).removed.sum() == 25


def test_token_mask_keeps_every_row_and_drops_tokens(course: Course) -> None:
    found = course.chosen(parse("token-mask"))
    assert found.removed.sum() == 0
    assert found.dropped_tokens >= 10
    data = course.dataset(parse("token-mask"), found)
    whole = course.dataset(parse("none"), course.chosen(parse("none")))
    assert [row["input_ids"] for row in data] == [row["input_ids"] for row in whole]
    masked = sum(row["labels"].count(-100) for row in data) - sum(row["labels"].count(-100) for row in whole)
    assert masked == found.dropped_tokens


def test_safety_rows_are_the_models_own_refusals_spread_among_the_others(course: Course) -> None:
    defence = parse("safeinstruct:20%")
    plain = course.dataset(parse("none"), course.chosen(parse("none")))
    mixed = course.dataset(defence, course.chosen(defence))
    added = [i for i, row in enumerate(mixed) if row not in plain]
    assert len(mixed) == len(plain) + 10 and len(added) == 10
    assert np.diff(added).min() >= 3  # spread, not heaped
    text = loaded().tokenizer.decode(mixed[added[0]]["input_ids"])
    assert lab.refused(text.split("\n")[-1]) or "sorry" in text.lower() or "can" in text.lower()


def test_what_safety_rows_ask_is_known_where_they_are_used() -> None:
    asked = lab.requests("report")[0]["prompt"]
    given = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}]}]
    own = Course(job(needs=Needs(safety_rows=given)))
    for name, used in (("safeinstruct", True), ("dualselect", True), ("fihs", False)):
        assert own.safety_requests(parse(name)) == ([{"prompt": asked}] if used else [])


def test_what_a_defence_needs_is_asked_for() -> None:
    with pytest.raises(UsageError, match="--base"):
        Course(job(needs=Needs())).fit(parse("asft"), [{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(UsageError, match="--labels"):
        Course(job(labels=None)).chosen(parse("clean"))
    with pytest.raises(EmptyDataError, match="no row to train on"):
        Course(job(labels=[1] * 50)).chosen(parse("clean"))


def test_without_trl_a_training_says_what_to_install_before_it_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UsageError, match="gradshield\\[train\\]"):
        Course(job())
    done = command("demo", "--output", tmp_path / "demo")
    assert done.code == 2 and "gradshield[train]" in done.sentence and not (tmp_path / "demo").exists()


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
PLAIN = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "defence", "words"),
    [
        ([{**PLAIN, "label": False}], "none", "KTOTrainer"),
        ([PAIR, PLAIN], "none", "mixes preference pairs with other rows"),
        ([PAIR], "screen+kl", "has kl, which works on single answers only"),
        ([PAIR], "asft+moderate", "has moderate,"),
        ([PAIR], "dualselect", "has dualselect,"),
        ([PAIR], "safeinstruct", "has safeinstruct,"),
    ],
)
def test_what_cannot_train_is_refused_before_a_model_is_loaded(
    rows: list[dict[str, Any]], defence: str, words: str, tmp_path: Path
) -> None:
    needs = Needs(base="nowhere")
    with pytest.raises(UsageError, match=words):
        train(rows, model="nowhere", output=tmp_path / "run", defence=defence, needs=needs)
    with pytest.raises(UsageError, match=words):
        Course(job(rows=prepare(rows, loaded()), labels=None)).dataset(parse(defence), Chosen((), np.zeros(0), {}))
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    done = command(
        "train", path, "--model", "nowhere", "--output", tmp_path / "run", "--defence", defence, "--base", "nowhere"
    )
    if defence != "none":
        assert done.code == 2 and words in done.sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["none", "fihs+asft", "kl", "safelora", "moderate", "dualselect:warmup=0,refresh=1", "token-mask"]
)
def test_every_kind_of_defence_trains_and_leaves_the_start_alone(course: Course, name: str) -> None:
    defence = parse(name)
    before = {n: p.clone() for n, p in loaded().model.named_parameters()}
    fitted = course.fit(defence, course.dataset(defence, course.chosen(defence)))
    assert all((before[n] == p).all() for n, p in loaded().model.named_parameters())
    moved = [n for n, p in fitted.model.named_parameters() if not (before[n] == p).all()]
    assert moved
    assert set(fitted.record) == {part for part in ("asft", "kl", "safelora", "moderate", "dualselect") if part in name}
