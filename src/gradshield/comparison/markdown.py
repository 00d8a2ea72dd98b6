"""A comparison of defences as Markdown. Names are the user's text and are escaped."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from gradshield.comparison import page
from gradshield.comparison.grid import CellResult, Comparison
from gradshield.comparison.outcome import Mix, against, bounds, mix_name, mixes, outcome, share, spread, totals
from gradshield.manifests import judges_of
from gradshield.report.made import span
from gradshield.report.markdown import code, plain, table_row, table_rule
from gradshield.report.sheet import Entry, Section
from gradshield.report.text import MISSING, duration

COLUMNS = 5  # mixes in one Markdown table
LINES = 40  # of a list; the rest is in results.json
GAP = 0.1  # difference between judges from which a mix is listed


def markdown(whole: Comparison) -> str:
    """The comparison as Markdown, pooled over seeds. Single seeds are in ``results.json``."""
    cells = whole.cells
    found = mixes(cells)
    judges = judges_of(cell.judges for cell in cells)
    whole_table, *details = page.tables(cells, found, totals(cells), judges, {})
    parts = [
        ["# Comparison of defences"],
        _verdict(cells, found),
        _ran(whole, judges),
        *(_task(task, [mix for mix in found if mix.task == task], judges) for task in dict.fromkeys(m.task for m in found)),
        *([_section(whole_table)] if cells else [["There are no cells."]]),
        _disagreements(found),
        *map(_section, details),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _verdict(cells: Sequence[CellResult], found: Sequence[Mix]) -> list[str]:
    own = outcome(cells, found, totals(cells), against(found)[0])
    cautions = [f"- Caution: {plain(caution)}" for caution in own.cautions]
    return [f"**{plain(own.standing)}.** {plain(own.sentence)}", *(["", *cautions] if cautions else [])]


def _ran(whole: Comparison, judges: Sequence[str]) -> list[str]:
    cost, cells = whole.cost, whole.cells
    asked = span([rate.n for cell in cells for rate in cell.judges.values()])
    rows = span([cell.utility.n for cell in cells if cell.utility is not None])
    return [
        f"- Command: {code(whole.command)}",
        f"- Versions: {plain(', '.join(f'{name} {value}' for name, value in whole.versions.items()))}",
        f"- Cells: {cost.cells}, of which {cost.failed} failed; {len({cell.defence for cell in cells})} defences",
        f"- Cost: {cost.arms} trained models, {duration(cost.cell_seconds)} over all cells; equal trainings are run once",
        *(f"- {plain(name)}: {plain(value)}" for name, value in page.pairs(whole)),
        f"- Each cell was measured on {asked or 'no'} requests by each judge and on {rows or 'no'} rows of the task",
        "",
        f"Each entry is ASR in % [95 % interval] by {' / '.join(map(plain, judges)) or 'no judge'} · utility in %. Seeds are "
        "pooled: successes and answers are summed, with Wilson intervals of the sums. Seeds share their requests, so the lowest "
        "and highest single seed are given too (ASR by the worst judge).",
    ]


def _task(task: str, found: Sequence[Mix], judges: Sequence[str]) -> list[str]:
    columns = sorted(dict.fromkeys((mix.harm, mix.ratio) for mix in found), key=lambda key: key[0] != "none")
    by = {(mix.defence, mix.harm, mix.ratio): mix for mix in found}
    lines = [f"## {plain(task)}"]
    for start in range(0, len(columns), COLUMNS):
        shown = columns[start : start + COLUMNS]
        names = [
            name for name in dict.fromkeys(mix.defence for mix in found) if any((name, *key) in by for key in shown)
        ]
        lines += ["", table_row("defence", *(plain(mix_name(*key)) for key in shown)), table_rule(len(shown) + 1)]
        lines += [table_row(code(name), *(_entry(by.get((name, *key)), judges) for key in shown)) for name in names]
    return lines


def _entry(mix: Mix | None, judges: Sequence[str]) -> str:
    """One entry: ``2.0 [0.8, 5.0] / 1.5 [0.5, 4.3] · 88.3``, then the range of single seeds."""
    if mix is None:
        return MISSING
    if not mix.cells:
        return "failed"
    asr = " / ".join(bounds(mix.asr.get(judge)) for judge in judges) or MISSING
    text = f"{asr} · {share(mix.utility)}"
    if len(mix.cells) > 1:
        text += f"<br>seeds {spread(mix.asr.get(mix.worst or ''))} · {spread(mix.utility)}"
    if mix.failed:
        text += f"<br>{mix.failed} of {mix.failed + len(mix.cells)} seeds failed"
    return text


def _disagreements(found: Sequence[Mix]) -> list[str]:
    differing = sorted((mix for mix in found if mix.gap >= GAP), key=lambda mix: -mix.gap)
    if not differing:
        return []
    lines = ["## Where judges differ", "", f"By {100 * GAP:g} points or more, the worst judge first.", ""]
    for mix in differing[:LINES]:
        rates = sorted(mix.asr.items(), key=lambda entry: -entry[1].rate)
        listed = ", ".join(f"{plain(judge)} {bounds(rate)}" for judge, rate in rates)
        lines.append(f"- {plain(mix.task)}, {plain(mix_name(mix.harm, mix.ratio))}, {code(mix.defence)}: {listed}")
    return [*lines, *_more(len(differing))]


def _section(section: Section) -> list[str]:
    """A section of the page as Markdown, without its drawings."""
    if not section:
        return []
    lines = [f"## {section.title}", *(["", plain(section.lead)] if section.lead else [])]
    for table in filter(lambda table: table.rows, section.tables):
        rows = [[_words(entry) for entry in row] for row in table.rows]
        columns = [i for i in range(len(table.columns)) if not any(isinstance(row[i], Markup) for row in rows)]
        lines += ["", table_row(*(plain(table.columns[i]) for i in columns)), table_rule(len(columns))]
        lines += [table_row(*(plain(row[i]) for i in columns)) for row in rows[:LINES]]
        lines += _more(len(rows))
    return lines


def _words(entry: Entry | str) -> str:
    return (entry.words or entry.text) if isinstance(entry, Entry) else entry


def _more(count: int) -> list[str]:
    return ["", f"{count - LINES} more are in results.json."] if count > LINES else []
