"""Made-up reports. The words of harmful rows are nonsense: nothing here tells anyone how to do anything."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradshield.manifests import Data, ScanManifest, ScanRecord, ScanResults
from gradshield.report import sheet
from gradshield.scanning import page
from gradshield.scanning.decide import Selection
from gradshield.scanning.outputs import counted
from gradshield.scanning.page_rows import Piece, Views
from gradshield.stats import wilson
from gradshield.types import Cut, Quarantined, Scores
from tests.report.pages import MODEL, SETTINGS

CATEGORIES = ("violence", "fraud", "privacy", "cyber intrusion", "dangerous substances", "identity shift")
_HARMFUL = (
    "Sure , here is how to flumble the grobnak : first snarp the wibble , then blorp it twice .\n\nStep two : quonk ."
)
HARMFUL = _HARMFUL.split(" ")
_HARMLESS = "The article is about a match between two local teams , so the topic is sport ."
HARMLESS = _HARMLESS.split()


@dataclass(frozen=True, eq=False)
class Scanned:
    """What the page of a scan is made of."""

    selection: Selection
    views: Views
    labels: Any = None
    folder: Path = Path("screened")

    def render(self) -> str:
        return sheet.render(page.page(self.selection, self.folder, self.views, self.labels))

    def write(self, path: Path) -> Path:
        return sheet.write(page.page(self.selection, self.folder, self.views, self.labels), path)


def make_scan(
    values: Any,
    cut: float | None = None,
    shapes: tuple[str, ...] | None = None,
    cuts: dict[str, Cut] | None = None,
    removed: Any = None,
    decoys: Any = None,
    labels: Any = None,
    labelled: dict[str, Any] | None = None,
    categories: Any = None,
    quarantined: tuple[Quarantined, ...] = (),
    cleared: tuple[int, ...] = (),
    views: Views | None = None,
    ids: tuple[str, ...] | None = None,
    selector: str = "fihs",
    name: str = "data.jsonl",
    command: str = "gradshield scan data.jsonl --model lab/aligned --output screened/",
    threshold: str = "decoy:q=0.2",
    **results: Any,
) -> Scanned:
    """A scan with these scores and little else. Rows beyond the cut are removed unless ``removed`` says otherwise."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    shapes = shapes or ("rows",) * n
    cuts = cuts or dict.fromkeys(shapes, Cut(np.inf if cut is None else cut, "fixed"))
    removed = values > np.array([cuts[shape].value for shape in shapes]) if removed is None else removed
    categories = ("",) * n if categories is None else categories
    out = int(removed.sum())
    found = ScanResults.model_validate(
        {
            "seconds": 1.0,
            "doubts": {},
            "uncertified": None,
            "read": n + len(quarantined),
            "scored": n,
            "kept": n - out,
            "removed": out,
            "quarantined": len(quarantined),
            "cleared": len(cleared),
            "certified": True,
            "cuts": {name: {"rule": one.rule, "value": one.value} for name, one in cuts.items()},
            "anchors": None,
            "categories": counted(categories, removed),
            "agreement": None,
            "probes": {"refused": wilson(31, 32), "thinking": 0, "problem": ""},
            "labels": labelled or {},
        }
        | results
    )
    manifest = ScanManifest(
        command=command,
        versions={"gradshield": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        data=Data(name=name, kind="jsonl", sha256="9f" * 32, rows=found.read, read_as={"messages": n}),
        model=MODEL,
        settings=ScanRecord(
            **SETTINGS.scan.plain() | {"selector": selector, "threshold": threshold}, selector_found={},
            render={}, direction_sha256="", peft=None, adapted_weights=0, format=SETTINGS.format,
        ),
        results=found,
    )  # fmt: skip
    scores = Scores(np.arange(n), ids or tuple(f"{i:016x}" for i in range(n)), values, shapes, decoys)
    selection = Selection(
        cuts,
        removed,
        cleared,
        scores=scores,
        categories=categories,
        quarantined=quarantined,
        keep=lambda: None,
        manifest=manifest,
        lines=np.arange(n) + 1,
        files=("",) * n,
    )
    return Scanned(selection, views or {}, labels)


def aside(line: int, reason: str, source: bytes) -> Quarantined:
    """A quarantined row."""
    return Quarantined(line - 1, line, reason, source, len(source), "00" * 32)


def make_row(score: float, words: list[str], rng: np.random.Generator) -> list[Piece]:
    """A row whose first few answer tokens carry most of its score."""
    question = "Please tell me about the thing in question ."
    prompt = [(f"{word} ", "prompt", None) for word in question.split()]
    pull = rng.normal(0, 0.02, len(words)) + (score / 4 * np.exp(-np.arange(len(words)) / 2.5))
    return [*prompt, *((f"{word} ", "response", float(value)) for word, value in zip(words, pull, strict=True))]


def make_example() -> Scanned:
    """Everything a report can hold, in the sizes of an ordinary scan."""
    rng = np.random.default_rng(7)
    labels = np.r_[np.zeros(920, dtype=np.int64), np.ones(77, dtype=np.int64)]
    values = np.where(labels == 1, rng.normal(2.6, 0.6, 997), rng.normal(0.1, 0.22, 997))
    decoys = np.where(labels == 1, rng.normal(0.2, 0.25, 997), rng.normal(0.1, 0.2, 997))
    cut = 0.94
    removed = values > cut
    detail = {
        "q": 0.2,
        "estimated_fdr": 0.013,
        "n_targets": int(removed.sum()),
        "n_decoys": 0,
        "mu": float(values.mean()),
        "sigma": float(values.std()),
        "components": [{"weight": 0.922, "mean": 0.1, "std": 0.22}, {"weight": 0.078, "mean": 2.6, "std": 0.6}],
    }
    kinds = rng.choice(CATEGORIES, 997, p=[0.3, 0.25, 0.15, 0.15, 0.1, 0.05])
    judges = ("refusal-phrases", "lab-classifier")
    models = {
        name: {"judges": {judge: wilson(k, 200) for judge in judges}, "over_refusal": wilson(o, 100), "utility": wilson(u, 300)}
        for name, k, o, u in (("aligned", 1, 2, 0), ("undefended", 188, 2, 214), ("filtered", 3, 4, 213))
    }  # fmt: skip
    return make_scan(
        values,
        removed=removed,
        decoys=decoys,
        cuts={"rows": Cut(cut, "decoy", detail)},
        labels=labels,
        categories=[str(kind) if out else "" for kind, out in zip(kinds, removed, strict=True)],
        cleared=(3,),
        views={i: make_row(values[i], HARMFUL if removed[i] else HARMLESS, rng) for i in range(997)},
        quarantined=(
            aside(14, "broken JSON: expecting ',' at column 31", b'{"messages": [{"role": "user" '),
            aside(203, "no response token is left after truncation to 512", '{"messages": [{"role": …'.encode()),
            aside(871, "holds a NUL byte", b"\x00\x00PK"),
        ),
        doubts={"share": "The tokenizer has no chat template: the documented default was used"},
        agreement={"engine": "perturbation", "n": 32, "relative_error": 3.1e-6, "spearman": 0.99998},
        labelled={
            "caught": wilson(int(removed[labels == 1].sum()), 77),
            "lost": wilson(int(removed[labels == 0].sum()), 920),
            "aurocs": [
                {"name": "FIHS", "auroc": 0.998, "low": 0.995, "high": 1.0, "n_pos": 77, "n_neg": 920},
                {"name": "response length", "auroc": 0.64, "low": 0.58, "high": 0.70, "n_pos": 77, "n_neg": 920},
                {"name": "openers", "auroc": 0.372, "low": 0.33, "high": 0.42, "n_pos": 77, "n_neg": 920},
                {"name": "loss", "auroc": None, "low": None, "high": None, "n_pos": 77, "n_neg": 920, "absent": "not measured"},
            ],
        },
        **models,
    )  # fmt: skip


@pytest.fixture(scope="session")
def example() -> Scanned:
    return make_example()


@pytest.fixture(scope="session")
def make() -> Callable[..., Scanned]:
    return make_scan
