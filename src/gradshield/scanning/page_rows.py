"""Rows as a person reads them: tokens tinted by per-token FIHS, and as much of each row as the page can carry.

A page of every token of every removed row would be hundreds of megabytes. Each row has an allowance of bytes; where
it does not fit, the tokens that moved the score most are shown with their neighbours, then the beginning, and every
gap says how much it leaves out.

Tokens of the highest-scoring rows are stored with the scores, so that a new cut can draw the page without a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from pydantic import TypeAdapter

from gradshield import data as rows_in
from gradshield import runs
from gradshield.report.text import number, one_line, shorten, visible
from gradshield.scanning.decide import ROWS, Selection
from gradshield.types import Example, Floats, Rendered, Scores

SHOWN = 200  # highest-scoring rows whose tokens are stored
NEAR = 10  # rows just below the cut
PREVIEW = 110  # characters of a row on its line
VIEWS = "views.json"
PIECE_CHARS = 400  # one token is rarely more than 20; a caller without tokens passes whole messages
ROW_BYTES = 24_000
ROUNDING = 1e-9  # relative to the score or the cut: a smaller margin counts as zero
MARKED = 5  # strongest tokens of a row that are underlined and listed
LEVELS = (0.03, 0.1, 0.25, 0.5, 0.8)  # share of the page's reference value at which each tint starts

Piece = tuple[str, str, float | None]
"""A token's text, its role (``"prompt"``, or ``"response"`` where it counts in the loss), its FIHS where measured.

The first piece of a row scored by its request has the role ``"request"`` and that text, for the row's line.
"""

Views = Mapping[int, Sequence[Piece]]
"""Pieces of rows by position in the input."""

_STORED = TypeAdapter(dict[int, list[Piece]])


def views(selection: Selection, rendered: Sequence[Rendered], examples: rows_in.Examples, tokenizer: Any) -> Views:
    """The pieces of the rows that a page may show: the highest scores and rows near the cut."""
    order = np.argsort(-selection.scores.values, kind="stable")
    near = order[~selection.removed[order]][:NEAR]
    shown, tokens = np.union1d(order[: SHOWN + NEAR], near), selection.scores.tokens
    found = {
        int(selection.scores.rows[i]): pieces(rendered[i], tokenizer, None if tokens is None else tokens[i])
        for i in shown.tolist()
    }
    if selection.manifest.settings.selector.partition(":")[0] == "screen":
        for example in examples.at(selection.scores.rows[shown]):
            if request := _request(example):
                found[example.row].insert(0, (request, "request", None))
    return found


def _request(example: Example) -> str:
    """The beginning of the user's last message, or of the prompt; empty where neither is text."""
    one = example.conversations[0]
    said = [turn.get("content") for turn in one.messages or () if turn.get("role") == "user"]
    text = said[-1] if said else one.prompt
    return one_line(text, PREVIEW) if isinstance(text, str) else ""


def pieces(row: Rendered, tokenizer: Any, values: Floats | None = None) -> list[Piece]:
    """A rendered row piece by piece; ``values`` are those of its tokens in the loss."""
    found: list[Piece] = []
    start = 0
    for n, tokens in enumerate(row.sequences):
        if tokens.coefficient < 0:
            found.append(("\n" * bool(n) + "── rejected ──\n", "prompt", None))
        place = start + np.cumsum(tokens.loss) - 1  # token of the sequence -> index into the row's values
        for text, t in rows_in.spans(tokens, tokenizer):
            value = float(values[place[t]]) if values is not None and len(values) and t is not None else None
            found.append((text, "prompt" if t is None else "response", value))
        start += int(tokens.loss.sum())
    return found


def stored_views(folder: Path) -> Views:
    """The pieces that a scan stored in its folder; empty if they cannot be read."""
    try:
        return _STORED.validate_json((folder / runs.WORK / VIEWS).read_bytes())
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class RowView:
    """One row to read. ``margin`` is score minus cut; ``note`` is one line next to it, such as ``"kept by hand"``."""

    row: int
    id: str
    score: float
    margin: float
    category: str = ""
    shape: str = ""
    pieces: Sequence[Piece] = ()
    note: str = ""


def row_view(scores: Scores, i: int, cut: float, category: str, pieces: Iterable[Piece], note: str = "") -> RowView:
    """The row at place ``i`` of the scores, against a cut."""
    shape, score = scores.shapes[i], float(scores.values[i])
    own = "" if shape == ROWS else shape
    return RowView(int(scores.rows[i]), scores.ids[i], score, score - cut, category, own, tuple(pieces), note)


@dataclass(frozen=True)
class ShownRow:
    """A RowView prepared for the page: ``body`` is safe markup, ``strongest`` are (text, value) of its top tokens.

    ``margin`` is how far from the cut the row is, without what only rounding makes of a row at the cut.
    """

    view: RowView
    preview: str
    body: Markup
    strongest: tuple[tuple[str, float], ...]
    truncated: bool
    margin: float


def references(rows: Iterable[RowView]) -> dict[str, float]:
    """Per row shape, the per-token value that tints are shares of: the strongest token of the middle row."""
    strongest: dict[str, list[float]] = {}
    for row in rows:
        top = max((abs(v) for _, _, v in row.pieces if v is not None and np.isfinite(v)), default=0.0)
        if top > 0:
            strongest.setdefault(row.shape, []).append(top)
    return {shape: float(np.median(found)) for shape, found in strongest.items()}


def show_rows(rows: Sequence[RowView], reference: Mapping[str, float], budget: int) -> list[ShownRow]:
    """All rows prepared, within ``budget`` bytes in total. Short rows leave their allowance to the others."""
    shown = []
    for i, row in enumerate(rows):
        allowance = min(ROW_BYTES, budget, 2 * budget // (len(rows) - i))
        ready = _show(row, reference.get(row.shape, 0.0), allowance)
        budget = max(budget - len(ready.body.encode("utf-8", "replace")), 0)
        shown.append(ready)
    return shown


def _show(row: RowView, reference: float, allowance: int) -> ShownRow:
    request = row.pieces[0][0] if row.pieces and row.pieces[0][1] == "request" else ""
    row = replace(row, pieces=row.pieces[bool(request) :])
    values = np.array([np.nan if v is None else v for _, _, v in row.pieces], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    magnitude = np.where(np.isnan(values), 0.0, np.abs(values))
    top = [int(i) for i in np.argsort(-magnitude, kind="stable")[:MARKED] if magnitude[i] > 0.1 * magnitude.max()]
    keep = _choose(row.pieces, top, allowance)
    body = _body(row.pieces, keep, set(top), reference, allowance)
    answer = "".join(text for text, role, _ in row.pieces[-5000:] if role != "prompt")
    whole = request or answer or "".join(text for text, _, _ in row.pieces[:200])
    strongest = tuple((one_line(row.pieces[i][0], 24) or "space", float(values[i])) for i in top)
    return ShownRow(row, one_line(whole, PREVIEW), body, strongest, len(keep) < len(row.pieces), _margin(row))


def _margin(row: RowView) -> float:
    scale = max(abs(row.score), abs(row.score - row.margin))
    rounding = math.isfinite(scale) and abs(row.margin) <= ROUNDING * scale
    return 0.0 if rounding else abs(row.margin)


def _choose(pieces: Sequence[Piece], top: Sequence[int], allowance: int) -> list[int]:
    """Ascending positions of the pieces to show: the strongest and their neighbours, then each role's beginning."""
    sizes = [min(len(text), PIECE_CHARS) + 48 for text, _, _ in pieces]
    if sum(sizes) <= allowance:
        return list(range(len(pieces)))
    near = [j for i in top for j in range(max(i - 4, 0), min(i + 5, len(pieces)))]
    answer = [i for i, piece in enumerate(pieces) if piece[1] != "prompt"]
    prompt = [i for i, piece in enumerate(pieces) if piece[1] == "prompt"]
    keep: set[int] = set()
    spent = 0
    for group, share in ((near, 0.4), (prompt, 0.6), (answer, 1.0)):
        for i in group:
            if i in keep:
                continue
            if spent + sizes[i] > share * allowance:
                break
            keep.add(i)
            spent += sizes[i]
    return sorted(keep)


def _body(pieces: Sequence[Piece], keep: list[int], top: set[int], reference: float, allowance: int) -> Markup:
    """The row's markup. Escapes can make text longer than ``_choose`` expected: the rest is then dropped."""
    turns: list[tuple[str, list[str]]] = []
    last, spent = -1, 0
    for i in keep:
        text, role, value = pieces[i]
        if spent > 1.5 * allowance:
            break
        if not turns or role != turns[-1][0]:
            turns.append((role, []))
        if i > last + 1:
            turns[-1][1].append(_gap(i - last - 1))
        turns[-1][1].append(_token(text, value, reference, i in top))
        spent += len(turns[-1][1][-1].encode("utf-8", "replace"))
        last = i
    if last < len(pieces) - 1:
        turns = turns or [("row", [])]
        turns[-1][1].append(_gap(len(pieces) - 1 - last))
    return Markup("").join(_turn(role, parts) for role, parts in turns)


def _turn(role: str, parts: list[str]) -> Markup:
    """A stretch of one role. ``parts`` are markup already."""
    kind = "prompt" if role == "prompt" else "response"
    shown = escape(visible(one_line(role, 24)).capitalize())
    text = "".join(parts)
    return Markup(f'<div class="turn {kind}"><span class="role">{shown}</span><div dir="auto">{text}</div></div>')


def _gap(count: int) -> str:
    return f'<span class="gap">… {count:,} token{"s" if count > 1 else ""} not shown …</span>'


def _token(text: str, value: float | None, reference: float, marked: bool) -> str:
    """One token: escaped, tinted by sign and size, its value in the tooltip; a tinted newline is shown."""
    shown = str(escape(visible(shorten(text, PIECE_CHARS))))
    if value is None or not np.isfinite(value):
        return shown
    share = abs(value) / reference if reference else 0.0
    level = sum(share >= edge for edge in LEVELS)
    if level:
        shown = shown.replace("\n", '<span class="nl">↵</span>\n')
    classes = [f"{'h' if value > 0 else 's'}{level}"] if level else []
    classes += ["mark"] if marked else []
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f'<span{attribute} title="{"+" if value > 0 else ""}{number(float(value))}">{shown}</span>'
