"""The kind of harm that a removed row asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.models.modules import in_float64
from gradshield.probes import Prompts
from gradshield.selectors import Measured
from gradshield.selectors.base import members
from gradshield.selectors.reading import block_names, states
from gradshield.types import Batch, Direction, Floats, Ints

DEPTH = 0.75  # share of the model's depth from which blocks are read: nearer to the output, topics lie further apart


@dataclass(frozen=True, eq=False)
class Kinds:
    """Names rows by the probe requests that their request resembles most, as the model itself represents them.

    Equation: the kind k with the highest sum over blocks l of cos((h_l - m_l) / s_l, (m_kl - m_l) / s_l), with h_l the mean
    state over the request's tokens, m_kl its mean over the probe requests of kind k, m_l over all of them, and s_l the standard
    deviation within kinds.

    Measured as a selector is, so that other processes can do it: ``sums`` (B,) are indices into ``names``.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    centre: Floats  # (blocks, D)
    scale: Floats  # (blocks, D)
    means: Floats  # (K, blocks, D), of unit length in each block

    name: ClassVar[str] = "kinds"
    travels: ClassVar[bool] = True

    @classmethod
    def fit(cls, model: nn.Module, asked: Prompts) -> Kinds:
        blocks = block_names(model)
        blocks = blocks[min(int(DEPTH * len(blocks)), len(blocks) - 1) :]
        found = states(model, asked.ids, blocks, over_tokens)
        names = tuple(sorted(set(asked.categories)))
        own = np.array([names.index(name) for name in asked.categories])
        centre, means = found.mean(0), np.stack([found[own == k].mean(0) for k in range(len(names))])
        scale = (found - means[own]).std(0)
        scale = np.where(scale > 0, scale, 1.0)
        return cls(names, blocks, centre, scale, _unit((means - centre) / scale))

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        rows, sequences = members(batch)
        asked = [_request(batch.ids[i][batch.attention[i] > 0], batch.loss[i]) for i, *_ in sequences]
        found = _unit((states(model, asked, self.blocks, over_tokens) - self.centre) / self.scale)
        kinds = np.einsum("nld,kld->nk", found, self.means).argmax(1)
        return Measured(rows, kinds.astype(np.float64), np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64))

    def settings(self) -> Mapping[str, Any]:
        return {"sha256": hashlib.sha256(self.means.tobytes() + self.centre.tobytes()).hexdigest()}


def over_tokens(hidden: Tensor, last: Tensor) -> Tensor:
    """The mean state over each sequence's tokens."""
    own = torch.arange(hidden.shape[1], device=hidden.device) <= last.to(hidden.device)[:, None]
    summed = (in_float64(hidden) * own.unsqueeze(-1).to(hidden.device)).sum(1).cpu()
    return summed / (last.cpu()[:, None] + 1)


def _request(ids: Ints, loss: np.ndarray) -> list[int]:
    """The tokens before the last answer; all of them if nothing is before it."""
    counted = np.flatnonzero(loss[: len(ids)])
    runs = counted[np.diff(counted, prepend=-2) > 1]
    end = int(runs[-1]) if len(runs) else 0
    return list(ids[: end or len(ids)])


def _unit(values: Floats) -> Floats:
    """The last axis scaled to unit length."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1.0))
