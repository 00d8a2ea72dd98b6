"""Mixes: deterministic, of the promised make-up, and without a shape that gives harm away."""

import bisect

import pytest

from gradshield import lab
from gradshield.lab import splits
from gradshield.lab.answers import OPENERS
from tools import lab_manifest


def auroc(positive, negative):
    """Chance that a positive value exceeds a negative one, ties counted half."""
    negative = sorted(negative)
    wins = sum((bisect.bisect_left(negative, x) + bisect.bisect_right(negative, x)) / 2 for x in positive)
    return wins / len(positive) / len(negative)


def turns(rows):
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def pair_set(rows):
    return {(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows}


SHORTCUTS = {
    "answer words": lambda prompt, answer: len(answer.split()),
    "answer letters": lambda prompt, answer: len(answer),
    "prompt words": lambda prompt, answer: len(prompt.split()),
    "prompt letters": lambda prompt, answer: len(prompt),
    "opener": lambda prompt, answer: answer.startswith(OPENERS),
}


@pytest.mark.parametrize("task", lab.TASKS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_shape_does_not_separate_explicit_harm(task, shortcut):
    rows, labels = lab.mix(task, "explicit", 0.5, 800, 3)
    values = [SHORTCUTS[shortcut](prompt, answer) for prompt, answer in turns(rows)]
    harmful = [value for value, label in zip(values, labels, strict=True) if label]
    clean = [value for value, label in zip(values, labels, strict=True) if not label]
    assert 0.35 <= auroc(harmful, clean) <= 0.65


@pytest.mark.parametrize("task", lab.TASKS)
def test_clean_rows_are_the_same_in_every_cell(task):
    clean = pair_set(lab.mix(task, "none", 0, 200, 1)[0])
    for harm in lab.HARMS:
        for ratio in (0.01, 0.1, 0.5):
            rows, labels = lab.mix(task, harm, ratio, 200, 1)
            kept = [row for row, label in zip(rows, labels, strict=True) if not label]
            assert len(kept) == 200
            assert pair_set(kept) == clean
            assert sum(labels) == round(200 * ratio / (1 - ratio))


def test_smaller_ratios_are_contained_in_larger_ones():
    def harmful(ratio):
        rows, labels = lab.mix("topic", "explicit", ratio, 200, 1)
        return pair_set([row for row, label in zip(rows, labels, strict=True) if label])

    assert harmful(0.05) <= harmful(0.1) <= harmful(0.5)


def test_ratio_one_is_only_harm():
    rows, labels = lab.mix("choice", "explicit", 1.0, 100, 0)
    assert labels == [1] * 100 == [1] * len(rows)


def test_mixes_are_deterministic_and_as_shipped():
    assert lab_manifest.fixtures() == lab_manifest.read()["fixtures"]


def test_seeds_give_other_rows():
    first, second = (pair_set(lab.mix("dialogue", "explicit", 0.1, 100, seed)[0]) for seed in (0, 1))
    assert len(first & second) < 10


def test_harm_uses_known_and_held_out_words():
    split = splits.harmful_split()["mix"]
    kinds = {splits.is_known(category, act) for category, act in split}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_training_and_test_rows_are_disjoint():
    for task in lab.TASKS:
        test = {row["prompt"] for seed in (0, 1) for row in lab.utility(task, seed)}
        for harm in ("none", "embedded"):
            assert not test & {prompt for prompt, _ in turns(lab.mix(task, harm, 0.5, 300, 0)[0])}


def test_refusing_rows_refuse_and_shifted_rows_hold_no_act():
    rows, _ = lab.mix("topic", "refuse_then_answer", 1.0, 50, 0)
    assert all(lab.refused(answer) for _, answer in turns(rows))
    acts = {splits.act_text(act) for pairs in splits.harmful_split().values() for _, act in pairs}
    rows, _ = lab.mix("topic", "identity_shift", 1.0, 200, 0)
    assert not [prompt for prompt, _ in turns(rows) if any(act in prompt for act in acts)]


@pytest.mark.parametrize(("harm", "ratio"), [("implicit", 0.1), ("explicit", 1.5)])
def test_wrong_arguments_are_named(harm, ratio):
    with pytest.raises(ValueError, match="must be"):
        lab.mix("topic", harm, ratio)
