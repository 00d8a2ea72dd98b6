"""The page as text: every edge renders, what is untrusted is escaped, and size has a bound."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gradshield.scanning.page import render, write
from gradshield.scanning.page_data import Agreement, Check, Counts, QuarantinedView, ReportData, RowView
from gradshield.scanning.page_rows import references, show_rows
from gradshield.types import Cut

EVIL = (
    "<script>window.__pwned=1</script><img src=x onerror=window.__pwned=1>{{7*7}}{% raw %}'\"javascript:</title>\u202e"
)
Make = Callable[..., ReportData]


class Elements(HTMLParser):
    """The elements and attributes of a page, and the text of it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def evil_data(make: Make) -> ReportData:
    """Someone else's text in every place that takes any."""
    pieces = ((EVIL, "prompt", None), (EVIL, EVIL, 0.5), (EVIL, "response", -0.4))
    row = RowView(0, EVIL, 2.0, 1.0, EVIL, EVIL, pieces, EVIL)
    return make(
        [2.0, 0.1], shapes=(EVIL, EVIL), cuts={EVIL: Cut(1.0, EVIL, {EVIL: EVIL, "components": [{EVIL: EVIL}]})},
        removed=np.array([True, False]), labels=np.array([1, 0]), verdict=EVIL, warnings=(EVIL,),
        checks=(Check(EVIL, "warn", EVIL),), removed_rows=(row,), kept_rows=(row,), counts=Counts(3, 2, 1, 1, 1),
        quarantined=(QuarantinedView(1, EVIL, EVIL),), agreement=Agreement(EVIL, 0.1, 0.9, 2, True, EVIL),
        manifest={EVIL: {EVIL: EVIL}, "command": EVIL}, files={"removed": EVIL, "kept": EVIL, "quarantine": EVIL},
        aurocs=({"name": EVIL, "auroc": 0.9},), next_steps=(EVIL,), selector=EVIL,
    )  # fmt: skip


def test_untrusted_text_is_only_text(make: Make) -> None:
    page = render(evil_data(make))
    elements = Elements(page).seen
    assert sum(tag == "script" for tag, _ in elements) == 3
    assert not [tag for tag, _ in elements if tag in ("img", "iframe", "object", "embed", "form", "base")]
    assert not [name for _, attrs in elements for name in attrs if name.startswith("on") or name == "style"]
    links = [value for _, attrs in elements for name, value in attrs.items() if name in ("href", "src", "xlink:href")]
    assert all(link is not None and link.startswith(("#", "data:,")) for link in links)
    assert "\u202e" not in page
    assert "⟨U+202E⟩" in page
    assert "{{7*7}}" in page.replace("&#34;", '"')
    assert "49{%" not in page


def test_policy_names_exactly_what_runs(example: ReportData) -> None:
    page = render(example)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    allowed = policy.group(1).replace("&#39;", "'")
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    assert "http" not in allowed
    bodies = re.findall(r"<script>(.*?)</script>", page, re.S) + re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(bodies) == 3
    for body in bodies:
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in allowed


def test_figures_hold_only_bins(example: ReportData) -> None:
    found = re.search(r'id="specs">(.*?)</script>', render(example), re.S)
    assert found is not None
    specs = json.loads(found.group(1))
    assert set(specs) == {"scores-0", "classes-0", "categories"}
    bars = [trace for trace in specs["scores-0"]["data"] if trace["type"] == "bar"]
    assert [sum(trace["y"]) for trace in bars] == [example.counts.kept, example.counts.removed]


@pytest.mark.parametrize(
    ("values", "cut"),
    [([], None), ([1.0], None), ([1.0], 0.5), ([2.0] * 50, 1.0), ([2.0] * 50, np.inf), ([2.0] * 50, -np.inf),
     ([0.0] * 50, 0.0), ([-1e300, 0, 1e300], 1.0)],
)  # fmt: skip
def test_edges_render(make: Make, values: list[float], cut: float | None) -> None:
    data = make(values, cut, decoys=np.zeros(len(values)) if values else None)
    page = render(data)
    assert page.count("<h1>") == 1
    assert page.rstrip().endswith("</html>")
    labelled = make(values, cut, labels=np.ones(len(values), dtype=np.int64))
    assert "Against the labels" in render(labelled)


def test_what_the_first_screen_says(make: Make, example: ReportData) -> None:
    assert "Nothing was removed" in render(make([0.1, 0.2], 1.0))
    assert "nothing is left to train on" in render(make([2.0, 3.0], 1.0))
    assert "Little: 1 of 10" in render(make([2.0] * 9 + [0.0], 1.0))
    assert "Read the warnings" in render(example)
    failed = make([0.1], 1.0, checks=(Check("Probe validity", "fail", "The model did not refuse its probes."),))
    assert "Do not rely on this yet" in render(failed)
    assert "1 by hand" in render(example)


def test_only_pushes_toward_unsafe_answers_are_called_so(make: Make) -> None:
    pages = [render(make([2.0, 0.1], cut=1.0, selector=selector)) for selector in ("fihs", "loss")]
    for words in ("push toward unsafe answers", "score (FIHS)", "how far one training step"):
        assert [words in page for page in pages] == [True, False]
    assert "the selector loss" in pages[1] and "score (loss)" in pages[1]


def test_shapes_have_charts_of_their_own(make: Make) -> None:
    data = make(np.arange(30.0), shapes=("messages",) * 20 + ("preference",) * 10,
                cuts={"messages": Cut(15.0, "fixed"), "preference": Cut(np.inf, "decoy")})  # fmt: skip
    page = render(data)
    assert "Scores of messages rows" in page
    assert "Scores of preference rows" in page


def test_the_fits_are_drawn_where_the_rule_gives_them(make: Make) -> None:
    detail = {
        "mu": 0.0,
        "sigma": 1.0,
        "log_likelihood_1": -100.0,
        "log_likelihood_2": -50.0,
        "alpha": 10,
        "components": [{"weight": 0.9, "mean": 0.0, "std": 0.5}, {"weight": 0.1, "mean": 3.0, "std": 0.5}],
    }
    page = render(make(np.linspace(-2, 4, 100), cuts={"": Cut(2.0, "adaptive", detail)}))
    assert "component 2" in page
    assert "one Gaussian" in page
    assert "so the mixture decides" in page


def test_many_long_rows_stay_within_eight_megabytes(make: Make) -> None:
    n = 100_000
    values = np.random.default_rng(0).standard_t(2, n)
    removed = np.flatnonzero(values > 2)
    piece = ("\u202e<&\"'" * 4, "response", 0.3)
    rows = tuple(RowView(int(i), "x", float(values[i]), 0.1, "c", "messages", (piece,) * 3000) for i in removed[:300])
    page = render(make(values, 2.0, decoys=-values, removed_rows=rows, kept_rows=rows[:50],
                       quarantined=(QuarantinedView(1, EVIL * 99, EVIL * 99),) * 5000))  # fmt: skip
    assert len(page.encode()) < 8_000_000
    assert "Shown: the 200 with the highest scores." in page
    assert f"{len(removed) - 200:,} more removed rows are in" in page


def test_a_long_row_keeps_its_strongest_tokens() -> None:
    pieces = [("prompt ", "prompt", None)] * 2000 + [(f"w{i} ", "response", 0.01) for i in range(4000)]
    pieces[5500] = ("blorp ", "response", 9.0)
    row = RowView(0, "id", 1.0, 0.5, pieces=tuple(pieces))
    (shown,) = show_rows([row], references([row]), 10_000)
    assert shown.truncated
    assert len(shown.body) < 20_000
    assert "blorp" in shown.body
    assert "w3501" in shown.body
    assert "prompt" in shown.body
    assert "tokens not shown" in shown.body
    assert shown.strongest[0] == ("blorp", 9.0)


def test_write_is_whole_or_nothing(
    example: ReportData, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(make([1.0]), tmp_path / "report.html")
    before = path.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(example, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_misaligned_or_infinite_input_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="removed has 1 entries for 2 scores"):
        make([1.0, 2.0], removed=np.array([True]))
    with pytest.raises(ValueError, match="not finite"):
        make([1.0, np.nan], removed=np.array([True, False]))


def test_kinds_are_shown_as_a_guess_and_the_manifest_is_collapsed(example: ReportData) -> None:
    page = render(example)
    assert "Removed rows by nearest kind (a guess)" in page
    assert "nearest kind (a guess): violence" in page
    folded = page.partition('<section id="manifest">')[2].partition("</section>")[0]
    assert folded.index("<details") < folded.index("<table")
    assert "<details open" not in folded
    assert "token_set" in folded


@pytest.mark.parametrize(
    ("score", "cut", "said"),
    [(5.3, 5.3 - 1.776e-15, "0 over the cut"), (5.3, 5.2, "0.1 over the cut"), (1e-12, 5e-13, "5e−13 over the cut"),
     (2.0, -np.inf, "∞ over the cut")],
)  # fmt: skip
def test_a_row_at_the_cut_is_no_rounding_error_beyond_it(make: Make, score: float, cut: float, said: str) -> None:
    row = RowView(0, "id", score, score - cut, pieces=(("a", "response", 220.0),))
    page = render(make([score, 0.0], 0.5, removed=np.array([True, False]), removed_rows=(row,)))
    assert said in page
    assert "+180</span>" in page
    assert "e+02" not in page.partition('class="ramp"')[2].partition("</p>")[0]
