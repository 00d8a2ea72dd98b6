"""For TRL: rendered rows as a dataset, so that training uses the scored tokens; and a check of option names."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.errors import EmptyDataError, FormatError, UsageError, did_you_mean
from gradshield.types import Conversation, Example, Rendered

WRITTEN = 1000  # rows written at once
IGNORED = -100  # the label that PyTorch's cross entropy skips
PAIR = ("chosen", "rejected")


def to_trl(examples: Iterable[Example], rendered: Sequence[Rendered]) -> Any:
    """A ``datasets.Dataset`` of the rendered rows, in order; ``examples`` contains these rows, and may contain others.

    Tokens are in a temporary Arrow file, which is deleted with the dataset.

    Preference pairs become ``prompt``, ``chosen``, ``rejected`` for ``DPOTrainer``, and answers with a label ``prompt``,
    ``completion``, ``label`` for ``KTOTrainer``, with ``tools`` (as JSON, None for a row without) and ``chat_template_kwargs``
    if there are any. All other rows become ``input_ids`` and ``labels``, which
    ``SFTTrainer`` uses unchanged; since the labels are the mask, leave ``assistant_only_loss`` False there (TRL rejects it for
    tokenised rows).

    Raises FormatError for preference pairs or answers with a label among other rows, or strings among messages there, since no
    trainer takes both, and for such rows with different keys in ``chat_template_kwargs``; EmptyDataError if there is no row.
    """
    import datasets

    if not rendered:
        raise EmptyDataError("no row is left to train on: loosen the threshold, or give more data")
    shapes = {row.shape for row in rendered}
    if shapes.isdisjoint(("preference", "kto")):
        return _on_disk(rendered)
    if len(shapes) > 1:
        raise FormatError(
            "the data mixes preference pairs or answers with a label with other rows, which no single trainer takes: put them in "
            "separate files"
        )
    rest = iter(examples)
    pairs = [_pair(next(example for example in rest if example.row == row.row)) for row in rendered]
    if len({type(pair["prompt"]) for pair in pairs}) > 1:
        raise FormatError("the data mixes rows of strings with rows of messages: put them in separate files")
    options = {tuple(sorted(pair.get("chat_template_kwargs", ()))) for pair in pairs}
    if len(options) > 1:  # a column of dicts has every key in every row, and templates distinguish None from missing
        raise FormatError(
            "the pairs give different chat_template_kwargs ("
            f"{'; '.join(', '.join(keys) or 'none' for keys in sorted(options))}), and a dataset for DPOTrainer needs the same "
            "keys in every row: give every pair the same keys, or put them in separate files"
        )
    # Collect the columns of all rows: datasets would take only the first row's.
    columns = dict.fromkeys(key for pair in pairs for key in pair)
    return datasets.Dataset.from_dict({key: [pair.get(key) for pair in pairs] for key in columns})


def _on_disk(rendered: Iterable[Rendered]) -> Any:
    import datasets
    import pyarrow as pa

    folder = tempfile.mkdtemp(prefix="gradshield-kept-")
    path = Path(folder) / "kept.arrow"
    # The types that datasets gives to columns of these names.
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})
    rows = iter(rendered)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while some := [labelled(row) for row in islice(rows, WRITTEN)]:
            writer.write_table(pa.Table.from_pylist(some, schema))
    dataset = datasets.Dataset.from_file(str(path))
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def labelled(row: Rendered) -> dict[str, list[int]]:
    """The tokens of a row and their labels: `IGNORED` for tokens outside the loss. Of a pair, each answer's tokens with those of
    its prompt, and the mask of those that count."""
    if len(row.sequences) == 1:
        (tokens,) = row.sequences
        return {"input_ids": tokens.ids.tolist(), "labels": np.where(tokens.loss, tokens.ids, IGNORED).tolist()}
    found: dict[str, list[int]] = {}
    for name, tokens in zip(PAIR, row.sequences, strict=True):
        found |= {f"{name}_ids": tokens.ids.tolist(), f"{name}_mask": tokens.loss.astype(int).tolist()}
    return found


def _pair(example: Example) -> dict[str, Any]:
    first = example.conversations[0]
    names = ("completion",) if example.shape == "kto" else PAIR
    plain = first.messages is None
    pair: dict[str, Any] = {"prompt": first.prompt if plain else _part(first, True)}
    for name, one in zip(names, example.conversations, strict=True):
        pair[name] = one.completion if plain else _part(one, False)
    if example.shape == "kto":
        pair["label"] = first.coefficient > 0
    if first.tools is not None:
        # As dicts, every tool would get the arguments of all the others. TRL reads JSON unchanged.
        pair["tools"] = json.dumps([dict(tool) for tool in first.tools])
    if first.template_kwargs:
        pair["chat_template_kwargs"] = dict(first.template_kwargs)
    return pair


def _part(conversation: Conversation, prompt: bool) -> list[dict[str, Any]]:
    messages, turns = conversation.messages or (), conversation.prompt_turns or 0
    return [dict(message) for message in (messages[:turns] if prompt else messages[turns:])]


def config_of(pairs: bool) -> Any:
    """TRL's class of training options for preference pairs, or for other rows. Raises ImportError if TRL is not installed."""
    if pairs:
        from trl.trainer.dpo_config import DPOConfig

        return DPOConfig
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig


def names_of(pairs: bool) -> set[str]:
    """The options of `config_of`."""
    return {field.name for field in fields(config_of(pairs)) if field.init}


def check_names(options: Iterable[str], pairs: bool | None = None) -> None:
    """Raises UsageError for an option that DPOConfig (``pairs``) or SFTConfig does not have, or with None neither of them.

    Raises ImportError if TRL is not installed.
    """
    kinds = (False, True) if pairs is None else (pairs,)
    known = {name for kind in kinds for name in names_of(kind)}
    for name in options:
        if name not in known:
            configs = [config_of(kind).__name__ for kind in kinds]
            hint = did_you_mean(name, known) or f"see the fields of {' and '.join(configs)}"
            whose = " or ".join(configs) + " of TRL" + (", which pairs are trained with," if pairs else "")
            raise UsageError(f"unknown training option {name!r}: no field of {whose} has this name, {hint}")
