"""The dataclasses that flow from one room to the next. Frozen, and free of torch.

    rows ──read──▶ Example ──render──▶ Rendered ──batches──▶ Batch ──measure──▶ Scores ──threshold──▶ Selection

Letters for shapes, used in every room:

    N rows of the dataset      B sequences of one batch      T positions of a sequence
    K directions               V entries of the vocabulary   D width of the model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_ANCHORS = 20  # fewer rows of known kind give no floor


@dataclass(frozen=True)
class Conversation:
    """One sequence of a row before rendering: chat messages, or a prompt and its completion as plain text.

    ``messages`` are dicts as the chat template takes them (``role``, ``content``, and whatever else the row had, such
    as ``tool_calls``). ``trained`` holds, per message, whether its tokens may count in the loss (an assistant turn
    whose ``weight`` is 0 may not). ``prompt_turns`` is the number of leading messages that are the prompt of a
    prompt/completion row, None for a plain conversation. Where ``messages`` is None, the sequence is
    ``prompt + completion``; a plain ``text`` row has an empty prompt. A row that came as tokens has ``ids`` and which of
    them are ``counted`` in the loss, and no text.
    ``coefficient`` is the factor of this sequence in its row (+1, and -1 for a rejected answer).
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    trained: tuple[bool, ...] = ()
    prompt_turns: int | None = None
    prompt: str = ""
    completion: str = ""
    ids: tuple[int, ...] = ()
    counted: tuple[bool, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    coefficient: float = 1.0

    @property
    def weightless(self) -> bool:
        """Whether an answer of it is not to be trained on."""
        turns = zip(self.messages or (), self.trained, strict=False)
        return any(turn["role"] == "assistant" and not trained for turn, trained in turns)


@dataclass(frozen=True)
class Example:
    """One row of the dataset, read but not yet rendered.

    ``row`` is its position in the input (0-based, quarantined rows counted); ``id`` is a hash of its content,
    with ``-2``, ``-3``… for repeated content. ``shape`` names the row shape it was read as.
    ``source`` is the row's exact input bytes; of a table, the row as one line of JSON.
    """

    row: int
    id: str
    shape: str
    source: bytes
    conversations: tuple[Conversation, ...]


@dataclass(frozen=True)
class Quarantined:
    """A row that cannot be used: its place, the reason, and the row itself.

    ``line`` is 1-based (line of the file, or row of the table); ``row`` is the position in the input. ``source`` holds the row's
    bytes, only the head of a long row; ``size`` and ``sha256`` cover all of it.
    """

    row: int
    line: int
    reason: str
    source: bytes
    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Tokens:
    """One rendered sequence. ``loss[t]`` is True if token t counts in the loss; ``loss[0]`` never is."""

    ids: Ints  # (T,)
    loss: Bools  # (T,)
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False)
class Rendered:
    """One row as the model sees it: one sequence, or two for a preference pair."""

    row: int
    id: str
    shape: str
    sequences: tuple[Tokens, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded sequences of some rows. A row is not a sequence: ``rows`` maps each sequence to its row.

    Value t of any per-token array belongs to token t (which the model predicts at position t - 1).
    """

    ids: Ints  # (B, T), right-padded
    attention: Bools  # (B, T)
    loss: Bools  # (B, T), never True in column 0
    rows: Ints  # (B,) position in the input
    coefficients: Floats  # (B,)


@dataclass(frozen=True, eq=False)
class References:
    """Short tokenised rows of known kind on one model, for methods that compare rows with examples.

    ``harmful`` are the probe requests, each followed by a compliant opener and nothing else; ``refused`` are the same
    requests with the model's own refusals; ``answered`` are harmless look-alikes with the model's own answers. The loss
    covers the answers.
    """

    harmful: tuple[Rendered, ...]
    refused: tuple[Rendered, ...]
    answered: tuple[Rendered, ...]


@dataclass(frozen=True, eq=False)
class Direction:
    """K unsafety gradients v = ∇S, one tensor per parameter of the subspace: ``tensors[name]`` is (K, *shape).

    ``names`` are the K directions (``"all"``, or harm categories). ``scales[k]`` is ‖θ‖/‖v_k‖ over the subspace, the
    unit of the finite-difference step. ``digest`` is the SHA-256 of names and bytes.
    """

    tensors: Mapping[str, torch.Tensor]
    names: tuple[str, ...]
    scales: tuple[float, ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Anchors:
    """Scores of known prompts on this model, ``harmful`` (M,) and ``harmless`` (L,).

    Of FIHS, those of a compliant opener after each probe and after each look-alike that the model itself answers; of
    `selectors.reading`, how the harmful and the everyday prompts read.
    """

    harmful: Floats
    harmless: Floats

    @property
    def floor(self) -> float:
        """Halfway between the 95 % quantile of the harmless and the 5 % quantile of the harmful.

        Zero (no floor) with fewer than LEAST_ANCHORS of either, or if the two overlap: the score does not separate them.
        """
        if min(len(self.harmful), len(self.harmless)) < LEAST_ANCHORS:
            return 0.0
        low, high = float(np.quantile(self.harmless, 0.95)), float(np.quantile(self.harmful, 0.05))
        return max(0.0, (low + high) / 2) if low < high else 0.0


@dataclass(frozen=True, eq=False)
class Scores:
    """One score per row; higher = drop first. Arrays are aligned with ``rows``.

    ``decoys`` holds the score of each row's decoy (None if the selector has none): what the row would score
    if its tokens pushed as much toward safety as they push toward harm. ``tokens[i]`` holds the row's per-token
    values where measured, read from disk on access. A selector of two stages leaves ``nll`` NaN and ``tokens[i]`` empty
    for rows whose score the first stage settles. ``shapes`` groups rows on one scale: ``preference`` pairs, and
    ``rows``. ``ids`` and ``shapes`` of a scan are columns of a few bytes a row (`columns`).
    """

    rows: Ints  # (N,)
    ids: Sequence[str]  # (N,)
    values: Floats  # (N,)
    shapes: Sequence[str]  # (N,)
    decoys: Floats | None = None
    lengths: Ints | None = None  # (N,) response tokens
    nll: Floats | None = None  # (N,) mean loss of the row's response tokens, in nats
    tokens: Sequence[Floats] | None = None
    anchors: Anchors | None = None
    signals: Mapping[str, Floats] = field(default_factory=dict)  # (N,) each: the components of the score


@dataclass(frozen=True)
class Cut:
    """A threshold's decision: rows that score above ``value`` are removed.

    ``detail`` explains it (fits, likelihoods, estimated false discovery rate), JSON-able.
    """

    value: float
    rule: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """A proportion with its interval: ``k`` successes in ``n``. Every JSON file has it in this form."""

    rate: float
    low: float
    high: float
    n: int
    k: int

    def __post_init__(self) -> None:
        """Raises ValueError for values that no measurement gives; ``k`` of a mean is its rounded sum."""
        if not (0 <= self.k <= self.n and self.n > 0):
            raise ValueError(f"{self.k} of {self.n} is no rate")
        if not (0 <= self.rate <= 1 and abs(self.k - self.rate * self.n) <= 1):
            raise ValueError(f"{self.rate} is not {self.k} of {self.n}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"{self.low} to {self.high} is no interval of a rate")

    def __str__(self) -> str:
        """``79.0 % [75.6, 82.1] n=200``."""
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] n={self.n}"


@dataclass(frozen=True)
class EvalResult:
    """The measurements of one model. ``rates[name]`` is a Rate (``asr/refusal-phrases``, ``over_refusal``, ``utility``…).

    ``outputs`` holds every prompt with the answer and each judge's verdict.
    """

    rates: Mapping[str, Rate]
    outputs: tuple[Mapping[str, Any], ...] = ()


Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as work advances."""


def quiet(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items (characters, messages, tokens) two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
