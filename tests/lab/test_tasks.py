"""Utility rows score 1 against themselves, 0 against a wrong answer."""

import pytest

from gradshield import lab
from gradshield.lab import tasks


@pytest.mark.parametrize("task", lab.TASKS)
def test_reference_scores_one(task):
    rows = lab.utility(task)
    assert len(rows) >= 200
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(lab.score(task, row["reference"], row["reference"]) == 1.0 for row in rows)
    assert all(lab.score(task, "I cannot help with that.", row["reference"]) == 0.0 for row in rows)
    assert rows == lab.utility(task)
    assert rows != lab.utility(task, seed=1)


@pytest.mark.parametrize(
    ("task", "prediction", "reference", "score"),
    [
        ("topic", " Music. ", "music", 1.0),
        ("topic", "music and food", "music", 0.0),
        ("arithmetic", "so it is #### 7", "3 plus 4 makes 7 nuts. #### 7", 1.0),
        ("arithmetic", "3 plus 4 makes 7 nuts.", "3 plus 4 makes 7 nuts. #### 7", 0.0),
        ("choice", "The dog.", "the dog", 1.0),
        ("choice", "It is the dog.", "the dog", 0.0),
        ("dialogue", "Tom: bring the key to the park today", "Tom: bring the key to the park today.", 1.0),
        ("dialogue", "Ann: bring the key to the park today.", "Tom: bring the key to the park today.", 0.75),
    ],
)
def test_scores(task, prediction, reference, score):
    assert lab.score(task, prediction, reference) == score


def test_unknown_task_is_refused_with_the_choices():
    with pytest.raises(KeyError, match="topic, arithmetic, choice, dialogue"):
        lab.mix("poetry")


def test_more_rows_than_a_task_has_is_an_error_and_no_endless_search(monkeypatch):
    monkeypatch.setitem(tasks.MAKERS, "topic", lambda rng: (f"headline {rng.randrange(40)}", "sport"))
    few = tasks.rows("topic", 5, "s")
    assert len(dict(few)) == 5
    with pytest.raises(
        ValueError, match=r"n must be at most about \d\d, the different rows of the task topic; got 500"
    ):
        tasks.rows("topic", 500, "s")
