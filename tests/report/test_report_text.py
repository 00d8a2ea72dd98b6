"""Untrusted text: nothing hidden, nothing that reorders, nothing that closes what it stands in."""

import json

import numpy as np
import pytest

from gradshield.report.text import chart_text, number, percent, plain_json, script_json, visible

HIDDEN = [*"\u202e\u2066\u200b\u00ad\ufeff\u2028\x1b\x00\x85\ud800\U000e0041\u061c"]


@pytest.mark.parametrize("character", HIDDEN)
def test_a_hidden_character_is_written_out(character: str) -> None:
    shown = visible(f"a{character}b")
    assert character not in shown
    assert shown == f"a⟨U+{ord(character):04X}⟩b"
    assert character not in chart_text(f"a{character}b")
    assert character not in plain_json({"key": character})


def test_ordinary_text_is_left_alone() -> None:
    text = "Grüße, שלום, 你好 👍🏽\n\tnext"
    assert visible(text) == text
    assert visible("one\r\ntwo") == "one\ntwo"


def test_stacked_marks_are_bounded() -> None:
    assert len(visible("a" + "\u0301" * 500)) < 20


def test_chart_text_leaves_plotly_no_markup() -> None:
    shown = chart_text('<a href="https://example.org">x</a> $x$ & y')
    assert not set("<>$") & set(shown)


def test_script_json_cannot_leave_its_element() -> None:
    value = {"</script><!--": "]]>&\u2028\u2029</SCRIPT>"}
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_plain_json_is_valid_and_whole() -> None:
    value = {"text": "\u202eabc\U000e0041 é", "n": np.int64(3), "xs": np.array([1.5]), "t": (1, 2), "inf": float("inf")}
    assert json.loads(plain_json(value)) == {"text": value["text"], "n": 3, "xs": [1.5], "t": [1, 2], "inf": "inf"}


def test_numbers_and_percentages() -> None:
    assert [number(x) for x in (1234, 0.123456, -2.5, True, None, float("inf"))] == [
        "1,234", "0.1235", "−2.5", "yes", "–", "∞",
    ]  # fmt: skip
    assert [percent(x).replace("\u00a0", " ") for x in (0.0, 1.0, 0.0001, 0.9999, 0.0414)] == [
        "0 %",
        "100 %",
        "<0.1 %",
        ">99.9 %",
        "4.1 %",
    ]
