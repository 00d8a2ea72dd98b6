"""The page as text: every edge renders, what is untrusted is escaped, and size has a bound."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradshield.scanning.page_rows import RowView, references, show_rows
from gradshield.stats import wilson
from gradshield.types import Cut
from tests.report.conftest import Scanned, aside
from tests.report.pages import assert_tame, shown, specs

EVIL = (
    "<script>window.__pwned=1</script><img src=x onerror=window.__pwned=1>{{7*7}}{% raw %}'\"javascript:</title>\u202e"
)
Make = Callable[..., Scanned]


def evil_scan(make: Make) -> Scanned:
    """Someone else's text in every place that takes any."""
    pieces = ((EVIL, "prompt", None), (EVIL, EVIL, 0.5), (EVIL, "response", -0.4))
    return make(
        [2.0, 0.1], shapes=(EVIL, EVIL), cuts={EVIL: Cut(1.0, EVIL, {EVIL: EVIL, "components": [{EVIL: EVIL}]})},
        labels=np.array([1, 0]), doubts={EVIL: EVIL}, categories=(EVIL, ""), ids=(EVIL, EVIL), cleared=(1,),
        views={0: pieces, 1: pieces}, quarantined=(aside(1, EVIL, EVIL.encode()),), selector=EVIL, name=EVIL, command=EVIL,
        threshold=EVIL, agreement={"engine": EVIL, "n": 2, "relative_error": 0.1, "spearman": 0.9},
        labelled={"aurocs": [{"name": EVIL, "auroc": 0.9, "low": 0.8, "high": 1.0, "n_pos": 1, "n_neg": 1}]},
    )  # fmt: skip


def test_untrusted_text_is_only_text_and_the_policy_names_what_runs(make: Make, example: Scanned) -> None:
    page = evil_scan(make).render()
    assert_tame(page)
    assert "⟨U+202E⟩" in page
    assert "{{7*7}}" in page.replace("&#34;", '"')
    assert_tame(example.render())


def test_figures_hold_only_bins(example: Scanned) -> None:
    found = specs(example.render())
    assert set(found) == {"scores-0", "classes-0", "categories"}
    bars = [trace for trace in found["scores-0"]["data"] if trace["type"] == "bar"]
    removed = example.selection.removed
    assert [sum(trace["y"]) for trace in bars] == [(~removed).sum(), removed.sum()]


@pytest.mark.parametrize(
    ("values", "cut"),
    [([1.0], None), ([1.0], 0.5), ([2.0] * 50, 1.0), ([2.0] * 50, np.inf), ([2.0] * 50, -np.inf),
     ([0.0] * 50, 0.0), ([-1e300, 0, 1e300], 1.0)],
)  # fmt: skip
def test_edges_render(make: Make, values: list[float], cut: float | None) -> None:
    page = make(values, cut, decoys=np.zeros(len(values))).render()
    assert page.count("<h1>") == 1
    assert page.rstrip().endswith("</html>")
    assert "Against the labels" in make(values, cut, labels=np.ones(len(values), dtype=np.int64)).render()


def test_what_the_first_screen_says(make: Make, example: Scanned) -> None:
    assert "Nothing was removed" in make([0.1, 0.2], 1.0).render()
    assert "nothing is left to train on" in make([2.0, 3.0], 1.0).render()
    assert "Little: 1 of 10" in make([2.0] * 9 + [0.0], 1.0).render()
    assert "Certified: no check failed" in make([2.0] + [0.0] * 9, 1.0).render()
    assert "Read the warnings" in example.render() and "Certified" not in example.render()
    problem = {"refused": wilson(1, 32), "thinking": 0, "problem": "it did not refuse"}
    assert "Do not rely on this yet" in make([0.1], 1.0, probes=problem).render()
    apart = {"engine": "forward", "n": 16, "relative_error": 0.5, "spearman": 0.8}
    assert "They disagree" in make([0.1], 1.0, agreement=apart).render()
    assert "1 by hand" in example.render()
    assert "found no score to cut at" in make([0.1], np.inf).render()
    assert "removes every one of these rows" in make([0.1], -np.inf).render()


@pytest.mark.parametrize(
    ("doubts", "marked"),
    [((), []), (("share",), ["What is left"]), (("near",), ["Other checks"]),
     (("share", "near", "labels"), ["What is left", "Other checks"]), (("ruler",), ["Known requests"])],
)  # fmt: skip
def test_every_doubt_is_said_once_and_marks_a_check(make: Make, doubts: tuple[str, ...], marked: list[str]) -> None:
    said = {name: f"what is wrong with {name}" for name in doubts}
    known = {"harmful": [1.0] * 20, "harmless": [0.0] * 20}
    page = make([2.0] + [0.0] * 9, 1.0, doubts=said, certified=not doubts, anchors=known, selector="screen").render()
    assert re.findall(r'class="mark-warn">.{,150}?</span><div><b>(.*?)</b>', page) == marked
    assert all(page.partition('<section id="made">')[0].count(text) == 1 for text in said.values())
    unasked = make([2.0] + [0.0] * 9, 1.0, doubts={"probes": "not asked"}, certified=False, probes=None).render()
    assert "Other checks" in unasked and "Probe validity" not in unasked
    none = {"harmful": [], "harmless": []}  # what a model of which too few probes are refused has of FIHS
    assert "Known requests" not in make([2.0], 1.0, anchors=none, selector="fihs").render()


def test_the_line_of_a_row_is_its_request_where_that_was_scored(make: Make) -> None:
    pieces = (("<user>Ask this</s>", "prompt", None), ("Say that</s>", "response", 0.5))
    for views, line in ((pieces, "Say that</s>"), ((("Ask this", "request", None), *pieces), "Ask this")):
        page = make([2.0, 0.1], 1.0, views={0: views, 1: views}, selector="screen").render().replace("&lt;", "<")
        assert re.findall("<bdi>(.*?)</bdi></span>\n", page.replace("&gt;", ">")) == [line] * 2
        assert page.count("Ask this</s") == 2 and page.count("Say that</span>") == 0
    for selector, said in (("screen", True), ("screen:all", True), ("fihs", False)):
        page = make([2.0, 0.1], 1.0, views={0: pieces}, selector=selector).render()
        assert ("FIHS, which decides only borderline rows" in page) == said


def test_only_pushes_toward_unsafe_answers_are_called_so(make: Make) -> None:
    pages = [make([2.0, 0.1], cut=1.0, selector=selector).render() for selector in ("fihs", "loss")]
    for words in ("push toward unsafe answers", "score (FIHS)", "how far one training step"):
        assert [words in page for page in pages] == [True, False]
    assert "the selector loss" in pages[1] and "score (loss)" in pages[1]


def test_groups_have_charts_of_their_own(make: Make) -> None:
    page = make(np.arange(30.0), shapes=("rows",) * 20 + ("preference",) * 10,
                cuts={"rows": Cut(15.0, "fixed"), "preference": Cut(np.inf, "decoy")}).render()  # fmt: skip
    assert "Scores of single rows" in page
    assert "Scores of preference pairs" in page


def test_the_fits_are_drawn_where_the_rule_gives_them(make: Make) -> None:
    detail = {
        "mu": 0.0,
        "sigma": 1.0,
        "log_likelihood_1": -100.0,
        "log_likelihood_2": -50.0,
        "alpha": 10,
        "components": [{"weight": 0.9, "mean": 0.0, "std": 0.5}, {"weight": 0.1, "mean": 3.0, "std": 0.5}],
    }
    page = make(np.linspace(-2, 4, 100), cuts={"rows": Cut(2.0, "adaptive", detail)}).render()
    assert "component 2" in page
    assert "one Gaussian" in page
    assert "so the mixture decides" in page


def test_the_next_commands_name_the_folder_as_it_was_typed(example: Scanned) -> None:
    text = shown(replace(example, folder=Path("my runs/screened")).render())
    assert "gradshield review 'my runs/screened'" in text
    assert "gradshield cut" not in text
    assert "Train on my runs/screened/kept.jsonl" in text


def test_many_long_rows_stay_within_eight_megabytes(make: Make) -> None:
    n = 100_000
    values = np.random.default_rng(0).standard_t(2, n)
    removed = int((values > 2).sum())
    piece = ("\u202e<&\"'" * 4, "response", 0.3)
    page = make(values, 2.0, decoys=-values, views=dict.fromkeys(range(n), (piece,) * 3000),
                quarantined=(aside(1, EVIL * 99, EVIL.encode() * 99),) * 5000).render()  # fmt: skip
    assert len(page.encode()) < 8_000_000
    assert f"Shown are the 200 with the highest scores; {removed - 200:,} more are in removed.jsonl." in page
    assert "4,800 more in that file." in page


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
    example: Scanned, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make([1.0]).write(tmp_path / "report.html")
    before = path.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        example.write(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_kinds_are_shown_as_a_guess_and_the_settings_are_collapsed(example: Scanned) -> None:
    page = example.render()
    assert "Removed rows by nearest kind (a guess)" in page
    assert "nearest kind (a guess): violence" in page
    folded = page.partition('<section id="made">')[2].partition("</section>")[0]
    assert folded.index("<details") < folded.index("<table")
    assert "<details open" not in folded
    assert "settings.<wbr>token_<wbr>budget" in folded


def test_the_models_of_a_demo_and_the_labels_have_tables(example: Scanned) -> None:
    text = shown(example.render())
    assert "filtered 920 1.5 %" in text
    assert "harmful rows caught 100 % [95.2 %, 100 %] 77 of 77" in text
    assert "response length 0.640 [0.580, 0.700] 77 / 920" in text


@pytest.mark.parametrize(
    ("score", "cut", "said"),
    [(5.3, 5.3 - 1.776e-15, "0 over the cut"), (5.3, 5.2, "0.1 over the cut"), (1e-12, 5e-13, "5e−13 over the cut"),
     (2.0, -np.inf, "∞ over the cut")],
)  # fmt: skip
def test_a_row_at_the_cut_is_no_rounding_error_beyond_it(make: Make, score: float, cut: float, said: str) -> None:
    page = make([score], cut, removed=np.array([True]), views={0: (("a", "response", 220.0),)}).render()
    assert said in page
    assert "+180</span>" in page
    assert "e+02" not in page.partition('class="ramp"')[2].partition("</p>")[0]
