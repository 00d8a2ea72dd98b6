"""Certify a finished run, and check a certificate by recomputing it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradshield.errors import DataError, UsageError
from gradshield.evaluation import card
from gradshield.evaluation.bounds import Claim
from gradshield.evaluation.certificate import (
    LABELLED,
    Run,
    damaged,
    differing,
    evidence,
    judged,
    offline,
    read,
    read_labelled,
    statement,
    subject,
    text,
)
from gradshield.files import file_digest, write_text
from gradshield.judges import Judge
from gradshield.manifests import Model, TrainingManifest
from gradshield.models.loading import files_digest
from gradshield.report.text import BEGIN, END
from gradshield.runs import CERTIFICATE, alone, write_lines
from gradshield.thresholds.verified import TARGET

Leaf = tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """The result of recomputing a certificate: what ``changed``, what is the ``same`` and what is ``unchecked``, as clauses.

    ``predicate`` is the certificate's own, as are ``certified`` and ``reason``; they are valid only if nothing has changed.
    """

    predicate: Mapping[str, Any]
    changed: tuple[str, ...]
    same: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def certified(self) -> bool:
        return bool(self.predicate.get("certified"))

    @property
    def reason(self) -> str | None:
        return self.predicate.get("reason")


def certify(
    folder: str | Path,
    *,
    confidence: float = 0.95,
    looks: int = 1,
    limit: float = TARGET,
    calibrate: str | Path | None = None,
    judges: Sequence[Judge] = (),
) -> dict[str, Any]:
    """Certify the model of a finished run: writes ``certificate.json`` in its folder, and into the model card of a training.

    The run is a training, or an evaluation of a model trained elsewhere: no scan and no training data stand behind that one.

    Parameters
    ----------
    confidence
        Confidence at which the bounds of all judges hold jointly.
    looks
        How often the report requests were used to choose this model, including this time.
    limit
        The attack success rate that no judge's bound may exceed.
    calibrate
        A file of labelled answers of this model (`evaluation.bounds`). Without one, the calibration of an earlier
        certificate of this run is kept; if there was none, no bound covers the judges' own error.
    judges
        Judges of the run that need a model or an endpoint, to judge the labelled answers; the others are recreated.

    Raises
    ------
    UsageError
        A claim out of range; judges that are missing or are not the run's.
    DataError
        No finished run, files that are not as they were written, or labelled answers that cannot be used.
    """
    claim = Claim(confidence, looks, limit)
    if judges and calibrate is None:
        raise UsageError(
            "judges are only asked about labelled answers, and there are none: give them with --calibrate FILE"
        )
    read(Path(folder), calibrated=calibrate is None)  # so that nothing is written into a folder without a run
    with alone(folder):
        return write(Path(folder), claim, calibrate, judges, again=True)


def write(
    folder: Path,
    claim: Claim | None = None,
    calibrate: str | Path | None = None,
    judges: Sequence[Judge] = (),
    again: bool = False,
) -> dict[str, Any]:
    """Write the certificate of a folder that this process has locked; ``again`` unless the run was just trained.

    With ``again``, judges that can be rerun here are rerun, and an earlier calibration is kept. The old certificate is removed
    before anything it rests on is changed, and the new one is written last. Raises as ``certify`` does.
    """
    run = read(folder, calibrated=again and calibrate is None)
    if again and (wrong := differing(run)):
        raise DataError(f"{wrong[0]}: the file was changed, or the judge was; run the command again")
    source = _calibrated_by(folder) if run.labelled is not None else None
    labelled = None
    if calibrate is not None:
        _check_judges(run, judges)
        labelled = judged(read_labelled(calibrate), _asked(run, judges))
        if not (folder / LABELLED).exists() or not Path(calibrate).samefile(folder / LABELLED):
            source = {"name": str(calibrate), "sha256": file_digest(Path(calibrate))}
    _made(replace(run, labelled=labelled or run.labelled), claim or Claim(), source)  # errors are raised here
    (folder / CERTIFICATE).unlink(missing_ok=True)
    if labelled is not None:
        write_lines(folder / LABELLED, labelled)
    elif not again:
        (folder / LABELLED).unlink(missing_ok=True)  # of the model trained here before
    run = read(folder)
    found = _made(run, claim or Claim(), source)
    if run.training:
        card.write(folder, run.training, found)
    write_text(folder / CERTIFICATE, text(found))
    return found


def _made(run: Run, claim: Claim, source: Mapping[str, Any] | None, in_place: bool | None = None) -> dict[str, Any]:
    """The statement. Raises DataError if a file of the run lacks a value, or holds a wrong one."""
    try:
        model = run.manifest.model
        text(found := statement(run, claim, source, _start_in_place(model) if in_place is None else in_place))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        raise damaged(run.folder, error) from None
    return found


def check(folder: str | Path) -> Checked:
    """Recompute the certificate of a folder, offline and without its model, and report every difference.

    Every hash and bound, the verdicts of judges that need no model and the card's section are recomputed from the files. Files
    that no longer exist, such as the training data, are reported as unchecked. Writes nothing. Raises DataError if there is no
    readable certificate.
    """
    folder = Path(folder)
    raw, old = _certificate(folder)
    predicate = old["predicate"]
    try:
        claim = Claim(*(predicate["claim"][key] for key in ("confidence", "looks", "limit")))
        source, in_place = predicate["calibration"], bool(predicate["start"]["in_place"])
        then, measured = _listed(old), predicate.get("data") is None
    except (KeyError, TypeError, UsageError) as error:
        raise _unreadable(folder, f"its claim is broken, {type(error).__name__}: {error}") from None
    kept = {key: source[key] for key in ("name", "sha256") if key in source} if isinstance(source, Mapping) else None
    changed = [] if text(old) == raw else [f"{CERTIFICATE} is not in the form in which it was written"]
    run = None
    try:
        run = read(folder)
        new, wrong = _made(run, claim, kept, in_place), differing(run)
    except (DataError, LookupError, TypeError, AttributeError, ValueError) as error:
        there = old["subject"] if measured else subject(folder)  # a measured model is elsewhere
        new, wrong, run = {"subject": there, "predicate": {"files": evidence(folder)}}, [str(error)], None
    now = _listed(new)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            what = (
                "is missing"
                if name not in now
                else "was added"
                if name not in then
                else "is not the file that was certified"
            )
            changed.append(f"{name} {what}")
    if run is None:
        return Checked(predicate, (*changed, *wrong), (), ("everything that is computed from those files",))
    changed += [*_differences(old, new), *wrong]
    found: dict[str, list[str]] = {"changed": changed, "same": [], "unchecked": []}
    if not changed:
        files = [f"{len(old['subject'])} files of the model"] if run.training else []
        found["same"] += [*files, "manifest, answers and requests", "every bound"]
    for name, record in run.judges.items():
        found["unchecked" if offline(name, record) is None else "same"].append(f"the verdicts of {name}")
    own = (_card(folder, run.training, old), _data(run.training)) if run.training else ()
    for which, clause in (*own, _start(run, in_place), *_source(kept)):
        found[which].append(clause)
    if others := _others(folder, then):
        shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        found["unchecked"].append(f"{len(others)} files that it does not list ({shown})")
    return Checked(predicate, **{which: tuple(clauses) for which, clauses in found.items()})


def _listed(certificate: Mapping[str, Any]) -> dict[str, str]:
    """The hashes of every file that a certificate lists, by name."""
    model = {one["name"]: one["digest"]["sha256"] for one in certificate["subject"]}
    return {**model, **certificate["predicate"]["files"]}


def _others(folder: Path, listed: Mapping[str, str]) -> list[str]:
    """Files of the run's folder without a hash in the certificate."""
    named = {*listed, CERTIFICATE, "README.md"}
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if path.as_posix() not in named and not path.parts[0].startswith(".")]


def _calibrated_by(folder: Path) -> dict[str, str] | None:
    """The file of labelled answers that the certificate in the folder names."""
    try:
        found = _certificate(folder)[1]["predicate"].get("calibration") or {}
    except DataError:
        return None
    return {key: str(found[key]) for key in ("name", "sha256") if key in found} or None


def _asked(run: Run, given: Sequence[Judge]) -> list[Judge]:
    """Every judge of the run. Raises UsageError if one is missing, or if a given one is not one of the run's."""
    by_name = {judge.name: judge for judge in given}
    if not run.judges:
        raise UsageError("no request was asked in this run, so no judge can be calibrated: leave out --calibrate")
    if others := sorted(set(by_name) - set(run.judges)):
        raise UsageError(
            f"the judge {others[0]!r} did not judge this run: give the ones that did, {', '.join(run.judges)}"
        )
    found = {name: offline(name, record) or by_name.get(name) for name, record in run.judges.items()}
    if missing := [name for name, judge in found.items() if judge is None]:
        raise UsageError(
            f"the judge {missing[0]!r} needs a model or an endpoint to judge the labelled answers: give it with --judge, "
            "as in the run"
        )
    return [judge for judge in found.values() if judge is not None]


def _check_judges(run: Run, given: Sequence[Judge]) -> None:
    """Raises UsageError if a judge has the name of one of the run's and another record; a model's path does not count."""
    for judge in given:
        guard = getattr(judge, "guard", None)
        then, now = run.judges.get(judge.name), {} if guard is None else dict(guard.record())
        if then is None:  # identified by its name
            continue
        path = {"model"} if "sha256" in now else set()
        if {k: v for k, v in then.items() if k not in path} != {k: v for k, v in now.items() if k not in path}:
            raise UsageError(
                f"the judge {judge.name!r} is not the one that judged the run (its record differs): give the same model, "
                "endpoint and options"
            )


def _certificate(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / CERTIFICATE
    if not path.is_file():
        raise DataError(
            f"the folder {str(folder)!r} holds no {CERTIFICATE}: make one with `gradshield certify {folder}`"
        )
    try:
        raw = path.read_bytes().decode()
        value = json.loads(raw, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, f"{type(error).__name__}") from None
    if not isinstance(value, dict) or not isinstance(value.get("predicate"), dict):
        raise _unreadable(folder, "it has no predicate")
    return raw, value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _unreadable(folder: Path, why: str) -> DataError:
    return DataError(
        f"{str(folder / CERTIFICATE)!r} is not a certificate of this version ({why}): make one with `gradshield certify {folder}`"
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A clause for each leaf that differs, files aside."""
    before, after = (
        dict(_leaves({**one, "subject": (), "predicate": {**one["predicate"], "files": ()}})) for one in (old, new)
    )
    found = []
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path, "nothing"), after.get(path, "nothing")
        # Another SciPy version may round the last digits of a bound differently.
        near = isinstance(was, float) and isinstance(now, float) and math.isclose(was, now, rel_tol=1e-9)
        if not near and (was != now or type(was) is not type(now)):
            found.append(f"{'.'.join(path)} is {was!r} in the certificate and {now!r} in the files")
    return found


def _leaves(value: Any, path: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(i)))
    else:
        yield path, value


def _card(folder: Path, manifest: TrainingManifest, certificate: Mapping[str, Any]) -> tuple[str, str]:
    """The model card must match the certificate, which it names by hash."""
    path = folder / "README.md"
    try:
        section = card.section(manifest, certificate)
    except (KeyError, TypeError, AttributeError, ValueError):
        return "changed", "the certificate lacks what the model card shows"
    found = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    once = found.count(BEGIN) == found.count(END) == found.count("## Safety of the fine-tuning") == 1
    if once and "\n".join(section.splitlines()) in "\n".join(found.splitlines()):
        return "same", "the model card's section"
    return "changed", "README.md does not match the certificate"


def _data(manifest: TrainingManifest) -> tuple[str, str]:
    """The training data; rows from memory or the hub have no file."""
    data = manifest.data
    if data.kind in ("dataset", "list"):
        return "unchecked", f"the training data ({data.name} is missing)"
    return _file(data.name, data.sha256, "the training data", "are not the ones that were trained on")


def _start(run: Run, in_place: bool) -> tuple[str, str]:
    """The model that training started from, which an adapter depends on; or the model that an evaluation measured."""
    model, what = run.manifest.model, "the model that " + ("training started from" if run.training else "was measured")
    if not in_place or not _folders(model):
        return "unchecked", f"{what} ({model.name})"
    if _start_in_place(model):
        return "same", f"the weights of {what}"
    return "changed", f"{model.name} is not {what}"


def _source(kept: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The user's file of labelled answers, which the run's folder holds a copy of."""
    if not kept:
        return []
    what = "the file of labelled answers"
    return [_file(str(kept.get("name")), kept.get("sha256"), what, "is not the one that calibrated the judges")]


def _file(name: str, sha256: Any, what: str, another: str) -> tuple[str, str]:
    """A file outside the run's folder; a relative path may lead to another file of that name."""
    path = Path(name)
    if not path.is_file():
        return "unchecked", f"{what} ({path} is missing)"
    if file_digest(path) == sha256:
        return "same", what
    if path.is_absolute():
        return "changed", f"{what} {path} {another}"
    return "unchecked", f"{what} {path} {another}, or the command runs in a different folder from the training"


def _folders(model: Model) -> list[Path]:
    """The folders that the starting weights were read from; empty if that is unknown."""
    found = [Path(name) for name in (model.name, model.adapter) if name]
    whole = found and (found[0] / "config.json").is_file() and all(path.is_dir() for path in found)
    return found if whole else []


def _start_in_place(model: Model) -> bool:
    """Whether the weights in the starting model's folder match its hash; False if it came from memory or the hub."""
    folders = _folders(model)
    return bool(folders) and files_digest(folders) == model.sha256
