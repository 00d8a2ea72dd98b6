"""Task scores of one answer against its reference, between 0 and 1, by name.

    score = metric("number")
    score("2 plus 3 makes 5. #### 5", "So there are 5.")    # 1.0

An answer is whatever a model wrote, and is hostile text: every metric is total (wild text scores, it never raises), works
on a bounded part of it, and evaluates nothing in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from gradshield.errors import UnknownNameError, UsageError
from gradshield.registry import Registry

MOST_CHARACTERS = 10_000  # of an answer; what is looked for at its end keeps its end
MOST_LABELS, LONGEST_LABEL = 20, 4  # what may be guessed to be a choice: labels, and words of one
SHORT_WORDS = 4  # references this short are guessed to be matched exactly
PATTERN_SECONDS = 1.0


class Metric(Protocol):
    """A score of an answer against its reference, between 0 and 1. ``name`` is what ``metric`` made it from."""

    name: str

    def __call__(self, reference: str, answer: str) -> float: ...


METRICS: Registry[Callable[..., Metric]] = Registry("metric")
LIKELIHOOD = "likelihood"
BESIDE = {  # what may be typed as well and is no entry: the one asks no answer, the other is made of what is typed
    LIKELIHOOD: "How likely the model finds the reference, per token; no answer is made.",
    "regex:PATTERN": "Whether what the pattern finds last in the answer is the reference.",
}


def metric(name: str, references: Sequence[str] = ()) -> Metric:
    """The metric of that name, or ``regex:PATTERN``; ``choice`` takes its labels from ``references``.

    Raises UnknownNameError, and UsageError for a pattern that is none, where a library is not installed, and for
    ``likelihood``, which is of a whole exam and scores no answer.
    """
    if name.startswith("regex:"):
        return Extraction(name.removeprefix("regex:"))
    if name == LIKELIHOOD:
        raise UsageError("the metric likelihood is of all rows of a task: give it with --metric, and not in a row")
    if name not in METRICS:
        raise UnknownNameError(METRICS.kind, name, [*METRICS, *BESIDE])
    entry = METRICS[name]
    return entry(references) if entry is Choice else entry()


# ---- words ----------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Case, kinds of white space, compatibility forms and surrounding punctuation left out."""
    folded = " ".join(unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]).casefold().split())
    return folded.strip(" .,;:!?\"'`*()[]“”‘’") or folded


@METRICS.register("exact")
class Exact:
    """Whether the answer is the reference, but for case, white space and the punctuation around it."""

    name = "exact"

    def __call__(self, reference: str, answer: str) -> float:
        return float(normalised(answer) == normalised(reference))


@METRICS.register("contains")
class Contains:
    """Whether the reference stands in the answer as whole words, but for case and white space."""

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
    """The number that an answer ends on: the first after its last ``####``, else the last of all; None if there is none.

    Thousands may be parted by commas, and ``3/4`` is one number; a sign counts where nothing is joined to its left (``5-3``
    ends on 3).
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
    """Whether the answer ends on the number that the reference ends on, after #### where there is one (as in GSM8K)."""

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
    """Whether the one label that the answer settles on (a letter, a word) is the reference.

    The label is, in this order: the whole answer; what follows the last "answer is" or "Answer:"; what the answer opens
    with; the only label that occurs in it. Where none of these finds exactly one, the answer is wrong. A label of one letter
    counts only as a capital that stands apart, and "A" before another word is an article.
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
        """The label that ``answer`` settles on, normalised; None where it settles on none."""
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

# Scripts that write no spaces count by character; rouge-score's own tokens know ASCII alone and score all else 0.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class _Tokens:
    """rouge-score's tokens with its stemmer on ASCII text, and words of other scripts besides."""

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
        # The longest common subsequence costs the product of the lengths.
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
    """Whether what a pattern finds last in the answer is the reference: ``regex:PATTERN``, its first group or all of it.

    A reference that the pattern fits is cut the same way. Only the last ``MOST_CHARACTERS`` of an answer are searched; a
    pattern that takes longer than ``PATTERN_SECONDS`` on one answer ends the measurement with a UsageError rather than
    score that answer, so that no score depends on the machine's speed.
    """

    def __init__(self, pattern: str) -> None:
        try:
            import regex
        except ImportError:
            raise UsageError(
                "the metric regex needs the package regex, which is not installed: run pip install 'gradshield[eval]'"
            ) from None
        self.name = f"regex:{pattern}"
        try:
            self._pattern = regex.compile(pattern, regex.MULTILINE)
        except regex.error as error:
            raise UsageError(f"the metric regex got a pattern that is none ({error}): {pattern[:80]!r}") from None

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
                "write it without repeats inside repeats"
            ) from None
        return None if found is None else str(found[1 if self._pattern.groups else 0] or "")


# ---- which one -------------------------------------------------------------------------------------------------------


def guess(references: Sequence[str]) -> str:
    """A metric by the look of the references: ``number``, ``choice``, ``exact`` for short ones, else ``rouge-l``.

    ``number`` where nine in ten have a ``####`` before a number or are one; ``choice`` where few short labels come again
    and again (three times each on average); ``exact`` where all are at most ``SHORT_WORDS`` words.
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
