"""The page of one model's exam: its safety and utility by each judge, and the answers behind every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.evaluation.asr import attack
from gradshield.manifests import EvaluationManifest, Figures, JudgeAgreement
from gradshield.report.draw import Chart, axis_style, barred, base_layout, limit_line, percent_axis, worded
from gradshield.report.sheet import Entry, Section, Sheet, Status, Table, rate_entry
from gradshield.report.text import chart_text, flatten, one_line, percent, shorten, visible
from gradshield.stats import wilson
from gradshield.thresholds.verified import TARGET
from gradshield.types import Rate

SHOWN = 60  # answers per table; outputs.jsonl has all of them
_LONG = 500  # characters of a request or an answer
UNSORTED = "without a category"
PHRASES = "refusal-phrases"  # the judge of look-alikes
FILES = (("every answer", "outputs.jsonl"), ("manifest", "manifest.json"))
BY_LIKELIHOOD = "– (scored by likelihood)"

Answer = Mapping[str, Any]


def page(manifest: EvaluationManifest, answers: Sequence[Answer]) -> Sheet:
    """The page of an exam.

    ``answers`` are those of ``outputs.jsonl``: to the requests, the look-alikes and the task rows, in this order.
    """
    found, model = manifest.results.figures, manifest.model
    requests, lookalikes, _ = manifest.settings.n
    asked = answers[:requests]
    tone, standing = _verdict(found)
    made = [("Name", model.name), ("Adapter", model.adapter), ("Sha256", model.sha256)]
    rates = {f"ASR, {judge}": rate for judge, rate in found.judges.items()}
    others = (("over-refusal", found.over_refusal), ("utility", found.utility))
    rates |= {name: rate for name, rate in others if rate is not None}
    return Sheet(
        title=f"How safe and useful is {model.name}?",
        kind="evaluation",
        tone=tone,
        standing=standing,
        verdict=_sentence(found),
        facts=_facts(found),
        figures=tuple((name, percent(rate.rate), f"n = {rate.n}") for name, rate in rates.items()),
        sections=(
            _rates(rates | manifest.results.harness),
            _categories(asked, list(found.judges)),
            _judges(manifest.results.agreement, asked),
            _unsafe(asked),
            _refused(answers[requests : requests + lookalikes]),
            _missed(answers[requests + lookalikes :]),
        ),
        command=manifest.command,
        versions=manifest.versions,
        made=tuple((name, value) for name, value in made if value),
        links=FILES,
        folded=tuple(flatten(manifest.settings.plain())),
    )


def _verdict(found: Figures) -> tuple[Status, str]:
    """A pass only if every judge's upper bound is under the target: a low rate of few answers proves little."""
    rates = found.judges.values()
    if not rates:
        return "warn", "Safety was not measured"
    if any(rate.rate > TARGET for rate in rates):
        return "fail", f"The ASR is above {100 * TARGET:g} %"
    if found.empty is not None and found.empty.high > TARGET:
        return "warn", f"The ASR says little: {percent(found.empty.rate)} of the answers are empty"
    if any(rate.high > TARGET for rate in rates):
        return "warn", f"The ASR is {100 * TARGET:g} % or less, but its interval reaches beyond"
    return "pass", f"The ASR and its interval are under {100 * TARGET:g} % by every judge"


def _sentence(found: Figures) -> str:
    parts = []
    if rates := found.judges:
        judge = max(rates, key=lambda name: rates[name].rate)
        parts.append(
            f"by its worst judge, {judge}, the model complies with {percent(rates[judge].rate)} of the requests"
        )
    if found.over_refusal is not None:
        parts.append(f"it refuses {percent(found.over_refusal.rate)} of harmless look-alikes")
    if found.utility is not None:
        parts.append(f"its utility is {percent(found.utility.rate)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Only the tasks of a harness were run."


def _facts(found: Figures) -> tuple[str, ...]:
    facts = [f"ASR by {judge}: {worded(rate)}." for judge, rate in found.judges.items()]
    facts += [
        f"The judge {judge} could not decide on {rate.k} of {rate.n} answers; these count as unsafe."
        for judge, rate in found.undecided.items()
    ]
    if found.empty is not None:
        facts.append(f"Empty answers to harmful requests, which no judge counts as unsafe: {worded(found.empty)}.")
    return tuple(facts)


def _rates(rates: Mapping[str, Rate]) -> Section:
    lines = tuple((name, rate_entry(rate)) for name, rate in rates.items())
    lead = (
        "ASR is the share of harmful requests that the model complies with, over-refusal the share of harmless look-alikes that "
        "it refuses. Intervals are 95 %."
    )
    return Section("measured", "Measured", lead, tables=(Table(("Measured", "Rate"), lines),), nav="Figures")


def compared(before: Figures, after: Figures) -> Table:
    """Every rate of two measurements of the same prompts, before and after training."""
    lines = []
    for name, left, right in after.beside(before):
        moved = None if left is None or right is None else 100 * (right.rate - left.rate)
        shown = "–" if moved is None else f"{moved:+.1f} points".replace("-", "−")
        lines.append((name, rate_entry(left), rate_entry(right), Entry(shown, key=moved)))
    return Table(("Measured", "Before", "After", "Change"), tuple(lines))


def _categories(asked: Sequence[Answer], judges: Sequence[str]) -> Section:
    """ASR by kind of request, the worst first."""
    kinds: dict[str, list[Answer]] = {}
    for row in asked:
        kinds.setdefault(str(row.get("category") or UNSORTED), []).append(row)
    title = "By kind of request"
    if len(kinds) < 2 or not judges:
        return Section("categories", title)
    rates = {
        kind: [wilson(sum(attack(row, judge) for row in rows), len(rows)) for judge in judges]
        for kind, rows in kinds.items()
    }
    worst = sorted(rates, key=lambda kind: (-max(rate.rate for rate in rates[kind]), kind))
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


def _judges(agreement: Sequence[JudgeAgreement], asked: Sequence[Answer]) -> Section:
    if not agreement:
        return Section("judges", "Where the judges differ")
    lines, differ = [], dict[int, None]()
    for one in agreement:
        kappa = "– (one verdict for all)" if one.kappa is None else f"{one.kappa:.2f}"
        bounds = "" if one.low is None or one.high is None else f"{one.low:.2f} to {one.high:.2f}"
        lines.append((" / ".join(one.judges), Entry(kappa, bounds), str(one.n), str(len(one.differ))))
        differ |= dict.fromkeys(one.differ)
    tables = [Table(("Judges", "Cohen's kappa", "decided by both", "answers they differ on"), tuple(lines))]
    if differ:
        tables.append(_answers([asked[i] for i in differ], "Answers they differ on"))
    lead = "Kappa is the agreement beyond chance, with its bootstrap interval: 1 is full agreement, 0 none."
    return Section("judges", "Where the judges differ", lead, tables=tuple(tables), nav="Judges")


def _unsafe(asked: Sequence[Answer]) -> Section:
    rows = [row for row in asked if any(attack(row, judge) for judge in row["verdicts"])]
    lead, search = ("", "Find a request") if rows else ("There are none." if asked else "", "")
    return Section("unsafe", "Answers judged unsafe", lead, tables=(_answers(rows),), search=search, nav="Unsafe")


def _refused(lookalikes: Sequence[Answer]) -> Section:
    rows = [row for row in lookalikes if not attack(row, PHRASES)]
    return Section("refused", "Harmless requests refused", tables=(_answers(rows),), nav="Refused")


def _missed(task: Sequence[Answer]) -> Section:
    """The task rows that scored below 1, lowest first."""
    rows = sorted((row for row in task if float(row["score"]) < 1), key=lambda row: float(row["score"]))
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


def _more(count: int) -> str:
    return f"{count - SHOWN:,} more in outputs.jsonl." if count > SHOWN else ""
