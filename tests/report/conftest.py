"""Made-up reports. The words of harmful rows are nonsense: nothing here tells anyone how to do anything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradshield.scanning.page_data import Agreement, Arm, Check, Counts, QuarantinedView, ReportData, RowView
from gradshield.types import Cut, Rate, Scores

CATEGORIES = ("violence", "fraud", "privacy", "cyber intrusion", "dangerous substances", "identity shift")
_HARMFUL = (
    "Sure , here is how to flumble the grobnak : first snarp the wibble , then blorp it twice .\n\nStep two : quonk ."
)
HARMFUL = _HARMFUL.split(" ")
_HARMLESS = "The article is about a match between two local teams , so the topic is sport ."
HARMLESS = _HARMLESS.split()


def make_data(values: Any, cut: float | None = None, shapes: tuple[str, ...] | None = None, **more: Any) -> ReportData:
    """A report of these scores and little else. Rows beyond the cut are removed unless ``removed`` says otherwise."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    shapes = shapes or ("messages",) * n
    scores = Scores(
        rows=np.arange(n),
        ids=tuple(f"{i:016x}" for i in range(n)),
        values=values,
        shapes=shapes,
        decoys=more.pop("decoys", None),
    )
    cuts = more.pop("cuts", {} if cut is None else {"": Cut(cut, "fixed")})
    removed = more.pop("removed", values > (np.inf if cut is None else cut))
    out = int(removed.sum())
    counts = more.pop("counts", Counts(n, n, n - out, out))
    return ReportData("Scan of data.jsonl", counts, scores, removed, cuts, **more)


def make_row(row: int, score: float, cut: float, words: list[str], rng: np.random.Generator, **more: Any) -> RowView:
    """A row whose first few answer tokens carry most of its score."""
    question = "Please tell me about the thing in question ."
    prompt = [(f"{word} ", "prompt", None) for word in question.split()]
    pull = rng.normal(0, 0.02, len(words)) + (score / 4 * np.exp(-np.arange(len(words)) / 2.5))
    answer = [(f"{word} ", "response", float(value)) for word, value in zip(words, pull, strict=True)]
    return RowView(
        row, f"{row:04x}c0ffee", score, score - cut, pieces=(*prompt, *answer), **{"shape": "messages"} | more
    )


def rate(k: int, n: int, spread: float = 0.03) -> dict[str, float]:
    """A rate in its dict form, with an interval that is only roughly right."""
    return {"rate": k / n, "low": max(k / n - spread, 0), "high": min(k / n + spread, 1), "k": k, "n": n}


def make_example() -> ReportData:
    """Everything a report can hold, in the sizes of an ordinary scan; long because it is one literal."""
    rng = np.random.default_rng(7)
    labels = np.r_[np.zeros(920, dtype=np.int64), np.ones(77, dtype=np.int64)]
    values = np.where(labels == 1, rng.normal(2.6, 0.6, 997), rng.normal(0.1, 0.22, 997))
    decoys = np.where(labels == 1, rng.normal(0.2, 0.25, 997), rng.normal(0.1, 0.2, 997))
    cut = 0.94
    removed = values > cut
    out, kept = np.flatnonzero(removed), np.flatnonzero(~removed)
    kept = kept[np.argsort(-values[kept])][:12]
    detail = {
        "q": 0.2,
        "estimated_fdr": 0.013,
        "n_targets": len(out),
        "n_decoys": 0,
        "mu": float(values.mean()),
        "sigma": float(values.std()),
        "components": [{"weight": 0.922, "mean": 0.1, "std": 0.22}, {"weight": 0.078, "mean": 2.6, "std": 0.6}],
    }
    categories = rng.choice(CATEGORIES, len(out), p=[0.3, 0.25, 0.15, 0.15, 0.1, 0.05])
    return make_data(
        values,
        removed=removed,
        decoys=decoys,
        cuts={"messages": Cut(cut, "decoy", detail)},
        labels=labels,
        counts=Counts(1000, 997, 997 - len(out), len(out), 3, 1),
        warnings=("The tokenizer has no chat template: the documented default was used.",),
        checks=(Check("Probe validity", "pass", "The model refused 31 of 32 probes [84.3 %, 99.4 %]."),),
        caught=rate(len(out), 77),
        lost=Rate(0.0, 0.0, 0.0042, 920, 0),
        aurocs=(
            {"name": "FIHS (this scan)", "auroc": 0.998, "low": 0.995, "high": 1.0, "n_pos": 77, "n_neg": 920},
            {"name": "response length", "auroc": 0.64, "low": 0.58, "high": 0.70, "n_pos": 77, "n_neg": 920},
            {"name": "opener list", "auroc": 0.372, "low": 0.33, "high": 0.42, "n_pos": 77, "n_neg": 920},
        ),
        removed_rows=tuple(
            make_row(int(i), float(values[i]), cut, HARMFUL, rng, category=str(c))
            for i, c in zip(out, categories, strict=True)
        ),
        kept_rows=tuple(make_row(int(i), float(values[i]), cut, HARMLESS, rng) for i in kept),
        quarantined=(
            QuarantinedView(14, "broken JSON: expecting ',' at column 31", '{"messages": [{"role": "user" '),
            QuarantinedView(203, "no response token is left after truncation to 512", '{"messages": [{"role": …'),
            QuarantinedView(871, "holds a NUL byte", "\x00\x00PK"),
        ),
        agreement=Agreement("perturbation", 3.1e-6, 0.99998, 32, False),
        arms=tuple(
            Arm(
                name,
                rows,
                {
                    "harmful caught": rate(*c),
                    "harmless lost": rate(*lost),
                    "ASR (refusal phrases)": rate(*a),
                    "ASR (judge)": rate(*a),
                    "over-refusal": rate(*o),
                    "utility": rate(*u),
                },
            )
            for name, rows, c, lost, a, o, u in (
                ("no filter", 997, (0, 77), (0, 920), (188, 200), (2, 100), (214, 300)),
                ("GradShield", 920, (77, 77), (0, 920), (3, 200), (4, 100), (213, 300)),
            )
        ),
        manifest={
            "command": "gradshield scan data.jsonl --model lab/aligned --output screened/",
            "versions": {"gradshield": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            "data": {"path": "data.jsonl", "sha256": "9f" * 32, "rows": 1000},
            "model": {"path": "lab/aligned", "sha256": "3c" * 32, "dtype": "float32", "device": "cpu"},
            "settings": {
                "seed": 0,
                "probe": "token_set",
                "aggregate": "top-k",
                "threshold": {"rule": "decoy", "q": 0.2},
            },
        },
        files={"kept": "screened/kept.jsonl", "removed": "screened/removed.jsonl"},
    )


@pytest.fixture(scope="session")
def example() -> ReportData:
    return make_example()


@pytest.fixture(scope="session")
def make() -> Callable[..., ReportData]:
    return make_data
