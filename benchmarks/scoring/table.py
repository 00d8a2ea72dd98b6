"""The figures as a table on the terminal and in a document, with what they were made on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.scoring import stages
from benchmarks.scoring.peers import peers
from gradshield import runs
from gradshield.errors import UsageError

Line = Mapping[str, Any]
BEGIN, END = "<!-- {} made by benchmarks.scoring, from here -->", "<!-- {} made by benchmarks.scoring, to here -->"
HEAD = ("arm", "rows", "× floor", "range", "memory, MB", "rank", "error", "AUROC sum", "AUROC push")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code; ``load_before`` is how many processes were at work as the run began."""
    loads = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": None if loads is None else round(loads[0], 2),
    }


def accelerator(device: str) -> dict[str, Any]:
    """The device that a model was on, and its name where it is a GPU."""
    import torch

    return {"device": device} | ({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {})


def _processor() -> str:
    """The processor's name; on Linux with its family and model, since a name may be no more than the maker's."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    said = {key: re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name, family, model = (found[1].strip() if found else "" for found in said.values())
    return f"{name or platform.machine()} (family {family}, model {model})" if family else name or platform.machine()


def versions() -> dict[str, str]:
    """Ours, and those of the peers that are installed."""
    found = runs.versions()
    for name in sorted({arm.name.partition("/")[0].partition("-")[0] for arm in peers()}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cells(line: Line) -> tuple[str, ...]:
    """One line of the table as text, in the order of HEAD."""
    spread = f"{line['low']:.2f}–{line['high']:.2f}"
    return (
        line["name"],
        str(line["rows"]),
        f"{line['ratio_to_floor']:.2f}",
        spread,
        _text(line["peak_mb"], "{:,.0f}"),
        _text(line["agreement"], "{:.4f}"),
        _text(line["relative_error"], "{:.0e}"),
        _text(line["auroc"], "{:.3f}"),
        _text(line["auroc_push"], "{:.3f}"),
    )


def _text(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else form.format(value)


def terminal(title: str, lines: Sequence[Line]) -> Table:
    """The table of one model for Rich."""
    table = plain(title, [HEAD, *map(cells, lines)])
    for n, (line, after) in enumerate(pairwise(lines)):
        table.rows[n].end_section = line["group"] != after["group"]
    return table


def plain(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """Any table for Rich, its head first."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for n, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if n == 0 else "right", no_wrap=n in (0, 3))
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    return table


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Any table in Markdown, its head first."""
    lines = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def scans(report: Mapping[str, Any]) -> str:
    """What a document says of whole scans, between its own marks."""
    parts = [_made_by(report)]
    for model in dict.fromkeys(line["model"] for line in report["scans"]):
        lines = [line for line in report["scans"] if line["model"] == model]
        sizes = {line["rows"]: f"{line['rows']:,} rows of {line['tokens']:,} tokens" for line in lines}
        parts += [
            f"### {Path(model).name}, whole scans\n",
            f"{', '.join(sizes.values())}.\n",
            markdown(stages.cells(lines)),
        ]
    return "\n".join(parts)


def _made_by(report: Mapping[str, Any]) -> str:
    host = report["machine"]
    where = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in host.items() if value is not None)
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"`{report['command']}`\n\nMachine: {where}. Versions: {packages}. Seed {report['seed']}, {report['rounds']} rounds, "
        f"{report['seconds'] / 60:.0f} minutes in all.\n"
    )


def section(report: Mapping[str, Any], picture: str) -> str:
    """What a document says of one run, between its marks: the command, the machine, a table for each model, the picture."""
    parts = [
        _made_by(report),
        f"![Each arm's cost in forward passes, with its range over the rounds]({picture})\n",
    ]
    for case in report["cases"]:
        lines = [line for line in report["rows"] if line["model"] == case["model"]]
        parts += [f"### {case['model']}\n", about(case) + "\n", markdown([HEAD, *map(cells, lines)])]
        if compared := beside(lines):
            parts.append(f"Compared with our cheapest engine over the same parameters: {compared}.\n")
        if case["left_out"]:
            parts += ["Left out: " + "; ".join(f"`{n}` ({why})" for n, why in case["left_out"].items()) + ".\n"]
    return "\n".join(parts)


def about(case: Mapping[str, Any]) -> str:
    """One model and its rows in a sentence or two."""
    text = (
        f"{case['parameters']:,} parameters in {case['dtype']} ({case['weights']}), {case['rows']} rows of {case['tokens']:,} "
        f"tokens, {case['response_tokens']:,} of them in the loss. The floor is {case['floor_seconds']:.2f} s."
    )
    if case["few"] < case["rows"]:
        text += (
            f" The oracle and the peers are timed on the first {case['few']} rows ({case['few_tokens']:,} tokens), over the "
            "floor of those rows; memory, rank and error are of all rows."
        )
    return text


def beside(lines: Sequence[Line]) -> str:
    """Time and memory of each peer as multiples of the cheapest engine of ours over the same subspace; below 1 the peer wins."""
    found = []
    for peer in (line for line in lines if line["group"] == "peer"):
        same = [
            x for x in lines if x["group"] == "ours" and x["name"].partition("/")[2] == peer["name"].partition("/")[2]
        ]
        if not same:
            continue
        best = min(same, key=lambda line: line["ratio_to_floor"])
        text = f"`{peer['name']}` takes {peer['ratio_to_floor'] / best['ratio_to_floor']:.1f} times the time"
        if peer["peak_mb"] and best["peak_mb"]:
            text += f" and {peer['peak_mb'] / best['peak_mb']:.1f} times the memory"
        found.append(f"{text} of `{best['name']}`")
    return "; ".join(found)


def rewrite(path: Path, inside: str, about: str = "arms") -> None:
    """Put a new section between the marks of a document. Raises UsageError where it has not both of them, once, in order."""
    begin, end = (mark.format(about) for mark in (BEGIN, END))
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(f"{path} has no place for the figures: put the lines {begin!r} and {end!r} where they belong")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    path.write_text(f"{head}{begin}\n\n{inside}\n{end}{tail}", encoding="utf-8")
