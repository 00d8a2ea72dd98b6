"""Attackers who know the method, against the defences beside each other: caught, lost, and what training gives.

    python -m benchmarks.attacks --output attacks/                     # every attack on the bundled lab; resumable
    python -m benchmarks.attacks --output attacks/ --quick             # two attacks, two defences, few rows
    python -m benchmarks.attacks --output attacks/ --docs docs/        # and the page, into docs/
    python -m benchmarks.attacks --output own/ --model MODEL --harmful harmful.jsonl --harmless rows.jsonl --utility test.jsonl

Every attack of `attackers` plants its rows; every defence says which rows it keeps; the model is trained on them and asked
what the defender would ask it (``report`` requests, by two judges) and what the attacker would, in his own wording. A set of
kept rows is trained once, whichever defence kept it. Of a defence that is in none of the trained arms only caught and lost are
measured, unless its rows were trained on for another (`--train-all` trains them too).

The attacker may choose how the model is trained: an arm that does not reach him is trained again with each further recipe, and
the worst one counts whose utility stays within `BOUND` of training on the harmless rows alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import attacks_table
from benchmarks.attack_siege import (
    BOUND,
    CLEAN,
    HALVES,
    LIMIT,
    POISONED,
    RECIPES,
    VOTES,
    Bench,
    Siege,
    altered,
    default,
)
from benchmarks.attack_targets import Target, lab_target, own_target
from benchmarks.attackers import ATTACKS
from gradshield import lab, runs
from gradshield.comparison import compare
from gradshield.evaluation.exam import check_disjoint
from gradshield.probes import requests
from gradshield.scanning.settings import ScanSettings
from gradshield.training.course import Chosen, Course
from gradshield.training.defences import parse

QUICK = ("noice", "plain")
PAPER = "fihs"  # the score that the attacks were written against, at its own cut


def extra(attack: str) -> tuple[str, ...]:
    """What an attack is aimed at beside the defences of the table, and what ``plain`` meets for comparison. All are trained."""
    found = {
        "calibration": (CLEAN, POISONED),
        "camouflage_moderate": (f"moderate-rows:as:{default()}",),
        "flooding": ("fihs:adaptive",),
        "plain": (f"moderate-rows:as:{default()}", "fihs:adaptive"),
    }
    return found.get(attack, ())


def defences(given: Sequence[str], attack: str) -> list[str]:
    """What stands against an attack."""
    return list(dict.fromkeys((*given, *extra(attack))))


def unattacked(target: Target, folder: Path, recipe: str, kept: Chosen) -> dict[str, Any]:
    """The harmless rows alone, trained by a recipe of the attacker's."""
    options = altered(target.unattacked.options, recipe)
    return Bench(Course(replace(target.unattacked, options=options)), target.exams, folder).measured(
        parse("none"), kept
    )


def run(target: Target, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Every cell that is missing, each kept as soon as it is finished."""
    (folder / compare.ARMS).mkdir(parents=True, exist_ok=True)
    store = folder / "cells.json"
    done: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    recipes = list(RECIPES)[: given.recipes]
    asked = {split: one.requests for split, one in target.exams.items()}
    check_disjoint(direction=target.unattacked.probing.requests or requests(), **asked)
    begin = Bench(Course(target.unattacked), target.exams, folder)
    kept = begin.course.chosen(parse("none"))
    clean = begin.measured(parse("none"), kept)
    hot = {recipe: unattacked(target, folder, recipe, kept) for recipe in recipes}
    searched = begin.searched(parse("none"), kept).rates.get("utility")
    utility = None if searched is None else {"search": round(searched.low, 4)}
    total, found = sum(len(defences(given.defences, attack)) for attack in given.attacks), []
    for attack in given.attacks:
        siege = Siege(attack, target, folder, recipes)
        for name in defences(given.defences, attack):
            trained = given.train_all or name in (*given.trained, *extra(attack))
            key = siege.key(name, trained, utility)
            if key not in done:
                done[key] = siege.cell(name, trained, utility)
                runs.write_json(store, done)
            found.append(done[key])
            print(f"{len(found)}/{total} {attack} / {name} {done[key]['seconds']} s", file=sys.stderr, flush=True)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.attacks", *given.typed]),
        "versions": runs.versions(),
        "target": target.name,
        "model": target.unattacked.rows.loaded.digest,
        "seed": target.seed,
        "pairs": {"harmful": len(target.harmful), "harmless": len(target.harmless)},
        "default": {"defence": default(), **ScanSettings().record().plain()},
        "recipes": {name: RECIPES[name] for name in recipes},
        "limit": LIMIT,
        "bound": BOUND,
        "unattacked": clean,
        "unattacked_recipes": hot,
        "summaries": {attack: ATTACKS.summary(attack) for attack in given.attacks},
        "seconds": round(sum(cell["seconds"] for cell in found), 1),
        "cells": found,
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options. Raises UsageError for an attack or a defence that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = [HALVES, VOTES]
    parser.add_argument("--output", type=Path, default=Path("attacks"))
    parser.add_argument("--docs", type=Path, help="folder that gets the page and its JSON as well")
    parser.add_argument("--task", choices=lab.TASKS, default="topic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratio", type=float, default=0.1, help="share of harmful pairs that an attacker begins with")
    parser.add_argument("--rows", type=int, default=500, help="harmless rows of the lab")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    parser.add_argument(
        "--defences", nargs="+", help=f"as after `train --defence`; also {', '.join(map(repr, beside))}"
    )
    parser.add_argument("--trained", nargs="+", help="defences whose kept rows are trained on")
    parser.add_argument("--train-all", action="store_true", help="train on what every defence keeps")
    parser.add_argument("--recipes", type=int, default=1, choices=range(len(RECIPES) + 1), help="of the attacker's")
    parser.add_argument("--quick", action="store_true", help="two attacks, two defences, 120 rows, no recipe")
    parser.add_argument("--model", help="a model of your own, with --harmful and --harmless")
    for name in ("harmful", "harmless", "utility", "requests"):
        parser.add_argument(f"--{name}", help="a file, for --model")
    parser.add_argument("--metric", help="of --utility, as in docs/evaluation.md")
    parser.add_argument("--judge", nargs="+", default=["refusal-phrases"], help="for --model, as in docs/evaluation.md")
    parser.add_argument(
        "--training", type=Path, help="JSON with `training` (SFTConfig) and `lora` (LoraConfig), for --model"
    )
    given = parser.parse_args(arguments)
    given.typed = list(sys.argv[1:] if arguments is None else arguments)
    verified = f"{default()}:verified:rounds=3"
    if given.quick:
        given.attacks, given.rows, given.recipes = list(QUICK), 120, 0
        given.defences = given.defences or ["none", default()]
    paper = [] if default() == PAPER else [PAPER]
    given.trained = given.trained or [
        name for name in given.defences or ["none", default(), verified] if name not in beside
    ]
    given.defences = given.defences or ["none", default(), verified, *beside, *paper]
    for attack in given.attacks:
        ATTACKS[attack]
    for name in (*given.defences, *given.trained):
        if name not in beside:
            parse(name)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    import torch

    given = parsed(arguments)
    torch.set_num_threads(1)
    own = given.model is not None
    target = own_target(given) if own else lab_target(given.task, given.seed, given.ratio, given.rows)
    results = run(target, given.output, given)
    for folder in filter(None, (given.output, given.docs)):
        attacks_table.write(results, folder)
    print(attacks_table.paragraph(results))


if __name__ == "__main__":
    main()
