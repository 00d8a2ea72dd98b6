"""The dashboard in a real Chromium: from an upload over its review to its approval, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradshield import lab
from gradshield.gateway import job as jobs
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.tables import Job
from tests.gateway.running import Served, serving
from tests.report.test_report_browser import CHROMIUM, DRIVER, browser, resize

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason="needs chromium and chromedriver"),
    pytest.mark.slow,
]
__all__ = ["browser"]  # a fixture
EVIL = "chats\u202e<script>window.__pwned=1</script>.jsonl"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("gateway"), training={"max_steps": 2}) as found:
        found.gateway.settings.save()
        yield found


def wait(browser: Any, condition: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda one: one.execute_script(f"return {condition}"))


def press(browser: Any, text: str) -> None:
    """Press the button with this text, and wait for the next page."""
    (button,) = [one for one in browser.find_elements("css selector", "button") if one.text == text]
    browser.execute_script("window.__old = 1; arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    wait(browser, "window.__old === undefined && document.readyState === 'complete'")


def text(browser: Any) -> str:
    return str(browser.find_element("tag name", "main").text)


def calm(browser: Any) -> None:
    """Nothing was refused by the policy, and no script of a row, a name or a reason ran."""
    said = [one["message"] for one in browser.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
    assert [one for one in said if "409" not in one] == []
    assert browser.execute_script("return window.__pwned === undefined")


def test_from_upload_to_approval(browser: Any, served: Served, tmp_path: Path) -> None:
    settings: Settings = served.gateway.settings
    project = served.project(Policy(rows="review"))
    secret = served.key(project, "operator")
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.1, n=60)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    client = served.client(secret)
    file = client.files.create(file=(EVIL, content), purpose="fine-tune")
    id = client.fine_tuning.jobs.create(model=LAB, training_file=file.id, suffix="chats").id

    resize(browser, 1280)
    browser.get(served.url)
    assert browser.current_url.endswith("/login")
    assert browser.switch_to.active_element.get_attribute("id") == "key"  # type and press Enter
    browser.switch_to.active_element.send_keys(secret + "\n")
    wait(browser, "location.pathname === '/'")
    assert "⟨U+202E⟩<script>" in text(browser)

    browser.get(f"{served.url}/jobs/{id}")
    assert "checking the files" in text(browser)
    assert jobs.main([str(settings.folder), id, "worker"]) == 0  # what a worker's process does
    assert served.store.get(Job, project.id, id).status == "paused"
    wait(browser, "document.querySelector('#decision') !== null")  # the page finds out by itself
    removed = client.fine_tuning.jobs.retrieve(id).model_extra["gradshield"]["result"]["scan"]["removed"]
    assert f"{removed} of {len(rows)} rows go." in text(browser)
    wait(browser, "document.querySelectorAll('#plot-scores-0 .bars .point').length > 5")
    bars = browser.execute_script("return document.querySelectorAll('#plot-scores-0 .bars .point').length")

    slide = browser.find_element("id", "slide")
    browser.execute_script("arguments[0].focus()", slide)
    browser.switch_to.active_element.send_keys("\ue010")  # End: above every score
    wait(browser, f"document.getElementById('cut-answer').textContent.includes('{removed} fewer')")
    assert f"0 of {len(rows)} rows go" in text(browser)
    wait(browser, "document.querySelectorAll('#plot-scores-0 .legendtoggle').length === 1")  # all are drawn as kept
    press(browser, "Back to the scan’s own")
    wait(browser, f"document.querySelectorAll('#plot-scores-0 .bars .point').length === {bars}")

    assert browser.find_elements("css selector", ".tokens") == []
    press(browser, "Show the rows")
    assert len(browser.find_elements("css selector", ".pick")) == removed
    browser.find_element("css selector", ".pick .row > summary").click()
    assert browser.find_element("css selector", ".pick .tokens [class^='h']").is_displayed()
    for width in (1280, 420):
        resize(browser, width)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), width
    resize(browser, 1280)
    box = browser.find_element("css selector", ".pick input")
    released = box.get_attribute("value")
    browser.execute_script("arguments[0].focus()", box)
    browser.switch_to.active_element.send_keys(" ")
    press(browser, "Approve")
    assert "A decision needs a reason" in text(browser)
    assert browser.find_element("css selector", ".pick input").is_selected()  # nothing is lost
    browser.find_element("id", "reason").send_keys("One is a joke <b>")
    press(browser, "Approve")

    assert served.sent == [id, id]
    assert served.store.get(Job, project.id, id).decision == {"released": [released], "threshold": None}
    assert jobs.main([str(settings.folder), id, "worker"]) == 0
    wait(browser, "document.querySelector('#certificate') !== null")
    assert "Safety before and after" in text(browser)
    browser.get(f"{served.url}/audit")
    assert "release rows" in text(browser)
    assert "One is a joke <b>" in text(browser)
    calm(browser)
    browser.get(f"{served.url}/jobs/{id}/files/scan/report.html")
    wait(browser, "document.querySelectorAll('#plot-scores-0 .bars .point').length > 5")  # in its sandbox
    calm(browser)
    browser.get(served.url)
    press(browser, "Log out")
    assert browser.current_url.endswith("/login")


def test_every_page_fits_a_phone_and_follows_the_scheme(browser: Any, served: Served) -> None:
    secret = served.key(served.project(), "operator")
    resize(browser, 420)
    browser.get(f"{served.url}/login")
    browser.find_element("id", "key").send_keys(secret + "\n")
    wait(browser, "location.pathname === '/'")
    for path in ("/", "/models", "/health", "/audit"):
        browser.get(served.url + path)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), path
        seen = set()
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            seen.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len(seen) == 2
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    calm(browser)
