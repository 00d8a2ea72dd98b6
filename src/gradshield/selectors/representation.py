"""The position of a row between unsafe and safe references, in the model's own hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.data import batches
from gradshield.errors import ProbeError, ScoreError, UsageError
from gradshield.gradients.base import DeviceBatch, scoring
from gradshield.gradients.direction import digest
from gradshield.models.modules import in_float64, outputs_of, text_config
from gradshield.options import Option, check
from gradshield.selectors.base import SELECTORS, Measured, Selector, by_row, members, standing
from gradshield.selectors.reading import block_names
from gradshield.types import Batch, Direction, Floats, References, Rendered

SIDES = ("unsafe", "safe")
FEATURES = ("mean", "last", "opening")
Feature = Annotated[str, Option(str, choices=FEATURES)]
_TOKENS = 4096  # positions in one batch of references
_LEAST = 2  # references of a kind: one is held out at a time


class Representation(Selector):
    """Shared by both methods: reference rows, the hidden state that represents a row, and one forward pass per row.

    Departures: the unsafe references are requests with only a compliant opener, since the package holds no harmful answers, so
    their last state is that of a truncated answer; the safe ones are the same requests with the model's own refusals. The state
    is that of the row's last answer token (``feature="last"``, as in both papers) or the mean over its answer (``"mean"``).
    ``feature="opening"`` is ours: the state that predicts the first answer token, with answered look-alikes as the safe side; it
    sees only the request. Both papers rank rows and take a top share: zero is halfway between the two sides, not a cut. This
    list may be incomplete.
    """

    def __init__(self, references: References, feature: Feature = "last") -> None:
        """``feature`` is one of FEATURES. Raises UsageError for any other."""
        check(type(self), feature=feature)
        self.references, self.feature = references, feature

    def prepare(self, model: nn.Module) -> Direction:
        """Means of the references at the chosen blocks: ``tensors["<block's name>"]`` is (2, D), unsafe then safe.

        Raises ProbeError with fewer than two references of a kind, UsageError with more layers than the model has, ScoreError
        if the two means are equal.
        """
        names = block_names(model)
        # Before the answer, refused and harmful rows are the same prompts.
        kinds = ("harmful", "answered" if self.feature == "opening" else "refused")
        sides = [self._features(model, kind, names) for kind in kinds]
        chosen, (unsafe, safe) = self._chosen(separation(*sides)), map(self._seen, sides)
        tensors = {names[i]: torch.stack([unsafe[:, i].mean(0), safe[:, i].mean(0)]).float() for i in chosen}
        for name, (one, other) in tensors.items():
            if not 0 < float((one - other).norm()) < float("inf"):
                raise ScoreError(
                    f"the unsafe and the safe references have equal means, or a mean that is not finite, at {name}: check the "
                    "model's weights, or load it in float32 (--dtype float32)"
                )
        return Direction(tensors, SIDES, (1.0, 1.0), digest(SIDES, tensors))

    def _features(self, model: nn.Module, kind: str, names: Sequence[str]) -> Tensor:
        """(n, blocks, D) of the references of a kind, float64, on the CPU."""
        rows: tuple[Rendered, ...] = getattr(self.references, kind)
        if len(rows) < _LEAST:
            raise ProbeError(
                f"there are {len(rows)} {kind} references on this model, and the selector {self.name} needs at least "
                f"{_LEAST} (harmful requests that it refuses, and harmless ones that it answers): give other requests, or "
                "another selector"
            )
        parts = [self._forward(model, batch, names)[0] for batch in batches(rows, _TOKENS, _TOKENS)]
        return in_float64(torch.cat(parts)).cpu()

    def _forward(self, model: nn.Module, batch: Batch, names: Sequence[str]) -> tuple[Tensor, Floats]:
        """One pass: features (B, len(names), D) in float32, and the sum of each sequence's losses in nats (B,)."""
        data = DeviceBatch.of(batch, model)
        weights = torch.as_tensor(_weights(batch, self.feature), dtype=torch.float32, device=data.ids.device)

        def counted(hidden: Tensor) -> Tensor:
            # A padded position may hold infinity, and zero times infinity is NaN.
            shown = hidden.float().masked_fill((weights == 0).unsqueeze(-1), 0.0)
            return torch.einsum("bt,btd->bd", weights, shown)

        with scoring(model), torch.no_grad(), outputs_of(model, names, counted) as found:
            nll = data.nll(model)
        return torch.stack([found[name] for name in names], 1), in_float64(nll.sum(-1)).cpu().numpy()

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's score from one forward pass. A preference pair is placed by its chosen answer, an answer that training
        pushes away from by minus its place. Raises UsageError for another model's direction.
        """
        names, sides = list(direction.tensors), torch.stack(list(direction.tensors.values()), 1)  # (2, layers, D)
        width = getattr(text_config(model), "hidden_size", sides.shape[-1])
        if not set(names) <= set(block_names(model)) or sides.shape[-1] != width:
            raise UsageError(
                f"the direction has states of {sides.shape[-1]} values at {', '.join(names)}, which this model does not have "
                f"(its states have {width}): a direction fits only the model that it was prepared on"
            )
        features, nll = self._forward(model, batch, names)
        unsafe, safe = in_float64(sides.to(features.device))
        values = batch.coefficients * self._between(in_float64(features), unsafe, safe).cpu().numpy()
        counted = standing(batch)
        placed = [float(values[np.intersect1d(own, counted)].mean()) for own in members(batch)[1]]
        rows, means, lengths = by_row(batch, nll)
        return Measured(rows, np.array(placed), means, lengths)

    @abstractmethod
    def _chosen(self, separations: Floats) -> list[int]:
        """Indices of the blocks to use, in order."""

    def _seen(self, features: Tensor) -> Tensor:
        """A reference's features as they enter the mean."""
        return features

    @abstractmethod
    def _between(self, at: Tensor, unsafe: Tensor, safe: Tensor) -> Tensor:
        """(B,): the position of features (B, layers, D) between two sides (layers, D)."""

    def settings(self) -> Mapping[str, Any]:
        return {"feature": self.feature}


@SELECTORS.register("larf")
class Larf(Representation):
    """Nearer to unsafe than to safe reference rows, in the hidden states of the model before training.

    Paper: arXiv 2507.18631 (LARF). Equation: the mean over layers of (‖h - μ_safe‖ - ‖h - μ_unsafe‖) / ‖μ_unsafe - μ_safe‖.
    Departures: those of `Representation`. The safety-sensitive layers are those that separate the references best relative to
    their spread, leaving each reference out of its own mean, where the paper scales weights and watches refusals; blocks are
    averaged in units of the distance between the means.
    """

    name = "larf"

    def __init__(
        self, references: References, feature: Feature = "last", layers: Annotated[int, Option(int, least=1)] = 1
    ) -> None:
        """``layers`` is how many blocks are used. Raises UsageError for fewer than one."""
        super().__init__(references, feature)
        check(Larf, layers=layers)
        self.layers = layers

    def _chosen(self, separations: Floats) -> list[int]:
        if self.layers > (blocks := len(separations)):
            raise UsageError(f"the selector larf got layers={self.layers}, but the model has {blocks}: ask for fewer")
        return sorted(np.argsort(-separations, kind="stable")[: self.layers].tolist())

    def _between(self, at: Tensor, unsafe: Tensor, safe: Tensor) -> Tensor:
        nearer: Tensor = (at - safe).norm(dim=-1) - (at - unsafe).norm(dim=-1)
        placed: Tensor = (nearer / (unsafe - safe).norm(dim=-1)).mean(-1)
        return placed


@SELECTORS.register("anchors")
class Anchoring(Representation):
    """More like harmful than like safe anchor rows, in the hidden states of the last block (bi-directional anchoring).

    Paper: arXiv 2404.01099. Equation: mean cos(h, unsafe) - mean cos(h, safe).
    Departures: those of `Representation`. This is the paper's variant on representations, not gradients, at the last block,
    before the final norm. The direction's means are of unit vectors, so a dot product with a unit vector is a mean cosine.
    """

    name = "anchors"

    def _chosen(self, separations: Floats) -> list[int]:
        return [len(separations) - 1]

    def _seen(self, features: Tensor) -> Tensor:
        unit: Tensor = features / features.norm(dim=-1, keepdim=True)
        return unit

    def _between(self, at: Tensor, unsafe: Tensor, safe: Tensor) -> Tensor:
        cosines: Tensor = ((at / at.norm(dim=-1, keepdim=True)) * (unsafe - safe)).sum(-1).mean(-1)
        return cosines


def separation(unsafe: Tensor, safe: Tensor) -> Floats:
    """How well each block separates the references, each left out of its own side's mean: (blocks,).

    ``unsafe`` is (n, blocks, D), ``safe`` (m, blocks, D). The value is the difference of the two sides' mean held-out
    scores (distance to the safe mean minus distance to the unsafe one) over their pooled standard deviation.
    """

    def held(own: Tensor, other: Tensor) -> Tensor:
        rest = (own.sum(0, keepdim=True) - own) / (len(own) - 1)
        score: Tensor = (own - other.mean(0)).norm(dim=-1) - (own - rest).norm(dim=-1)
        return score

    of_unsafe, of_safe = held(unsafe, safe), -held(safe, unsafe)
    spread = ((of_unsafe.var(0, correction=0) + of_safe.var(0, correction=0)) / 2).sqrt()
    apart: Floats = ((of_unsafe.mean(0) - of_safe.mean(0)) / spread.clamp_min(1e-12)).numpy()
    return apart


def _weights(batch: Batch, feature: str) -> Floats:
    """(B, T), summing to one in each row: the weight of each position in the feature."""
    counted = batch.loss.astype(np.float64)
    if feature == "mean":
        each: Floats = counted / np.maximum(counted.sum(1, keepdims=True), 1)
        return each
    found = np.zeros(batch.loss.shape)
    width = batch.loss.shape[1]
    at = batch.loss.argmax(1) - 1 if feature == "opening" else width - 1 - batch.loss[:, ::-1].argmax(1)
    found[np.arange(len(found)), at] = 1.0
    return found
