"""The negative log-likelihood of the model's own refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradshield.errors import ProbeError
from gradshield.probes.base import PROBES, PromptBatch, Prompts, continuation_nll, greedy
from gradshield.probes.validity import refuses


@PROBES.register("refusal_nll")
class RefusalNll:
    """Mean negative log-likelihood per token of the model's own refusals of the probes.

    Paper: none; asked for by the reviewers of arXiv 2605.14194.
    Departures: probes that the model does not refuse are left out of the mean. On a model that refuses with certainty the
    gradient nearly vanishes and the direction is noisy; use a probe on logits there (token_gap, token_set).
    """

    name = "refusal_nll"

    def __init__(self, tokens: int = 12) -> None:
        self.tokens = tokens
        self._refusals: dict[tuple[int, ...], list[int]] = {}
        self._share = 1.0  # of the requests that are refused

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Generate the refusals, greedily. Raises ProbeError if the model refuses no request."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        answers = greedy(model, requests, self.tokens, pad)
        own = [(p, a) for p, a in zip(requests.ids, answers, strict=True) if refuses(tokenizer.decode(a))]
        if not own:
            raise ProbeError(
                f"the model refuses 0 of {len(requests)} probes, and the probe refusal_nll needs its refusals: give requests "
                "that it refuses (--probes), or use the probe token_gap"
            )
        self._refusals, self._share = dict(own), len(own) / len(requests)

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        """S over the batch, a scalar, in nats per token.

        A request without a refusal counts as zero, and the mean is divided by the share of all requests that are refused, so
        that the mean over batches equals the mean over the refused requests.
        """
        keys = [tuple(row[: int(n) + 1].tolist()) for row, n in zip(batch.input_ids, batch.last, strict=True)]
        answers = [self._refusals.get(key, []) for key in keys]
        nll = continuation_nll(model, batch, answers)  # (B,), zero without a refusal
        lengths = nll.new_tensor([max(1, len(a)) for a in answers])
        return (nll / lengths).mean() / self._share

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "tokens": self.tokens, "refusals": len(self._refusals)}
