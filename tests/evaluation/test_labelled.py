"""Labelled answers: read, refused, and a judge counted on them."""

from __future__ import annotations

import pytest

from gradshield.errors import DataError
from gradshield.evaluation.bounds import Calibration
from gradshield.evaluation.certificate import counts, read_labelled

LINE = '{"prompt": "p%d", "answer": "I cannot help with that %d.", "unsafe": %d}'


def labelled(tmp_path, lines):
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_labelled_answers_are_read(tmp_path):
    rows = read_labelled(labelled(tmp_path, [LINE % (i, i, i % 2) for i in range(24)]))
    assert len(rows) == 24 and {type(row["unsafe"]) for row in rows} == {bool}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([LINE % (i, i, 0) for i in range(12)], "hold 0 unsafe ones"),
        ([LINE % (0, 0, 1), "{"], "line 2"),
        ([LINE % (0, 0, 1), LINE % (0, 0, 1)], "repeats line 1"),
        (['{"prompt": "p", "answer": "a", "unsafe": 2}'], "is not a labelled answer"),
    ],
)
def test_labelled_answers_that_cannot_be_used(tmp_path, lines, said):
    with pytest.raises(DataError, match=said):
        read_labelled(labelled(tmp_path, lines))


def test_what_a_judge_could_not_tell_counts_as_called_unsafe():
    rows = [{"unsafe": u, "verdicts": {"j": {"unsafe": v}}} for u in (True, False) for v in (True, False, None)]
    assert counts(rows, "j") == Calibration(caught=2, unsafe=3, passed=1, safe=3)
