"""The page in a real Chromium: it draws its charts, asks for nothing, and runs nothing but its own."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradshield.types import Cut
from tests.report.conftest import Scanned, aside

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
EVIL = (
    "</script><script>window.__pwned=1;alert(1)</script><img src=http://127.0.0.1:9/x onerror=window.__pwned=1>"
    "<svg onload=window.__pwned=1><a href='javascript:window.__pwned=1'>x</a><b>{{7*7}}</b>\u202e\u2028"
)

FILES = ("kept.jsonl", "removed.jsonl", "quarantine.jsonl", "scores.parquet", "manifest.json")

pytestmark = pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def resize(browser: Any, width: int) -> None:
    """The width that the page sees: a window of Chromium is never narrower than 500 pixels."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def visit(browser: Any, path: Path, width: int = 1400) -> tuple[list[str], list[str]]:
    """Open the page and wait for its charts. Console lines, and every address asked for except the page's own."""
    resize(browser, width)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    until = time.monotonic() + 10
    wanted = browser.execute_script("return document.querySelectorAll('[data-plot]').length")
    while time.monotonic() < until:
        if browser.execute_script("return document.querySelectorAll('[data-plot].js-plotly-plot').length") == wanted:
            break
        time.sleep(0.1)
    console = [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # On a busy machine the browser's own first page is still loading.
    asked = [
        one["request"]["url"] for one in sent if not one["documentURL"].startswith(("chrome://", "chrome-untrusted://"))
    ]
    return console, [url for url in asked if url != path.as_uri() and not url.startswith("data:")]


def test_the_charts_draw_and_nothing_is_fetched(browser: Any, example: Scanned, tmp_path: Path) -> None:
    console, asked = visit(browser, example.write(tmp_path / "report.html"))
    assert console == []
    assert asked == []
    bars = browser.execute_script("return document.querySelectorAll('#plot-scores-0 .bars .point path').length")
    curves = browser.execute_script("return document.querySelectorAll('#plot-scores-0 .scatterlayer .js-line').length")
    assert bars > 10
    assert curves == 4
    assert browser.execute_script("return document.querySelectorAll('#plot-categories .bars .point').length") == 6
    before = browser.execute_script("return document.querySelector('#plot-scores-0 .ytick text').textContent")
    button = browser.find_element("css selector", "[data-log='scores-0']")
    assert button.get_attribute("aria-pressed") == "true"  # removed bars are low next to the kept ones
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert browser.execute_script("return document.querySelector('#plot-scores-0 .ytick text').textContent") != before
    assert browser.get_log("browser") == []


def test_a_row_that_holds_a_script_is_only_text(browser: Any, make: Callable[..., Scanned], tmp_path: Path) -> None:
    pieces = ((EVIL, "prompt", None), (EVIL, "response", 0.5))
    scan = make(
        [2.0, 3.0, 0.1], shapes=(EVIL, EVIL, "b"), cuts={EVIL: Cut(1.0, EVIL, {EVIL: EVIL}), "b": Cut(1.0, "fixed")},
        doubts={EVIL: EVIL}, labels=np.array([1, 1, 0]), categories=(EVIL, '<a href="http://127.0.0.1:9/">go</a>', ""),
        ids=(EVIL, "b", "c"), views={0: pieces}, quarantined=(aside(1, EVIL, EVIL.encode()),), name=EVIL, selector=EVIL,
    )  # fmt: skip
    console, asked = visit(browser, scan.write(tmp_path / "report.html"))
    assert console == []
    assert asked == []
    script = "document.querySelectorAll('details').forEach(d => d.open = true); return window.__pwned === undefined"
    assert browser.execute_script(script)
    links = browser.execute_script(
        "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href'))"
    )
    assert links
    assert all(link.startswith("#") or link in FILES for link in links)
    labels = browser.execute_script("return document.querySelector('#plot-categories').textContent")
    assert '<a href="http' in labels
    assert browser.execute_script("return window.__pwned === undefined")
    assert browser.get_log("browser") == []


def test_a_long_score_is_not_printed_over(browser: Any, make: Callable[..., Scanned], tmp_path: Path) -> None:
    pieces = (("word " * 60, "response", 0.5),)
    views = dict.fromkeys(range(3), pieces)
    scan = make([-0.06273, -1234567.8, 2.0], 0.5, views=views, cuts={"rows": Cut(0.4999, "fixed")})
    visit(browser, scan.write(tmp_path / "report.html"))
    over = (
        "return [...document.querySelectorAll('.row > summary')].filter(line => { const box = document.createRange();"
        "box.selectNodeContents(line.children[1]); const score = box.getBoundingClientRect(),"
        "text = line.children[2].getBoundingClientRect(); return score.right > text.left && score.bottom > text.top; }).length"
    )
    for width in (1400, 1200, 700, 420):
        resize(browser, width)
        assert browser.execute_script(over) == 0, width


def test_it_fits_any_width_in_dark_and_light(browser: Any, example: Scanned, tmp_path: Path) -> None:
    visit(browser, example.write(tmp_path / "report.html"))
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in (1400, 420):
        resize(browser, width)
        for part in ("html", "nav"):
            wide = f"const part = document.querySelector('{part}'); return part.scrollWidth - part.clientWidth"
            assert browser.execute_script(wide) <= 0, (width, part)
    colours = (
        "return [getComputedStyle(document.body).backgroundColor,"
        "getComputedStyle(document.querySelector('#plot-scores-0 .bars .point path')).fill]"
    )
    seen = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        time.sleep(0.5)
        seen.append(browser.execute_script(colours))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("values", [[1.0], [-1e300, 0.0, 1e300]])
def test_odd_scores_draw(browser: Any, make: Callable[..., Scanned], tmp_path: Path, values: list[float]) -> None:
    console, _ = visit(browser, make(values, 0.5, decoys=np.zeros(len(values))).write(tmp_path / "report.html"))
    assert console == []
    assert browser.execute_script("return document.querySelectorAll('#plot-scores-0 .bars .point path').length") > 0
