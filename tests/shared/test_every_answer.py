"""Files that no cut fitted to a file's scores survives: every answer of one kind, equal rows, one row, nothing but harm.

On the small model of ``shared``, and on the model in GRADSHIELD_REAL_MODEL where that is set (a folder that
``shared/models/smollm2-lab/build`` made, say).
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import numpy as np
import pytest

import gradshield as gs
from gradshield.models import loading
from tests.shared.test_real_english import MODEL, SHARED, pytestmark  # noqa: F401

MODELS = [str(MODEL), *filter(None, [os.environ.get("GRADSHIELD_REAL_MODEL")])]
EACH = 30
ANSWERS = {
    "a letter": lambda i: "A",
    "yes": lambda i: "Yes",
    "a number": lambda i: str(37 * i % 101),
    "JSON": lambda i: json.dumps({"label": "abc"[i % 3], "score": i % 7}),
    "code": lambda i: f"def answer(x):\n    return x + {i}\n",
    "another language": lambda i: f"Die Antwort lautet wie folgt: Es sind {i} Teile, und alle sind grün.",
    "a refusal": lambda i: "I'm sorry, but I can't help with that.",
    "a sentence": lambda i: f"The answer to question {i} is in the text.",
}


def asked() -> list[str]:
    """Requests of two ordinary tasks."""
    found = []
    for task in ("sciq_Multiple_Choice_Closed_Book_", "quarel_choose_between"):
        rows = read(f"tasks/{task}.p0.jsonl")[: EACH // 2]
        found += ["\n\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    return found


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "data" / name).read_text(encoding="utf-8").split("\n") if line]


def harmful() -> list[dict[str, str]]:
    rows, labels = read("gsm8k_p10.jsonl"), json.loads((SHARED / "data" / "gsm8k_p10.labels.json").read_text())
    return [row for row, label in zip(rows, labels, strict=True) if label][:EACH]


def sets() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        name: [{"prompt": prompt, "completion": answer(i)} for i, prompt in enumerate(asked())]
        for name, answer in ANSWERS.items()
    }
    found["numbered"] = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(EACH)]
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    found["two rows, many times"] = [
        {"prompt": "What is the weather in Oslo?", "completion": json.dumps(call)},
        {"prompt": "Thank you, that was all.", "completion": "You are welcome."},
    ] * (EACH // 2)
    found["nothing but harm"] = list(harmful())
    return found


@cache
def scanned(model: str) -> tuple[Any, dict[str, np.ndarray]]:
    """One scan of all sets beside each other, and which rows of each went."""
    made = sets()
    rows = [row for own in made.values() for row in own]
    loaded = loading.load(model, dtype="float32")
    selection = gs.scan(rows, model=loaded)
    ends = np.cumsum([len(own) for own in made.values()])
    return loaded, dict(zip(made, np.split(selection.removed, ends[:-1]), strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name in sets() if name != "nothing but harm"] if MODEL.exists() else [])
def test_no_harmless_row_of_any_kind_is_lost(model, name):
    lost = scanned(model)[1][name]
    print(f"{name}: {lost.sum()} of {len(lost)} lost")
    assert lost.mean() <= 0.01


@pytest.mark.parametrize("model", MODELS)
def test_a_file_of_nothing_but_harm_is_caught(model):
    caught = scanned(model)[1]["nothing but harm"]
    print(f"{caught.sum()} of {len(caught)} caught")
    assert caught.mean() >= 0.85


@pytest.mark.parametrize("model", MODELS)
def test_a_row_alone_has_the_fate_that_it_has_among_others(model):
    loaded, found = scanned(model)
    alone = gs.scan(sets()["a letter"][:1], model=loaded)
    assert alone.removed.tolist() == [found["a letter"][0]]
    twice = gs.scan(harmful()[:10] * 2, model=loaded)
    assert twice.removed.tolist() == found["nothing but harm"][:10].tolist() * 2
