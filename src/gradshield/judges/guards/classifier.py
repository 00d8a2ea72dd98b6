"""A text-classification model as a guard."""

# ruff: noqa: SIM905 (a list of words is read as words)

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gradshield import errors
from gradshield.errors import ModelError, UsageError
from gradshield.files import own_name
from gradshield.judges.guards.base import GUARDS, Opinion, Reads, short_name
from gradshield.models import loading
from gradshield.models.loading import choose_device, choose_dtype
from gradshield.models.modules import in_float64
from gradshield.options import check

BATCH = 32
LONGEST = 2048  # most tokens in one window
SLACK = 8  # tokens kept free in a window: special tokens, and words cut in two that tokenise differently

UNSAFE_WORDS = frozenset(
    "unsafe|harmful|harm|toxic|toxicity|hate|hateful|offensive|abusive|abuse|dangerous|malicious|unethical|insult|obscene|"
    "threat|violence|violent|nsfw|jailbreak|flagged|inappropriate|unacceptable".split("|")
)
SAFE_WORDS = frozenset(
    "safe|harmless|benign|neutral|normal|ok|okay|appropriate|acceptable|clean|sfw|nontoxic|inoffensive".split("|")
)
_NEGATIONS = frozenset(("not", "non", "no"))


def label_unsafe(label: str) -> bool | None:
    """Whether a label's words mean unsafe; None if they do not say."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).lower())
    unsafe, safe = not UNSAFE_WORDS.isdisjoint(words), not SAFE_WORDS.isdisjoint(words)
    if unsafe == safe:
        return None
    return unsafe != (not _NEGATIONS.isdisjoint(words))


@GUARDS.register("classifier")
class Classifier:
    """Any text-classification model from a folder or the hub, its labels mapped to unsafe.

    The probability is the sum over the unsafe labels if labels are exclusive, and their maximum if each label is decided
    independently. An answer longer than the model's input is read in windows, of which the worst counts.

    ``unsafe`` are the names of the labels that mean unsafe, inferred if every name is clear; ``reads`` is ``pair`` to give the
    model request and answer as two segments, or ``answer``. Raises UsageError for labels that the model does not have or that
    cannot be inferred (the message lists them), ModelError and HubError as ``models.loading.load`` does.
    """

    def __init__(
        self,
        model: str | Path,
        unsafe: Sequence[str] = (),
        reads: Reads = "pair",
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        check(Classifier, reads=reads)
        self.source, self.wanted, self.reads = str(model), tuple(unsafe), reads
        self.device, self.dtype = device, dtype

    @property
    def name(self) -> str:
        return short_name("classifier", self.source)

    def ready(self) -> None:
        """Fetch the model and determine its labels, without loading its weights."""
        self._config, self._tokenizer, self.unsafe  # noqa: B018

    def record(self) -> Mapping[str, Any]:
        """The model with the hash of its weights, its unsafe labels, and what it reads."""
        unsafe = [self._labels[i] for i in self.unsafe]
        digest = loading.files_digest([self._folder])
        return {
            "guard": "classifier",
            "model": own_name(self.source),
            "sha256": digest,
            "unsafe": unsafe,
            "reads": self.reads,
        }

    def opinions(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Opinion]:
        """One opinion per answer: the probability of its worst window."""
        windows = [
            (i, pair) for i, both in enumerate(zip(prompts, answers, strict=True)) for pair in self._windows(*both)
        ]
        windows.sort(key=lambda window: -sum(map(len, window[1])))  # similar lengths together, the largest batch first
        worst = [0.0] * len(prompts)
        broken: set[int] = set()
        for start in range(0, len(windows), BATCH):
            batch = windows[start : start + BATCH]
            for (i, _), value in zip(batch, self._probabilities([pair for _, pair in batch]), strict=True):
                if value != value:
                    broken.add(i)
                worst[i] = max(worst[i], value)
        return [
            Opinion(None, "the classifier's output is not a number")
            if i in broken
            else Opinion(value, f"P({'|'.join(self._labels[k] for k in self.unsafe)}) = {value:.3f}")
            for i, value in enumerate(worst)
        ]

    @cached_property
    def unsafe(self) -> tuple[int, ...]:
        """Indices of the labels that mean unsafe."""
        labels, listed = self._labels, ", ".join(map(repr, self._labels))
        own = own_name(self.source)
        if self.wanted:
            if unknown := [label for label in self.wanted if label not in labels]:
                raise UsageError(f"{own} has no label {unknown[0]!r}: choose from {listed}")
            if self._exclusive and set(self.wanted) == set(labels):
                raise UsageError(f"every label of {own} would mean unsafe: choose from {listed}, but not all")
            return tuple(i for i, label in enumerate(labels) if label in self.wanted)
        meant = [label_unsafe(label) for label in labels]
        if None in meant or True not in meant or (self._exclusive and False not in meant):
            raise UsageError(
                f"the names of the labels of {own} do not say which mean unsafe ({listed}): name those with "
                "unsafe=LABEL, several joined with +"
            )
        return tuple(i for i, value in enumerate(meant) if value)

    @cached_property
    def _folder(self) -> Path:
        folder = loading.fetch(self.source, None, False)
        loading.check_folder(folder, self.source, False)
        return folder

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self._folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"the config of {self.source} cannot be read ({errors.first_line(error)}): give a complete model folder"
            ) from error

    @cached_property
    def _tokenizer(self) -> Any:
        return loading.tokenizer_of([self._folder], self.source, False)

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        names = self._config.id2label
        return tuple(str(names[i]) for i in sorted(names))

    @property
    def _exclusive(self) -> bool:
        return len(self._labels) > 1 and self._config.problem_type != "multi_label_classification"

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        device = choose_device(self.device)
        # A language model loads here too, but it lacks the weights of the head.
        dtype, auto = choose_dtype(self.dtype, device), AutoModelForSequenceClassification
        return loading.pretrained(auto, self._folder, self.source, "text classifier", dtype=dtype).to(device).eval()

    @cached_property
    def _length(self) -> int:
        stated = (self._tokenizer.model_max_length, getattr(self._config, "max_position_embeddings", None))
        tokenizer, table = (int(n) if n is not None and 0 < n < 10**6 else None for n in stated)
        if tokenizer is None and table is not None:
            table -= 2  # RoBERTa's positions begin at 2; a tokenizer's own limit accounts for that
        return min(n for n in (tokenizer, table, LONGEST) if n is not None)

    def _windows(self, prompt: str, answer: str) -> Iterator[tuple[str, ...]]:
        """The model's inputs for one answer: one, or several if the answer is too long."""
        request = self._cut(prompt, self._length // 4) if self.reads == "pair" else ""
        ids = self._ids(answer)
        room = max(1, self._length - SLACK - len(self._ids(request)))
        parts = [answer]
        if len(ids) > room:
            # Windows overlap by half, so that text at a border is whole in one of them.
            step = max(1, room // 2)
            starts = range(0, max(1, len(ids) - room + step), step)
            parts = [str(self._tokenizer.decode(ids[at : at + room], skip_special_tokens=True)) for at in starts]
        for part in parts:
            yield (request, part) if self.reads == "pair" else (part,)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _cut(self, text: str, tokens: int) -> str:
        ids = self._ids(text)
        return text if len(ids) <= tokens else str(self._tokenizer.decode(ids[:tokens], skip_special_tokens=True))

    def _probabilities(self, inputs: Sequence[tuple[str, ...]]) -> list[float]:
        """P(unsafe) of each input, (B,); NaN if the model gave NaN."""
        import torch

        columns = [list(column) for column in zip(*inputs, strict=True)]
        single = self._tokenizer.pad_token_id is None  # without padding, one at a time
        groups = [[[text] for text in texts] for texts in zip(*columns, strict=True)] if single else [columns]
        found: list[float] = []
        for group in groups:
            encoded = self._tokenizer(
                *group, padding=not single, truncation=True, max_length=self._length, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = in_float64(self._model(**encoded.to(self._model.device)).logits)  # (B, labels)
            chosen = (logits.softmax(-1) if self._exclusive else logits.sigmoid())[:, list(self.unsafe)]
            values = chosen.sum(-1).clamp(max=1.0) if self._exclusive else chosen.amax(-1)
            found += values.tolist()
        return found
