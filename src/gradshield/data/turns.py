"""Finds each assistant turn in a rendered conversation by difference, without markers.

A turn's span runs from the first character that the model writes to the token that ends its turn, inclusive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.data.fitting import RenderText, attempt
from gradshield.types import shared_length

Span = tuple[int, int]

# Two answers that share neither their first nor their last character, so that the common prefix and suffix of two
# renderings belong to the template.
_STAND_INS = ("qzx7Ajk", "Bvw3mQz9")


def turn_span(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, render: RenderText, ends: str
) -> Span | None:
    """Span in ``text`` (the rendered ``messages``) that the model writes in a turn; None if it cannot be found.

    Parameters
    ----------
    render
        Renders messages to text; any exception means that these messages cannot be rendered.
    ends
        Regular expression of the special tokens, one of which may end a turn; empty without any.
    """
    before = attempt(render, messages[:turn], add_generation_prompt=True)
    bare = attempt(render, messages[:turn])
    opening = before[len(bare) :] if before and bare is not None and before.startswith(bare) else ""
    until = attempt(render, messages[: turn + 1])
    if opening and until and before and text.startswith(before) and text.startswith(until) and len(until) > len(before):
        return len(before), _close(text, len(before), len(until), ends)
    # The template has no generation prompt, or renders earlier turns differently once later ones follow (reasoning models
    # drop old reasoning): change only the content of this turn and compare.
    span = _by_substitution(messages, turn, text, render, ends, bare or "", opening)
    if span is None and bare and until and text.startswith(until) and until.startswith(bare):
        # A tool call in place of the content: all that the turn adds, after what it shares with the generation prompt.
        start = len(bare) + shared_length(opening, until[len(bare) :])
        span = (start, _close(text, start, len(until), ends)) if len(until) > start else None
    return span


def _by_substitution(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, render: RenderText, ends: str, bare: str, opening: str
) -> Span | None:
    around = _surroundings(messages, turn, render)
    if around is None:
        return None
    start = len(_shared(text, around[0]))
    end = len(text) - len(_shared(text[start:][::-1], around[1][::-1]))
    if opening.strip():
        # The model also writes what is between its header and the content, such as a thinking block. The generation prompt
        # may hold a closed one, where the row has its own. Earlier turns may be written differently: then the last header.
        header = _header(opening)
        at = text.find(header, len(bare), start) if text.startswith(bare) else text.rfind(header, 0, start)
        if at >= 0:
            start = min(start, at + shared_length(opening[opening.index(header) :], text[at:]))
    last = _surroundings(messages[: turn + 1], turn, render)
    # A turn with only tool calls lacks the white space that would separate them from content.
    tails = (last[1], last[1].lstrip()) if last else ("",)
    end += max(len(_shared(text[end:], tail)) for tail in tails)
    end = _close(text, start, _outside_specials(text, start, end, ends), ends)
    return (start, end) if end > start else None


def _surroundings(messages: Sequence[Mapping[str, Any]], turn: int, render: RenderText) -> tuple[str, str] | None:
    """What the template writes before and after the content of a turn; None if it does not write that content."""
    first, second = (attempt(render, _with_content(messages, turn, stand_in)) for stand_in in _STAND_INS)
    if first is None or second is None or first == second:
        return None
    head = _shared(first, second)
    tail = _shared(first[len(head) :][::-1], second[len(head) :][::-1])[::-1]
    return head, tail


def _with_content(messages: Sequence[Mapping[str, Any]], turn: int, content: str) -> list[Mapping[str, Any]]:
    parts = isinstance(messages[turn].get("content"), list)
    value: Any = [{"type": "text", "text": content}] if parts else content
    return [{**m, "content": value} if n == turn else m for n, m in enumerate(messages)]


def _shared(left: str, right: str) -> str:
    """The beginning that two texts have in common."""
    return left[: shared_length(left, right)]


def _header(opening: str) -> str:
    """The first word of the generation prompt, a special token or a name: where a turn begins."""
    return opening.split(maxsplit=1)[0]


def _close(text: str, start: int, end: int, ends: str) -> int:
    """Exclude the white space that a template writes after the token that ends the turn."""
    kept = text[start:end].rstrip()
    if ends and re.search(f"(?:{ends})$", kept):
        return start + len(kept)
    return end


def _outside_specials(text: str, start: int, end: int, ends: str) -> int:
    """``end``, moved back if it is inside a special token: two of them may share a prefix."""
    inside = (m.start() for m in re.finditer(ends or r"(?!)", text[start:]) if m.start() < end - start < m.end())
    return start + next(inside, end - start)
