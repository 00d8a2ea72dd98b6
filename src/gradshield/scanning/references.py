"""Short rows of known kind, generated with the model itself: probes and look-alikes with an answer each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from gradshield.models.loading import LoadedModel
from gradshield.probes import COMPLY, Prompts, greedy, refuses
from gradshield.types import References, Rendered, Tokens

LONGEST = 96  # tokens of a refusal that is trained on
ANSWER = 24  # tokens of the model's own answers: enough to recognise a refusal


def answered(row: int, prompt: Sequence[int], answer: Sequence[int]) -> Rendered:
    """A prompt with an answer as a row, the loss over the answer."""
    ids = np.array([*prompt, *answer], dtype=np.int64)
    return Rendered(row, "", "probe", (Tokens(ids, np.arange(len(ids)) >= len(prompt)),))


def opened(tokenizer: Any, prompts: Prompts) -> list[Rendered]:
    """Every prompt with only a compliant opener. Row numbers are negative: these are not rows of the data."""
    rows = []
    for number, prompt in enumerate(prompts.ids):
        opener = tokenizer(COMPLY[number % len(COMPLY)], add_special_tokens=False)["input_ids"]
        rows.append(answered(-1 - number, prompt, opener))
    return rows


def answers(model: nn.Module, tokenizer: Any, prompts: Prompts, pad: int, refused: bool) -> list[Rendered]:
    """The prompts that the model refuses (or answers), each with the model's answer."""
    replies = greedy(model, prompts, ANSWER, pad)
    own = [(p, a) for p, a in zip(prompts.ids, replies, strict=True) if a and refuses(tokenizer.decode(a)) == refused]
    return [answered(-1 - number, prompt, answer) for number, (prompt, answer) in enumerate(own)]


def references(model: nn.Module, tokenizer: Any, asked: Prompts, harmless: Prompts, pad: int) -> References:
    """Rows of known kind on this model; a kind may be empty."""
    return References(
        tuple(opened(tokenizer, asked)),
        tuple(answers(model, tokenizer, asked, pad, refused=True)),
        tuple(answers(model, tokenizer, harmless, pad, refused=False)),
    )


def refusals(loaded: LoadedModel, asked: Prompts) -> list[dict[str, Any]]:
    """Chat rows of the probe requests with the model's own refusals, if they end within LONGEST tokens."""
    rows = []
    for prompt, ids in zip(asked.texts, greedy(loaded.model, asked, LONGEST, loaded.pad_token_id), strict=True):
        text = loaded.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if len(ids) < LONGEST and refuses(text):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            rows.append({"messages": turns})
    return rows
