"""Task scores of one answer against its reference, between 0 and 1, by name.

    score = metric("number")
    score("2 plus 3 makes 5. #### 5", "So there are 5.")    # 1.0

Answers are untrusted text: every metric accepts any text without raising, reads a bounded part of it, and evaluates nothing in
it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from gradshield.errors import UnknownNameError, UsageError
from gradshield.registry import Registry

MOST_CHARACTERS = 10_000  # of an answer; its end for metrics that search the end
MOST_LABELS, LONGEST_LABEL = 20, 4  # limits for guessing a choice: labels, and words per label
SHORT_WORDS = 4  # longest references, in words, for guessing an exact match
PATTERN_SECONDS = 1.0


class Metric(Protocol):
    """A score of an answer against its reference, between 0 and 1. ``name`` is the name given to ``metric``."""

    name: str

    def __call__(self, reference: str, answer: str) -> float: ...


METRICS: Registry[Callable[..., Metric]] = Registry("metric")
LIKELIHOOD = "likelihood"
UNREGISTERED = {  # metrics that are no registry entry: one takes no answer, the other takes a pattern
    LIKELIHOOD: "How likely the model finds the reference, per token; no answer is made.",
    "regex:PATTERN": "Whether the pattern's last match in the answer is the reference.",
}


def metric(name: str, references: Sequence[str] = ()) -> Metric:
    """The metric of that name, or ``regex:PATTERN``; ``choice`` takes its labels from ``references``.

    Raises UnknownNameError, and UsageError for an invalid pattern, a missing library, and ``likelihood``, which scores a whole
    exam and no single answer.
    """
    if name.startswith("regex:"):
        return Extraction(name.removeprefix("regex:"))
    if name == LIKELIHOOD:
        raise UsageError("the metric likelihood applies to all rows of a task: give it with --metric, not in a row")
    if name not in METRICS:
        raise UnknownNameError(METRICS.kind, name, [*METRICS, *UNREGISTERED])
    entry = METRICS[name]
    return entry(references) if entry is Choice else entry()


# ---- words ----------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """The text without case, kinds of white space, compatibility forms and surrounding punctuation."""
    folded = " ".join(unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]).casefold().split())
    return folded.strip(" .,;:!?\"'`*()[]“”‘’") or folded


@METRICS.register("exact")
class Exact:
    """Whether the answer equals the reference, ignoring case, white space and surrounding punctuation."""

    name = "exact"

    def __call__(self, reference: str, answer: str) -> float:
        return float(normalised(answer) == normalised(reference))


@METRICS.register("contains")
class Contains:
    """Whether the answer contains the reference as whole words, ignoring case and white space."""

    name = "contains"

    def __call__(self, reference: str, answer: str) -> float:
        wanted = normalised(reference)
        return float(bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalised(answer)) is not None)


# ---- a number -------------------------------------------------------------------------------------------------------

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?!\w))?"
_FRACTION = r"(?:/[1-9][0-9]*(?![/0-9]))?"
_NUMBER = re.compile(rf"(?<![\w./])[-+−]?(?:[$€£]\s?)?(?:{_DIGITS}{_FRACTION}|\.[0-9]+)|{_DIGITS}")
_LONGEST_NUMBER = 100


def number(text: str) -> Fraction | None:
    """The final number of an answer: the first after its last ``####``, else the last of all; None if there is none.

    Thousands may be separated by commas, and ``3/4`` is one number; a sign counts unless something is joined to its left (``5-3``
    ends with 3).
    """
    text = text[-MOST_CHARACTERS:]
    _, marked, after = text.rpartition("####")
    found = _NUMBER.findall(after)[:1] if marked else []
    found = found or _NUMBER.findall(text)
    if not found or len(found[-1]) > _LONGEST_NUMBER:
        return None
    numerator, _, denominator = re.sub(r"[,$€£\s]", "", found[-1]).replace("−", "-").partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


@METRICS.register("number")
class Number:
    """Whether the answer and the reference end with the same number, after #### if present (as in GSM8K)."""

    name = "number"

    def __call__(self, reference: str, answer: str) -> float:
        wanted = number(reference)
        return float(wanted is not None and number(answer) == wanted)


# ---- a choice -------------------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGH"
_SAID = re.compile(
    r"\b(?:answer|option|choice|label|category|topic)\b(?:\s+(?:is|are|would be|must be))?\s*[:=]?\s*", re.IGNORECASE
)


@METRICS.register("choice")
class Choice:
    """Whether the one label that the answer gives (a letter, a word) is the reference.

    The label is, in this order: the whole answer; what follows the last "answer is" or "Answer:"; the start of the answer; the
    only label that occurs in it. If none of these finds exactly one label, the answer is wrong. A one-letter label must be a
    separate capital letter, and "A" before another word is an article.
    """

    name = "choice"

    def __init__(self, references: Sequence[str]) -> None:
        labels = {normalised(reference): reference.strip() for reference in references}
        self._letters = bool(labels) and all(len(label) == 1 and label.upper() in _LETTERS for label in labels)
        if self._letters:  # an option that is never right can still be chosen
            labels = {letter.lower(): letter for letter in _LETTERS}
        # Longer ones first, so that "not spam" is not read as "spam".
        ordered = sorted((label for label in labels if label), key=lambda label: (-len(label), label))
        options = "|".join(map(re.escape, ordered)) or r"(?!)"
        flags = 0 if self._letters else re.IGNORECASE
        options = options.upper() if self._letters else options
        # "B", "(B)", "A or B"; not the article of "A dog".
        article = r"(?<!A(?=\s+(?!or\b|and\b|is\b|because\b)[a-z]))" if self._letters else ""
        self._label = re.compile(rf"(?<![\w'’])(?P<label>{options})(?![\w'’]){article}", flags)
        self._hedge = re.compile(rf"\W*\s(?:or|and)\s\W*(?:{options})(?!\w)|\s?[/&]\s?(?:{options})(?!\w)", flags)

    def label(self, answer: str) -> str | None:
        """The label that ``answer`` gives, normalised; None without a clear one."""
        text = unicodedata.normalize("NFKC", answer[:MOST_CHARACTERS])
        whole = normalised(text)
        if self._label.fullmatch(whole.upper() if self._letters else whole):
            return whole
        said = list(_SAID.finditer(text))
        for start in ([said[-1].end()] if said else []) + [0]:
            opening = re.match(r"[\s*_`\"'“‘(\[]*(?:the\s+)?[\s*_`\"'“‘(\[]*", text[start:], re.IGNORECASE)
            found = self._label.match(text, start + (opening.end() if opening else 0))
            if found:
                return None if self._hedge.match(text, found.end()) else normalised(found["label"])
        every = {normalised(found["label"]) for found in self._label.finditer(text)}
        return every.pop() if len(every) == 1 else None

    def __call__(self, reference: str, answer: str) -> float:
        return float(self.label(answer) == normalised(reference))


# ---- overlap --------------------------------------------------------------------------------------------------------

# Scripts without spaces count by character; rouge-score's own tokenizer handles only ASCII and scores everything else 0.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class _Tokens:
    """rouge-score's tokens, stemmed, for ASCII text, and words of other scripts."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        words = _TOKEN.findall(text.lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


class _Rouge:
    kind: str

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise UsageError(
                f"the metric {self.kind} needs rouge-score, which is not installed: run pip install 'gradshield[eval]'"
            ) from None
        self._scorer = RougeScorer([self.kind], tokenizer=_Tokens())

    def __call__(self, reference: str, answer: str) -> float:
        # The cost of the longest common subsequence is the product of the lengths.
        scores = self._scorer.score(reference[:MOST_CHARACTERS], answer[:MOST_CHARACTERS])
        return float(scores[self.kind].fmeasure)


@METRICS.register("rouge-l")
class RougeL(_Rouge):
    """F-measure of the longest common subsequence of words with the reference, stemmed (as for SAMSum)."""

    name, kind = "rouge-l", "rougeL"


@METRICS.register("rouge-1")
class Rouge1(_Rouge):
    """F-measure of the words shared with the reference, stemmed."""

    name, kind = "rouge-1", "rouge1"


# ---- a pattern ------------------------------------------------------------------------------------------------------


class Extraction:
    """Whether a pattern's last match in the answer is the reference: ``regex:PATTERN``, its first group or the whole match.

    A reference that matches the pattern is cut the same way. Only the last ``MOST_CHARACTERS`` of an answer are searched; a
    pattern that takes longer than ``PATTERN_SECONDS`` on one answer ends the measurement with a UsageError, so that no score
    depends on the machine's speed.
    """

    def __init__(self, pattern: str) -> None:
        import regex

        self.name = f"regex:{pattern}"
        try:
            self._pattern = regex.compile(pattern, regex.MULTILINE)
        except regex.error as error:
            raise UsageError(
                f"the metric regex got an invalid pattern ({error}): {pattern[:80]!r}; give a regular expression"
            ) from None

    def __call__(self, reference: str, answer: str) -> float:
        found = self._last(answer)
        if found is None:
            return 0.0
        wanted = self._last(reference)
        return float(normalised(found) == normalised(reference if wanted is None else wanted))

    def _last(self, text: str) -> str | None:
        found = None
        try:
            for match in self._pattern.finditer(text[-MOST_CHARACTERS:], timeout=PATTERN_SECONDS):
                found = match
        except TimeoutError:
            raise UsageError(
                f"the pattern of {self.name[:80]!r} took more than {PATTERN_SECONDS:g} s on one answer: "
                "write it without nested repeats"
            ) from None
        return None if found is None else str(found[1 if self._pattern.groups else 0] or "")


# ---- which one -------------------------------------------------------------------------------------------------------


def guess(references: Sequence[str]) -> str:
    """A metric guessed from the references: ``number``, ``choice``, ``exact`` for short ones, else ``rouge-l``.

    ``number`` if nine in ten are numbers or have one after ``####``; ``choice`` if a few short labels repeat (three times each on
    average); ``exact`` if all have at most ``SHORT_WORDS`` words.
    """
    numbers = sum(
        number(r) is not None and ("####" in r or _NUMBER.fullmatch(r.strip()) is not None) for r in references
    )
    if numbers >= 0.9 * len(references):
        return "number"
    labels = {normalised(r) for r in references}
    short = all(len(label.split()) <= LONGEST_LABEL for label in labels)
    if short and 2 <= len(labels) <= MOST_LABELS and len(references) >= 3 * len(labels):
        return "choice"
    return "exact" if all(len(r.split()) <= SHORT_WORDS for r in references) else "rouge-l"
