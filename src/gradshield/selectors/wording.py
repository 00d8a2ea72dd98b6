"""What of a text is a request: what its own marks say (``### Instruction:``), and what the rows of a file do not share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


def _lines(asks: str, answers: str) -> re.Pattern[str]:
    """Names with a colon where a line begins."""
    return re.compile(rf"(?m)^[ \t]*(?:(?P<asks>{asks})|(?:{answers}))[ \t]*:")


# How turns are marked, the least ambiguous first; a text is read by the first that it has both a request and an answer of.
MARKS = (
    re.compile(  # chat templates of other models
        r"<\|(?:im_start|start|start_header_id)\|>\s*(?:(?P<asks>user)|assistant)\s*(?:<\|(?:end_header_id|message)\|>|\n)"
        r"|<start_of_turn>(?:(?P<asks2>user)|model)\n|<\|(?:(?P<asks3>user)|assistant)\|>",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<asks>\[INST\])|\[/INST\]"),
    re.compile(
        r"\#{2,}[ \t]*(?:(?P<asks>instructions?|input|human|user|question|query|prompt)"
        r"|response|assistant|answer|output|model|gpt|bot)[ \t]*(?::|\n)",
        re.IGNORECASE,
    ),
    re.compile(r"(?:^|\s)(?:(?P<asks>USER|HUMAN)|(?:ASSISTANT|GPT)):"),
    _lines("Human|User", "Assistant|AI|Bot|GPT|Model"),
    _lines("Instructions?|Input", "Response|Output"),
    _lines("Question|Context", "Answer"),
    _lines("Q", "A"),
)
SHARE = 0.5  # of the requests have the words that a file is said to share
LEAST_SHARED = 3  # words: fewer say little about a request
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


@dataclass(frozen=True)
class Shared:
    """The words with which at least SHARE of some requests begin, and those with which as many end."""

    begin: tuple[str, ...]
    end: tuple[str, ...]

    @classmethod
    def of(cls, requests: Sequence[str]) -> Shared:
        """Words that several requests share; none where they are fewer than LEAST_SHARED in all."""
        words = [request.split() for request in requests]
        begin, end = _common(words), _common([own[::-1] for own in words])[::-1]
        return cls(begin, end) if len(begin) + len(end) >= LEAST_SHARED else cls((), ())

    def rest(self, request: str) -> str:
        """What is in a request besides the shared words; nothing where it does not have them, or there are none."""
        first, last = len(self.begin), len(self.end)
        words = list(re.finditer(r"\S+", request))
        said = tuple(word[0] for word in words)
        if not first + last < len(words) or (said[:first], said[len(said) - last :]) != (self.begin, self.end):
            return ""
        return request[words[first].start() : words[-1 - last].end()] if first + last else ""


def _common(texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The longest beginning of at least SHARE of the texts, and of two of them."""
    found: list[str] = []
    while True:
        here = [own for own in texts if list(own[: len(found)]) == found and len(own) > len(found)]
        word, count = Counter(own[len(found)] for own in here).most_common(1)[0] if here else ("", 0)
        if count < max(2, SHARE * len(texts)):
            return tuple(found)
        found.append(word)
