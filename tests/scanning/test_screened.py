"""The default scan from end to end on the lab: killed and resumed, cut again, and what is said where it is not certified."""

from __future__ import annotations

import html
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradshield as gs
from gradshield import cache, lab
from gradshield.report.text import one_line
from gradshield.scanning import trust
from gradshield.selectors import Fihs
from gradshield.selectors.screen import Look
from gradshield.training.course import lab_probing
from tests.common import command, jsonl, table, write
from tests.scanning.test_resume import _finished, _stopped

pytestmark = pytest.mark.slow
SIGNALS = ("request", "fihs", "pivots")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.05, n=100, seed=0)
    return write(tmp_path_factory.mktemp("screened") / "data.jsonl", jsonl(rows))


def _arguments(data: Path, output: Path) -> list[Any]:
    probing = ["--probes", data.parent / "probes.jsonl", "--lookalikes", data.parent / "lookalikes.jsonl"]
    for path, prompts in zip(probing[1::2], (lab.requests("direction"), lab.lookalikes("direction")), strict=True):
        write(Path(path), jsonl(prompts))
    return ["scan", data, "--model", lab.checkpoint("aligned"), "--output", output, "--token-budget", "256", *probing]


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    output = data.parent / "whole"
    assert command(*_arguments(data, output)).code == 0
    return output


def _manifest(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "manifest.json").read_text(encoding="utf-8")))


def test_a_scan_that_was_killed_has_every_signal_of_an_undisturbed_one(data: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "disturbed"
    code, said = _stopped(_arguments(data, output), output, 0, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    first = _finished(output)
    assert first
    assert command(*_arguments(data, output)).code == 0
    assert first.items() <= _finished(output).items()
    here, there = table(output), table(whole)
    assert here["id"] == there["id"] and here["removed"] == there["removed"]
    for name in ("score", *SIGNALS):
        assert np.allclose(here[name].to_numpy(), there[name].to_numpy(), equal_nan=True), name


def test_most_rows_have_their_score_before_there_is_a_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that ends while it looks for one keeps the readings."""
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.05, n=250, seed=0)
    given: dict[str, Any] = {"model": lab.checkpoint("aligned"), "probing": lab_probing()}
    told: list[tuple[str, int, int]] = []
    whole = gs.scan(rows, **given, progress=lambda *stage: told.append(stage))
    out = int(whole.removed.sum())
    assert repr(whole) == f"<Selection: {out} of {len(rows)} rows removed, certified>"
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages.index("scoring rows") < stages.index("finding the direction") < stages.index("scoring known rows")
    scored = [(done, total) for stage, done, total in told if stage == "scoring rows"]
    early = int(np.isnan(whole.scores.signals["fihs"]).sum())
    assert scored == sorted(scored) and (early, len(rows)) in scored and scored[-1] == (len(rows), len(rows))
    assert early > len(rows) / 2 and told.index(("scoring rows", early, len(rows))) < told.index(
        ("finding the direction", 0, 1)
    )
    read: list[Any] = []
    measure = Look.measure
    monkeypatch.setattr(Look, "measure", lambda look, *batch: read.append(batch) or measure(look, *batch))
    with monkeypatch.context() as patch:
        patch.setattr(Fihs, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setenv(cache.VARIABLE, "")
        with pytest.raises(KeyboardInterrupt):
            gs.scan(rows, **given, output=tmp_path)
    assert read
    read.clear()
    again = gs.scan(rows, **given, output=tmp_path)
    assert not read and np.array_equal(again.scores.values, whole.scores.values)
    assert [list(t) for t in again.scores.tokens or ()] == [list(t) for t in whole.scores.tokens or ()]


def test_the_same_cut_again_changes_nothing_and_a_looser_one_is_doubted(whole: Path) -> None:
    before = _manifest(whole)["results"]
    assert before["removed"] == 5 and before["doubts"] == {} and before["certified"]
    done = command("cut", whole)
    assert done.code == 0 and done.out.startswith("certified  no check failed\n")
    again = _manifest(whole)["results"]
    assert again["cuts"] == before["cuts"] and again["removed"] == 5 and again["doubts"] == {}
    done = command("cut", whole, "--threshold", "fixed:100")
    assert done.code == 0 and "certified" not in done.out
    assert "5 rows score above the default cut (anchored" in done.doubted
    loose = _manifest(whole)["results"]
    assert set(loose["doubts"]) == {"loose"} and not loose["certified"]
    assert loose["uncertified"] == trust.first(loose["doubts"])
    assert command("cut", whole).code == 0
    assert _manifest(whole)["results"]["doubts"] == {}


def test_what_speaks_against_a_scan_is_on_the_terminal(tmp_path: Path) -> None:
    rows, _ = lab.mix("topic", harm="explicit", ratio=0.5, n=12, seed=0)
    done = command(*_arguments(write(tmp_path / "data.jsonl", jsonl(rows)), tmp_path / "out"))
    assert done.code == 0 and "more than a tenth" in done.doubted


def test_the_lines_of_the_page_are_requests_without_special_tokens(data: Path, whole: Path) -> None:
    asked = {one_line(json.loads(line)["messages"][-2]["content"], 110) for line in data.read_text().splitlines()}
    for _ in range(2):
        lines = re.findall(r'row-preview"><bdi>(.*?)</bdi>', (whole / "report.html").read_text(encoding="utf-8"))
        assert len(lines) == 15 and {html.unescape(line) for line in lines} <= asked
        assert command("cut", whole).code == 0
