"""Untrusted text: nothing hidden, nothing that reorders, nothing that closes what it stands in."""

import json

import pytest

from gradshield.report.text import breakable, chart_text, duration, number, percent, script_json, visible

HIDDEN = [*"\u202e\u2066\u200b\u00ad\ufeff\u2028\x1b\x00\x85\ud800\U000e0041\u061c"]


@pytest.mark.parametrize("character", HIDDEN)
def test_a_hidden_character_is_written_out(character: str) -> None:
    shown = visible(f"a{character}b")
    assert character not in shown
    assert shown == f"a⟨U+{ord(character):04X}⟩b"
    assert character not in chart_text(f"a{character}b")


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


def test_numbers_of_everyday_size_have_no_power_of_ten() -> None:
    assert [number(x, 2) for x in (220.0, -140.0, 12345.6, 0.031)] == ["220", "−140", "12,000", "0.031"]
    assert number(1.5e12) == "1.5e+12"
    assert [duration(x) for x in (45, 720, 7200)] == ["45 s", "12 min", "2.0 h"]


def test_long_words_break_between_their_parts_only() -> None:
    assert breakable("model.layers.0.q_proj & more") == "model.<wbr>layers.<wbr>0.<wbr>q_<wbr>proj &amp; more"
    assert breakable("short.word <b>") == "short.word &lt;b&gt;"
    hostile = breakable("<script>alert(1)</script>.\u202ex" * 2)
    assert not set("<>\u202e") & set(hostile.replace("<wbr>", ""))
