"""The page of one model's exam: its safety and utility by each judge, and the answers behind every figure.

``write(whole, path)`` takes ``title``, ``figures`` (``judges``, ``over_refusal``, ``utility``, ``undecided``, ``empty``, if
measured), ``agreement`` (per pair of judges: ``judges``, ``kappa``, ``low``, ``high``, ``n``, ``differ``), ``harness`` (rates by
name), ``asked``, ``lookalikes`` and ``task`` (answers as in ``outputs.jsonl``), ``command``, ``versions``, ``model`` and
``settings`` as in the manifest, and ``files`` (names to paths relative to the page).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradshield.report import sheet
from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.frame import Status
from gradshield.report.lines import barred, limit_line, percent_axis, worded
from gradshield.report.pool import TARGET, asr_of, usable
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry
from gradshield.report.text import chart_text, flatten, one_line, percent, shorten, visible
from gradshield.stats import wilson

SHOWN = 60  # answers per table; outputs.jsonl has all of them
_LONG = 500  # characters of a request or an answer
UNSORTED = "without a category"
PHRASES = "refusal-phrases"  # the judge of look-alikes
BY_LIKELIHOOD = "– (scored by likelihood)"

Answer = Mapping[str, Any]


def write(whole: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page of an exam, as one self-contained HTML file."""
    return sheet.write(page(whole), path)


def page(whole: Mapping[str, Any]) -> Sheet:
    """The page, unrendered."""
    found: Mapping[str, Any] = whole.get("figures") or {}
    asked: Sequence[Answer] = whole.get("asked") or ()
    tone, standing = _verdict(found)
    model = whole.get("model") or {}
    made = [(name.capitalize(), str(model[name])) for name in ("name", "adapter", "sha256") if model.get(name)]
    rates: dict[str, Any] = {f"ASR, {judge}": rate for judge, rate in asr_of(found).items()}
    rates |= {"over-refusal": found.get("over_refusal"), "utility": found.get("utility")}
    return Sheet(
        title=str(whole.get("title") or "Evaluation"),
        kind="evaluation",
        tone=tone,
        standing=standing,
        verdict=_sentence(found),
        facts=_facts(found),
        figures=tuple(
            (name, percent(rate["rate"]), f"n = {rate['n']}") for name, rate in rates.items() if usable(rate)
        ),
        sections=(
            _rates(rates | (whole.get("harness") or {})),
            _categories(asked, list(asr_of(found))),
            _judges(whole.get("agreement") or (), asked),
            _unsafe(asked),
            _refused(whole.get("lookalikes") or ()),
            _missed(whole.get("task") or ()),
        ),
        command=str(whole.get("command", "")),
        versions=whole.get("versions") or {},
        made=tuple(made),
        links=tuple((str(name), str(path)) for name, path in (whole.get("files") or {}).items()),
        folded=tuple(flatten(whole.get("settings") or {})),
    )


def _verdict(found: Mapping[str, Any]) -> tuple[Status, str]:
    """A pass only if every judge's upper bound is under the target: a low rate of few answers proves little."""
    rates = list(asr_of(found).values())
    if not rates:
        return "warn", "Safety was not measured"
    if any(rate["rate"] > TARGET for rate in rates):
        return "fail", f"The ASR is above {100 * TARGET:g} %"
    if usable(found.get("empty")) and found["empty"]["high"] > TARGET:
        return "warn", f"The ASR says little: {percent(found['empty']['rate'])} of the answers are empty"
    if any(rate["high"] > TARGET for rate in rates):
        return "warn", f"The ASR is {100 * TARGET:g} % or less, but its interval reaches beyond"
    return "pass", f"The ASR and its interval are under {100 * TARGET:g} % by every judge"


def _sentence(found: Mapping[str, Any]) -> str:
    parts = []
    if rates := asr_of(found):
        judge = max(rates, key=lambda name: float(rates[name]["rate"]))
        parts.append(
            f"by its worst judge, {judge}, the model complies with {percent(rates[judge]['rate'])} of the requests"
        )
    if usable(found.get("over_refusal")):
        parts.append(f"it refuses {percent(found['over_refusal']['rate'])} of harmless look-alikes")
    if usable(found.get("utility")):
        parts.append(f"its utility is {percent(found['utility']['rate'])}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Only the tasks of a harness were run."


def _facts(found: Mapping[str, Any]) -> tuple[str, ...]:
    facts = [f"ASR by {judge}: {worded(rate)}." for judge, rate in asr_of(found).items()]
    facts += [
        f"The judge {judge} could not decide on {rate['k']} of {rate['n']} answers; these count as unsafe."
        for judge, rate in (found.get("undecided") or {}).items()
        if usable(rate)
    ]
    if usable(found.get("empty")):
        facts.append(f"Empty answers to harmful requests, which no judge counts as unsafe: {worded(found['empty'])}.")
    return tuple(facts)


def _rates(rates: Mapping[str, Any]) -> Section:
    lines = tuple((name, rate_entry(rate)) for name, rate in rates.items() if usable(rate))
    lead = (
        "ASR is the share of harmful requests that the model complies with, over-refusal the share of harmless look-alikes that "
        "it refuses. Intervals are 95 %."
    )
    return Section(
        "measured", "Measured", lead, tables=(Table(("Measured", "Rate"), lines),) if lines else (), nav="Figures"
    )


def _categories(asked: Sequence[Answer], judges: Sequence[str]) -> Section:
    """ASR by kind of request, the worst first."""
    kinds: dict[str, list[Answer]] = {}
    for row in asked:
        kinds.setdefault(str(row.get("category") or UNSORTED), []).append(row)
    title = "By kind of request"
    if len(kinds) < 2 or not judges:
        return Section("categories", title)
    rates = {
        kind: [asdict(wilson(sum(_attack(row, judge) for row in rows), len(rows))) for judge in judges]
        for kind, rows in kinds.items()
    }
    worst = sorted(rates, key=lambda kind: (-max(rate["rate"] for rate in rates[kind]), kind))
    names = [chart_text(kind, 24) for kind in worst]
    traces = []
    for i, judge in enumerate(judges):
        (trace,) = barred(judge, range(len(worst)), [rates[kind][i] for kind in worst], i)
        nudge = (i - (len(judges) - 1) / 2) * 0.16  # so that no bar hides another
        traces.append(trace | {"mode": "markers", "x": [at + nudge for at in range(len(worst))]})
    figure = base_layout(height=360, showlegend=True)
    figure["xaxis"] = axis_style("kind of request") | {
        "tickvals": list(range(len(worst))),
        "ticktext": names,
        "fixedrange": True,
    }
    figure["yaxis"] = percent_axis("ASR", [rate for kind in worst for rate in rates[kind]])
    figure["shapes"] = [limit_line(TARGET)]
    table = [("Kind of request", *judges), *((kind, *map(worded, rates[kind])) for kind in worst)]
    caption = "Bars are 95 % intervals; kinds with few requests have wide ones."
    chart = Chart("kinds", "ASR by kind of request", caption, {"data": traces, "layout": figure}, tuple(table), False)
    return Section("categories", title, charts=(chart,), nav="Kinds")


def _judges(agreement: Sequence[Mapping[str, Any]], asked: Sequence[Answer]) -> Section:
    if not agreement:
        return Section("judges", "Where the judges differ")
    lines, differ = [], dict[int, None]()
    for one in agreement:
        kappa = "– (one verdict for all)" if one["kappa"] is None else f"{one['kappa']:.2f}"
        bounds = "" if one["kappa"] is None else f"{one['low']:.2f} to {one['high']:.2f}"
        lines.append((" / ".join(one["judges"]), Entry(kappa, bounds), str(one["n"]), str(len(one["differ"]))))
        differ |= dict.fromkeys(one["differ"])
    tables = [Table(("Judges", "Cohen's kappa", "decided by both", "answers they differ on"), tuple(lines))]
    if differ:
        tables.append(_answers([asked[i] for i in differ if i < len(asked)], "Answers they differ on"))
    lead = "Kappa is the agreement beyond chance, with its bootstrap interval: 1 is full agreement, 0 none."
    return Section("judges", "Where the judges differ", lead, tables=tuple(tables), nav="Judges")


def _unsafe(asked: Sequence[Answer]) -> Section:
    rows = [row for row in asked if any(_attack(row, judge) for judge in row["verdicts"])]
    if not rows:
        return Section("unsafe", "Answers judged unsafe", "There are none." if asked else "")
    return Section("unsafe", "Answers judged unsafe", tables=(_answers(rows),), search="Find a request", nav="Unsafe")


def _refused(lookalikes: Sequence[Answer]) -> Section:
    rows = [row for row in lookalikes if not _attack(row, PHRASES)]
    if not rows:
        return Section("refused", "Harmless requests refused")
    return Section("refused", "Harmless requests refused", tables=(_answers(rows),), nav="Refused")


def _missed(task: Sequence[Answer]) -> Section:
    """The task rows that scored below 1, lowest first."""
    rows = sorted((row for row in task if float(row["score"]) < 1), key=lambda row: float(row["score"]))
    if not rows:
        return Section("missed", "Task rows that scored lowest")
    lines = tuple(
        (
            _text(row["prompt"]),
            _words(row.get("answer", BY_LIKELIHOOD)),
            _text(row.get("reference", "")),
            Entry(f"{row['score']:.3g}", key=float(row["score"])),
        )
        for row in rows[:SHOWN]
    )
    table = Table(("Row", "Answer", "Reference", "Score"), lines, hint=_more(len(rows)))
    return Section("missed", "Task rows that scored lowest", tables=(table,), nav="Task")


def _answers(rows: Sequence[Answer], title: str = "") -> Table:
    lines = tuple((_text(row["prompt"]), _words(row["answer"]), _verdicts(row["verdicts"])) for row in rows[:SHOWN])
    return Table(("Request", "Answer", "Verdicts"), lines, title=title, hint=_more(len(rows)))


def _verdicts(verdicts: Mapping[str, Any]) -> Entry:
    words = {True: "unsafe", False: "safe", None: "undecided"}
    text = ", ".join(f"{judge}: {words[found['unsafe']]}" for judge, found in verdicts.items())
    reasons = "; ".join(
        one_line(visible(str(found["reason"])), 120) for found in verdicts.values() if found.get("reason")
    )
    return Entry(text, reasons)


def _text(value: Any) -> str:
    """A request (text or chat turns) or an answer, shortened for a table."""
    if not isinstance(value, str) and isinstance(value, Sequence):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value if isinstance(turn, Mapping))
    return shorten(visible(str(value)[: 2 * _LONG]), _LONG)


def _words(value: Any) -> Entry:
    return Entry(_text(value), look="words")


def _attack(row: Answer, judge: str) -> bool:
    """Whether the attack succeeded; undecided counts as a success."""
    return row["verdicts"][judge]["unsafe"] is not False


def _more(count: int) -> str:
    return f"{count - SHOWN:,} more in outputs.jsonl." if count > SHOWN else ""
