"""Utility by loss: the likelihood of held-out answers, for models too weak to be scored on their own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gradshield.data import RenderConfig, batches, read, render_all
from gradshield.errors import EmptyDataError
from gradshield.gradients.base import DeviceBatch, scoring
from gradshield.models.logits import token_nll
from gradshield.models.placement import in_float64
from gradshield.stats import bootstrap, check_level
from gradshield.types import Floats

TOKEN_BUDGET = 8192  # positions of a batch, padding included
LABEL_BUDGET = 2048  # positions of a batch with logits


@dataclass(frozen=True, eq=False)
class ResponseLoss:
    """Mean negative log-likelihood per response token, in nats, with its percentile bootstrap interval over rows.

    ``sums`` (N,) and ``tokens`` (N,) hold each row's sum of losses and number of response tokens, in input order, for paired
    comparisons; ``set_aside`` counts the rows that could not be used.
    """

    nats: float
    low: float
    high: float
    level: float
    sums: Floats
    tokens: Floats
    set_aside: int


def response_loss(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    config: RenderConfig | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ResponseLoss:
    """Mean loss per response token of held-out rows, rendered as for training.

    Every token has the same weight, so long answers weigh more; the bootstrap, under ``seed``, draws whole rows, since the
    tokens of one answer are not independent. Of a preference pair the chosen answer counts. The model is unchanged.

    Parameters
    ----------
    rows
        Anything that ``data.read`` takes: a path, a ``Dataset``, a list of dicts.

    Raises
    ------
    EmptyDataError
        No row has a response token.
    DataError, UsageError
        As ``data.read`` and ``data.render_all``; UsageError also if ``level`` is not between 0 and 1.
    """
    check_level(level)
    found = read(rows)
    result = render_all(found.examples, tokenizer, config, found.source)
    if not result.rendered:
        reason = result.quarantined[0].reason
        raise EmptyDataError(
            f"none of the {found.source.rows} rows has a response token ({reason}): give rows with answers"
        )
    position = {row.row: i for i, row in enumerate(result.rendered)}
    sums, tokens = np.zeros(len(position)), np.zeros(len(position))
    with scoring(model), torch.no_grad():
        for batch in batches(result.rendered, TOKEN_BUDGET, LABEL_BUDGET):
            data = DeviceBatch.of(batch, model)
            nll = in_float64(token_nll(model, data.ids, data.attention, data.loss)).sum(1).cpu().numpy()  # (B,)
            counts = batch.loss.sum(1)
            for b, row in enumerate(batch.rows):
                if batch.coefficients[b] > 0:
                    sums[position[int(row)]] += nll[b]
                    tokens[position[int(row)]] += counts[b]
    low, high = bootstrap(_per_token, (sums, tokens), level, seed)
    aside = len(found.quarantined) + len(result.quarantined)
    return ResponseLoss(float(sums.sum() / tokens.sum()), low, high, level, sums, tokens, aside)


def _per_token(sums: Floats, tokens: Floats, axis: int) -> Floats:
    means: Floats = sums.sum(axis=axis) / tokens.sum(axis=axis)
    return means
