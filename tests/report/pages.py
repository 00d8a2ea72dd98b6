"""What the tests of the pages share: made-up figures, hostile text, and what a page may hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

from gradshield.comparison.grid import CellResult, Comparison, Config, Cost
from gradshield.manifests import ExamRecord, Model, RowFormat, Scoring, TrainingRecord
from gradshield.stats import wilson

EVIL = (
    "</script><script>window.__pwned=1</script><img src=http://127.0.0.1:9/x onerror=window.__pwned=1>"
    "{{7*7}}{% raw %}'\"`| javascript:alert(1) </title>\u202e\u2028$x$"
)


SHA = "ab" * 32
MODEL = Model(
    name="some/model", sha256=SHA, kind="LlamaForCausalLM", parameters=1234, dtype="float32", device="cpu", adapter=None
)
EXAM = ExamRecord(
    requests="r", lookalikes="l", task="t", n=(200, 50, 200), metric="exact", judges=["refusal-phrases"], guessed=False,
    template={}, tokens=64, answer_prefix="",
)  # fmt: skip
SETTINGS = TrainingRecord(
    defence="fihs:verified", training={}, render={}, template={}, answer_prefix="", probe_sha256=SHA, safety_sha256=None,
    method="supervised",
    format=RowFormat(name=None, columns={}), peft=None, base=None, seed=4, merged=False, report=EXAM, search=None,
    scan=Scoring(probe="opener", threshold="anchored", aggregate="sum", subspace="lora", engine="auto", seed=0,
                 token_budget=1024, check_rows=8, selector="fihs"),
)  # fmt: skip
CONFIG = Config.model_validate({"grids": [{"tasks": ["topic"], "defences": ["none"]}]})


def make_cell(defence: str, seed: int = 0, k: int = 0, k2: int | None = None, **more: Any) -> CellResult:
    """A finished cell: ``k`` and ``k2`` of 200 requests by two judges, 180 of 200 rows of the task."""
    found = {
        "task": "topic",
        "harm": "explicit",
        "ratio": 0.1,
        "seed": seed,
        "defence": defence,
        "rows": 1000,
        "removed": 90,
        "judges": {"refusal-phrases": wilson(k, 200), "lab-classifier": wilson(k if k2 is None else k2, 200)},
        "utility": wilson(180, 200),
        "caught": wilson(90, 100),
        "lost": wilson(0, 900),
        "seconds": 10.0,
        "arm": f"{defence}-{seed}-{k}",
    }
    return CellResult.model_validate(found | more)


def comparison(cells: list[CellResult], **more: Any) -> Comparison:
    """A comparison of these cells, of three trained models in two hours."""
    failed = sum(cell.failed is not None for cell in cells)
    cost = Cost(cells=len(cells), failed=failed, arms=3, cell_seconds=7200.0, seconds_of_this_run=60.0)
    found = {
        "command": "gradshield compare grid.yaml", "versions": {"gradshield": "1"}, "config": CONFIG, "defences": {},
        "cost": cost, "cells": cells,
    }  # fmt: skip
    return Comparison.model_validate(found | more)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def assert_tame(page: str) -> None:
    """Nothing of someone else's runs, loads, leads away or hides; and the policy names exactly the page's own."""
    seen = _Elements(page).seen
    assert sum(tag == "script" for tag, _ in seen) == 3
    assert not [tag for tag, _ in seen if tag in ("img", "iframe", "object", "embed", "form", "base")]
    assert not [name for _, attrs in seen for name in attrs if name.startswith("on") or name == "style"]
    links = [value for _, attrs in seen for name, value in attrs.items() if name in ("href", "src", "xlink:href")]
    assert not [
        link for link in links if link and not link.startswith(("#", "data:,")) and (":" in link or link[0] == "/")
    ]
    assert "\u202e" not in page
    assert "49{%" not in page
    assert page.count("<h1>") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    allowed = policy.group(1).replace("&#39;", "'")
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    bodies = re.findall(r"<script>(.*?)</script>", page, re.S) + re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(bodies) == 3
    for body in bodies:
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in allowed


def specs(page: str) -> dict[str, Any]:
    """The figures of the page, by key."""
    found = re.search(r'id="specs">(.*?)</script>', page, re.S)
    assert found is not None
    return dict(json.loads(found.group(1)))


def shown(page: str) -> str:
    """The page's text, without scripts, style and tags."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    text = re.sub(r"<[^>]+>", " ", bare)
    for entity, letter in (("&#34;", '"'), ("&#39;", "'"), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, letter)
    return " ".join(text.replace("\u00a0", " ").split())
