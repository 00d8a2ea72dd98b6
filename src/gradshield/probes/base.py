"""The probe interface: a differentiable unsafety score S(θ) on requests that the model should refuse.

S rises as the model moves away from refusal, so that FIHS = -<∇L, ∇S> is positive for rows that make the model less safe
(arXiv 2605.14194). A probe scores opened assistant turns, which end with the chat template's generation prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from gradshield.errors import UsageError
from gradshield.models.decoding import continued, stop_tokens, until
from gradshield.models.logits import common, logits_at, prefix_of, token_nll
from gradshield.registry import Registry
from gradshield.types import shared_length


@dataclass(frozen=True, eq=False)
class Prompts:
    """Opened assistant turns: token ids of each prompt up to the first response position, and its harm category."""

    ids: tuple[tuple[int, ...], ...]
    categories: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, keep: Sequence[int]) -> Prompts:
        return Prompts(
            tuple(self.ids[i] for i in keep),
            tuple(self.categories[i] for i in keep),
            tuple(self.texts[i] for i in keep),
        )

    def batch(self, device: torch.device) -> PromptBatch:
        return padded(self.ids, device)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Right-padded prompts. ``last`` is the index of each prompt's last token, whose logits predict the first answer token."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    last: Tensor  # (B,)


def padded(ids: Sequence[Sequence[int]], device: torch.device) -> PromptBatch:
    """Right-pad sequences of token ids with 0."""
    width = max(len(row) for row in ids)
    tokens = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return PromptBatch(tokens.to(device), mask.to(device), (mask.sum(1) - 1).to(device))


def first_logits(model: nn.Module, batch: PromptBatch, **more: Any) -> Tensor:
    """Logits of the first response token, (B, V) in float32. ``more`` are further arguments of the model.

    Without any, what all prompts begin with (a system prompt) runs once, where the model allows it (`models.logits`).
    """
    ids, attention, last = batch.input_ids, batch.attention_mask, batch.last
    if not more:
        prompts = [row[: int(n) + 1] for row, n in zip(ids.tolist(), last, strict=True)]
        count = common(prompts)
        if count and (prefix := prefix_of(model, max(prompts, key=len), count)):
            ids, attention, last = ids[:, count:], attention[:, count:], last - count
            more = prefix.inputs(attention)
    where = torch.zeros_like(attention, dtype=torch.bool)
    where[torch.arange(len(where), device=where.device), last] = True
    return logits_at(model, ids, attention, where, **more)


def continuation_nll(model: nn.Module, batch: PromptBatch, answers: Sequence[Sequence[int]]) -> Tensor:
    """Summed negative log-likelihood of ``answers[i]`` after prompt i, in nats: (B,)."""
    prompts = [row[: int(n) + 1].tolist() for row, n in zip(batch.input_ids, batch.last, strict=True)]
    whole = padded([p + list(a) for p, a in zip(prompts, answers, strict=True)], batch.input_ids.device)
    loss = torch.zeros_like(whole.attention_mask, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        loss[i, len(prompt) : len(prompt) + len(answer)] = True
    return token_nll(model, whole.input_ids, whole.attention_mask, loss).sum(-1)


class Probe(Protocol):
    """One unsafety score. ``fit`` adapts it to the model once; a call gives the mean of S over a batch, a scalar.

    ``settings`` is JSON-able and goes into the manifest: the probe's options and what it found on this model.
    """

    name: str

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None: ...

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor: ...

    def settings(self) -> Mapping[str, Any]: ...


PROBES: Registry[type[Probe]] = Registry("probe")


class FunctionProbe:
    """Any function of (model, PromptBatch) to a scalar tensor that rises as the model leaves refusal.

    Not in the registry: it is passed as an object (``gs.ScanSettings(probe=my_score)``).
    """

    def __init__(self, function: Callable[[nn.Module, PromptBatch], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Does nothing."""

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        """The function's value. Raises UsageError if it is not a scalar that depends on the model."""
        value = self.function(model, batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            raise UsageError(
                f"the probe function {self.name} returned {type(value).__name__}"
                f"{tuple(value.shape) if isinstance(value, Tensor) else ''}, but a probe must return one scalar tensor that "
                "depends on the model's parameters: return S averaged over the batch, without detaching it"
            )
        return value

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "function": True}


def open_turns(tokenizer: Any, prompts: Sequence[Mapping[str, str]], prefix: str = "", **template: Any) -> Prompts:
    """Render requests as opened assistant turns. ``prefix`` is text that starts the answer (a closed thinking block)."""
    ids = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt["prompt"]}], add_generation_prompt=True, tokenize=False, **template
        )
        ids.append(tuple(tokenizer(text + prefix, add_special_tokens=False)["input_ids"]))
    return Prompts(tuple(ids), tuple(p.get("category", "") for p in prompts), tuple(str(p["prompt"]) for p in prompts))


def first_token(tokenizer: Any, text: str) -> int:
    """The first token of an answer that begins with ``text``, tokenised after the generation prompt."""
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    before = tokenizer(opened, add_special_tokens=False)["input_ids"]
    after = tokenizer(opened + text, add_special_tokens=False)["input_ids"]
    return int(after[shared_length(before, after)])


class _Decided(StoppingCriteria):  # type: ignore[misc]
    """Ends the answers that ``known`` needs no more of, and tells how long they were then."""

    def __init__(self, known: Callable[[list[int]], bool], width: int, rows: int) -> None:
        self._known, self._width = known, width
        self.ends: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for i, row in enumerate(input_ids[:, self._width :].tolist()):
            if self.ends[i] is None and self._known(row):
                self.ends[i] = len(row)
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def greedy(
    model: nn.Module,
    prompts: Prompts,
    tokens: int,
    pad: int,
    chunk: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
    known: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The model's greedy answers, at most ``tokens`` long, cut at its end-of-sequence token; always without dropout.

    With ``known``, an answer also ends with the first token for which it is true of the tokens so far.
    """
    stops = stop_tokens(model)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), chunk):
        some = prompts.ids[start : start + chunk]
        decided = None if known is None else _Decided(known, max(map(len, some)), len(some))
        criteria = None if decided is None else StoppingCriteriaList([decided])
        found, _ = continued(model, some, tokens, pad, stops, stopping_criteria=criteria)
        for i, row in enumerate(found):
            answers.append(until(row if decided is None else row[: decided.ends[i]], stops))
        progress(len(answers), len(prompts))
    return answers
