"""The page of a comparison: the verdict, a map of every task and mix, the trade-off, every defence, and where a rival wins."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from gradshield.comparison.grid import CellResult, Comparison, Config, Cost
from gradshield.comparison.outcome import (
    RULES,
    TOTALS_NOTE,
    Mix,
    Pooled,
    Totals,
    against,
    bounds,
    mix_name,
    mixes,
    outcome,
    points,
    reference,
    share,
    spread,
    totals,
)
from gradshield.errors import GradShieldError
from gradshield.manifests import Round, judges_of
from gradshield.options import Spec
from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.made import DEFAULTS, LONG, WHOLE, Pairs, adapter_words, option_words, span
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry, spark
from gradshield.report.text import MISSING, chart_text, code, duration, flatten, one_line, plain, table_row, table_rule
from gradshield.selectors import SELECTORS
from gradshield.thresholds.verified import TARGET
from gradshield.training.defences import parse

LEVELS = (0.01, TARGET, 0.12, 0.25, 0.5, 0.75)  # highest ASR of each tint of the map; one more tint follows
LOOKS = {"too unsafe": "unsafe", "utility short": "short", "passes": "passes"}
SPARKS = 24  # rounds of a search in its sparkline


def page(whole: Comparison) -> Sheet:
    """The page of a comparison."""
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
        made=(*pairs(whole), *_cost(whole.cost, cells)),
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
        tables=(Table(tuple(head), tuple(_total(one, judges, about) for one in sums), sorts=True),),
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
        (rival, *(Entry(f"{count}", key=count) for count in tally)) for rival, *tally in standings
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
    return Section(
        "failed", "Failed cells", tables=(Table(("Defence", "Task", "Mix", "Seed", "Why"), lines, sorts=True),)
    )


def _where(cell: CellResult) -> tuple[str, str, str, Entry]:
    return cell.defence, cell.task, mix_name(cell.harm, cell.ratio), Entry(f"{cell.seed}", key=cell.seed)


# ---- how it was made -------------------------------------------------------------------------------------------------


LAB = "lab"  # the bundled model in a config


def pairs(whole: Comparison) -> Pairs:
    """What every arm shares."""
    config, cells = whole.config, whole.cells
    own = config.model == LAB
    found: Pairs = [("Model", "the bundled lab's" if own else _normal(config.model))]
    if config.base:
        found.append(("Model before its alignment", _normal(config.base)))
    found += _training(whole)
    adapter = whole.adapter or config.lora
    found.append(("Adapter", adapter_words(adapter) if adapter else "the lab's own LoRA" if own else WHOLE))
    found.append(("Judges", ", ".join(judges_of(cell.judges for cell in cells) or config.judges) or "none"))
    found += [] if own else _measured(config)
    found.append(("Seeds", ", ".join(map(str, sorted({cell.seed for cell in cells}))) or "none"))
    found += _sizes(cells)
    return [(name, one_line(value, LONG)) for name, value in found]


def _training(whole: Comparison) -> Pairs:
    """Training options: per task if known, else from the config."""
    if whole.recipes:
        texts = {task: option_words(found) or DEFAULTS for task, found in whole.recipes.items()}
        if len(set(texts.values())) == 1:
            return [("Training", next(iter(texts.values())))]
        return [(f"Training on {task}", text) for task, text in texts.items()]
    config, common = whole.config, option_words(whole.config.training)
    default = "the lab's own recipe for each task" if config.model == LAB else DEFAULTS
    found = [("Training", (f"{default}, with {common}" if config.model == LAB else common) if common else default)]
    own = [(f"Training on {dataset.name}", option_words(dataset.training)) for dataset in config.datasets]
    return found + [(name, options) for name, options in own if options]


def _measured(config: Config) -> Pairs:
    """Requests, answers and the task's metrics of a user's own datasets."""
    files = ", ".join(f"{split} from {_normal(path)}" for split, path in config.requests.items())
    found = [("Requests", files or "the built-in ones"), ("Longest answer", f"{config.answer_tokens} tokens")]
    metrics = [f"{own.name} by {own.metric or 'the metric of its rows'}" for own in config.datasets if own.task]
    if metrics:
        found.append(("Utility", f"{', '.join(metrics)}; at most {config.task_rows} rows of each"))
    return found


def _sizes(cells: Sequence[CellResult]) -> Pairs:
    rows = [(cell.rows, cell.removed) for cell in cells if cell.rows is not None]
    found = [
        ("Rows of a dataset", span([count for count, _ in rows])),
        ("Rows trained on", span([count - removed for count, removed in rows])),
    ]
    return [(name, value) for name, value in found if value]


def _normal(value: str) -> str:
    """A normalised path or a name: ``configs/../../model`` is ``../model``."""
    return os.path.normpath(value) if ".." in PurePath(value).parts else value


# ---- safety against usefulness ---------------------------------------------------------------------------------------


LONGEST = 24  # characters of a name in the legend
REACH = 100 * TARGET + 2  # least end of the axis in percent, so that it shows the target
SYMBOLS = (
    "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon", "star", "hexagon", "hourglass",
    "bowtie", "triangle-left", "triangle-right", "star-triangle-up", "star-square", "star-diamond", "hexagram",
)  # fmt: skip
REFERENCE, OURS, OTHER = range(3)
COLOURS = ("var(--ink)", "var(--link)", "var(--quarantined)")


def trade_off(sums: Sequence[Totals]) -> Chart | None:
    """Utility (minus clean, if every defence has it) over ASR with harm by the worst judge; None without points."""
    relative = all(one.minus_clean is not None for one in sums if one.defence != "clean" and one.harmed)
    found = []
    for one in sums:
        y = one.minus_clean if relative else one.utility
        if relative and y is None and one.defence == "clean" and one.utility is not None:
            y = Pooled(0.0, 0.0, 0.0, one.utility.n, 0, one.utility.cells, 0.0, 0.0)
        if one.harmed and y is not None:
            found.append((one, max(one.harmed.values(), key=lambda rate: rate.rate), y))
    if not found:
        return None
    top = max(102 * max(x.high for _, x, _ in found), REACH)
    grouped = sorted(found, key=lambda point: _group(point[0].defence))
    traces = [_trace(one, x, y, SYMBOLS[i % len(SYMBOLS)]) for i, (one, x, y) in enumerate(grouped)]
    figure = base_layout(height=480, showlegend=True, margin={"l": 8, "r": 24, "t": 8, "b": 8})
    figure["legend"] |= {"y": -0.2, "yanchor": "top"}
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    figure["shapes"] = [
        {"type": "line", "x0": 100 * TARGET, "x1": 100 * TARGET, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    ]
    figure["xaxis"] = axis_style("ASR with harm in the rows, %, worst judge") | {
        "fixedrange": True, "range": [-0.015 * top, top], "zeroline": True, "zerolinecolor": "var(--line)"
    }  # fmt: skip
    words = "utility − clean, points" if relative else "utility, %"
    figure["yaxis"] = axis_style(words) | {"fixedrange": True, "zeroline": relative, "zerolinecolor": "var(--line)"}
    head = ("Defence", "ASR with harm, % [95 %]", words + " [95 %]", "Cells")
    lines = [(one.defence, bounds(x), bounds(y, relative), f"{one.cells - one.failed}") for one, x, y in found]
    caption = (
        f"Bars are 95 % intervals of the pooled figures; the dotted line is an ASR of {100 * TARGET:g} %. Hover over a mark for "
        "its figures."
    )
    spec = {"data": traces, "layout": figure}
    return Chart("trade", "Safety against usefulness", caption, spec, (head, *lines), False)


def _group(defence: str) -> int:
    """REFERENCE (no filter or a perfect one), OURS (FIHS chooses its rows), or OTHER."""
    if defence in ("none", "clean"):
        return REFERENCE
    try:
        selector = parse(defence).selector
    except GradShieldError:  # a method of a plugin that is not installed here
        return OTHER
    return OURS if selector is not None and SELECTORS[Spec.split(selector).name].probed else OTHER


def _trace(one: Totals, x: Pooled, y: Pooled, symbol: str) -> dict[str, Any]:
    colour = COLOURS[_group(one.defence)]

    def bar(value: Pooled) -> dict[str, Any]:
        up, down = [100 * (value.high - value.rate)], [100 * (value.rate - value.low)]
        return {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 0, "color": colour}

    return {
        "type": "scatter", "mode": "markers", "name": chart_text(one.defence, LONGEST), "x": [100 * x.rate], "y": [100 * y.rate],
        "customdata": [chart_text(one.defence, 60)], "cliponaxis": False,
        "marker": {"color": colour, "symbol": symbol, "size": 10}, "error_x": bar(x), "error_y": bar(y),
        "hovertemplate": "%{customdata}<br>ASR %{x:.1f} %<br>%{y:.1f}<extra></extra>",
    }  # fmt: skip


COLUMNS = 5  # mixes in one Markdown table
LINES = 40  # of a list; the rest is in results.json
GAP = 0.1  # difference between judges from which a mix is listed


def markdown(whole: Comparison) -> str:
    """The comparison as Markdown, pooled over seeds. Single seeds are in ``results.json``."""
    cells = whole.cells
    found = mixes(cells)
    judges = judges_of(cell.judges for cell in cells)
    whole_table, *details = tables(cells, found, totals(cells), judges, {})
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
        *(f"- {plain(name)}: {plain(value)}" for name, value in pairs(whole)),
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
