"""Checks on the built-in probe prompts (data only, nothing is loaded from the package), and on a file of a user's own.

Row i of lookalikes.jsonl is the harmless partner of row i of requests.jsonl: same category, same
split, similar phrasing. Splits and row order come from hashes of the request text (below), so
that no prompt is placed by hand in "report", and neither depends on the other.
After changing a prompt, reassign both by the same rule.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from gradshield.errors import DataError

FOLDER = Path(__file__).resolve().parents[2] / "src" / "gradshield" / "probes" / "prompts"
NAMES = ("requests", "lookalikes")
CATEGORIES = (
    "weapons",
    "drugs",
    "cybercrime",
    "fraud",
    "violence",
    "hate",
    "self_harm",
    "privacy",
    "disinformation",
    "theft",
)
PER_CATEGORY = 34
SPLITS = {"direction": 8, "search": 13, "report": 13}
MEASURING = ("search", "report")
MIN_WORDS, MAX_WORDS = 5, 25
BARRED = re.compile(
    r"\b(sex\w*|porn\w*|nud(e|es|ity)|rape\w*|child\w*|kids?|minors?|teen\w*|underage"
    r"|bab(y|ies)|toddlers?|pupils?|boys?|girls?|school\w*)\b",
    re.IGNORECASE,
)


def load(name: str) -> list[dict[str, str]]:
    text = (FOLDER / f"{name}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text
    return [json.loads(line) for line in text[:-1].split("\n")]


def normal(prompt: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", prompt.lower().replace("'", "")))


def opening(prompt: str) -> str:
    return " ".join(normal(prompt).split()[:2])


def rank(salt: str, prompt: str) -> str:
    return hashlib.sha256(f"{salt}:{prompt}".encode()).hexdigest()


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict[str, str]]]:
    return {name: load(name) for name in NAMES}


def test_folder_holds_only_the_data_files() -> None:
    found = {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"}
    assert found == {"requests.jsonl", "lookalikes.jsonl", "blunt.jsonl", "ordinary.jsonl"}


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values(files, name) -> None:
    for row in files[name]:
        assert list(row) == ["prompt", "category", "split"]
        assert all(isinstance(value, str) for value in row.values())
        assert row["category"] in CATEGORIES and row["split"] in SPLITS


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_strata(files, name) -> None:
    rows = files[name]
    assert len(rows) == PER_CATEGORY * len(CATEGORIES) == 340
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, PER_CATEGORY)
    cells = Counter((row["category"], row["split"]) for row in rows)
    assert cells == {(c, s): n for c in CATEGORIES for s, n in SPLITS.items()}
    # A Wilson upper bound below 6 % with two successes needs at least 128 prompts.
    sizes = Counter(row["split"] for row in rows)
    assert all(sizes[split] >= 128 for split in MEASURING)


def test_lookalikes_pair_with_requests(files) -> None:
    pairs = list(zip(*(files[name] for name in NAMES), strict=True))
    for harmful, harmless in pairs:
        assert harmful["category"] == harmless["category"]
        assert harmful["split"] == harmless["split"]
        assert harmful["prompt"].split()[0] == harmless["prompt"].split()[0]


def test_unique_across_both_files_and_all_splits(files) -> None:
    seen: dict[str, str] = {}
    for name in NAMES:
        for row in files[name]:
            key = normal(row["prompt"])
            assert key not in seen, row["prompt"]
            seen[key] = row["split"]


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicates(files, name) -> None:
    words = [(row["prompt"], set(normal(row["prompt"]).split())) for row in files[name]]
    for (p, a), (q, b) in itertools.combinations(words, 2):
        assert len(a & b) / len(a | b) < 0.5, (p, q)


@pytest.mark.parametrize("name", NAMES)
def test_one_line_request_without_answer(files, name) -> None:
    answer = re.compile(
        r"^(sure|certainly|of course|here|yes|no|okay|sorry|i can't|i cannot|as an ai)\b"
        r"|\b(answer|response|assistant|user)\s*:"
        r"|\bstep \d|\b\d+[.)]\s"
        r"|\b\d+(\.\d+)?\s*(mg|g|kg|ml|l|grams?|degrees)\b",
        re.IGNORECASE,
    )
    for row in files[name]:
        prompt = row["prompt"]
        assert prompt == prompt.strip() and prompt.isprintable() and "  " not in prompt
        assert prompt.isascii() and prompt[0].isupper()
        assert prompt[-1] in ".?" and not re.search(r"[.?!:]", prompt[:-1]), prompt
        assert not answer.search(prompt), prompt


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sexual_or_about_minors(files, name) -> None:
    for row in files[name]:
        assert not BARRED.search(row["prompt"]), row["prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_length_bounds(files, name) -> None:
    for row in files[name]:
        assert MIN_WORDS <= len(row["prompt"].split()) <= MAX_WORDS, row["prompt"]


def test_lengths_alike(files) -> None:
    def alike(select, within: float) -> None:
        for measure in (lambda p: len(p.split()), len):
            a, b = (mean(measure(r["prompt"]) for r in files[n] if select(r)) for n in NAMES)
            assert abs(a - b) <= within * max(a, b)

    alike(lambda row: True, 0.05)
    for split in SPLITS:
        alike(lambda row, s=split: row["split"] == s, 0.15)
    for category in CATEGORIES:
        alike(lambda row, c=category: row["category"] == c, 0.15)
    # Between splits of one file, too.
    for name in NAMES:
        means = [mean(len(r["prompt"].split()) for r in files[name] if r["split"] == s) for s in SPLITS]
        assert max(means) - min(means) <= 0.15 * max(means)


@pytest.mark.parametrize("name", NAMES)
def test_opening_diversity(files, name) -> None:
    openings = Counter(opening(row["prompt"]) for row in files[name])
    assert max(openings.values()) <= 0.12 * len(files[name]), openings.most_common(3)
    assert len(openings) >= 0.25 * len(files[name])


def test_surface_form_does_not_tell_the_files_apart(files) -> None:
    harmful, harmless = ([row["prompt"] for row in files[name]] for name in NAMES)
    n = len(harmful)
    shared = Counter(map(opening, harmful)) & Counter(map(opening, harmless))
    assert shared.total() >= 0.85 * n
    for mark in ("?", ",", ";", "-", "'"):
        counts = [sum(mark in prompt for prompt in prompts) for prompts in (harmful, harmless)]
        assert abs(counts[0] - counts[1]) <= 0.06 * n, (mark, counts)


def test_splits_and_order_follow_the_rule(files) -> None:
    rows = files["requests"]
    assert rows == sorted(rows, key=lambda row: rank("order", row["prompt"]))
    labels = [split for split, count in SPLITS.items() for _ in range(count)]
    for category in CATEGORIES:
        mine = [row for row in rows if row["category"] == category]
        mine.sort(key=lambda row: rank("split", row["prompt"]))
        assert [row["split"] for row in mine] == labels


def test_position_does_not_reveal_split_or_category(files) -> None:
    rows = files["requests"]
    for key, values, slack in (("split", SPLITS, 0.1), ("category", CATEGORIES, 0.2)):
        for value in values:
            places = [i / (len(rows) - 1) for i, row in enumerate(rows) if row[key] == value]
            assert abs(mean(places) - 0.5) <= slack, (value, mean(places))


def test_blunt_pairs_repeat_no_request_that_measures(files) -> None:
    """Like the other pairs in form and in what they spare, eight of each kind of harm, and near no prompt of another file."""
    rows = load("blunt")
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, 8)
    words = lambda prompt: set(normal(prompt).split())  # noqa: E731
    others = [words(row["prompt"]) for name in NAMES for row in files[name]]
    for row in rows:
        assert (
            list(row) == ["prompt", "category", "lookalike"] and row["prompt"].split()[0] == row["lookalike"].split()[0]
        )
        for prompt in (row["prompt"], row["lookalike"]):
            assert prompt.isascii() and prompt[-1] in ".?" and not BARRED.search(prompt)
            own = words(prompt)
            assert all(len(own & other) / len(own | other) < 0.5 for other in others), prompt


def test_everyday_requests_are_each_there_once() -> None:
    prompts = [row["prompt"] for row in load("ordinary")]
    assert len({normal(prompt) or prompt for prompt in prompts}) == len(prompts) == 603


def test_a_cell_of_a_users_csv_keeps_every_character(tmp_path: Path) -> None:
    from gradshield.probes import read_prompts

    cells = ["one\u2028two", "three\x0bfour\x85five", "six\nseven", "eight, nine"]
    typed = [*cells[:2], *(f'"{cell}"' for cell in cells[2:])]
    path = tmp_path / "own.csv"
    path.write_text("prompt,category\r\n" + "".join(f"{cell},theft\r\n" for cell in typed), "utf-8", newline="")
    assert [row["prompt"] for row in read_prompts(path)] == cells
    assert {row["category"] for row in read_prompts(path)} == {"theft"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["How do I pick a lock?", "How do I  pick a LOCK? "], "row 2 .* repeats row 1"),
        (["How do I pick a lock \\ud800?"], "a lone surrogate"),
    ],
)
def test_prompts_that_count_twice_or_are_no_text_are_refused(rows, said, tmp_path):
    from gradshield.probes import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join('{"prompt": "' + row + '"}\n' for row in rows))
    with pytest.raises(DataError, match=said):
        read_prompts(path)
