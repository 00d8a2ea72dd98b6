"""The page of training on one dataset after another: safety, every task and the safe basin, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradshield.manifests import Number, SequenceRecord, StageRecord, judges_of
from gradshield.report import made
from gradshield.report.draw import Chart, axis_style, banded, limit_line, percent_axis, steps_layout, worded
from gradshield.report.frame import Status
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry
from gradshield.report.text import MISSING, flatten, number, percent
from gradshield.thresholds.verified import TARGET
from gradshield.training.page import USELESS
from gradshield.types import Rate

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


def page(whole: SequenceRecord) -> Sheet:
    """The page of a continual run."""
    tasks, stages, judges = whole.tasks, whole.stages, judges_of(stage.asr for stage in whole.stages)
    names = [stage.name for stage in stages]
    tone, standing, sentence, facts = _verdict(whole)
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
            _table(stages, tasks, judges),
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


def _verdict(whole: SequenceRecord) -> tuple[Status, str, str, tuple[str, ...]]:
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


def _table(stages: Sequence[StageRecord], tasks: Sequence[str], judges: Sequence[str]) -> Section:
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
