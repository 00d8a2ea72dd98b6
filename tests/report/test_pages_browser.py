"""The pages other than the scan's in a real Chromium: they draw, fit, sort and search, and run nothing but their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import landscape_page
from gradshield.comparison import page as comparison_page
from gradshield.comparison.grid import Comparison
from gradshield.evaluation.landscape import Landscape
from gradshield.manifests import Figures, JudgeAgreement
from gradshield.report import sheet
from gradshield.stats import wilson
from tests.report import test_examined_page, test_sequence_page, test_training_page
from tests.report.pages import EVIL, comparison, make_cell
from tests.report.test_report_browser import browser, pytestmark, visit  # noqa: F401


def grid() -> Comparison:
    names = ["none", "fihs", EVIL, "asft", "loss", "random", "kl", "guard:classifier:some/long-name-of-a-model"]
    cells = [
        make_cell(name, seed, (37 * i) % 90 + seed, task=task, harm=harm, ratio=ratio)
        for i, name in enumerate(names)
        for seed in range(2)
        for task in ("topic", EVIL)
        for harm, ratio in (("none", 0.0), ("explicit", 0.1), ("identity_shift", 0.05))
    ]
    cells.append(make_cell("fihs:verified", verified=test_training_page.verdict(sentence=EVIL)))
    return comparison(cells, command=EVIL, versions={EVIL: EVIL}, defences={"fihs": EVIL})


def run() -> sheet.Sheet:
    one = Figures(judges={EVIL: wilson(1, 9)}, utility=wilson(3, 9))
    return test_training_page.run(before=one, after=one, verified=test_training_page.verdict(sentence=EVIL))


def measured() -> sheet.Sheet:
    asked = [
        {"prompt": EVIL, "category": i % 2, "answer": EVIL, "verdicts": {EVIL: {"unsafe": True, "reason": EVIL}}}
        for i in range(9)
    ]
    one = JudgeAgreement(judges=(EVIL, EVIL), kappa=0.5, low=0.1, high=0.9, n=9, differ=(1, 2))
    task = [{"prompt": EVIL, "answer": EVIL, "reference": EVIL, "score": 0.0}]
    return test_examined_page.page(Figures(judges={EVIL: wilson(9, 9)}), asked, task=task, agreement=[one])


def landscape() -> sheet.Sheet:
    rates = {
        EVIL: {f"asr/{EVIL}": tuple(wilson(k, 9) for k in (1, 2, 8))},
        "alignment": {f"asr/{EVIL}": (wilson(0, 9),) * 3},
    }
    return landscape_page.page(Landscape((-1.0, 0.0, 1.0), 2.0, rates), EVIL, EVIL, {EVIL: EVIL})


PAGES = {
    "examined": measured,
    "results": lambda: comparison_page.page(grid()),
    "rounds": run,
    "sequence": test_sequence_page.run,
    "landscape": landscape,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_draws_fits_and_runs_nothing_of_others(browser: Any, tmp_path: Path, name: str) -> None:  # noqa: F811
    path = sheet.write(PAGES[name](), tmp_path / "page.html")
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
    sheet.write(comparison_page.page(grid()), path)
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
