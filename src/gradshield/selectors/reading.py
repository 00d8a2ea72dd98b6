"""How the model reads a request, before any answer: like harmless ones (0), or like harmful ones (1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.errors import ProbeError
from gradshield.gradients.base import scoring
from gradshield.gradients.direction import decoder_layers
from gradshield.models.logits import groups, prefix_of
from gradshield.models.modules import in_float64, outputs_of, run_until
from gradshield.probes import PromptBatch, Prompts, first_logits
from gradshield.probes.base import padded
from gradshield.types import Anchors, Bools, Floats, Ints, shared_length

DEPTH = (0.5, 0.75)  # blocks read, as shares of the model's depth: what is asked is decided there, below is wording
OPENER = 0.02  # a token that begins this share of the refusals counts as a refusal opener
LEAST = 2  # prompts of a kind: each half is read with a ruler fitted on the other
STRENGTH = 0.3  # of the regression's penalty, inverse, on states of unit mean square
MOST_STEPS = 1000  # of its solver, which needs some thirty
_POSITIONS = 4096  # in one batch, padding included

# Of hidden states (B, T, D) and the index ``last`` (B,): what is read, (B, D) in float64 on the CPU.
Take = Callable[..., Tensor]


@dataclass(frozen=True)
class Turn:
    """How the chat template opens an assistant turn: the ids before a first user message, and those after any."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Prompts) -> Turn:
        """The common prefix and suffix of all opened turns. Raises ProbeError if either is missing."""
        first, *others = prompts.ids
        before = min(shared_length(first, other) for other in others)
        after = min(shared_length(first[::-1], other[::-1]) for other in others)
        if not 0 < after < len(first):
            raise ProbeError(
                "the chat template opens an assistant turn with no fixed tokens, so a row's request cannot be found: use "
                "--selector fihs"
            )
        return cls(tuple(first[:before]), tuple(first[len(first) - after :]))

    def openings(self, ids: Ints, loss: Bools) -> list[tuple[tuple[int, ...], slice]]:
        """Every answer of a rendered sequence: the ids before it, and its span.

        A turn is recognised by its opening, or by the beginning of one right before the loss: an answer with thoughts of its own
        does not have the closed thinking block of the opening, and is read as if it had. Text without one (a plain prompt and
        completion) is read as a first user message; a text whose loss starts at its first token has no request to read.
        """
        ids_of, width = ids.tolist(), len(self.after)
        opened = {
            i + width: tuple(ids_of[: i + width])
            for i in range(len(ids_of) - width)
            if ids_of[i] == self.after[0] and tuple(ids_of[i : i + width]) == self.after
        }
        for start in np.flatnonzero(loss & ~np.r_[False, loss[:-1]]).tolist():
            size = next(
                (k for k in range(width - 1, 1, -1) if tuple(ids_of[max(start - k, 0) : start]) == self.after[:k]), 0
            )
            if size and not {start, start + width - size} & opened.keys():
                opened[start] = (*ids_of[: start - size], *self.after)
        spans = [slice(a, b) for a, b in pairwise([*sorted(opened), len(ids_of)])]
        found = [(opened[own.start], own) for own in spans if loss[own].any()]
        if found:
            return found
        first = int(loss.argmax()) if loss.any() else 0
        if first < 2:
            return []
        return [((*self.before, *ids_of[:first], *self.after), slice(first, len(ids_of)))]


@dataclass(frozen=True, eq=False)
class Reading:
    """The harm that a model reads in a request, as a ruler: 0 at harmless requests, 1 at harmful ones.

    Paper: arXiv 2406.11717 (the state at the end of the opened turn, and the depth at which it is read).
    Equation: r(x) = mean over blocks l of (⟨h_l(x), w_l⟩ - a_l) / (b_l - a_l), with h_l the state at the end of the opened
    turn, w_l the weights of a logistic regression of harmful against harmless requests on h_l, a_l the mean of ⟨h_l, w_l⟩
    over the harmless and b_l its median over the harmful.
    Departures: the paper takes the difference of the means, in one block. Where a model refuses much that is harmless, that
    difference is what it refuses; the regression finds what tells harm from everything else.

    ``weights`` is (blocks, D) with the scale folded in. ``anchors`` are the values of the harmful and of the everyday prompts,
    each read with a ruler fitted on the other half; ``answered`` marks the look-alikes that the model begins to answer.
    """

    blocks: tuple[str, ...]
    weights: Floats
    bias: float
    turn: Turn
    anchors: Anchors
    answered: Bools

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        turn: Turn,
        refused: Prompts,
        tricky: Prompts,
        everyday: Prompts,
        blunt: Sequence[Prompts] = (),
    ) -> Reading:
        """Fit the ruler on ``refused`` against ``tricky`` (their harmless look-alikes) and ``everyday``, with ``blunt``,
        harmful prompts and their look-alikes, if given.

        A look-alike whose answer begins with a refusal opener (OPENER) is not ``answered``. Raises ProbeError with fewer than
        LEAST prompts of a kind.
        """
        for kind, number in (
            ("harmful prompts that the model refuses", len(refused)),
            ("harmless prompts", min(len(tricky), len(everyday))),
        ):
            if number < LEAST:
                raise ProbeError(
                    f"there are {number} {kind}, and the selector screen needs at least {LEAST}: give more, or use "
                    "--selector fihs"
                )
        blocks = read_blocks(model)
        begun, first = (np.zeros(len(prompts), dtype=np.int64) for prompts in (refused, tricky))
        high, low = states(model, refused.ids, blocks, at_end, begun), states(model, tricky.ids, blocks, at_end, first)
        if blunt:  # first, so that both of a pair are in the same half of `_held_out`
            more = [states(model, prompts.ids, blocks, at_end) for prompts in blunt]
            high, low = (np.concatenate(both) for both in zip(more, (high, low), strict=True))
        plain = states(model, everyday.ids, blocks, at_end)
        tokens, counts = np.unique(begun, return_counts=True)
        answered = ~np.isin(first, tokens[counts >= OPENER * len(refused)])
        weights, bias = _ruler(high, np.concatenate([low, plain]))
        return cls(blocks, weights, bias, turn, _held_out(high, low, plain), answered)

    def read(self, model: nn.Module, requests: Sequence[Sequence[int]]) -> Floats:
        """r of each request, given as the ids of an opened turn: (n,)."""
        found = states(model, requests, self.blocks, at_end)
        return np.asarray(np.einsum("nld,ld->n", found, self.weights) + self.bias)

    def as_json(self) -> dict[str, Any]:
        """JSON-able, exact."""
        return {
            "blocks": self.blocks,
            "weights": self.weights.tolist(),
            "bias": self.bias,
            "turn": [self.turn.before, self.turn.after],
            "anchors": [self.anchors.harmful.tolist(), self.anchors.harmless.tolist()],
            "answered": self.answered.tolist(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Reading:
        """The inverse of `as_json`."""
        before, after = map(tuple, found["turn"])
        anchors = Anchors(*(np.array(values) for values in found["anchors"]))
        answered = np.array(found["answered"], dtype=np.bool_)
        return cls(
            tuple(found["blocks"]), np.array(found["weights"]), found["bias"], Turn(before, after), anchors, answered
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ruler."""
        sha = hashlib.sha256(repr((self.blocks, self.bias, self.turn.before, self.turn.after)).encode())
        sha.update(np.ascontiguousarray(self.weights).tobytes())
        return sha.hexdigest()


def read_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks within DEPTH; a model too shallow for any gives the block nearest to its middle."""
    blocks = block_names(model)
    depth = len(blocks)
    chosen = [i for i in range(1, depth + 1) if DEPTH[0] * depth <= i <= DEPTH[1] * depth]
    chosen = chosen or [max(1, round(sum(DEPTH) / 2 * depth))]
    return tuple(blocks[i - 1] for i in chosen)


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all decoder blocks, in the order in which they run."""
    prefix, layers = decoder_layers(model)
    return tuple(f"{prefix}.{i}" if prefix else str(i) for i in range(len(layers)))


def _ruler(high: Floats, low: Floats) -> tuple[Floats, float]:
    """Weights (blocks, D) and bias that put the mean of ``low`` (m, blocks, D) at 0 and the median of ``high`` at 1."""
    from sklearn.linear_model import LogisticRegression

    harmful = np.arange(len(high) + len(low)) < len(high)
    weights, bias, apart = np.zeros(high.shape[1:]), 0.0, 0
    for block in range(high.shape[1]):
        both = np.concatenate([high[:, block], low[:, block]])
        centred = both - both.mean(0)
        size = float(np.sqrt((centred**2).sum(1).mean())) or 1.0
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=MOST_STEPS)
        w = model.fit(centred / size, harmful).coef_[0]
        a, b = (low[:, block] @ w).mean(), np.median(high[:, block] @ w)
        if b > a:  # a block that does not separate the two gets weight 0
            weights[block], bias, apart = w / (b - a), bias - a / (b - a), apart + 1
    return weights / max(apart, 1), float(bias) / max(apart, 1)


def _held_out(high: Floats, alike: Floats, plain: Floats) -> Anchors:
    """The values of the harmful and the everyday prompts, each half on a ruler fitted on the other (with its look-alikes)."""
    values = [np.zeros(len(high)), np.zeros(len(plain))]
    for half in (0, 1):
        weights, bias = _ruler(high[half::2], np.concatenate([alike[half::2], plain[half::2]]))
        for side, out in zip((high, plain), values, strict=True):
            out[1 - half :: 2] = np.einsum("nld,ld->n", side[1 - half :: 2], weights) + bias
    return Anchors(values[0], values[1])


def states(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    blocks: Sequence[str],
    take: Take,
    begun: Ints | None = None,
) -> Floats:
    """``take`` of the hidden states of each block, (n, blocks, D) in float64; no pass runs beyond the last block.

    With ``begun`` (n,), which receives the most likely token after each sequence, passes run to the end. Of `at_end`, tokens
    that many sequences begin with are run once, where the model allows it (`models.logits`).
    """
    found: list[Any] = [None] * len(sequences)
    with scoring(model), torch.no_grad():
        for some, count in groups(sequences) if take is at_end else [(range(len(sequences)), 0)]:
            until = blocks[-1] if begun is None else None
            prefix = prefix_of(model, max((sequences[i] for i in some), key=len), count, until) if count else None
            for own, batch in _padded(model, [sequences[i][count if prefix else 0 :] for i in some]):
                more = prefix.inputs(batch.attention_mask) if prefix else {"attention_mask": batch.attention_mask}
                places = [some[i] for i in own]
                with outputs_of(model, blocks, partial(take, last=batch.last)) as seen:
                    if begun is None:
                        run_until(model, blocks[-1], input_ids=batch.input_ids, **more)
                    else:
                        begun[places] = first_logits(model, batch, **more).argmax(-1).cpu().numpy()
                for i, one in zip(places, torch.stack([seen[name] for name in blocks], 1).numpy(), strict=True):
                    found[i] = one
    return np.stack(found)


def at_end(hidden: Tensor, last: Tensor) -> Tensor:
    """The state of each sequence's last token."""
    rows = torch.arange(len(last), device=hidden.device)
    return in_float64(hidden[rows, last.to(hidden.device)]).cpu()


def _padded(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], PromptBatch]]:
    """Batches on the model's device, the longest sequences first, with the indices of their sequences."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while order:
        width = len(sequences[order[0]])
        own, order = order[: max(1, _POSITIONS // width)], order[max(1, _POSITIONS // width) :]
        yield own, padded([sequences[i] for i in own], device)
