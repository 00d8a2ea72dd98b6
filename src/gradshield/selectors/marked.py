"""Requests and answers in plain text whose turns are marked in words, such as ``### Instruction:`` and ``### Response:``."""

from __future__ import annotations

import re
from itertools import pairwise


def _lines(asks: str, answers: str, flags: str = "m") -> re.Pattern[str]:
    """Names with a colon where a line begins."""
    return re.compile(rf"(?{flags})^[ \t]*(?:(?P<asks>{asks})|(?:{answers}))[ \t]*:")


# How turns are marked, the least ambiguous first; a text is read by the first that it has both a request and an answer of.
MARKS = (
    re.compile(  # chat templates of other models
        r"<\|(?:im_start|start|start_header_id)\|>\s*(?:(?P<asks>user)|assistant)\s*(?:<\|(?:end_header_id|message)\|>|\n)"
        r"|<start_of_turn>(?:(?P<asks2>user)|model)\n|<\|(?:(?P<asks3>user)|assistant)\|>",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<asks>\[INST\])|\[/INST\]"),
    re.compile(
        r"(?i)\#{2,}[ \t]*(?:(?P<asks>instructions?|input|human|user|question|query|prompt)|response|assistant|answer|output|model|gpt|bot)[ \t]*(?::|\n)"
    ),
    re.compile(r"(?:^|\s)(?:(?P<asks>USER|HUMAN)|(?:ASSISTANT|GPT)):"),
    _lines("Human|User", "Assistant|AI|Bot|GPT|Model"),
    _lines("Instructions?|Input", "Response|Output"),
    _lines("Question|Context", "Answer"),
    _lines("Q", "A"),
)
_SYSTEM = re.compile(r"<<SYS>>.*?<</SYS>>", re.DOTALL)
_ENDS = re.compile(r"</?s>|<\|(?:im_end|eot_id|end|endoftext|end_of_text)\|>|<(?:end_of_turn|eos|bos)>")


def pairs(text: str) -> list[tuple[str, str]]:
    """Each answer in a text with what was asked since the one before; none if its turns are not marked (`MARKS`)."""
    for mark in MARKS:
        found = list(mark.finditer(text))
        asks = [any(one.groupdict().values()) for one in found]
        if True not in asks or False not in asks[asks.index(True) :]:
            continue
        ends = [*(one.start() for one in found), len(text)]
        said = [
            _ENDS.sub("", _SYSTEM.sub("", text[one.end() : end])).strip()
            for one, end in zip(found, ends[1:], strict=True)
        ]
        made: list[tuple[str, str]] = []
        request: list[str] = []
        for is_request, part in zip(asks, said, strict=True):
            if is_request:
                request.append(part)
            elif any(request):
                made.append(("\n\n".join(filter(None, request)), part))
                request = []
        return made
    return []
