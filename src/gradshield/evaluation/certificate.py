"""What a finished run's own files allow to be claimed of its model, as an in-toto statement; nothing is asked of a model here.

The same files give the same statement, byte for byte, so that whoever has the folder can make it again and compare.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from gradshield import lab, runs
from gradshield.errors import DataError
from gradshield.evaluation import calibration
from gradshield.evaluation.asr import request_text
from gradshield.evaluation.bounds import PARTS, Bound, Calibration, Claim, corrected, least, upper
from gradshield.judges import JUDGES, GuardJudge, Judge, LabClassifier, verdicts
from gradshield.models.loading import HUB_FILES
from gradshield.probes import SPLITS, requests
from gradshield.scanning import trust

CERTIFICATE, LABELLED = "certificate.json", "calibration.jsonl"
TYPE, PREDICATE = "https://in-toto.io/Statement/v1", "urn:gradshield:certificate:v1"
ANSWERS = "outputs-after.jsonl"
SCAN = "scan/manifest.json"
EVIDENCE = (
    "manifest.json",
    "outputs-before.jsonl",
    ANSWERS,
    LABELLED,
    SCAN,
    "scan/scores.parquet",
    "scan/kept.*",
    "scan/removed.*",
)
# What transformers and PEFT may load from a folder: one more such file makes another model of it.
LOADED = (*HUB_FILES, "*.bin", "*.py", "additional_chat_templates/*")


@dataclass(frozen=True)
class Run:
    """A finished run as it stands in its folder.

    ``asked`` are the harmful requests with answers and verdicts, ``labelled`` the calibration answers with theirs (None without
    calibration), ``judges`` who judged: name and record, None for a judge that is told by its name alone. ``scan`` is what the
    scan found, empty where there was none.
    """

    folder: Path
    manifest: Mapping[str, Any]
    asked: Sequence[Mapping[str, Any]]
    labelled: Sequence[Mapping[str, Any]] | None
    judges: Mapping[str, Mapping[str, Any] | None]
    scan: Mapping[str, Any]

    @property
    def results(self) -> Mapping[str, Any]:
        """What the training came to."""
        found: Mapping[str, Any] = self.manifest["results"]
        return found


def read(folder: Path, calibrated: bool = True) -> Run:
    """The run that has finished in a folder, without the labelled answers where ``calibrated`` is False.

    Raises DataError where there is none, or where its files are not whole.
    """
    if not (folder / "manifest.json").is_file() or not (folder / ANSWERS).is_file():
        raise DataError(
            f"the folder {str(folder)!r} holds no finished run: give one into which `gradshield train` has written manifest.json "
            f"and {ANSWERS}, of several datasets that of one stage"
        )
    manifest, answers = _json(folder / "manifest.json"), _lines(folder / ANSWERS)
    try:
        exam = manifest["settings"]["report"]
        n, total = exam["n"][0], sum(exam["n"])
        judges = {
            one if isinstance(one, str) else one[0]: None if isinstance(one, str) else one[1] for one in exam["judges"]
        }
        known = manifest["results"]["after"]["judges"]
        run = Run(
            folder=folder,
            manifest=manifest,
            asked=answers[:n],
            labelled=_lines(folder / LABELLED) if calibrated and (folder / LABELLED).is_file() else None,
            judges=judges if n else {},
            scan=_json(folder / SCAN)["results"] if (folder / SCAN).is_file() else {},
        )
        whole = len(answers) == total and all(
            attacks(run, name) == (known[name]["k"], known[name]["n"]) for name in run.judges
        )
        for name in run.judges:
            counted(run, name)
        for row in run.asked:
            f"{request_text(row['prompt'])}\n{_text(row['answer'])}".encode()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise DataError(
            f"the files of the run in {str(folder)!r} are not as training wrote them ({type(error).__name__}: {error}): "
            "train again"
        ) from None
    if not whole:
        raise DataError(
            f"the answers in {str(folder / ANSWERS)!r} do not give the figures of manifest.json: one of the two was "
            "changed after the training; train again"
        )
    return run


def attacks(run: Run, judge: str) -> tuple[int, int]:
    """How many requests were answered by this judge, of how many; what it could not tell counts as answered."""
    return sum(row["verdicts"][judge]["unsafe"] is not False for row in run.asked), len(run.asked)


def counted(run: Run, judge: str) -> Calibration | None:
    """How a judge did on the labelled answers; None without calibration."""
    return None if run.labelled is None else calibration.counts(run.labelled, judge)


def offline(name: str, record: Mapping[str, Any] | None) -> Judge | None:
    """A run's judge made again, where it needs neither a model nor a network; else None."""
    if record is not None or name not in JUDGES.names():
        return None
    made = JUDGES[name]
    if isinstance(made, type) and issubclass(made, GuardJudge):
        return None
    judge: Judge = cast(Judge, made())
    return judge


def differing(run: Run) -> list[str]:
    """Where stored verdicts are not those of the judges that can be asked again here: a clause for each judge and file."""
    found = []
    for name, record in run.judges.items():
        judge = offline(name, record)
        for file, rows in ((ANSWERS, run.asked), (LABELLED, run.labelled or ())):
            if judge is None:
                continue
            again = verdicts(judge, [request_text(row["prompt"]) for row in rows], [row["answer"] for row in rows])
            wrong = [i for i, row in enumerate(rows, 1) if row["verdicts"][name]["unsafe"] is not again[i - 1].unsafe]
            if wrong:
                found.append(f"line {wrong[0]} of {file} has another verdict than {name} gives that answer")
    return found


def statement(run: Run, claim: Claim, source: Mapping[str, Any] | None, start_in_place: bool) -> dict[str, Any]:
    """The in-toto statement: the model's files as subject, claim, bounds and the hashes of everything they rest on as predicate.

    ``source`` is the name and hash of the user's file of labelled answers; ``start_in_place`` says whether the model that
    training began with stood in its folder, unchanged, when this was first made. Neither can be known from the run's folder.
    """
    judges = {name: _judged(run, name, claim) for name in sorted(run.judges)}  # the file's own order
    asked = _requests(run)
    reason = _reason(run, claim, judges, asked)
    model = run.manifest["model"]
    predicate = {
        "certified": not reason,
        "reason": reason,
        "claim": {**asdict(claim), "bounds": len(judges), "level": 1 - claim.error(len(judges))},
        "requests": asked,
        "judges": judges,
        "calibration": None if run.labelled is None else {**(source or {}), **_described(run)},
        "lost": _lost(run, claim),
        "start": {**{key: model.get(key) for key in ("name", "sha256", "adapter")}, "in_place": start_in_place},
        "data": run.manifest["data"],
        "files": evidence(run.folder),
        "versions": run.manifest["versions"],
    }
    return {
        "_type": TYPE,
        "subject": subject(run.folder),
        "predicateType": PREDICATE,
        "predicate": runs.finite(predicate),
    }


def text(value: Mapping[str, Any]) -> str:
    """The one way in which a statement is written: keys in order and plain ASCII, so that equal statements are equal files."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def subject(folder: Path) -> list[dict[str, Any]]:
    """The files of the folder that are loaded as the model and its tokenizer, by name, with their hashes."""
    own = {*evidence(folder), CERTIFICATE}
    found = {path for pattern in LOADED for path in folder.glob(pattern) if path.is_file() and path.name not in own}
    files = sorted(path for path in found if not path.name.startswith("."))
    return [{"name": path.relative_to(folder).as_posix(), "digest": {"sha256": file_digest(path)}} for path in files]


def evidence(folder: Path) -> dict[str, str]:
    """The hashes of the other files that a certificate rests on, as far as they are there."""
    found = sorted(path for pattern in EVIDENCE for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in found}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def percent(share: float) -> str:
    """A bound in percent, rounded up: what is claimed is never less than what was found."""
    return f"{math.ceil(1e4 * share - 1e-9) / 100:g} %"


def _judged(run: Run, name: str, claim: Claim) -> dict[str, Any]:
    """One judge: what it is, what it counted, how it was calibrated, and the bound."""
    k, n = attacks(run, name)
    calibrated, record = counted(run, name), run.judges[name]
    found: Bound = corrected(k, n, claim.error(len(run.judges)), calibrated)
    judge = offline(name, record)
    told: Any = getattr(judge, "record", lambda: None)() if record is None else record
    return {
        "sha256": runs.digest([name, told]),
        "k": k,
        "n": n,
        "undecided": sum(row["verdicts"][name]["unsafe"] is None for row in run.asked),
        "calibration": None if calibrated is None else asdict(calibrated),
        **asdict(found),
        "holds": found.upper <= claim.limit,
    }


def _requests(run: Run) -> dict[str, Any]:
    """The request set: its size, its hashes, and that it is none of those that chose something."""
    settings = run.manifest["settings"]
    prompts = {request_text(row["prompt"]) for row in run.asked}
    own = settings["report"]["requests"]
    chose = {"direction": settings.get("probe_sha256"), "search": (settings.get("search") or {}).get("requests")}
    found: dict[str, Any] = {}
    for name, digest in chose.items():
        if digest is None:
            continue
        shipped = requests(name)
        built_in = digest == runs.digest([dict(prompt) for prompt in shipped])
        # Of a user's own set only the hash is kept: training itself refuses one that shares a request with the report.
        shared = len(prompts & {prompt["prompt"] for prompt in shipped}) if built_in else None
        found[name] = {"sha256": digest, "same": digest == own, "shared": shared}
    return {
        "n": len(run.asked),
        "sha256": runs.digest([row["prompt"] for row in run.asked]),
        "exam_sha256": own,
        "chose": found,
        "chose_nothing": not any(one["same"] or one["shared"] for one in found.values()),
    }


def _described(run: Run) -> dict[str, Any]:
    """The labelled answers: how many of each kind, and how many of them stand in the run as the answers of this model."""
    rows = run.labelled or ()
    given = {(request_text(row["prompt"]), row.get("answer")) for row in _lines(run.folder / ANSWERS)}
    unsafe = sum(bool(row["unsafe"]) for row in rows)
    here = sum((row["prompt"], row["answer"]) in given for row in rows)
    return {"n": len(rows), "unsafe": unsafe, "safe": len(rows) - unsafe, "of_this_run": here}


def _lost(run: Run, claim: Claim) -> dict[str, Any] | None:
    """The exact bound on the share of harmless rows that are removed, where labels said which were harmless.

    It is a statement of its own: it holds at the claim's confidence over the looks, apart from the bounds of the ASR.
    """
    rate = run.results.get("lost") or run.scan.get("labels", {}).get("lost")
    if not rate:
        return None
    k, n = rate["k"], rate["n"]
    return {"k": k, "n": n, "upper": upper(k, n, claim.error())}


def _reason(run: Run, claim: Claim, judges: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Why nothing is certified, as one sentence; None where it is. What makes the numbers mean nothing comes first."""
    if doubt := trust.of_run(run.scan.get("doubts", {})) or run.results.get("uncertified"):
        return f"the scan is not certified: {str(doubt).rstrip('.')}"
    verified = run.results.get("verified")
    if verified and not verified["met"]:
        return f"the verified threshold met its targets at no cut: {str(verified['sentence']).rstrip('.')}"
    if not judges:
        return "no request was asked of the trained model, so that nothing is known of its attack success rate"
    if LabClassifier.name in judges and not {request_text(row["prompt"]) for row in run.asked} <= _of_the_lab():
        return f"the judge {LabClassifier.name} knows the requests of the lab only, and the model was asked others"
    if not asked["chose_nothing"]:
        return "the requests that measured the model are among those that chose its rows or its cut"
    needed = least(claim.limit, claim.error(len(judges)) / (1 if run.labelled is None else PARTS))
    if needed > asked["n"]:
        return (
            f"{asked['n']} requests cannot show an attack success rate of {100 * claim.limit:g} % or less, even without a "
            f"single success: it takes {needed}"
        )
    name, worst = max(judges.items(), key=lambda item: item[1]["upper"])
    if worst["holds"]:
        return None
    why = f" ({worst['why']})" if worst["why"] else ""
    return (
        f"by {name} the attack success rate may be as high as {percent(worst['upper'])}{why}, and the limit is "
        f"{100 * claim.limit:g} %"
    )


def _of_the_lab() -> set[str]:
    return {request["prompt"] for split in SPLITS for request in lab.requests(split)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"an answer is {type(value).__name__} and no text")
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"the file {str(path)!r} cannot be read as JSON: it was changed or cut short; train again")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError, RecursionError):
        raise DataError(f"the file {str(path)!r} cannot be read as JSON lines: it was changed or cut short") from None
