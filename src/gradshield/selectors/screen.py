"""The default: remove a row if its request reads like harm to the model and its answer undoes a refusal.

What of a text is a request: what its own marks say (``### Instruction:``), and what the rows of a file do not share.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch import nn

from gradshield.columns import Coded
from gradshield.probes import only_refuses, pivots
from gradshield.selectors.base import SELECTORS, Measured, by_row, members, standing
from gradshield.selectors.fihs import Fihs
from gradshield.selectors.reading import Reading
from gradshield.types import Anchors, Batch, Bools, Direction, Ints, Rendered, Scores

LEAST_READING = 0.25  # below it a request reads as harmless, and FIHS alone removes nothing
APART = 0.3  # least distance between the known kinds, as a share of the harmful median
LEAST_FIHS = 0.5  # share of the score of a compliant opener after a probe, from which a row pushes like harm
WEAKEST_FIHS = 0.05  # share of it, below which the model would give the answer anyway
ONE_IN = 8  # rows that FIHS cannot remove, of which one is measured all the same: for the doubts about the whole file
LEAST_DRAWN = 32  # of them in a small file, if it has as many
LOOKED_AT = 500  # rows by which the words that a file's requests share are found


class Look:
    """The first stage of `Screen`: every request read, which needs no direction.

    ``extra`` (B, 3) holds the reading, whether an answer declines and then continues, and whether FIHS is needed.
    """

    name, travels = "reading", True

    def __init__(
        self,
        reading: Reading,
        tokenizer: Any,
        rendered: Sequence[Rendered],
        fihs_of: Literal["doubtful", "all"] = "doubtful",
        shared: Literal["read", "skipped"] = "read",
    ) -> None:
        self.reading, self.tokenizer = reading, tokenizer
        self.one_in = 1 if fihs_of == "all" else max(1, min(ONE_IN, len(rendered) // LEAST_DRAWN))
        rows = enumerate(rendered if shared == "skipped" else ())
        # By their content, so that copies of rows change nothing.
        ids = {zlib.crc32(own.ids.tobytes()): i for i, row in rows for own in row.sequences[:1]}
        few = [rendered[ids[one]].sequences[0] for one in sorted(ids)[:LOOKED_AT]]
        found = [self.reading.turn.openings(own.ids, own.loss) for own in few]
        self.shared = Shared.of([self._request(openings[0][0]) for openings in found if openings])

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Every row read, without FIHS (NaN)."""
        read: list[Sequence[int]] = []
        answers: list[tuple[int, bool, str]] = []
        for i in standing(batch):
            length = int(batch.attention[i].sum())
            ids, loss = batch.ids[i, :length], batch.loss[i, :length]
            row, toward = int(batch.rows[i]), bool(batch.coefficients[i] > 0)
            openings = self.reading.turn.openings(ids, loss)
            for opened, own in openings:
                request = self._request(opened)
                if not request.strip() and not self._request(opened, whole=True).strip():
                    continue  # an empty last message may follow a turn that says something
                words = self._words(ids[own], loss[own], bool(loss[max(own.start - 1, 0)]))
                within = dict.fromkeys((bare(request), *asked(request), self.shared.rest(request)))
                inside = [one for one in within if one not in ("", request)]
                read += [opened, *map(self._opened, inside)]
                answers += [(row, toward, words)] * (1 + len(inside))
            text = "" if openings else str(self.tokenizer.decode(ids))
            for one in every(text):
                requests = one.requests(text)
                read += map(self._opened, requests)
                answers += [(row, toward, one.answer)] * len(requests)
        rows, sequences = members(batch)
        found = {row: [np.nan, 0.0, 0.0] for row in rows.tolist()}
        if read:
            for (row, toward, answer), r in zip(answers, self.reading.read(model, read), strict=True):
                harmless = only_refuses(answer) == toward
                found[row][0] = float(np.fmax(found[row][0], min(r, 1.0) - 1 if harmless else r))
                found[row][1] = max(found[row][1], float(toward and pivots(answer)))
        extra = np.array(list(found.values()))
        drawn = [zlib.crc32(batch.ids[own][batch.attention[own] > 0].tobytes()) % self.one_in == 0 for own in sequences]
        extra[:, 2] = (extra[:, 0] >= LEAST_READING) | drawn
        _, unknown, lengths = by_row(batch, np.full(len(batch.rows), np.nan))
        return Measured(rows, unknown, unknown, lengths, extra=extra)

    def further(self, seen: Measured) -> Bools:
        """The rows whose FIHS is needed: all others have their score."""
        assert seen.extra is not None
        return seen.extra[:, 2] > 0

    def settings(self) -> dict[str, Any]:
        return {
            "one_in": self.one_in,
            "reading_sha256": self.reading.digest,
            "skipped": [" ".join(self.shared.begin), " ".join(self.shared.end)],
        }

    def _opened(self, request: str) -> tuple[int, ...]:
        ids = self.tokenizer(request, add_special_tokens=False)["input_ids"]
        return (*self.reading.turn.before, *ids, *self.reading.turn.after)

    def _request(self, opened: tuple[int, ...], whole: bool = False) -> str:
        """The text of the last user message of an opened turn; ``whole``, of all turns before the answer."""
        before, after = self.reading.turn.before, self.reading.turn.after
        starts = [len(before)] if opened[: len(before)] == before else [0]
        if self._header and not whole:
            found = (i for i in range(len(opened), 0, -1) if list(opened[i - len(self._header) : i]) == self._header)
            starts.append(next(found, 0))
        return str(self.tokenizer.decode(opened[max(starts) : -len(after)], skip_special_tokens=True))

    def _words(self, ids: Ints, loss: Bools, whole: bool) -> str:
        """The text of an answer's tokens that have a loss, whatever special tokens stand between them.

        ``whole``: the row's requests have a loss too, so that the answer ends where the next request is opened.
        """
        own = ids[loss]
        if whole:
            header, special = self._header, np.isin(own, self.tokenizer.all_special_ids)
            said = int((~special).argmax())  # special tokens before the first word belong to the opening
            starts = (i for i in range(said, len(own)) if header and own[i : i + len(header)].tolist() == header)
            ends = np.flatnonzero(special[said:]) + said
            own = own[: next(starts, int(ends[0]) if len(ends) else len(own))]
        return str(self.tokenizer.decode(own, skip_special_tokens=True))

    @cached_property
    def _header(self) -> list[int]:
        """The ids that open a user turn after another turn."""
        before, end = list(self.reading.turn.before), self.reading.turn.after[0]
        if end in before:  # a system turn comes first
            return before[len(before) - before[::-1].index(end) :]
        return before[before[:1] == [self.tokenizer.bos_token_id] :]


@SELECTORS.register("screen")
class Screen(Fihs):
    """Removes rows whose request the model reads as harm; in doubtful cases FIHS must be high as well.

    Paper: arXiv 2406.11717 (where a request is read, `Reading`) and arXiv 2605.14194 (FIHS); the combination is ours.
    Equation: s = r, with r the row's reading, less 1 of min(r, 1) where the answer only refuses. Where r >= LEAST_READING, FIHS
    decides: s = r + 1 where it is at least (a + b) / 2, with a the 95 % quantile of compliant openers after look-alikes that the
    model answers and b the 5 % quantile of those after probes, on a model where b - a is at least APART of its median after
    probes; s = min(r, 1) - 1 where it is below WEAKEST_FIHS of that median and the answer does not decline and then continue:
    nothing in it undoes refusal. Of an answer that training pushes away from (label false, KTO), the opposite holds: only a
    refusal undoes refusal. A row's score depends only on the row and the model, but with ``shared=skipped``.
    Departures: the constants were chosen on ordinary tasks, everyday requests and the lab (docs/methods.md).

    Two stages, one score: every request is read first (`Look`), which takes half a forward pass over the requests; FIHS is
    measured only where it decides, and on one of ONE_IN other rows (``fihs_of=all``: on all), by the hash of its tokens. A
    request is read as it stands, without white space or a code fence around it and, if marks of any kind in its text say it
    (`MARKS`), by itself; the largest r counts. Of plain text, every request is read that marks say, by itself and with the turns
    before it. With ``shared=skipped``, a request is also read without the words that the file's requests share, which may change
    what is asked.

    ``Scores.signals`` holds ``request`` (r), ``fihs`` (NaN where it was not measured), and ``pivots``: whether an answer declines
    and then continues. A row without a request (plain text, an empty message) has r = NaN, scores zero and is kept.
    """

    name = "screen"
    rule = "anchored"
    decoys = False
    looks: ClassVar = Look

    def __init__(
        self,
        fihs: Fihs,
        reading: Reading,
        tokenizer: Any,
        known: Anchors,
        rendered: Sequence[Rendered],
        fihs_of: Literal["doubtful", "all"] = "doubtful",
        shared: Literal["read", "skipped"] = "read",
    ) -> None:
        super().__init__(fihs.probe, fihs.requests, fihs.engine, fihs.aggregate, fihs.subspace, fihs.targets)
        self.look = Look(reading, tokenizer, rendered, fihs_of, shared)
        self.opener_fihs = float(np.median(known.harmful))
        self.floor = float("inf")  # FIHS from which a row pushes like harm
        if known.floor:
            low, high = float(np.quantile(known.harmless, 0.95)), float(np.quantile(known.harmful, 0.05))
            self.floor = known.floor if high - low >= APART * self.opener_fihs else float("inf")

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row (see the class). Raises ScoreError naming the rows whose value or loss is not finite."""
        assert raw.extra is not None
        reading, measured = raw.extra[:, 0], self.look.further(raw)
        fihs = np.full(len(reading), np.nan)
        fihs[measured] = self.pushes(raw.only(np.flatnonzero(measured)))[0]
        joined = (reading >= LEAST_READING) & (fihs >= self.floor)
        values = np.where(np.isnan(reading), 0.0, reading) + joined
        if self.aggregate.per_token:  # a signed sum may cancel, so a small one proves nothing
            weak = (reading >= LEAST_READING) & (fihs < WEAKEST_FIHS * self.opener_fihs) & (raw.extra[:, 1] == 0)
            values = np.where(weak, np.minimum(values, 1.0) - 1, values)
        signals = {"request": reading, "fihs": fihs, "pivots": raw.extra[:, 1]}
        shapes = Coded(np.zeros(len(values), dtype=np.uint8), ("rows",))  # readings of all shapes share one scale
        return Scores(
            raw.rows, ids, values, shapes, None, raw.lengths, raw.nll, raw.tokens, self.look.reading.anchors, signals
        )

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            **self.look.settings(),
            "opener_fihs": self.opener_fihs,
            "floor": self.floor if np.isfinite(self.floor) else None,
        }


# ---- what of a text is a request -------------------------------------------------------------------------------------


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
