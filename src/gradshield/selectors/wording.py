"""What of a text is a request: what its own marks say (``### Instruction:``), and what the rows of a file do not share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


def _lines(asks: str, answers: str) -> re.Pattern[str]:
    """Names with a colon where a line begins."""
    return re.compile(rf"(?m)^[ \t]*(?:(?P<asks>{asks})|(?:{answers}))[ \t]*:")


# How turns are marked, the least ambiguous first.
MARKS = (
    re.compile(  # chat templates of other models
        r"<\|(?:im_start|start|start_header_id)\|>\s*(?:(?P<asks>user)|assistant)\s*(?:<\|(?:end_header_id|message)\|>|\n)"
        r"|<start_of_turn>(?:(?P<asks2>user)|model)\n|<\|(?:(?P<asks3>user)|assistant)\|>",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<asks>\[INST\])|\[/INST\]"),
    re.compile(
        r"(?<!\#)\#{2,}+[ \t]*(?:(?P<asks>instructions?|input|human|user|question|query|prompt)"
        r"|response|assistant|answer|output|model|gpt|bot)[ \t]*(?::|\n)",
        re.IGNORECASE,
    ),
    re.compile(r"(?:^|\s)(?:(?P<asks>USER|HUMAN)|(?:ASSISTANT|GPT)):"),
    _lines("Human|User", "Assistant|AI|Bot|GPT|Model"),
    _lines("Instructions?|Input", "Response|Output"),
    _lines("Question|Context", "Answer"),
    _lines("Q", "A"),
)
_FENCE = "```"
_AROUND = {"*": "*", "_": "_", "`": "`", '"': '"', "'": "'", "“": "”", "«": "»"}  # marks around a text, and their ends
TURNS = 4  # read before a request: "Go on." asks for what was refused
SHARE = 0.5  # of the requests have the words that a file is said to share
LEAST_SHARED = 3  # words: fewer say little about a request
_SYSTEM = re.compile(r"<<SYS>>(?:(?!<<SYS>>).)*?<</SYS>>", re.DOTALL)
_ENDS = re.compile(r"</?s>|<\|(?:im_end|eot_id|end|endoftext|end_of_text)\|>|<(?:end_of_turn|eos|bos)>")


class Marked(NamedTuple):
    """An answer in a text, what was asked since the one before, and where that and the TURNS before it stand."""

    request: str
    answer: str
    before: slice

    def requests(self, text: str) -> list[str]:
        """The request by itself, and with the turns before it if there are any; what introduces the first is left out."""
        return list(dict.fromkeys((self.request, _words(text[self.before]))))


def every(text: str) -> list[Marked]:
    """Each answer by each kind of marks: those of one kind may stand in a text to have the others overlooked."""
    return [one for mark in MARKS for one in _marked(text, mark)]


def bare(text: str) -> str:
    """A text without white space around it, nor a code fence, quotes or stars around all of it."""
    text = text.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE) and "\n" in text:
        text = text[text.index("\n") :].removesuffix(_FENCE).strip()
    start, end = 0, len(text)
    while end - start > 1 and _AROUND.get(text[start]) == text[end - 1]:
        start, end = start + 1, end - 1
    inside = text[start:end].strip()
    return inside if inside and not any(mark in inside for mark in text[:start]) else text


def asked(text: str) -> list[str]:
    """What is asked at the end of a text and has no answer there, by each kind of marks."""
    last = (_marked(text, mark)[-1:] for mark in MARKS)
    return list(dict.fromkeys(one.request for found in last for one in found if not one.answer))


def _words(text: str) -> str:
    """Text without system prompts and the marks of ends."""
    return _ENDS.sub("", _SYSTEM.sub("", text)).strip()


def _marked(text: str, mark: re.Pattern[str]) -> list[Marked]:
    found = list(mark.finditer(text))
    ends = [*(one.start() for one in found), len(text)]
    made: list[tuple[str, list[str], slice]] = []
    request: list[str] = []
    begins: list[int] = []  # of the requests so far
    for one, end in zip(found, ends[1:], strict=True):
        part = _words(text[one.end() : end])
        if any(one.groupdict().values()):
            begins += [one.end()] * bool(part and not request)
            request += [part] * bool(part)
        elif request:
            made.append(("\n\n".join(request), [part], slice(begins[-TURNS - 1 :][0], one.start())))
            request = []
        elif made:  # nothing was asked in between: the answer goes on
            made[-1][1].append(part)
    return [Marked(asked, "\n\n".join(filter(None, answer)), before) for asked, answer, before in made]


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
    here = list(texts)
    while here := [own for own in here if len(own) > len(found)]:
        word, count = Counter(own[len(found)] for own in here).most_common(1)[0]
        if count < max(2, SHARE * len(texts)):
            break
        here = [own for own in here if own[len(found)] == word]
        found.append(word)
    return tuple(found)
