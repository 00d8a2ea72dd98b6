"""Greedy answers from a model, in batches: the ``generate`` callable that every measurement takes.

A prompt is a user's text or a list of chat messages. It is rendered with the tokenizer's chat template (by default that of
``data.templates``) and its generation prompt, as at inference. Batches are left-padded without changing the tokenizer, and
prompts are sorted by length to reduce padding; answers come in the order of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from gradshield.errors import DataError
from gradshield.models.decoding import continued, stop_tokens, until
from gradshield.models.modules import learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages
Generate: TypeAlias = Callable[[Sequence[Prompt]], list[str]]


def generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    prefix: str = "",
    template: Mapping[str, Any] | None = None,
) -> Generate:
    """A callable from prompts to greedy answers, without special tokens and surrounding white space.

    The same prompts give the same answers. Sampling and penalties of the model's ``generation_config`` are ignored. The config,
    the mode of each module and the tokenizer are restored after every call, also after an exception.

    ``prefix`` is text after the generation prompt that the model continues (a closed thinking block, or a forced start of the
    answer) and is not part of the returned answer; ``template`` are arguments for the chat template. The callable raises
    DataError if a prompt and its answer exceed the model's table of positions.
    """

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        ids = [encode(tokenizer, prompt, prefix, template) for prompt in prompts]
        _check_room(model, ids, max_new_tokens)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)  # a batch too large fails at once
        answers = [""] * len(ids)
        stops = stop_tokens(model, tokenizer.eos_token_id)
        pad = next((i for i in (tokenizer.pad_token_id, *stops) if i is not None), 0)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found, _ = continued(model, [ids[i] for i in rows], max_new_tokens, pad, stops)
            for row, new in zip(rows, found, strict=True):
                answers[row] = str(tokenizer.decode(until(new, stops), skip_special_tokens=True)).strip()
        return answers

    return generate


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prefix: str = "", more: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt as at inference: chat template, generation prompt, then ``prefix``."""
    from gradshield.data.templates import DEFAULT_CHAT_TEMPLATE

    template = None if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE  # as rows are scored
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    text: Any = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **(more or {})
    )
    # The template already writes the special tokens.
    return list(tokenizer(text + prefix, add_special_tokens=False)["input_ids"])


def _check_room(model: PreTrainedModel, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises DataError for prompts that exceed the model's learned positions."""
    most = min(learned_positions(model), default=math.inf)
    for i, row in enumerate(ids):
        if len(row) + max_new_tokens > most:
            raise DataError(
                f"prompt {i} has {len(row)} tokens, which with {max_new_tokens} new ones is more than the "
                f"{most} positions of the model: shorten it or lower max_new_tokens"
            )
