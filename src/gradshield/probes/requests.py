"""The probe prompts: the package's own, and a user's file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gradshield.data.raw_files import open_file
from gradshield.errors import DataError, UsageError
from gradshield.files import read_text

SPLITS = ("direction", "search", "report")
Prompt = dict[str, str]


@cache
def _shipped(name: str) -> tuple[Prompt, ...]:
    text = files("gradshield.probes").joinpath("prompts", name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def requests(split: str = "direction") -> list[Prompt]:
    """Built-in requests that a model should refuse: ``{prompt, category, split}``. ``split`` is one of SPLITS.

    ``direction`` builds ∇S, ``search`` decides a verified cut, ``report`` measures attack success only.
    """
    return _of_split("requests.jsonl", split)


def lookalikes(split: str = "direction") -> list[Prompt]:
    """Built-in harmless requests, each resembling the harmful request at the same index."""
    return _of_split("lookalikes.jsonl", split)


def blunt() -> tuple[list[Prompt], list[Prompt]]:
    """Built-in harmful requests that order an answer outright ("Write a guide to ..."), and their harmless look-alikes.

    They only teach the reading of `selectors.reading` that the form of a request is no sign of harm.
    """
    rows = _shipped("blunt.jsonl")
    return [dict(row) for row in rows], [{**row, "prompt": row["lookalike"]} for row in rows]


def ordinary() -> list[Prompt]:
    """Built-in everyday requests (questions, tasks, small talk): plainly harmless prompts."""
    return _of_split("ordinary.jsonl", "direction")


def _of_split(name: str, split: str) -> list[Prompt]:
    if split not in SPLITS:
        raise UsageError(f"unknown prompt split {split!r}: choose one of {', '.join(SPLITS)}")
    return [dict(p) for p in _shipped(name) if p["split"] == split]


def read_prompts(path: str | Path, split: str = "direction", unnamed: bool = True) -> list[Prompt]:
    """A user's prompts: a file of rows with ``prompt`` and optionally ``category`` and ``split``, or ``.txt`` with one per line.

    Rows of another split are skipped. Rows without one belong to every split, or with ``unnamed`` False to no split; the
    result may then be empty. Raises DataError.
    """
    file = Path(path)
    found: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_rows(file), 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f"row {number} of the prompts file {file.name!r} has no text under 'prompt': give each row as "
                '{"prompt": "...", "category": "..."}'
            )
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise DataError(
                f"row {number} of the prompts file {file.name!r} has a lone surrogate, which is not a character: fix the row"
            )
        if (first := seen.setdefault(alike(prompt), number)) != number:
            raise DataError(
                f"row {number} of the prompts file {file.name!r} repeats row {first}, which would count twice: give each "
                "prompt once"
            )
        if (row.get("split") or (split if unnamed else None)) == split:
            found.append({"prompt": prompt, "category": str(row.get("category") or "requests"), "split": split})
    if not found and unnamed:
        raise DataError(
            f"the prompts file {file.name!r} has no prompt of split {split!r}: give at least one, ideally 32"
        )
    return found


def alike(prompt: str) -> str:
    """A prompt's key for comparison: Unicode-normalised, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".txt":
        lines = read_text(file, "the prompts file", "give one request per line").split("\n")
        yield from ({"prompt": line} for line in lines if line.strip())
        return
    for record in open_file(file)[1]:
        if record.reason:
            raise DataError(
                f"line {record.line} of the prompts file {file.name!r} cannot be used, {record.reason}: fix it"
            )
        yield record.value
