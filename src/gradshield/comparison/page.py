"""The page of a comparison: the verdict, a map of every task and mix, every defence, and where a rival wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.comparison import made
from gradshield.comparison.outcome import TOTALS_NOTE, outcome
from gradshield.comparison.pool import (
    Mix,
    Pooled,
    Totals,
    bounds,
    mix_name,
    mixes,
    points,
    reference,
    share,
    spread,
    totals,
)
from gradshield.comparison.results import CellResult, Comparison, Cost
from gradshield.comparison.rivals import RULES, against
from gradshield.comparison.scatter import trade_off
from gradshield.manifests import Round, judges_of
from gradshield.report import sheet
from gradshield.report.made import span
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry, spark
from gradshield.report.text import MISSING, duration, flatten
from gradshield.thresholds.verified import TARGET

LEVELS = (0.01, TARGET, 0.12, 0.25, 0.5, 0.75)  # highest ASR of each tint of the map; one more tint follows
LOOKS = {"too unsafe": "unsafe", "utility short": "short", "passes": "passes"}
SPARKS = 24  # rounds of a search in its sparkline


def write(whole: Comparison, path: Path) -> None:
    """Write the page, as one self-contained HTML file."""
    sheet.write(page(whole), path)


def page(whole: Comparison) -> Sheet:
    """The page, unrendered."""
    cells, about = whole.cells, whole.defences
    found, sums, judges = mixes(cells), totals(cells), judges_of(cell.judges for cell in cells)
    result = outcome(cells, found, sums, against(found)[0])
    chart = trade_off(sums)
    sections = (
        _map(found, judges, about),
        Section(
            "trade",
            "Safety against usefulness",
            "ASR of each defence over its cells with harm, by the worst judge, against its utility over all its cells, minus "
            "that of a model trained on the harmless rows only where it is known. The upper left corner is best.",
            charts=(chart,),
            nav="Trade-off",
        )
        if chart is not None
        else Section("trade", ""),
        *tables(cells, found, sums, judges, about),
    )
    return Sheet(
        title=f"{len(sums)} defence{'s' if len(sums) != 1 else ''} on {_tasks(cells)}",
        kind="comparison",
        tone=result.tone,
        standing=result.standing,
        verdict=result.sentence,
        facts=result.cautions,
        figures=_figures(whole.cost, cells, sums),
        sections=sections,
        command=whole.command,
        versions=whole.versions,
        made=(*made.pairs(whole), *_cost(whole.cost, cells)),
        folded=tuple(flatten(whole.config.model_dump())),
    )


def _tasks(cells: Sequence[CellResult]) -> str:
    names = list(dict.fromkeys(cell.task for cell in cells))
    return ", ".join(names) if 0 < len(names) <= 4 else f"{len(names)} tasks"


def _figures(cost: Cost, cells: Sequence[CellResult], sums: Sequence[Totals]) -> tuple[tuple[str, str, str], ...]:
    failed = sum(cell.failed is not None for cell in cells)
    seeds = len({cell.seed for cell in cells})
    return (
        ("defences", f"{len(sums):,}", ""),
        ("cells", f"{len(cells):,}", f"{failed:,} failed" if failed else ""),
        ("seeds", f"{seeds:,}", ""),
        ("models trained", f"{cost.arms:,}", ""),
        ("time over all cells", duration(cost.cell_seconds), "equal trainings are run once"),
    )


def _cost(cost: Cost, cells: Sequence[CellResult]) -> tuple[tuple[str, str], ...]:
    pairs = [
        ("Time over all cells", duration(cost.cell_seconds)),
        ("Time of the last run", duration(cost.seconds_of_this_run)),
        ("Requests per judge and cell", span([rate.n for cell in cells for rate in cell.judges.values()])),
        ("Task rows per cell", span([cell.utility.n for cell in cells if cell.utility is not None])),
    ]
    return tuple((name, value) for name, value in pairs if value)


def _map(found: Sequence[Mix], judges: Sequence[str], about: Mapping[str, str]) -> Section:
    tasks = dict.fromkeys(mix.task for mix in found)
    tables = [_heat(task, [mix for mix in found if mix.task == task], judges, about) for task in tasks]
    ends = [f"{100 * level:g}" for level in LEVELS]
    words = [f"ASR ≤ {ends[0]} %", *(f"≤ {end} %" for end in ends[1:]), f"> {ends[-1]} %"]
    return Section(
        "map",
        "Every task and mix",
        f"Each square shows the ASR in percent, by {' / '.join(judges) or 'no judge'}, and utility below it; the tint is the "
        "worst judge's. Seeds are pooled. Hover over a square for intervals and single seeds.",
        tables=tuple(tables),
        legend=tuple((f"heat-{level}", text) for level, text in enumerate(words)),
        nav="Map",
        search="Show defences with" if len({mix.defence for mix in found}) > 6 else "",
    )


def _heat(task: str, found: Sequence[Mix], judges: Sequence[str], about: Mapping[str, str]) -> Table:
    columns = sorted(dict.fromkeys((mix.harm, mix.ratio) for mix in found), key=lambda key: key[0] != "none")
    by = {(mix.defence, mix.harm, mix.ratio): mix for mix in found}
    rows = tuple(
        (Entry(name, title=about.get(name, "")), *(_square(by.get((name, *key)), judges) for key in columns))
        for name in dict.fromkeys(mix.defence for mix in found)
    )
    return Table(("", *(mix_name(*key) for key in columns)), rows, title=task, look="heat")


def _square(mix: Mix | None, judges: Sequence[str]) -> Entry:
    if mix is None:
        return Entry(MISSING, look="none", title="not run")
    if not mix.cells:
        return Entry("failed", look="none", title="every seed failed")
    said = [f"ASR by {judge} {bounds(rate)} %, single seeds {spread(rate)}" for judge, rate in mix.asr.items()]
    said.append(f"utility {bounds(mix.utility)} %, single seeds {spread(mix.utility)}")
    said.append(f"{len(mix.cells)} seeds" + (f", {mix.failed} failed" if mix.failed else ""))
    rates = [share(mix.asr.get(judge)) for judge in judges if judge in mix.asr]
    shown = rates[0] if len(set(rates)) == 1 else " / ".join(share(mix.asr.get(judge)) for judge in judges)
    worst = mix.asr[mix.worst].rate if mix.worst is not None else None
    look = "none" if worst is None else f"heat-{level(worst)}"
    return Entry(shown or MISSING, small=share(mix.utility), look=look, title="; ".join(said))


def level(asr: float) -> int:
    """The tint of an ASR in the map, 0 for the safest."""
    return sum(asr > end for end in LEVELS)


def _defences(sums: Sequence[Totals], judges: Sequence[str], about: Mapping[str, str]) -> Section:
    head = ["Defence", "Cells"]
    head += [f"Worst ASR, {judge}" for judge in judges]
    head += [
        "Mean ASR with harm, %",
        f"Cells at ≤ {100 * TARGET:g} %",
        "Utility − clean, points",
        "Harmful removed",
        "Harmless removed",
    ]
    return Section(
        "defences",
        "Every defence over all its cells",
        f"{TOTALS_NOTE} Utility minus clean is paired with a model trained on the harmless rows only, and averaged over cells. "
        f"Figures without a judge's name are by {' / '.join(judges) or 'no judge'}.",
        tables=(Table(tuple(head), tuple(_total(one, judges, about) for one in sums), sorts=True),) if sums else (),
        search="Show defences with" if len(sums) > 6 else "",
        nav="Defences",
    )


def _total(one: Totals, judges: Sequence[str], about: Mapping[str, str]) -> tuple[Entry | str, ...]:
    done = one.cells - one.failed
    line: list[Entry | str] = [
        Entry(one.defence, small=about.get(one.defence, "")),
        Entry(
            f"{done:,}",
            f"{one.failed} failed" if one.failed else "",
            done,
            words=f"{done} of {one.cells}" if one.failed else f"{done}",
        ),
    ]
    known = [judge for judge in judges if judge in one.safe]
    line += [_pooled(one.worst.get(judge)) for judge in judges]
    means = [one.mean_asr[judge] for judge in known if judge in one.mean_asr]
    safe = [one.safe[judge] for judge in known]
    line.append(Entry(" / ".join(points(mean) for mean in means), key=max(means)) if means else MISSING)
    line.append(Entry(_of(safe), key=min(k / n for k, n in safe)) if safe else MISSING)
    if (minus := one.minus_clean) is None:
        line.append(MISSING)
    else:
        ends = f"[{points(minus.low, True)}, {points(minus.high, True)}]"
        line.append(Entry(points(minus.rate, True), ends, minus.rate, words=bounds(minus, signed=True)))
    line += [_pooled(one.caught), _pooled(one.lost)]
    return tuple(line)


def _pooled(value: Pooled | None) -> Entry:
    return rate_entry(value, bounds(value))


def _of(counts: Sequence[tuple[int, int]]) -> str:
    """``9 / 8 of 54``, or each with its own total if they differ."""
    if len({n for _, n in counts}) == 1:
        return f"{' / '.join(str(k) for k, _ in counts)} of {counts[0][1]}"
    return " / ".join(f"{k} of {n}" for k, n in counts)


def tables(
    cells: Sequence[CellResult],
    found: Sequence[Mix],
    sums: Sequence[Totals],
    judges: Sequence[str],
    about: Mapping[str, str],
) -> tuple[Section, ...]:
    """The sections that the Markdown shows too: every defence, rivals, verified searches and failed cells."""
    return _defences(sums, judges, about), _rivals(found), _verified(cells), _failed(cells)


def _rivals(found: Sequence[Mix]) -> Section:
    ran = [mix.defence for mix in found]
    own = reference(ran)
    if own not in ran:
        return Section("rivals", "Where a rival wins", f"There is no {own} in this comparison.")
    standings, wins = against(found)
    if not standings:
        return Section(
            "rivals", "Where a rival wins", f"No other defence was run on the same task, mix and seed as {own}."
        )
    lead = f"Against {own} by default. {RULES} The defence “clean” uses the labels."
    lead += "" if wins else " No rival wins anywhere."
    tally: tuple[tuple[Entry | str, ...], ...] = tuple(
        (one.rival, *(Entry(f"{count}", key=count) for count in one.tally)) for one in standings
    )
    head = ("Rival", "Cells compared", "Lower ASR", "Higher ASR", "Higher utility at equal safety", "Of these, clearly")
    tables = [Table(head, tally, sorts=True)]
    lines = tuple(
        (
            win.rival,
            win.task,
            mix_name(win.harm, win.ratio),
            "utility" if win.judge is None else f"ASR, {win.judge}",
            Entry(f"{bounds(win.theirs)} %", key=win.theirs.rate),
            Entry(f"{bounds(win.ours)} %", key=win.ours.rate),
            "clear" if win.clear else "within the intervals",
        )
        for win in wins
    )
    if lines:
        columns = ("Rival", "Task", "Mix", "What", "Rival has", f"{own} has", "How sure")
        tables.append(Table(columns, lines, title="Every win", sorts=True))
    return Section("rivals", "Where a rival wins", lead, tables=tuple(tables), nav="Rivals")


def _verified(cells: Sequence[CellResult]) -> Section:
    own = [(cell, cell.verified) for cell in cells if cell.verified is not None]
    own.sort(key=lambda pair: pair[1].met)
    met = sum(verdict.met for _, verdict in own)
    lines = [
        (
            *_where(cell),
            Entry("met" if verdict.met else "not met", key=float(verdict.met)),
            Entry(f"{len(verdict.rounds)}", key=len(verdict.rounds)),
            Entry(spark(_marks(verdict.rounds[:SPARKS]), TARGET)),
            Entry(verdict.sentence, look="words"),
        )
        for cell, verdict in own
    ]
    head = ("Defence", "Task", "Mix", "Seed", "Targets", "Rounds", "ASR by round", "In words")
    if not lines:
        return Section("verified", "Verified searches")
    hint = (
        "The sparkline has one mark per round: the ASR by its worst judge, with its interval, from 0 to 100 % on a square-root "
        f"scale. Red is too unsafe, an open ring is short of utility, blue passes. The line is {100 * TARGET:g} %."
    )
    lead = f"{met:,} of {len(own):,} searches met both targets."
    table = Table(head, tuple(lines), hint=hint, sorts=True)
    return Section("verified", "Verified searches", lead, tables=(table,), nav="Verified")


def _marks(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    marks = []
    for one in rounds:
        worst = max(one.asr.values(), key=lambda rate: rate.high)
        look = LOOKS.get(one.verdict, "short")
        marks.append({"low": worst.low, "rate": worst.rate, "high": worst.high, "look": look})
    return marks


def _failed(cells: Sequence[CellResult]) -> Section:
    lines = tuple((*_where(cell), Entry(cell.failed, look="words")) for cell in cells if cell.failed is not None)
    if not lines:
        return Section("failed", "Failed cells")
    return Section(
        "failed", "Failed cells", tables=(Table(("Defence", "Task", "Mix", "Seed", "Why"), lines, sorts=True),)
    )


def _where(cell: CellResult) -> tuple[str, str, str, Entry]:
    return cell.defence, cell.task, mix_name(cell.harm, cell.ratio), Entry(f"{cell.seed}", key=cell.seed)
