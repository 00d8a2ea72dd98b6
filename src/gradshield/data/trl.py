"""Rendered rows as a dataset for TRL, so that what is trained is what was scored, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradshield.errors import DataError, EmptyDataError
from gradshield.types import Conversation, Example, Rendered

IGNORED = -100  # the label that PyTorch's cross entropy skips


def to_trl(examples: Sequence[Example], rendered: Sequence[Rendered]) -> Any:
    """A ``datasets.Dataset`` of the rendered rows, in their order.

    Preference pairs become ``prompt``, ``chosen``, ``rejected`` for ``DPOTrainer``. All other rows become ``input_ids``
    and ``labels``, which ``SFTTrainer`` takes as they are; since they carry their mask, leave ``assistant_only_loss``
    False there (TRL refuses it for rows that are tokens).

    Raises
    ------
    DataError
        Preference pairs among other rows, or pairs of strings among pairs of messages: no trainer takes both.
    EmptyDataError
        There is no row.
    """
    import datasets

    if not rendered:
        raise EmptyDataError("no row is left to train on: loosen the threshold, or give more data")
    if not any(row.shape == "preference" for row in rendered):
        return datasets.Dataset.from_list([_tokens(row) for row in rendered])
    if not all(row.shape == "preference" for row in rendered):
        raise DataError(
            "the data mixes preference pairs with other rows, which no single trainer takes: put them in separate files"
        )
    by_row = {example.row: example for example in examples}
    pairs = [_pair(by_row[row.row]) for row in rendered]
    if len({type(pair["chosen"]) for pair in pairs}) > 1:
        raise DataError("the data mixes pairs of strings with pairs of messages: put them in separate files")
    return datasets.Dataset.from_list(pairs)


def _tokens(row: Rendered) -> dict[str, list[int]]:
    (tokens,) = row.sequences
    return {"input_ids": tokens.ids.tolist(), "labels": np.where(tokens.loss, tokens.ids, IGNORED).tolist()}


def _pair(example: Example) -> dict[str, Any]:
    good, bad = example.conversations
    if good.messages is None:
        return {"prompt": good.prompt, "chosen": good.completion, "rejected": bad.completion}
    pair: dict[str, Any] = {"prompt": _part(good, True), "chosen": _part(good, False), "rejected": _part(bad, False)}
    if good.tools is not None:
        pair["tools"] = [dict(tool) for tool in good.tools]
    if good.template_kwargs:
        pair["chat_template_kwargs"] = dict(good.template_kwargs)
    return pair


def _part(conversation: Conversation, prompt: bool) -> list[dict[str, Any]]:
    messages, turns = conversation.messages or (), conversation.prompt_turns or 0
    return [dict(message) for message in (messages[:turns] if prompt else messages[turns:])]
