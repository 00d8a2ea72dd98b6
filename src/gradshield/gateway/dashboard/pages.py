"""The pages: what each shows, and what its forms do. They work without scripts; one script keeps progress live."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import FileResponse, RedirectResponse, Response
from jinja2.filters import do_filesizeformat as size
from starlette.datastructures import FormData

from gradshield.evaluation.page import compared
from gradshield.gateway.content import RESULTS, certificate, results
from gradshield.gateway.dashboard import scan as scans
from gradshield.gateway.dashboard.visit import HEADERS, Form, Visit, Visiting, field_text, page
from gradshield.gateway.dashboard.visit import router as router
from gradshield.gateway.database import Missing, Page, Refused
from gradshield.gateway.store import ACTIVE, ENDED, UNSAFE, name_of
from gradshield.gateway.tables import Event, File, Job, Model
from gradshield.manifests import Figures
from gradshield.report import text

JOBS, LINES, EVENTS = 20, 100, 30  # of a page
SILENT = 60  # seconds that a job may wait while no process has any
FULL = 0.9  # share of a disk


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
    return RedirectResponse(f"/jobs/{id}", 303)


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


def _scan(visit: Visit, job: Job) -> scans.Scan | None:
    return scans.read(_folder(visit, job) / "scan")


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
    return RedirectResponse("/models", 303)


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
