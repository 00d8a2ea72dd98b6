"""Greedy answers from a model, in batches: the ``generate`` callable that every measurement takes.

A prompt is a user's text or a list of chat messages. It is rendered with the tokenizer's chat template (where it has
none, the default of ``data.templates``) and its generation prompt, as at inference. Batches are padded on the left, so
that every row's next token stands in the last column; the tokenizer is not touched. Prompts are sorted by length, which
keeps padding small, and answers come back in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from gradshield.errors import DataError
from gradshield.models.loading import evaluating

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
    progress: Callable[[int, int], None] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Generate:
    """A callable from prompts to greedy answers, without special tokens and surrounding white space.

    The same prompts give the same answers. Whatever sampling or penalty the model's ``generation_config`` asks for is
    left out, and that config, the mode of each of the model's modules and the tokenizer are as before after every call,
    also after an exception.

    Parameters
    ----------
    prefix
        Text after the generation prompt, on which the model goes on (a closed thinking block, or the start of an
        answer that an attacker forces). It is not part of the answer returned.
    progress
        Called with (prompts answered, all prompts) after every batch.
    template
        Arguments for the chat template, as the rows are rendered with.

    Raises
    ------
    DataError
        A prompt and its answer do not fit into the model's table of positions.
    """

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        ids = [encode(tokenizer, prompt, prefix, template) for prompt in prompts]
        _check_room(model, ids, max_new_tokens)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)  # a batch too large fails at once
        answers = [""] * len(ids)
        with _greedy(model, tokenizer, max_new_tokens):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                for row, answer in zip(rows, _continue(model, tokenizer, [ids[i] for i in rows]), strict=True):
                    answers[row] = answer
                if progress is not None:
                    progress(start + len(rows), len(order))
        return answers

    return generate


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prefix: str = "", more: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt as the model meets it at inference: chat template, generation prompt, then ``prefix``."""
    from gradshield.data.templates import DEFAULT_CHAT_TEMPLATE

    # Without a template of its own, the one that such rows are scored with.
    template = None if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    text: Any = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **(more or {})
    )
    # The template writes the special tokens itself; the tokenizer would write the first one twice.
    return list(tokenizer(text + prefix, add_special_tokens=False)["input_ids"])


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: those of the model's ``generation_config`` and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    stops = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return sorted(stop for stop in stops if stop is not None)


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """The model in evaluation mode with a plain greedy ``generation_config``, both put back on the way out.

    The config is replaced, not passed to ``generate``: transformers fills what a passed config leaves open from the
    model's own, so a repetition penalty in there would come through.
    """
    from transformers import GenerationConfig

    stops = stop_tokens(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *stops) if i is not None), 0)
    config = model.generation_config
    model.generation_config = cast(Any, GenerationConfig)(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = config


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Sequence[int]]) -> list[str]:
    """The model's answer to each row of a batch, under the ``generation_config`` that the model has now."""
    import torch

    from gradshield.data import left_padded

    ids, attention = map(torch.from_numpy, left_padded(batch, model.generation_config.pad_token_id))
    sequences = cast(Any, model).generate(input_ids=ids.to(model.device), attention_mask=attention.to(model.device))
    out = sequences[:, ids.shape[1] :]  # (B, new)
    stops = set(model.generation_config.eos_token_id or ())
    return [str(tokenizer.decode(_until(row, stops), skip_special_tokens=True)).strip() for row in out.tolist()]


def _until(row: list[int], stops: set[int]) -> list[int]:
    """The tokens before the first stop: a row that ended early is padded up to the longest of its batch."""
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]


def _check_room(model: PreTrainedModel, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Models with a learned table of positions fail past its end; rotary ones go on, so only the former are checked."""
    from torch import nn

    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    if not tables:
        return
    for i, row in enumerate(ids):
        if len(row) + max_new_tokens > min(tables):
            raise DataError(
                f"prompt {i} has {len(row)} tokens, which with {max_new_tokens} new ones is more than the "
                f"{min(tables)} positions of the model: shorten it or lower max_new_tokens"
            )
