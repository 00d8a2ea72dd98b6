"""A manifest is written and read by one model, and its schema is documented."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from gradshield import runs
from gradshield.comparison.grid import Comparison
from gradshield.errors import DataError
from gradshield.manifests import EvaluationManifest, Figures, ScanManifest, SequenceRecord, TrainingManifest
from gradshield.stats import mean_interval, wilson
from tests.common import write
from tests.evaluation.test_certificate import scanned

SCHEMAS = Path(__file__).parents[1] / "docs" / "schema"
KINDS = {
    "manifest": ScanManifest | TrainingManifest | EvaluationManifest,
    "sequence": SequenceRecord,
    "results": Comparison,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_documented_schema_is_that_of_the_models(name: str) -> None:
    """Set GRADSHIELD_WRITE_SCHEMAS to write them anew."""
    path, found = SCHEMAS / f"{name}.json", TypeAdapter(KINDS[name]).json_schema()
    if os.environ.get("GRADSHIELD_WRITE_SCHEMAS"):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == found, "run it with GRADSHIELD_WRITE_SCHEMAS=1"


def test_what_is_read_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    cuts = {"rows": {"rule": "median", "value": math.inf, "found": [1, math.nan]}}
    agreed = {"engine": "loop", "n": 2, "relative_error": 0.0, "spearman": math.nan}
    found = scanned(cuts=cuts, agreement=agreed, labels={"caught": asdict(wilson(1, 2))})
    runs.write_json(tmp_path / "manifest.json", ScanManifest.model_validate(found))
    first = (tmp_path / "manifest.json").read_bytes()
    runs.write_json(tmp_path / "manifest.json", runs.read_manifest(tmp_path, ScanManifest))
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert b'"lost"' not in first and b'"demo"' not in first  # what does not apply is left out


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the whole: "),
        (json.dumps(scanned() | {"more": 1}), "more: "),
        (json.dumps(scanned(kept="many")), "results.kept: "),
        *(
            (json.dumps(scanned(labels={"caught": asdict(wilson(1, 2)) | change})), "results.labels.caught: ")
            for change in (
                {"k": 3},
                {"k": -1},
                {"n": -2, "k": -1},
                {"n": 0, "k": 0},
                {"n": 9},
                {"rate": 1.5},
                {"low": -0.1},
                {"high": 1.1},
                {"low": 0.9, "high": 0.1},
            )
        ),
    ],
)
def test_a_damaged_manifest_is_one_sentence(content: str | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        write(tmp_path / "manifest.json", content)
    with pytest.raises(DataError) as raised:
        runs.read_manifest(tmp_path, ScanManifest)
    assert why in str(raised.value) and "run `gradshield scan` into it first" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_rate_of_real_scores_is_whole(tmp_path: Path) -> None:
    mean = asdict(mean_interval([0.1, 0.2, 0.4]))
    write(tmp_path / "manifest.json", json.dumps(scanned(labels={"caught": mean})))
    assert asdict(runs.read_manifest(tmp_path, ScanManifest).results.labels.caught) == mean  # type: ignore[call-overload]


def test_another_command_s_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "manifest.json", json.dumps(scanned()))
    with pytest.raises(DataError, match="finished train"):
        runs.read_manifest(tmp_path, TrainingManifest)


def test_records_are_plain_in_json() -> None:
    rate: Any = wilson(1, 4)
    assert runs.finite([Figures(judges={"mine": rate}), rate]) == [{"judges": {"mine": asdict(rate)}}, asdict(rate)]
