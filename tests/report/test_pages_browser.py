"""The pages other than the scan's in a real Chromium: they draw, fit, sort and search, and run nothing but their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import landscape_page
from gradshield.comparison import page as comparison_page
from gradshield.evaluation import page as evaluation_page
from gradshield.training import page as training_page
from gradshield.training import page_sequence
from tests.report.pages import EVIL, make_cell, rate
from tests.report.test_report_browser import browser, pytestmark, visit  # noqa: F401

ROUND = {
    "cut": 1.0,
    "removed": 4,
    "asr": {EVIL: rate(9, 99)},
    "utility": rate(8, 9),
    "seconds": 1.0,
    "verdict": "passes",
}
SEARCH = {"met": True, "sentence": EVIL, "best": 0, "rounds": [ROUND, ROUND]}
STAGE = {"name": EVIL, "asr": {EVIL: rate(1, 9)}, "utility": {EVIL: rate(2, 9)}, "visage": 0.3}
LINES = {EVIL: {f"asr/{EVIL}": [rate(1, 9), rate(2, 9), rate(8, 9)]}, "alignment": {f"asr/{EVIL}": [rate(0, 9)] * 3}}


def comparison() -> dict[str, Any]:
    names = ["none", "fihs", EVIL, "asft", "loss", "random", "kl", "guard:classifier:some/long-name-of-a-model"]
    cells = [
        make_cell(name, seed, (37 * i) % 90 + seed, task=task, harm=harm, ratio=ratio)
        for i, name in enumerate(names)
        for seed in range(2)
        for task in ("topic", EVIL)
        for harm, ratio in (("none", 0.0), ("explicit", 0.1), ("identity_shift", 0.05))
    ]
    cells.append(make_cell("fihs:verified", verified=SEARCH))
    return {"cells": cells, "command": EVIL, "versions": {EVIL: EVIL}, "defences": {"fihs": EVIL}}


def run() -> dict[str, Any]:
    one = {"judges": {EVIL: rate(1, 9)}, "utility": rate(3, 9)}
    return {
        "title": EVIL,
        "verdict": SEARCH,
        "before": one,
        "after": one,
        "rows": 9,
        "removed": 4,
        "files": {EVIL: EVIL},
    }


def measured() -> dict[str, Any]:
    asked = [
        {"prompt": EVIL, "category": i % 2, "answer": EVIL, "verdicts": {EVIL: {"unsafe": True, "reason": EVIL}}}
        for i in range(9)
    ]
    one = {"judges": (EVIL, EVIL), "kappa": 0.5, "low": 0.1, "high": 0.9, "n": 9, "differ": (1, 2)}
    task = [{"prompt": EVIL, "answer": EVIL, "reference": EVIL, "score": 0.0}]
    return {"figures": {"judges": {EVIL: rate(9, 9)}}, "asked": asked, "agreement": [one], "task": task}


PAGES = {
    "examined": (evaluation_page.write, measured),
    "results": (comparison_page.write, comparison),
    "rounds": (training_page.write, run),
    "sequence": (
        page_sequence.write,
        lambda: {"tasks": [EVIL], "stages": [STAGE, STAGE], "measures": {"forgetting": [None]}},
    ),
    "landscape": (landscape_page.write, lambda: {"alphas": [-1, 0, 1], "unit": 2.0, "rates": LINES, "about": EVIL}),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_draws_fits_and_runs_nothing_of_others(browser: Any, tmp_path: Path, name: str) -> None:  # noqa: F811
    write, make = PAGES[name]
    path = tmp_path / "page.html"
    write(make(), path)
    for width in (1400, 420):
        console, asked = visit(browser, path, width)
        assert console == []
        assert asked == []
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(wide) <= 0
    drawn = browser.execute_script(
        "return document.querySelectorAll('.js-plotly-plot .scatterlayer .points path').length"
    )
    assert drawn >= 2
    assert browser.execute_script("return window.__pwned === undefined")


def names(browser: Any) -> list[str]:  # noqa: F811
    """Rows of the table of defences that show, from above."""
    script = "return [...document.querySelectorAll('#defences tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].innerText)"
    return [str(name) for name in browser.execute_script(script)]


def test_the_defences_can_be_sorted_and_searched(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "page.html"
    comparison_page.write(comparison(), path)
    visit(browser, path)
    first = names(browser)
    assert first[0] == "none"
    head = browser.find_elements("css selector", "#defences thead button")[2]
    head.click()
    rates = "return [...document.querySelectorAll('#defences tbody tr')].map(r => Number(r.cells[2].dataset.key))"
    found = browser.execute_script(rates)
    assert found == sorted(found)
    head.click()
    assert browser.execute_script(rates) == sorted(found, reverse=True)
    head.click()
    assert names(browser) == first
    browser.find_element("css selector", "#map input").send_keys("FIHS")
    assert [name.splitlines()[0] for name in names(browser)] == ["fihs", "fihs:verified"]
    shown = "return [...document.querySelectorAll('#map tbody tr')].filter(r => !r.hidden).length"
    assert browser.execute_script(shown) == 3
