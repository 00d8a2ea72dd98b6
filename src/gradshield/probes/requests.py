"""The probe prompts: those that come with the package, and a user's own file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from gradshield.errors import DataError, UsageError

SPLITS = ("direction", "search", "report")
Prompt = dict[str, str]


@cache
def _shipped(name: str) -> tuple[Prompt, ...]:
    text = files("gradshield.probes").joinpath("prompts", name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def requests(split: str = "direction") -> list[Prompt]:
    """Built-in requests that a model should refuse: ``{prompt, category, split}``. ``split`` is one of SPLITS.

    ``direction`` builds ∇S, ``search`` decides a verified cut, ``report`` measures attack success and nothing else.
    """
    return _of_split("requests.jsonl", split)


def lookalikes(split: str = "direction") -> list[Prompt]:
    """Built-in harmless requests that look like the harmful ones, row by row."""
    return _of_split("lookalikes.jsonl", split)


def ordinary() -> list[Prompt]:
    """Built-in everyday requests (questions, tasks, small talk) that nobody would refuse: what harmless prompts look like."""
    return _of_split("ordinary.jsonl", "direction")


def _of_split(name: str, split: str) -> list[Prompt]:
    if split not in SPLITS:
        raise UsageError(f"unknown prompt split {split!r}: choose one of {', '.join(SPLITS)}")
    return [dict(p) for p in _shipped(name) if p["split"] == split]


def read_prompts(path: str | Path, split: str = "direction", unnamed: bool = True) -> list[Prompt]:
    """A user's prompts: JSON lines or CSV with ``prompt`` and optionally ``category`` and ``split``, or one per line of text.

    Rows of another split are left out; rows without one belong to every split, or with ``unnamed`` False to none, and then
    there may be none at all. Raises DataError in one sentence.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the prompts file {str(path)!r} could not be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}): "
            "give a .jsonl, .csv or .txt file of one-line requests"
        ) from error
    found: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_rows(file, text), 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f"row {number} of the prompts file {file.name!r} has no text under 'prompt': give each row as "
                '{"prompt": "...", "category": "..."}'
            )
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise DataError(
                f"row {number} of the prompts file {file.name!r} holds half a character (a lone surrogate): write it anew"
            )
        if (first := seen.setdefault(alike(prompt), number)) != number:
            raise DataError(
                f"row {number} of the prompts file {file.name!r} asks what row {first} asks: give each prompt once, or it "
                "counts twice"
            )
        if (row.get("split") or (split if unnamed else None)) == split:
            found.append({"prompt": prompt, "category": str(row.get("category") or "requests"), "split": split})
    if not found and unnamed:
        raise DataError(
            f"the prompts file {file.name!r} has no prompt of split {split!r}: give at least one, better 32"
        )
    return found


def alike(prompt: str) -> str:
    """What two prompts share that ask the same: letters of one width and case, white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _rows(file: Path, text: str) -> Sequence[dict[str, str]]:
    if file.suffix == ".csv":
        return list(
            csv.DictReader(io.StringIO(text, newline=""))
        )  # a cell may hold other ends of lines, such as U+2028
    if file.suffix == ".txt":
        return [{"prompt": line} for line in text.split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # by newline alone: a prompt may hold others, such as U+2028
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of the prompts file {file.name!r} is not JSON ({error.msg}): give one object a line"
            ) from error
    return rows


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the prompts and their categories, in order."""
    text = json.dumps([[p["prompt"], p.get("category", "")] for p in prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
