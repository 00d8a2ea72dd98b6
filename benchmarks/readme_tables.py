"""The tables of README.md and docs/results.md, from the figures in ``docs/``.

    python -m benchmarks.readme_tables            # print them
    python -m benchmarks.readme_tables --write    # replace those in the documents

A test compares the documents with what this prints.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from gradshield.comparison.grid import CellResult, Comparison
from gradshield.comparison.outcome import Totals, bounds, mix_name, totals
from gradshield.stats import wilson
from gradshield.types import Rate

ROOT = Path(__file__).parents[1]
DEFENCES = (
    "none",
    "fihs",
    "fihs:adaptive",
    "fihs:verified:rounds=8",
    "fihs+asft",
    "asft",
    "moderate",
    "dualselect",
    "larf",
    "random:as:fihs",
)
REAL = ("none", "clean", "screen", "asft", "screen:verified:rounds=2")
SCREENED = ("screen", "screen+kl")
ARMS = {"no defence": "none", "filtered": "filtered", "clean rows only": "clean"}


def real() -> str:
    """The main defences on the real model."""
    return smollm2.table(*smollm2.read(ROOT / "docs" / "results_smollm2.json"), shown=REAL)


def _cells(name: str) -> list[CellResult]:
    return Comparison.model_validate_json((ROOT / "docs" / name).read_bytes()).cells


def scans() -> str:
    """What the scan caught and lost and what training gave, for each share of explicit harm over tasks and seeds."""
    cells = json.loads((ROOT / "docs" / "lab_results.json").read_text(encoding="utf-8"))["cells"]
    shares = sorted({cell["ratio"] for cell in cells if cell["harm"] in ("none", "explicit")})
    head = ["harm mixed in", "caught", "lost", *(f"ASR, {name}" for name in ARMS)]
    lines = []
    for share in shares:
        own = [cell for cell in cells if cell["ratio"] == share and cell["harm"] in ("none", "explicit")]
        labels = [cell["scan"].get("labels", {}) for cell in own]
        caught, lost = ([_rate(found.get(key)) for found in labels] for key in ("caught", "lost"))
        asr = (_worst(_rate(cell["arms"].get(arm, {}).get("asr")) for cell in own) for arm in ARMS.values())
        name = "none" if not share else "all of it" if share == 1 else f"{100 * share:g} %"
        lines.append([name, _worst(caught, least=True), _worst(lost), *asr])
    return _table(head, lines)


def _rate(value: Mapping[str, Any] | None) -> Rate | None:
    return Rate(**value) if value else None


def defences() -> str:
    """Each main defence over the cells that all of them have: how many are safe by every judge, the worst, and what it costs."""
    cells = _cells("results.json")
    ran: dict[tuple[Any, ...], set[str]] = {}
    for cell in cells:
        ran.setdefault(_place(cell), set()).add(cell.defence)
    common = [c for c in cells if ran[_place(c)].issuperset(DEFENCES)]
    found = {one.defence: one for one in totals(common)}
    head = ["defence", "cells at 6 % or below", "worst cell, ASR", "utility minus clean rows only, points, mean"]
    head.append("harmless rows removed")
    lines = [
        [
            f"`{name}`",
            "{} of {}".format(*found[name].held),
            _highest(found[name]),
            bounds(found[name].minus_clean, True),
            _removed([c for c in common if c.defence == name]),
        ]
        for name in DEFENCES
    ]
    return _table(head, lines)


def default() -> str:
    """The default scan on the lab, alone and with the KL penalty, for each kind of harm over four tasks."""
    cells = _cells("results_screen.json")
    head = ["mix", "caught", "lost"]
    for name in SCREENED:
        head += [f"`{name}`: ASR by phrases", "by the lab's classifier", "utility"]
    lines = []
    for harm in dict.fromkeys(cell.harm for cell in cells):
        by = {name: [c for c in cells if (c.harm, c.defence) == (harm, name)] for name in SCREENED}
        own = by[SCREENED[0]]
        line = [mix_name(harm, own[0].ratio), _worst((c.caught for c in own), least=True)]
        line.append(_worst(c.lost for c in own))
        for found in by.values():
            line += [_worst(c.judges[judge] for c in found) for judge in ("refusal-phrases", "lab-classifier")]
            line.append(_worst((c.utility for c in found), least=True))
        lines.append(line)
    return _table(head, lines)


def _removed(cells: Sequence[CellResult]) -> str:
    """The share of the harmless rows of all cells that went; a dash where the defence takes no row out."""
    if not any(cell.removed for cell in cells):
        return "–"
    lost = [cell.lost for cell in cells if cell.lost is not None]
    share = wilson(sum(rate.k for rate in lost), sum(rate.n for rate in lost))
    return f"{_percent(share.rate)} % [{_percent(share.low)}, {_percent(share.high)}] n={share.n}"


def _place(cell: CellResult) -> tuple[Any, ...]:
    return cell.task, cell.harm, cell.ratio, cell.seed


def _worst(rates: Iterable[Rate | None], least: bool = False) -> str:
    """``98.2–100 % [90.6, 99.7] n=56``: lowest and highest run, and the interval and n of the worse of the two."""
    found = sorted((rate for rate in rates if rate), key=lambda rate: (rate.rate, rate.low))
    if not found:
        return "–"
    worst = found[0] if least else found[-1]
    ends = dict.fromkeys(_percent(rate.rate) for rate in (found[0], found[-1]))
    return f"{'–'.join(ends)} % [{_percent(worst.low)}, {_percent(worst.high)}] n={worst.n}"


def _highest(one: Totals) -> str:
    """The ASR of a defence's worst cell, by the judge that finds most."""
    worst = max(one.worst.values(), key=lambda rate: rate.rate)
    return f"{_percent(worst.rate)} % [{_percent(worst.low)}, {_percent(worst.high)}] n={worst.n}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}".replace("100.0", "100")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"|{'|'.join(row)}|\n" if row[0] == "---" else f"| {' | '.join(row)} |\n" for row in rows)


def placed(document: str, text: str) -> str:
    """The text of a document with each of its tables in place of the one with the same first head."""
    for make in DOCUMENTS[document]:
        table = make()
        head = re.escape(table.partition(" | ")[0])
        found = list(re.finditer(rf"^{head} \|.*\n(?:\|.*\n)+", text, re.MULTILINE))
        if len(found) != 1:
            raise SystemExit(
                f"{document} has {len(found)} tables that begin with {head!r}, not one: restore the table's head"
            )
        text = text[: found[0].start()] + table + text[found[0].end() :]
    return text


DOCUMENTS = {"README.md": (real,), "docs/results.md": (default, scans, defences)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="change the documents instead of printing the tables")
    write = parser.parse_args().write
    for document, tables in DOCUMENTS.items():
        if write:
            path = ROOT / document
            path.write_text(placed(document, path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print(document, *(make() for make in tables), sep="\n\n")


if __name__ == "__main__":
    main()
