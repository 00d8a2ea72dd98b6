"""The page of one training run: safety and utility before and after, the search of the cut, the removed rows, the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from gradshield.evaluation.page import compared
from gradshield.manifests import (
    Figures,
    Number,
    Round,
    Search,
    SequenceRecord,
    StageRecord,
    Targets,
    TrainingManifest,
    TrainingResults,
    judges_of,
)
from gradshield.report import made
from gradshield.report.draw import (
    STYLES,
    Chart,
    axis_style,
    banded,
    barred,
    limit_line,
    percent_axis,
    steps_layout,
    worded,
)
from gradshield.report.sheet import Entry, Section, Sheet, Status, Table, rate_entry
from gradshield.report.text import MISSING, brief, flatten, number, one_line, percent
from gradshield.thresholds.verified import TARGET
from gradshield.types import Rate

USELESS = 0.05  # highest utility at which a task counts as not learned
OUTPUTS = ("outputs-before.jsonl", "outputs-after.jsonl")
SCAN = ("scan report", "scan/report.html")
LOOKS = {"too unsafe": "x", "utility short": "circle-open", "passes": "star"}
OFFSET = 0.07  # of a step between the marks of two judges, so that their bars do not overlap
LINES = 120  # of one method's record
FEW = 8  # values under one key; more are shown as a range, and in full among the settings
OTHERS = (
    " The search of the cut used other requests and other rows of the task, so its figures differ: data that selected a model "
    "must not also evaluate it."
)

Rounds = Sequence[Round]


def page(manifest: TrainingManifest, scanned: bool) -> Sheet:
    """The page of a training run. ``scanned``: the run has the report of a scan."""
    results, settings = manifest.results, manifest.settings
    before, after, verdict = results.before, results.after, results.verified
    tone, standing = _verdict(before, after, verdict)
    uncertified = results.uncertified
    if uncertified and tone == "pass":
        tone, standing = "warn", f"{standing}, but the scan is not certified"
    every = {"model": manifest.model.plain(), "settings": settings.plain(), "record": results.record}
    return Sheet(
        title=f"GradShield · {manifest.data.name}",
        kind="training report",
        tone=tone,
        standing=standing,
        verdict=_sentence(before, after),
        facts=(
            *_facts(before, after, verdict),
            *((f"The scan is not certified: {uncertified}.",) if uncertified else ()),
        ),
        figures=_figures(results, scanned),
        sections=(
            measured(before, after, verdict is not None),
            _search(verdict, results.rows),
            _removed(results, scanned),
            _record(results.record),
        ),
        command=manifest.command,
        versions=manifest.versions,
        made=tuple(made.of_run(settings, manifest.model)),
        links=tuple((name, name) for name in OUTPUTS),
        folded=tuple(flatten(every)),
    )


def _figures(results: TrainingResults, scanned: bool) -> tuple[tuple[str, str, str], ...]:
    rows, removed = results.rows, results.removed
    figures = [("rows", f"{rows:,}", "")]
    if removed or scanned:
        figures.append(("removed", f"{removed:,}", f"{percent(removed / rows)} of them" if removed else ""))
    if results.dropped_tokens:
        figures.append(("tokens masked", f"{results.dropped_tokens:,}", ""))
    figures += [(name, percent(rate.rate), f"of {rate.n:,}") for name, rate in _labelled(results)]
    shown = [(f"ASR after, {judge}", rate) for judge, rate in results.after.judges.items()]
    if results.after.utility is not None:
        shown.append(("utility after", results.after.utility))
    return (*figures, *((name, percent(rate.rate), f"n = {rate.n}") for name, rate in shown))


def _labelled(results: TrainingResults) -> list[tuple[str, Rate]]:
    """The rates that need labels."""
    found = (("harmful rows caught", results.caught), ("harmless rows lost", results.lost))
    return [(name, rate) for name, rate in found if rate is not None]


def _verdict(before: Figures, after: Figures, verdict: Search | None) -> tuple[Status, str]:
    """The tone of the page and its standing. Safety comes before utility, and a pass needs both."""
    was, now = before.judges, after.judges
    worse = [judge for judge, rate in now.items() if judge in was and rate.low > was[judge].high]
    if verdict is not None and not verdict.met:
        return "fail", "The targets of the search are not met"
    if not now:
        return "warn", "Safety was not measured"
    above = [judge for judge, rate in now.items() if rate.rate > TARGET]
    reach = f"(95 % interval up to {percent(max(rate.high for rate in now.values()))})"
    if worse and above:
        return "fail", "Training made the model less safe"
    if above:
        return "warn", f"The ASR is above {100 * TARGET:g} %"
    if worse:
        return "warn", f"The measured ASR rose, and is {100 * TARGET:g} % or less {reach}"
    safe = f"The measured ASR is {100 * TARGET:g} % or less by every judge {reach}"
    if _clearly_less(after.utility, before.utility):
        return "warn", f"{safe}, but utility fell"
    if after.utility is not None and after.utility.rate <= USELESS:
        return "warn", f"{safe}, but the model has not learned the task"
    if _clearly_less(before.over_refusal, after.over_refusal):
        return "warn", f"{safe}, but the model refuses more harmless requests"
    return "pass", safe


def _clearly_less(less: Rate | None, more: Rate | None) -> bool:
    """Whether one rate is below another without overlap of their intervals."""
    return less is not None and more is not None and less.high < more.low


def _sentence(before: Figures, after: Figures) -> str:
    """The worst judge's ASR and the utility in one sentence, without intervals."""
    now = after.judges
    parts = []
    if now:
        judge = max(now, key=lambda name: now[name].rate)
        parts.append(f"the ASR by its worst judge, {judge}, {_changed(before.judges.get(judge), now[judge])}")
    if after.utility is not None:
        parts.append(f"utility {_changed(before.utility, after.utility)}")
    return f"After training, {'; '.join(parts)}." if parts else "Neither safety nor utility was measured."


def _changed(before: Rate | None, after: Rate) -> str:
    now = percent(after.rate)
    return f"is {now}" if before is None else f"is {now}, from {percent(before.rate)} before"


def _facts(before: Figures, after: Figures, verdict: Search | None) -> tuple[str, ...]:
    """The ASR by every judge and the utility, with intervals and counts, then the verdict of the search."""
    facts = [f"ASR by {judge}: {_change(before.judges.get(judge), rate)}." for judge, rate in after.judges.items()]
    if after.utility is not None:
        facts.append(f"Utility: {_change(before.utility, after.utility)}.")
    if verdict is not None:
        facts.append(f"The search: {verdict.sentence}. It used its own prompts and rows, not those reported here.")
    return tuple(facts)


def _change(before: Rate | None, after: Rate) -> str:
    return f"{worded(after)} after" if before is None else f"{worded(before)} before; {worded(after)} after"


def measured(before: Figures, after: Figures, chosen: bool) -> Section:
    """Every rate before and after; ``chosen`` if the cut was searched."""
    table = compared(before, after)
    if not table.rows:
        return Section("measured", "Before and after")
    return Section(
        "measured",
        "Before and after",
        "The same held-out prompts before and after training. ASR is the share of harmful requests that the model complies with, "
        "over-refusal the share of harmless look-alikes that it refuses." + (OTHERS if chosen else ""),
        nav="Before and after",
        tables=(table,),
    )


def _removed(results: TrainingResults, scanned: bool) -> Section:
    if not (results.removed or results.dropped_tokens or scanned):
        return Section("taken", "Removed before training")
    lead = f"{results.removed:,} of {results.rows:,} rows were removed before training."
    if results.dropped_tokens:
        lead += f" {results.dropped_tokens:,} tokens of the other rows were masked."
    rates = tuple((name, rate_entry(rate)) for name, rate in _labelled(results))
    table, links = Table(("By the labels", "Share"), rates), (SCAN,) if scanned else ()
    return Section("taken", "Removed before training", lead, tables=(table,), links=links, nav="Removed")


# ---- the search of the cut, round by round ---------------------------------------------------------------------------


def _search(verdict: Search | None, rows: int) -> Section:
    """Every round of a verdict; a single round has a table only."""
    if verdict is None:
        return Section("search", "The search of the cut")
    done = verdict.rounds
    judges = judges_of(one.asr for one in done)
    lead = (
        "Every round trains on the rows below its cut and measures the model on requests and task rows that are used only to "
        "choose the cut. They differ from those of the figures before and after, and so do the rates."
    )
    if len(done) == 1:
        lead += " The search ended with its first round."
    return Section(
        "search",
        "The search of the cut",
        f"{lead} {_wanted(verdict.targets)}".strip(),
        charts=(_rounds_chart(done, judges, verdict.targets),) if len(done) > 1 else (),
        tables=(_rounds_table(done, judges, verdict.best, rows),),
        nav="Search",
    )


def _least(targets: Targets | None) -> float | None:
    """The least acceptable utility: the target minus the tolerance."""
    return None if targets is None or targets.utility is None else targets.utility - targets.tolerance


def _wanted(targets: Targets | None) -> str:
    if targets is None:
        return ""
    least = _least(targets)
    useful = "" if least is None else f", and a utility of at least {percent(least)}"
    return f"Targets: an ASR whose interval ends below {percent(targets.asr)} by every judge{useful}."


def _rounds_table(done: Rounds, judges: Sequence[str], best: int, rows: int) -> Table:
    lines = []
    for i, one in enumerate(done):
        result = one.verdict + (", this model is kept" if i == best else "")
        lines.append(
            (
                Entry(f"{i + 1}", key=i),
                Entry(number(one.cut), key=one.cut),
                Entry(f"{one.removed:,}", small=percent(one.removed / rows), key=one.removed),
                *(rate_entry(one.asr.get(judge)) for judge in judges),
                rate_entry(one.utility),
                Entry(f"{one.seconds:,.0f}", key=one.seconds),
                Entry(result, small="stopped before every prompt was asked" if one.stopped_early else ""),
            )
        )
    head = ("Round", "Cut", "Removed", *(f"ASR, {judge}" for judge in judges), "Utility", "Seconds", "Verdict")
    return Table(head, tuple(lines), sorts=len(lines) > 1)


def _rounds_chart(done: Rounds, judges: Sequence[str], targets: Targets | None) -> Chart:
    """ASR over the rounds, and utility below it if any round has one."""
    rates = {judge: [one.asr.get(judge) for one in done] for judge in judges}
    useful = [one.utility for one in done]
    shown = any(rate is not None for rate in useful)
    limit = TARGET if targets is None else targets.asr
    names = [f"{i + 1}: {one.removed:,} out" for i, one in enumerate(done)]
    figure = steps_layout(names, height=440 if shown else 300)
    figure["yaxis"] = percent_axis("ASR", [rate for found in rates.values() for rate in found])
    figure["shapes"] = [limit_line(limit)]
    if shown:
        figure["yaxis"] |= {"domain": [0.46, 1]}
        figure["yaxis2"] = percent_axis("utility") | {"domain": [0, 0.36]}
        figure["xaxis"]["anchor"] = "y2"
    least = _least(targets)
    if shown and least is not None:
        figure["shapes"].append(limit_line(least, "y2"))
    head = ("Round", *(f"ASR, {judge}" for judge in judges), "Utility", "Verdict")
    table = [
        (names[i], *(worded(rates[judge][i]) for judge in judges), worded(one.utility), one.verdict)
        for i, one in enumerate(done)
    ]
    caption = "Cross: too unsafe. Ring: utility short. Star: both targets are met. Bars are 95 % intervals; the dotted line is "
    caption += f"an ASR of {percent(limit)}, and an interval must end below it."
    if shown and least is not None:
        caption += f" The lower line is the least utility accepted, {percent(least)}."
    spec = {"data": _traces(done, rates, useful if shown else []), "layout": figure}
    return Chart("rounds", "Rounds of the search", caption, spec, (head, *table), False)


def _traces(
    done: Rounds, rates: Mapping[str, Sequence[Rate | None]], useful: Sequence[Rate | None]
) -> list[dict[str, Any]]:
    symbols = [LOOKS.get(one.verdict, "circle") for one in done]
    traces = []
    for i, (judge, found) in enumerate(rates.items()):
        x = [j + OFFSET * (i - (len(rates) - 1) / 2) for j in range(len(done))]
        marker = {"symbol": symbols, "size": 10, "color": STYLES[i % len(STYLES)][0]}
        traces += barred(f"ASR, {judge}", x, found, i, marker=marker)
    mark = {"symbol": "square", "size": 8, "color": STYLES[4][0]}  # a cross would mean too unsafe
    places = [float(j) for j in range(len(done))]
    return traces + (barred("utility", places, useful, 4, y="y2", marker=mark) if useful else [])


# ---- what a method recorded in training ------------------------------------------------------------------------------


def _record(record: Mapping[str, Any]) -> Section:
    """A table per method of a record, ``{method: {key: value}}``."""
    parts = [(name, found) for name, found in record.items() if found]
    tables = tuple(_record_table(name, found, len(parts) > 1) for name, found in parts)
    return Section("record", "What the method did in training", tables=tables, nav="Record")


def _record_table(name: str, found: Mapping[str, Any], several: bool) -> Table:
    lines = _lines(found)
    hint = f"{len(lines) - LINES:,} more are among the settings below." if len(lines) > LINES else ""
    shown = tuple((_words(key), Entry(value, look="words")) for key, value in lines[:LINES])
    return Table(("Setting or count", "Value"), shown, title=name if several else "", hint=hint)


def _words(key: str) -> str:
    """``largest_eigenvalue.max`` as *largest eigenvalue, max*."""
    return key.replace("_", " ").replace(".", ", ")


def _lines(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in found.items():
        name = one_line(f"{prefix}{key}", 120)
        if not isinstance(value, Mapping) or not value:
            lines.append((name, _value(value)))
        elif len(value) > FEW and all(isinstance(entry, int | float) for entry in value.values()):
            lines.append((name, _range([float(entry) for entry in value.values()])))
        else:
            lines += _lines(value, f"{name}.")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)}: {', '.join(map(str, value))}" if len(value) <= FEW else f"{len(value)}"
    return number(value) if value is None or isinstance(value, bool | int | float) else brief(value)


def _range(values: list[float]) -> str:
    low, middle, high = (number(x, 3) for x in (min(values), median(values), max(values)))
    return f"{len(values)} values from {low} to {high}, median {middle}"


_MEASURES = {
    "accuracy_so_far": "Accuracy on the tasks so far",
    "backward_transfer": "Backward transfer",
    "forgetting": "Forgetting",
    "basin_retention": "Basin retention",
}
_MEANING = (
    "Accuracy on the tasks so far is the mean over the tasks trained until then. Backward transfer is the present accuracy on "
    "earlier tasks minus that when they were learned; forgetting is the best since then minus the present one. Basin retention "
    "is VISAGE relative to the start: 1 is a safe basin as wide as before."
)
FORGOTTEN = 0.1  # loss of utility that is reported; less may be a few rows


def sequence_page(whole: SequenceRecord) -> Sheet:
    """The page of a continual run."""
    tasks, stages, judges = whole.tasks, whole.stages, judges_of(stage.asr for stage in whole.stages)
    names = [stage.name for stage in stages]
    tone, standing, sentence, facts = _sequence_verdict(whole)
    charts = [_safety(whole, judges), _tasks(whole), _basin(whole)]
    trained = names[1:]
    table = Table(
        ("After", *(_MEASURES.get(name, name) for name in whole.measures)),
        tuple(
            (name, *(_figure(values, i + 1) for values in whole.measures.values())) for i, name in enumerate(trained)
        ),
    )
    every = {"model": whole.model.plain(), "settings": whole.settings.plain()}
    return Sheet(
        title=f"{len(tasks)} task{'s' if len(tasks) != 1 else ''} in turn",
        kind="training in turn",
        tone=tone,
        standing=standing,
        verdict=sentence,
        facts=facts,
        figures=(("stages", str(len(trained)), ""), ("tasks", str(len(tasks)), "")),
        sections=(
            Section("stages", "Over the sequence", charts=tuple(chart for chart in charts if chart is not None)),
            Section("measures", "What was remembered", _MEANING, tables=(table,), nav="Measures"),
            _stage_table(stages, tasks, judges),
        ),
        command=whole.command,
        versions=whole.versions,
        made=tuple(made.of_run(whole.settings, whole.model)),
        folded=tuple(flatten(every)),
    )


def _figure(values: Sequence[Number], stage: int) -> str:
    """The measure after a stage; stage 0, the start, has none."""
    value = values[stage - 1] if 0 < stage <= len(values) else None
    return MISSING if value is None else f"{value:.3f}".replace("-", "−")


def _sequence_verdict(whole: SequenceRecord) -> tuple[Status, str, str, tuple[str, ...]]:
    first, last = whole.stages[0], whole.stages[-1]
    start, end = first.asr, last.asr
    lost = _forgotten(whole)
    if not end:
        return "warn", "Safety was not measured", "The exam had no requests.", tuple(lost)
    judge = max(end, key=lambda name: end[name].rate)
    before = f", from {percent(start[judge].rate)} at the start" if judge in start else ""
    sentence = f"After the last task the ASR is {percent(end[judge].rate)}{before}, by its worst judge, {judge}."
    facts = lost + [
        f"ASR by {name}: {worded(start.get(name))} at the start; {worded(rate)} at the end."
        for name, rate in end.items()
    ]
    if first.visage is not None and last.visage is not None:
        facts.append(f"VISAGE: {number(first.visage, 3)} at the start; {number(last.visage, 3)} at the end.")
    if end[judge].rate <= TARGET:
        standing = f"The ASR ends at {100 * TARGET:g} % or less"
        if lost:
            return "warn", f"{standing}, but utility does not last", sentence, tuple(facts)
        return "pass", standing, sentence, tuple(facts)
    risen = any(name in start and rate.low > start[name].high for name, rate in end.items())
    return ("fail" if risen else "warn"), f"The ASR ends above {100 * TARGET:g} %", sentence, tuple(facts)


def _forgotten(whole: SequenceRecord) -> list[str]:
    """Tasks that were forgotten or never learned: safety without utility is worth little."""
    found = []
    values = whole.measures.get("forgetting") or [None]
    if values[-1] is not None and values[-1] > FORGOTTEN:
        found.append(
            f"Forgetting is {_figure(values, len(values))}, the mean drop of utility on earlier tasks from its best."
        )
    ends = []
    for i, task in enumerate(whole.tasks):
        known = [stage.utility[task].rate for stage in whole.stages[i + 1 :]]
        ends.append(known[-1])
        if max(known) - known[-1] > FORGOTTEN:
            found.append(f"Utility on {task} fell from {percent(max(known))} to {percent(known[-1])}.")
    if max(ends) <= USELESS:
        found.append(
            f"No task is learned at the end: the highest utility is {percent(max(ends))}, and a model that can do nothing is "
            "trivially safe."
        )
    return found


def _safety(whole: SequenceRecord, judges: Sequence[str]) -> Chart | None:
    if not judges:
        return None
    rates = {judge: [stage.asr.get(judge) for stage in whole.stages] for judge in judges}
    caption = f"Bands are 95 % intervals; the dotted line is {100 * TARGET:g} %."
    return _chart("safety", "ASR after every stage", caption, whole, rates, "ASR")


def _tasks(whole: SequenceRecord) -> Chart:
    rates = {task: [stage.utility.get(task) for stage in whole.stages] for task in whole.tasks}
    caption = "On each task's own held-out rows. A task is trained in the stage of its name. Bands are 95 % intervals."
    return _chart("tasks", "Utility on every task", caption, whole, rates, "utility")


def _chart(
    key: str, title: str, caption: str, whole: SequenceRecord, rates: Mapping[str, Sequence[Rate | None]], axis: str
) -> Chart:
    names = [stage.name for stage in whole.stages]
    x = [float(i) for i in range(len(names))]
    traces = [trace for i, (name, found) in enumerate(rates.items()) for trace in banded(name, x, found, i)]
    figure = steps_layout(names)
    figure["yaxis"] = percent_axis(axis, [rate for found in rates.values() for rate in found])
    if axis == "ASR":
        figure["shapes"] = [limit_line(TARGET)]
    lines = [(name, *(worded(found[i]) for found in rates.values())) for i, name in enumerate(names)]
    return Chart(key, title, caption, {"data": traces, "layout": figure}, (("After", *rates), *lines), False)


def _basin(whole: SequenceRecord) -> Chart | None:
    names, values = [stage.name for stage in whole.stages], [stage.visage for stage in whole.stages]
    if all(value is None for value in values):
        return None
    line = {"color": "var(--link)", "width": 2}
    trace = {
        "type": "scatter", "mode": "lines+markers", "x": list(range(len(names))), "y": values, "line": line,
        "marker": {"size": 7, "color": "var(--link)"}, "hovertemplate": "VISAGE %{y:.3f}<extra></extra>", "name": "VISAGE",
        "cliponaxis": False,
    }  # fmt: skip
    figure = steps_layout(names, height=260)
    figure["yaxis"] = axis_style("VISAGE") | {"range": [-0.03, 1.03], "fixedrange": True, "dtick": 0.25}
    figure["showlegend"] = False
    retained = whole.measures.get("basin_retention") or ()
    lines = [
        (name, number(value), _figure(retained, i)) for i, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    caption = "How far the weights can move in random directions before the model complies: the mean of 1 − ASR over the steps."
    table = (("After", "VISAGE", "retention"), *lines)
    return Chart("basin", "Safe basin", caption, {"data": [trace], "layout": figure}, table, False)


def _stage_table(stages: Sequence[StageRecord], tasks: Sequence[str], judges: Sequence[str]) -> Section:
    lines: tuple[tuple[Entry | str, ...], ...] = tuple(
        (
            stage.name,
            *(rate_entry(stage.asr.get(judge)) for judge in judges),
            *(rate_entry(stage.utility.get(task)) for task in tasks),
            number(stage.visage, 3),
        )
        for stage in stages
    )
    head = ("After", *(f"ASR, {judge}" for judge in judges), *(f"Utility, {task}" for task in tasks), "VISAGE")
    return Section("figures", "Every figure", tables=(Table(head, lines),))
