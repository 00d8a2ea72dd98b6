"""The scoring benchmark: its quick form gives what its JSON promises, and what cannot run is left out by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.scoring import peers, plot, rounds, stages, table
from benchmarks.scoring.arms import FLOOR, Arm, Scored, floor, subspaces
from benchmarks.scoring.cases import Spec, open_case, prepare_directions
from gradshield.errors import UsageError
from gradshield.gradients import ENGINES, SUBSPACES

ROOT = Path(__file__).parents[2]
# ‖f − o‖/‖o‖ on the lab's model: rounding, and the curvature of a finite step. What is not named is exact.
BOUNDS = {"finite-difference": 2e-2}
KEYS = {"name", "ratio_to_floor", "low", "high", "agreement", "peak_mb"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The quick form on a handful of rows, as it is typed."""
    folder = tmp_path_factory.mktemp("bench")
    command = ["-m", "benchmarks.scoring", "--quick", "--rounds=1", "--rows=8", "--threads=1", "--device=cpu"]
    files = ["--json", str(folder / "found.json"), "--plot", str(folder / "found.svg")]
    done = subprocess.run(
        [sys.executable, *command, *files],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return {**found, "printed": done.stdout, "picture": (folder / "found.svg").read_text(encoding="utf-8")}


@pytest.mark.slow
def test_every_engine_and_subspace_is_there(report: dict) -> None:
    rows = {row["name"]: row for row in report["rows"]}
    assert {f"{engine}/{subspace}" for engine in ENGINES for subspace in subspaces()} <= set(rows)
    assert {"floor", "perturbation/lora/K=2", "perturbation/lora/K=4"} <= set(rows)
    assert len(subspaces()) == len(SUBSPACES)
    assert all(set(row) >= KEYS for row in report["rows"])
    assert all(0 < row["low"] <= row["ratio_to_floor"] <= row["high"] for row in report["rows"])


@pytest.mark.slow
def test_whole_scans_are_split_by_stage(report: dict) -> None:
    before, first, cached = report["scans"]
    assert [line["arm"] for line in report["scans"]] == ["before", "first", "cached"]
    for line in report["scans"]:
        assert set(line["stages"]) == set(stages.STAGES) and line["rows"] == before["rows"]
        assert sum(line["stages"].values()) == pytest.approx(line["whole"])  # of one round
        assert all(line["stages"][s] > 0 for s in ("loading the model", "reading rows", "scoring rows", "writing"))
        assert line["first_row_seconds"] > 0  # by the clock, the stages in processor time
    assert cached["stages"]["finding the direction"] < first["stages"]["finding the direction"]
    assert cached["stages"]["asking the probes"] < first["stages"]["asking the probes"]
    assert "whole scan" in report["printed"]


@pytest.mark.slow
def test_every_arm_agrees_with_the_oracle(report: dict) -> None:
    for row in report["rows"]:
        if row["group"] == "floor":
            assert row["agreement"] is None
            continue
        bound = BOUNDS.get(row["name"].partition("/")[0], 1e-4)
        assert row["relative_error"] <= bound, row
        assert row["agreement"] >= 0.99, row


@pytest.mark.slow
def test_what_it_was_made_on_is_told(report: dict) -> None:
    assert report["machine"]["threads"] == 1 and report["machine"]["device"] == "cpu" and report["machine"]["processor"]
    assert report["versions"]["torch"] and report["seed"] == 0 and "--quick" in report["command"]
    assert report["command"] in report["printed"].replace("\n", " ")
    if sys.platform == "linux":
        assert all(row["peak_mb"] is not None for row in report["rows"])
    ElementTree.fromstring(report["picture"])
    (case,) = report["cases"]
    measured = {row["name"] for row in report["rows"]}
    for peer in peers.peers():  # measured, or left out with the way to get it
        assert (peer.name in measured) != (peer.name in case["left_out"])
        assert peer.name in measured or "pip install" in case["left_out"][peer.name]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return Spec("lab", 6, None, 0, 1, "cpu", str(tmp_path))


def test_half_precision_leaves_out_what_cannot_run(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on the CPU: finite differences say why they cannot, every other engine runs in bfloat16."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    case = open_case(replace(spec, dtype="bfloat16", rows=3))
    prepare_directions(case, ["all", "targets"])
    some = [arm for arm in rounds.every(case) if arm.name.endswith(("/all", "/targets"))]
    monkeypatch.setattr(rounds, "every", lambda case: some)
    monkeypatch.setattr(rounds, "truths", list)
    found = rounds.try_out(case, lambda what, steps: None)
    ran = {arm.name for arm in found.arms}
    assert {f"{engine}/{s}" for engine in ENGINES if engine != "finite-difference" for s in ("all", "targets")} <= ran
    left = {name: why for name, why in found.left_out.items() if name.startswith("finite-difference/")}
    assert set(left) == {"finite-difference/all", "finite-difference/targets"}
    assert all("float32" in why for why in left.values())
    absent = {name for name, why in found.left_out.items() if "not installed" in why}
    assert absent == {arm.name for arm in peers.peers() if not arm.name.startswith("vmap")}
    assert case.step("all") is None


def test_a_peer_of_plain_torch_gives_the_oracle_s_values(spec: Spec) -> None:
    case = open_case(spec)
    prepare_directions(case, ["all"])
    every = {arm.name: arm for arm in rounds.every(case)}
    found = {}
    for name in ("loop/all", "vmap/all"):
        with every[name].ready(case, case.rendered) as run:
            found[name] = run().values
    assert np.allclose(found["vmap/all"], found["loop/all"], rtol=1e-4, atol=1e-4)


def test_ratios_are_taken_to_the_floor_just_before(spec: Spec) -> None:
    """A slow moment slows the floor too; processor time has a ratio of its own."""
    case = open_case(replace(spec, few=2))
    slow, fast = Arm("slow", "peer", floor, slow=True), Arm("fast", "ours", floor)
    names = (FLOOR, "slow", "fast")

    def times(*clock: float) -> list[rounds.Time]:
        return [rounds.Time(seconds, 2 * seconds**2) for seconds in clock]

    found = rounds.Measured(
        [Arm(FLOOR, "floor", floor), slow, fast],
        {name: Scored(None) for name in names},
        {},
        {FLOOR: times(1, 3, 1), "slow": times(2, 6, 3), "fast": times(2, 6, 3)},
        {FLOOR: times(1, 3, 1), "slow": times(0.5, 1.5, 0.5), "fast": times(1, 3, 1)},
    )
    lines = {line["name"]: line for line in rounds.figures(case, found)}
    assert (lines["slow"]["ratio_to_floor"], lines["slow"]["low"], lines["slow"]["high"]) == (4.0, 4.0, 6.0)
    assert (lines["fast"]["ratio_to_floor"], lines["fast"]["low"], lines["fast"]["high"]) == (2.0, 2.0, 3.0)
    assert (lines["fast"]["processor_ratio"], lines[FLOOR]["processor_ratio"]) == (4.0, 1.0)
    assert (lines["slow"]["rows"], lines["fast"]["rows"]) == (2, len(case.rendered))


@pytest.mark.slow
def test_each_arm_is_timed_beside_the_floor_of_its_own_rows(spec: Spec) -> None:
    case, told = open_case(replace(spec, few=2)), []
    arms = [Arm(FLOOR, "floor", floor), Arm("slow", "peer", floor, slow=True)]
    found = rounds.Measured(arms, {}, {})
    rounds.time_rounds(case, found, 3, lambda name, _: told.append(name))
    assert told == [FLOOR, "slow", "slow", FLOOR, FLOOR, "slow"]
    for name in (FLOOR, "slow"):
        assert [len(kept[name]) for kept in (found.times, found.floors)] == [3, 3]
        assert all(time.clock > 0 for time in found.times[name] + found.floors[name])


def test_a_document_gets_its_section_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = table.BEGIN.format("scans"), table.END.format("scans")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    table.rewrite(page, "new", "scans")
    assert page.read_text(encoding="utf-8") == f"before\n{begin}\n\nnew\n{end}\nafter\n"
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no place for the figures"):
        table.rewrite(page, "new")


def test_a_peer_that_wins_is_seen_to() -> None:
    ours = {"group": "ours", "name": "a/all", "ratio_to_floor": 2.0, "peak_mb": 10.0}
    peer = {"group": "peer", "name": "b/all", "ratio_to_floor": 1.0, "peak_mb": None}
    other = {"group": "peer", "name": "c/all", "ratio_to_floor": 6.0, "peak_mb": 20.0}
    dear = {**ours, "name": "d/all", "ratio_to_floor": 9.0}
    elsewhere = {**ours, "name": "e/lora", "ratio_to_floor": 0.1}
    assert table.beside([ours, dear, elsewhere, peer, other]) == (
        "`b/all` takes 0.5 times the time of `a/all`; `c/all` takes 3.0 times the time and 2.0 times the memory of `a/all`"
    )
    assert table.beside([ours]) == ""


def test_the_picture_is_an_image_of_every_arm() -> None:
    line = {"model": "a<b", "group": "ours", "name": "x&y/all", "ratio_to_floor": 2.0, "low": 1.9, "high": 2.2}
    text = plot.svg([line, {**line, "name": "z", "group": "peer"}, {**line, "name": "floor", "group": "floor"}])
    ElementTree.fromstring(text)
    assert "x&amp;y/all" in text and "a&lt;b" in text and ">floor<" not in text
    ElementTree.fromstring(plot.svg([]))


def test_a_model_of_one_s_own_needs_rows(spec: Spec) -> None:
    with pytest.raises(UsageError, match="--data"):
        open_case(replace(spec, model="some/folder"))
