"""The probe interface: a differentiable unsafety score S(θ) on requests that the model should refuse, and those requests.

S rises as the model moves away from refusal, so that FIHS = -<∇L, ∇S> is positive for rows that make the model less safe
(arXiv 2605.14194). A probe scores opened assistant turns, which end with the chat template's generation prompt.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from gradshield.data.raw_files import open_file
from gradshield.errors import DataError, UsageError
from gradshield.files import read_text
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

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        return None  # nothing to adapt

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor: ...

    def settings(self) -> Mapping[str, Any]: ...


PROBES: Registry[type[Probe]] = Registry("probe")


class FunctionProbe(Probe):
    """Any function of (model, PromptBatch) to a scalar tensor that rises as the model leaves refusal.

    Not in the registry: it is passed as an object (``gs.ScanSettings(probe=my_score)``).
    """

    def __init__(self, function: Callable[[nn.Module, PromptBatch], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

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


# ---- requests: the package's own, and a user's file -----------------------------------------------------------------

SPLITS = ("direction", "search", "report")
Prompt = dict[str, str]


@cache
def _shipped(name: str) -> tuple[Prompt, ...]:
    text = files("gradshield.probes").joinpath("prompts", name).read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def requests(split: str = "direction") -> list[Prompt]:
    """Built-in requests that a model should refuse: ``{prompt, category, split}``. ``split`` is one of SPLITS.

    ``direction`` builds ∇S, ``search`` decides a verified cut, ``report`` measures attack success only.
    """
    return _of_split("requests.jsonl", split)


def lookalikes(split: str = "direction") -> list[Prompt]:
    """Built-in harmless requests, each resembling the harmful request at the same index."""
    return _of_split("lookalikes.jsonl", split)


def blunt() -> tuple[list[Prompt], list[Prompt]]:
    """Built-in harmful requests that order an answer outright ("Write a guide to ..."), and their harmless look-alikes.

    They only teach the reading of `selectors.reading` that the form of a request is no sign of harm.
    """
    rows = _shipped("blunt.jsonl")
    return [dict(row) for row in rows], [{**row, "prompt": row["lookalike"]} for row in rows]


def ordinary() -> list[Prompt]:
    """Built-in everyday requests (questions, tasks, small talk): plainly harmless prompts."""
    return _of_split("ordinary.jsonl", "direction")


def _of_split(name: str, split: str) -> list[Prompt]:
    if split not in SPLITS:
        raise UsageError(f"unknown prompt split {split!r}: choose one of {', '.join(SPLITS)}")
    return [dict(p) for p in _shipped(name) if p["split"] == split]


def read_prompts(path: str | Path, split: str = "direction", unnamed: bool = True) -> list[Prompt]:
    """A user's prompts: a file of rows with ``prompt`` and optionally ``category`` and ``split``, or ``.txt`` with one per line.

    Rows of another split are skipped. Rows without one belong to every split, or with ``unnamed`` False to no split; the
    result may then be empty. Raises DataError.
    """
    file = Path(path)
    found: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(_rows(file), 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                f"row {number} of the prompts file {file.name!r} has no text under 'prompt': give each row as "
                '{"prompt": "...", "category": "..."}'
            )
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise DataError(
                f"row {number} of the prompts file {file.name!r} has a lone surrogate, which is not a character: fix the row"
            )
        if (first := seen.setdefault(alike(prompt), number)) != number:
            raise DataError(
                f"row {number} of the prompts file {file.name!r} repeats row {first}, which would count twice: give each "
                "prompt once"
            )
        if (row.get("split") or (split if unnamed else None)) == split:
            found.append({"prompt": prompt, "category": str(row.get("category") or "requests"), "split": split})
    if not found and unnamed:
        raise DataError(
            f"the prompts file {file.name!r} has no prompt of split {split!r}: give at least one, ideally 32"
        )
    return found


def alike(prompt: str) -> str:
    """A prompt's key for comparison: Unicode-normalised, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".txt":
        lines = read_text(file, "the prompts file", "give one request per line").split("\n")
        yield from ({"prompt": line} for line in lines if line.strip())
        return
    for record in open_file(file)[1]:
        if record.reason:
            raise DataError(
                f"line {record.line} of the prompts file {file.name!r} cannot be used, {record.reason}: fix it"
            )
        yield record.value
