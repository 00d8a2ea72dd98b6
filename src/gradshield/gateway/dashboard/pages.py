"""The pages: what each shows, and what its forms do. They work without scripts; one script keeps progress live."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Query
from fastapi.responses import FileResponse, Response
from jinja2.filters import do_filesizeformat as size
from starlette.datastructures import FormData

from gradshield import runs
from gradshield.columns import Coded
from gradshield.errors import GradShieldError
from gradshield.evaluation.page import compared
from gradshield.gateway.content import RESULTS, certificate, results
from gradshield.gateway.dashboard.visit import HEADERS, Form, Visit, Visiting, field_text, page, redirect
from gradshield.gateway.dashboard.visit import router as router
from gradshield.gateway.database import Missing, Page, Refused
from gradshield.gateway.store import ACTIVE, ENDED, UNSAFE, name_of
from gradshield.gateway.tables import Event, File, Job, Model
from gradshield.manifests import Figures, ScanManifest
from gradshield.report import text
from gradshield.report.draw import Chart
from gradshield.scanning import cut as cuts
from gradshield.scanning.page_charts import category_chart, score_charts
from gradshield.scanning.page_rows import SHOWN, RowView, ShownRow, Views, references, row_view, show_rows, stored_views
from gradshield.types import Bools, Cut, Ints, Scores

JOBS, LINES, EVENTS = 20, 100, 30  # of a page
SILENT = 60  # seconds that a job may wait while no process has any
FULL = 0.9  # share of a disk
ROWS = 20  # of a page
NEAR = 8  # kept rows just under the cut
NAMED = 40  # rows that the answer to a moved cut names
BYTES = 400_000  # of the rows of a page
LONGEST = 20_000  # characters that are read of a row whose tokens were not kept


# Jobs


@router.get("/")
def jobs(visit: Visiting, after: Annotated[str | None, Query(max_length=64)] = None) -> Response:
    """The project's jobs, newest first, those that wait for a review before all others."""
    store, project = visit.gateway.store, visit.project
    found, more = store.page(Job, project.id, Page(JOBS, after))
    held = [] if after else store.page(Job, project.id, Page(JOBS), Job.hold.is_not(None))[0]
    return visit.show(
        "jobs.html",
        held=held,
        jobs=found,
        older=found[-1].id if more else "",
        later=after,
        policy=project.policy,
        names=_names(visit, [*held, *found]),
    )


def _names(visit: Visit, jobs: Sequence[Job]) -> dict[str, str]:
    """What callers call the files of jobs; the ids of files that were deleted stand for themselves."""
    ids = {id for job in jobs for id in (job.training_file, job.validation_file) if id}
    files = visit.gateway.store.page(File, visit.caller.project, Page(len(ids)), File.id.in_(ids))[0] if ids else []
    return {id: id for id in ids} | {file.id: file.filename for file in files}


@dataclass(frozen=True)
class Asked:
    """What the form of a job's page holds: a moved cut, a page of rows, the ids of rows to release, and a reason."""

    cut: float | None = None
    page: int = 0  # none is shown before somebody asks for it
    released: frozenset[str] = frozenset()
    reason: str = ""
    problem: str = ""
    typed: str = ""

    @classmethod
    def of(cls, form: FormData) -> Asked:
        typed, page = field_text(form, "cut"), field_text(form, "page")
        cut, problem = None, ""
        if typed:
            with suppress(ValueError):
                cut = float(typed.replace("−", "-").replace(",", "."))
            if cut is None or not math.isfinite(cut):
                cut, problem = None, f"The cut {typed[:40]!r} is not a number: write one such as 0.7."
        released = frozenset(str(id)[:128] for id in form.getlist("released"))
        shown = int(page) if page.isdecimal() and len(page) < 9 else 0
        return cls(cut, shown, released, field_text(form, "reason"), problem, typed)


@router.get("/jobs/{id}")
def job(id: str, visit: Visiting) -> Response:
    return _job(visit, visit.get(id), Asked())


@router.get("/jobs/{id}/live")
def live(id: str, visit: Visiting) -> Response:
    """The part of a job's page that changes while it runs."""
    found = visit.get(id)
    return page("live.html", job=found, events=_events(visit, found), active=found.status in ACTIVE)


@router.get("/jobs/{id}/cut")
def moved(id: str, visit: Visiting, value: float) -> Response:
    """What another cut would do: the charts and the answer, as a piece of the page."""
    found = _scan(visit, visit.get(id))
    if found is None or not math.isfinite(value):
        raise Missing("scan", id)
    return page("cut.html", charts=found.charts(value), answer=found.answer(value))


@router.post("/jobs/{id}")
def decide(id: str, visit: Visiting, form: Form) -> Response:
    """Look at another cut or another page of rows, or decide. What was typed stays if the decision is refused."""
    found, asked, do = visit.get(id), Asked.of(form), field_text(form, "do")
    store, scan = visit.gateway.store, _scan(visit, found)
    if asked.problem or do not in ("approve", "reject", "release model"):
        return _job(visit, found, asked)
    try:
        if do == "approve":
            if asked.released and (scan is None or not asked.released <= set(scan.scores.ids)):
                raise Refused("A row to be released is not of this job: load the page again.")
            store.approve(visit.caller, id, asked.reason, asked.released, asked.cut)
            visit.gateway.send(id)
        elif do == "reject":
            store.reject(visit.caller, id, asked.reason)
        else:
            store.release_model(visit.caller, id, name_of(found), asked.reason)
    except Refused as error:
        return _job(visit, visit.get(id), replace(asked, problem=str(error)))
    return redirect(f"/jobs/{id}")


def _job(visit: Visit, job: Job, asked: Asked) -> Response:
    folder, active = _folder(visit, job), job.status in ACTIVE
    found = None if active else _scan(visit, job)
    context: dict[str, Any] = {"scan": found}
    if found is not None:
        rows, pages, near = found.rows(asked.cut, asked.page) if asked.page else ([], 0, [])
        context |= {"charts": found.charts(asked.cut), "answer": found.answer(asked.cut), "ends": found.ends}
        context |= {"beyond": rows, "pages": pages, "near": near, "page": min(asked.page, pages)}
        context["elsewhere"] = sorted(asked.released - {shown.view.id for shown in rows})
    safety = (job.result or {}).get("safety")
    table = compared(*(Figures.model_validate(safety[when]) for when in ("before", "after"))) if safety else None
    return visit.show(
        "job.html",
        409 if asked.problem else 200,
        job=job,
        asked=asked,
        events=_events(visit, job),
        names=_names(visit, [job]),
        active=active,
        withheld=job.status == "failed" and (job.error or {}).get("code") == UNSAFE,
        tone={"succeeded": "pass", "failed": "fail"}.get(job.status, "warn"),
        safety=safety,
        table=table,
        certificate=certificate(folder) if job.status in ENDED else None,
        downloads=[] if active else results(folder),
        details=text.flatten({"method": job.method, "metadata": job.labels or {}, "policy": job.policy}),
        **context,
    )


def _folder(visit: Visit, job: Job) -> Path:
    return visit.gateway.settings.job_folder(job.id)


def _scan(visit: Visit, job: Job) -> Scan | None:
    return read_scan(_folder(visit, job) / "scan")


def _events(visit: Visit, job: Job) -> list[Event]:
    return visit.gateway.store.page(Event, job.project_id, Page(EVENTS), Event.job_id == job.id)[0]


@router.get("/jobs/{id}/files/{name:path}")
def download(id: str, name: str, visit: Visiting) -> Response:
    """A result of a job, to be saved. Reports open in the browser, as pages of no site."""
    path = _folder(visit, visit.get(id)) / name
    if name not in {one.path for one in RESULTS} or not path.is_file():
        raise Missing("file", name)
    if name.endswith(".html"):
        headers = {**HEADERS, "Content-Security-Policy": "sandbox allow-scripts"}
        return FileResponse(path, media_type="text/html", headers=headers)
    name = f"{id}-{path.name}"
    return FileResponse(path, media_type="application/octet-stream", filename=name, headers=HEADERS)


# Models, health, audit


@router.get("/models")
def models(visit: Visiting, after: Annotated[str | None, Query(max_length=255)] = None) -> Response:
    store, project = visit.gateway.store, visit.caller.project
    found, more = store.page(Model, project, Page(JOBS, after))
    settings = visit.gateway.settings
    own = [(model, certificate(settings.job_folder(model.job_id))) for model in found]
    return visit.show("models.html", own=own, base=settings.models, older=found[-1].id if more else "")


@router.post("/models/delete")
def delete_model(visit: Visiting, form: Form) -> Response:
    """Take a model out of service, as the API does."""
    name = field_text(form, "model")
    visit.gateway.store.delete_model(visit.caller, name)
    visit.gateway.chats.forget(name)
    return redirect("/models")


@router.get("/health")
def health(visit: Visiting) -> Response:
    """What the jobs need: the database, the files, a worker, room on the disk."""
    store, settings = visit.gateway.store, visit.gateway.settings
    began = time.perf_counter()
    counts = store.counts()
    took = time.perf_counter() - began
    works, oldest = store.working()
    idle = oldest is not None and not works and time.time() - oldest > SILENT
    waits = sum(counts.get(status, 0) for status in ACTIVE) - works
    disk, there = shutil.disk_usage(settings.folder), visit.gateway.content.ready()
    free, total = (size(count, binary=True) for count in (disk.free, disk.total))
    since = "" if oldest is None else f", the oldest for {text.duration(max(time.time() - oldest, 0.0))}"
    checks = [
        ("pass", "Database", f"{store.reader.dialect.name} answers in {1000 * took:.0f} ms"),
        ("pass" if there else "fail", "Files", "can be reached" if there else "cannot be reached"),
        ("fail" if idle else "pass", "Worker", "jobs wait, and none runs" if idle else f"running: {works}"),
        ("warn" if idle else "pass", "Queue", f"waiting: {waits}{since}"),
        ("warn" if disk.free < (1 - FULL) * disk.total else "pass", "Disk", f"{free} free of {total}"),
    ]
    return visit.show("health.html", checks=checks, counts=counts)


@router.get("/audit")
def audit(visit: Visiting, before: int | None = Query(None, ge=0, lt=2**62)) -> Response:
    store, project = visit.gateway.store, visit.caller.project
    found = store.audits(project, LINES + 1, before)
    keys = {key.id: key.name for key in store.all_keys(project)}
    older = found[LINES - 1].n if len(found) > LINES else None
    return visit.show("audit.html", lines=found[:LINES], keys=keys, older=older, flatten=text.flatten)


# The scan of a job, as its folder holds it


@dataclass(frozen=True, eq=False)
class Scan:
    """A finished scan. Arrays are aligned with ``scores``; ``views`` has the tokens of the rows that the report shows."""

    folder: Path
    manifest: ScanManifest
    scores: Scores
    removed: Bools
    categories: Coded
    cuts: Mapping[str, Cut]
    views: Views

    @property
    def at(self) -> float:
        """The cut of the largest group of rows, where a moved one starts."""
        counts = Coded.of(self.scores.shapes).counts()
        return self.cuts[max(counts, key=lambda name: counts[name])].value

    @property
    def ends(self) -> tuple[float, float]:
        """A little under the lowest score, and a little over the highest: the page rounds what is chosen."""
        low, high = float(self.scores.values.min()), float(self.scores.values.max())
        return low - 0.01 * (high - low or 1.0), high + 0.01 * (high - low or 1.0)

    def moved(self, value: float | None) -> Bools:
        """The rows that a cut at ``value`` takes; without one, those that the scan took."""
        return self.removed if value is None else self.scores.values > value

    def charts(self, value: float | None) -> tuple[Chart, ...]:
        """The report's own charts, with the cut at ``value``."""
        at = self.cuts if value is None else dict.fromkeys(self.cuts, Cut(value, "fixed"))
        charts = score_charts(self.scores, self.moved(value), at, self.manifest.settings.selector)
        return charts if value is not None else charts + category_chart(self.manifest.results.categories)

    def answer(self, value: float | None) -> dict[str, Any]:
        """What a cut does: how many rows go, and which of them would not, or would, by the scan's own."""
        removed, moved = self.moved(value), value is not None
        counts = {"rows": len(removed), "go": int(removed.sum()), "moved": moved, "value": value if moved else self.at}
        more, fewer = self._named(removed & ~self.removed), self._named(self.removed & ~removed)
        return {**counts, "more": more, "fewer": fewer}

    def _named(self, which: Bools) -> dict[str, Any]:
        rows = self.scores.rows[which]
        return {"count": len(rows), "rows": ", ".join(text.number(int(row)) for row in rows[:NAMED]), "most": NAMED}

    def rows(self, value: float | None, page: int) -> tuple[list[ShownRow], int, list[ShownRow]]:
        """A page of the rows that go, highest scores first; how many pages there are; and the kept rows next to the cut."""
        removed = self.moved(value)
        order = np.argsort(-self.scores.values, kind="stable")
        out = order[removed[order]]
        reference = references(self._view(i, value, {}) for i in order[:SHOWN].tolist())
        pages = max(math.ceil(len(out) / ROWS), 1)
        page = min(max(page, 1), pages)
        shown = out[(page - 1) * ROWS : page * ROWS]
        near = order[~removed[order]][:NEAR]
        texts = self._texts(np.concatenate([shown, near]))
        go, stay = ([self._view(i, value, texts) for i in part.tolist()] for part in (shown, near))
        return show_rows(go, reference, BYTES), pages, show_rows(stay, reference, BYTES)

    def _view(self, i: int, value: float | None, texts: Mapping[int, str]) -> RowView:
        scores = self.scores
        row, at = int(scores.rows[i]), self.cuts[scores.shapes[i]].value if value is None else value
        pieces = self.views.get(row) or ([(texts[i], "row", None)] if i in texts else [])
        return replace(row_view(scores, i, at, self.categories[i], pieces), shape="")

    def _texts(self, wanted: Ints) -> dict[int, str]:
        """The beginning of rows whose tokens were not kept, from the scan's files of rows, which hold a row a line."""
        found = {}
        for name, own in (("removed.jsonl", self.removed), ("kept.jsonl", ~self.removed)):
            bare = (i for i in wanted.tolist() if own[i] and int(self.scores.rows[i]) not in self.views)
            lines = {int(own[:i].sum()): i for i in bare}
            if lines and (self.folder / name).is_file():
                with (self.folder / name).open(encoding="utf-8", errors="backslashreplace", newline="\n") as source:
                    for at, line in enumerate(islice(source, max(lines) + 1)):
                        if at in lines:
                            found[lines[at]] = line[:LONGEST]
        return found


def read_scan(folder: Path) -> Scan | None:
    """The finished scan in a folder; None if there is none, or while it is written anew."""
    try:
        return _read_scan(folder, (folder / "manifest.json").stat().st_mtime_ns)
    except (OSError, GradShieldError, ValueError, KeyError):
        return None


@lru_cache(maxsize=4)
def _read_scan(folder: Path, _changed: int) -> Scan:
    manifest = runs.read_manifest(folder, ScanManifest)
    scores, removed, categories, *_ = cuts.read_scores(folder, manifest)
    if not len(removed) or len(removed) != manifest.results.scored:
        raise ValueError("the scores and the manifest are of two scans")
    return Scan(folder, manifest, scores, removed, categories, cuts.stored_cuts(manifest.results), stored_views(folder))
