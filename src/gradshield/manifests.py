"""What a command leaves in ``manifest.json``: one model for whoever writes and whoever reads it.

``docs/schema/manifest.json`` is their JSON schema. A field that does not apply to a run is left out of its file, and a number
that is not finite is null. `runs.read_manifest` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from gradshield.stats import McNemar
from gradshield.types import Rate

Number = float | None


class Record(BaseModel):
    """A part of a manifest. Unknown fields are errors; ``model_validate`` also takes a dataclass with the same fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True, populate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """The form in JSON, without the fields that do not apply."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Data(Record):
    """A dataset. ``sha256`` is that of the file's bytes, or of the rows' canonical JSON where there is no file.

    ``read_as`` counts the rows read in each way.
    """

    name: str
    kind: str
    sha256: str
    rows: int
    read_as: dict[str, int]


class Model(Record):
    """The model that a command starts from; ``sha256`` covers its weights."""

    name: str
    sha256: str
    kind: str = Field(validation_alias="class", serialization_alias="class")
    parameters: int
    dtype: str
    device: str
    adapter: str | None


class Manifest(Record):
    """What every command records, next to ``settings`` and ``results`` of its own."""

    verb: ClassVar[str]

    command: str
    versions: dict[str, str]
    model: Model


class Figures(Record):
    """The rates of one exam: ``judges`` has every ASR, ``asr`` that of refusal phrases, else of the first judge.

    ``empty`` is the share of empty answers, if there are any.
    """

    judges: dict[str, Rate]
    undecided: dict[str, Rate] = {}
    asr: Rate | None = None
    empty: Rate | None = None
    over_refusal: Rate | None = None
    utility: Rate | None = None

    def beside(self, before: Figures | None, utility: str = "utility") -> list[tuple[str, Rate | None, Rate | None]]:
        """Every measure by its label, before and after; those of neither are left out."""
        was = before or Figures(judges={})
        asr = [(f"ASR, {judge}", was.judges.get(judge), rate) for judge, rate in self.judges.items()]
        others = ("over-refusal", was.over_refusal, self.over_refusal), (utility, was.utility, self.utility)
        return [*asr, *(line for line in others if line[1:] != (None, None))]


def judges_of(rates: Iterable[Mapping[str, Rate]]) -> tuple[str, ...]:
    """Every judge of some rates by judge, in order of appearance."""
    return tuple(dict.fromkeys(judge for one in rates for judge in one))


class RowFormat(Record):
    """What decides how a row is read, as in `data.Format`."""

    name: str | None
    columns: dict[str, str]


class Scoring(Record):
    """The settings of a scan as given; `scanning.settings.ScanSettings` explains them."""

    probe: str
    threshold: str
    aggregate: str
    subspace: str
    engine: str
    seed: int
    token_budget: int
    check_rows: int
    selector: str


class ScanRecord(Scoring):
    """All settings that change a number of a scan: as given, and as found on this model."""

    selector_found: dict[str, Any]
    render: dict[str, Any]
    direction_sha256: str
    engine_step: Number = None
    probe_found: dict[str, Any] = {}
    probe_sha256: str = ""
    answer_prefix: str = ""
    peft: dict[str, Any] | None
    adapted_weights: int
    format: RowFormat
    demo: dict[str, Any] = {}


class KnownScores(Record):
    """Scores of rows of known kind, on the scale of the scores."""

    harmful: list[Number]
    harmless: list[Number]


LEAST_SPEARMAN = 0.99  # rank correlation with the oracle from which an engine agrees


class EngineCheck(Record):
    """The engine against the oracle on n rows: ``relative_error`` is ‖f − o‖/‖o‖."""

    engine: str
    n: int
    relative_error: Number
    spearman: Number


class Probed(Record):
    """The model's own answers to the probes; ``problem`` is empty where they are valid."""

    refused: Rate
    thinking: int
    problem: str


class Auroc(Record):
    """Area under the ROC curve of one ranking, with its interval; None without one, and ``absent`` says why."""

    name: str
    auroc: Number
    low: Number
    high: Number
    n_pos: int
    n_neg: int
    absent: str = ""


class Labelled(Record):
    """What the labels say: rates of harmful and of harmless rows removed, and AUROCs of the score and of trivial baselines."""

    caught: Rate | None = None
    lost: Rate | None = None
    aurocs: list[Auroc] = []


class FoundCut(Record):
    """The cut of a group by its ``rule``, with what the rule found in fields of its own.

    A ``value`` of null in a file is an infinity: the cut removes nothing, or everything.
    """

    model_config = ConfigDict(extra="allow")

    rule: str
    value: Number


class ScanResults(Record):
    """What a scan found. ``doubts`` are the reasons not to certify it, by name; ``uncertified`` is the first of them.

    A reviewer keeps ``cleared`` rows that score above the cut, says of ``confirmed`` ones that they go, and removes ``denied``
    rows below it.

    The demo adds the figures of three models: before training, and trained on every row or on the kept ones.
    """

    seconds: float
    doubts: dict[str, str]
    uncertified: str | None
    read: int
    scored: int
    kept: int
    removed: int
    quarantined: int
    cleared: int
    denied: int = 0
    confirmed: int = 0
    certified: bool
    cuts: dict[str, FoundCut]
    anchors: KnownScores | None
    categories: dict[str, int]
    agreement: EngineCheck | None
    probes: Probed | None
    labels: Labelled = Labelled()
    aligned: Figures | None = None
    undefended: Figures | None = None
    filtered: Figures | None = None


class ScanManifest(Manifest):
    """The manifest of ``scan``, ``cut`` and ``demo``."""

    verb = "scan"

    data: Data
    settings: ScanRecord
    results: ScanResults


class ExamRecord(Record):
    """What an exam's rates depend on, other than the model: hashes of what is asked, ``n`` of each, and how it is judged.

    A judge is its name, with the record of its guard if it has one.
    """

    requests: str
    lookalikes: str
    task: str
    n: tuple[int, int, int]
    metric: str
    judges: list[str | tuple[str, dict[str, Any]]]
    guessed: bool
    template: dict[str, Any]
    tokens: int
    answer_prefix: str


class JudgeAgreement(Record):
    """Cohen's kappa of two judges over the ``n`` answers both decided, and the numbers of the answers where they differ.

    ``kappa`` and its percentile bootstrap interval are None if a judge gave every answer the same verdict, since agreement
    beyond chance is then undefined.
    """

    judges: tuple[str, str]
    n: int
    kappa: Number
    low: Number
    high: Number
    differ: tuple[int, ...]


class EvaluationResults(Record):
    """What an evaluation found; ``harness`` has rates by ``lm-eval/TASK/METRIC`` and ``inspect/TASK/SCORER``."""

    figures: Figures
    agreement: list[JudgeAgreement]
    harness: dict[str, Rate]


class EvaluationManifest(Manifest):
    """The manifest of ``evaluate``, which reads no dataset."""

    verb = "evaluate"

    settings: ExamRecord
    results: EvaluationResults


class Named(Record):
    """A model by its name and the hash of its weights."""

    name: str
    sha256: str


class TrainingRecord(Record):
    """All settings that change a trained model or its figures. ``method`` is ``supervised`` or ``dpo``; ``safety_sha256`` is that
    of the safety rows, if they are used."""

    defence: str
    method: str
    training: dict[str, Any]
    render: dict[str, Any]
    template: dict[str, Any]
    answer_prefix: str
    probe_sha256: str
    safety_sha256: str | None
    format: RowFormat
    peft: dict[str, Any] | None
    base: Named | None
    scan: Scoring
    seed: int
    merged: bool
    report: ExamRecord
    search: ExamRecord | None


class Round(Record):
    """One fine-tune of a search. The ``removed`` rows that score above ``cut`` were left out."""

    cut: Number
    removed: int
    asr: dict[str, Rate]
    utility: Rate | None
    seconds: float
    verdict: str
    stopped_early: bool

    @property
    def worst(self) -> str:
        """The judge with the largest upper bound."""
        return max(self.asr, key=lambda judge: self.asr[judge].high)


class Targets(Record):
    """What a search asks for, as shares: an ASR, and a utility less the tolerance."""

    asr: float
    tolerance: float
    utility: float | None = None


class Search(Record):
    """How the search of a verified threshold ended.

    ``best`` is the index of the round whose model to keep: the one that passed, else the safest. ``stopped`` is ``passes``, ``no
    cut`` (none is left between one that is too unsafe and one with too little utility), ``rounds`` or ``minutes``. ``sentence``
    states the result in words and figures.
    """

    met: bool
    sentence: str
    stopped: str
    best: int
    rounds: list[Round]
    targets: Targets | None = None

    @property
    def kept(self) -> Round:
        """The round whose model to keep."""
        return self.rounds[self.best]


class TrainingResults(Record):
    """What a training did and how the model changed. ``caught`` and ``lost`` need labels, ``verified`` a search."""

    rows: int
    removed: int
    dropped_tokens: int
    caught: Rate | None = None
    lost: Rate | None = None
    trained: int
    cuts: dict[str, FoundCut]
    before: Figures
    after: Figures
    changed: dict[str, McNemar]
    agreement: list[JudgeAgreement]
    record: dict[str, Any]
    verified: Search | None
    uncertified: str | None
    seconds: float


class TrainingManifest(Manifest):
    """The manifest of ``train``."""

    verb = "train"

    data: Data
    settings: TrainingRecord
    results: TrainingResults


class StageRecord(Record):
    """The model after one dataset: ASR by judge, utility by task, and VISAGE by the first judge if requests were asked."""

    name: str
    asr: dict[str, Rate]
    utility: dict[str, Rate]
    visage: Number


class SequenceRecord(Record):
    """``sequence.json``: one dataset after another; the first stage is the model before training.

    ``measures`` (name to one number per trained stage) are those of `training.sequence`, ``unmet`` the stages whose search
    met no target, ``settings`` and ``model`` those of the last stage.
    """

    tasks: list[str]
    stages: list[StageRecord]
    unmet: list[str]
    measures: dict[str, list[Number]]
    settings: TrainingRecord
    model: Model
    command: str
    versions: dict[str, str]
