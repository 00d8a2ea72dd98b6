"""A guard that writes its verdict: a causal language model such as Llama Guard."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gradshield.data.templates import special_tokens
from gradshield.errors import ModelError, UsageError
from gradshield.files import own_name
from gradshield.judges.guards.base import GUARDS, Opinion, short_name
from gradshield.models import loading
from gradshield.models.decoding import continued, stop_tokens
from gradshield.models.modules import in_float64, text_config

BATCH = 8
NEW_TOKENS = 8
_BEYOND_HALF = math.nextafter(0.5, 1)
_TRIAL = ("what is the capital of France", "the capital of France is Paris")


@GUARDS.register("guard")
class Generative:
    """A causal LM that writes whether the answer in a chat is safe, prompted with its own chat template.

    The first word it writes, possibly after a heading such as ``Safety:``, must be one of ``words``; anything else is no
    verdict. The probability compares the two words at the position of the verdict: exp(z_unsafe) over the sum of both,
    z the logits of each word's first token. If they share that token, the probability is 0 or 1. It is above one half exactly
    if the guard wrote unsafe, also in a tie.

    Special tokens spelled out in a request or an answer are broken up: they would end the guard's own turns.

    Source: Inan et al. (2023), arXiv 2312.06674, whose classifier score is the probability of the first token.

    ``words`` are what the guard writes for safe and for unsafe; case is ignored. Raises UsageError if they are not two
    different words; ModelError and HubError as ``models.loading.load`` does, and for a tokenizer without a chat template or
    with one that omits a turn.
    """

    def __init__(
        self,
        model: str | Path,
        words: Sequence[str] = ("safe", "unsafe"),
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.words = tuple(word.strip().lower() for word in words)
        if len(set(self.words)) != 2 or not all(re.fullmatch(r"\w+", word) for word in self.words):
            raise UsageError(f"words are {'+'.join(words)!r}: give two words, SAFE+UNSAFE, as the guard writes them")
        self.source = str(model)
        self.device, self.dtype = device, dtype
        alternatives = "|".join(map(re.escape, self.words))
        self._verdict = re.compile(rf"\W*(?:\w+\s*:\W*)?({alternatives})(?!\w)", re.IGNORECASE)

    @property
    def name(self) -> str:
        return short_name("guard", self.source)

    def ready(self) -> None:
        """Fetch the tokenizer and test its chat template, without loading the weights."""
        self._template_parts  # noqa: B018

    def record(self) -> Mapping[str, Any]:
        """The model with the hash of its weights, and its words."""
        return {
            "guard": "guard",
            "model": own_name(self.source),
            "sha256": self._loaded.digest,
            "words": list(self.words),
        }

    def opinions(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Opinion]:
        """One opinion per answer, by greedy decoding."""
        ids = [self._encoded(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        limit = getattr(text_config(self._loaded.model), "max_position_embeddings", None) or 10**9
        found = [Opinion(None, f"{len(row)} tokens are more than the guard reads ({limit})") for row in ids]
        fits = [i for i, row in enumerate(ids) if len(row) + NEW_TOKENS <= limit]
        fits.sort(key=lambda i: -len(ids[i]))  # similar lengths together, the largest batch first
        for start in range(0, len(fits), BATCH):
            rows = fits[start : start + BATCH]
            for i, opinion in zip(rows, self._answers([ids[i] for i in rows]), strict=True):
                found[i] = opinion
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        return loading.load_tokenizer(self.source)

    @cached_property
    def _loaded(self) -> loading.LoadedModel:
        return loading.load(self.source, None, self.device, self.dtype)

    @cached_property
    def _template_parts(self) -> bool:
        """Whether the template takes a turn's content as typed parts (multimodal guards) instead of a text."""
        if not self._tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {self.source} has no chat template: give a guard that has one")
        for parts in (False, True):
            try:
                text = self._rendered(*_TRIAL, parts)
            except Exception:  # a template may raise anything
                continue
            if all(turn in text for turn in _TRIAL):
                return parts
        raise ModelError(
            f"the chat template of {self.source} omits the user's or the assistant's turn: give a guard that judges answers"
        )

    def _rendered(self, prompt: str, answer: str, parts: bool) -> str:
        turns = [{"role": role, "content": text} for role, text in (("user", prompt), ("assistant", answer))]
        if parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]  # type: ignore[dict-item]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile(special_tokens(self._tokenizer) or r"(?!)")

    def _plain(self, text: str) -> str:
        """The text with every special token broken up by a space after its first character, repeated until none is left."""
        while self._special.search(text):
            broken = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
            if broken == text or len(broken) > 4 * len(text) + 64:
                return self._special.sub(" ", text)
            text = broken
        return text

    def _encoded(self, prompt: str, answer: str) -> list[int]:
        text = self._rendered(self._plain(prompt), self._plain(answer), self._template_parts)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _answers(self, batch: Sequence[Sequence[int]]) -> list[Opinion]:
        model, pad = self._loaded.model, self._loaded.pad_token_id
        stops = stop_tokens(model) or stop_tokens(model, self._tokenizer.eos_token_id)
        logits = {"output_logits": True, "return_dict_in_generate": True}
        new, out = continued(model, batch, NEW_TOKENS, pad, stops, **logits)
        return [self._read(row, [step[i] for step in out.logits]) for i, row in enumerate(new)]

    def _read(self, tokens: Sequence[int], logits: Sequence[Any]) -> Opinion:
        """The written verdict and its probability; ``logits`` are (V,) for each of ``tokens``."""
        text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        found = self._verdict.match(text)
        if not found:
            shown = "".join(c if c.isprintable() else " " for c in text).strip()[:60]
            return Opinion(None, f"the guard wrote {shown!r}, which is neither {self.words[0]!r} nor {self.words[1]!r}")
        word = found[1].lower()
        unsafe = word == self.words[1]
        pair = self._first_tokens(tokens, found.start(1), unsafe)
        if pair is None:
            return Opinion(float(unsafe), f"the guard wrote {found[1]!r}")
        step, safe_token, unsafe_token = pair
        gap = float(in_float64(logits[step][safe_token]) - in_float64(logits[step][unsafe_token]))
        value = 1 / (1 + math.exp(max(-700.0, min(gap, 700.0)))) if gap == gap else None
        if value is None:
            return Opinion(None, "the guard's logits are not numbers")
        if unsafe:  # in a tie, which happens in bfloat16, the written word is the verdict
            value = max(value, _BEYOND_HALF)
        return Opinion(value, f"the guard wrote {found[1]!r}, P({self.words[1]}) = {value:.3f}")

    def _first_tokens(self, tokens: Sequence[int], start: int, unsafe: bool) -> tuple[int, int, int] | None:
        """The position of the verdict's first token, and both words' first tokens in its style (space, capitals)."""
        step = next(
            (
                n
                for n in range(len(tokens))
                if len(str(self._tokenizer.decode(tokens[: n + 1], skip_special_tokens=True))) > start
            ),
            None,
        )
        if step is None:
            return None
        for style in (str, lambda w: " " + w, str.capitalize, lambda w: " " + w.capitalize(), str.upper):
            first = [self._tokenizer(style(word), add_special_tokens=False)["input_ids"][:1] for word in self.words]
            if all(first) and first[0] != first[1] and first[unsafe] == [tokens[step]]:
                return step, int(first[0][0]), int(first[1][0])
        return None
