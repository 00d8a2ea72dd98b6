"""What a selector needs of the model before rows are measured: valid probes, the ruler, the direction, an engine that agrees with
the oracle, and short rows of known kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from torch import nn

from gradshield import cache, runs
from gradshield import data as rows_in
from gradshield.errors import ProbeError, ScoreError, UsageError, first_line
from gradshield.gradients import (
    ENGINES,
    ROW_SUMS,
    Engine,
    EngineAgreement,
    FiniteDifference,
    Loop,
    adapted,
    agreement,
    calibrated,
    target_names,
)
from gradshield.gradients import direction as directions
from gradshield.manifests import LEAST_SPEARMAN
from gradshield.models.loading import LoadedModel, fingerprint
from gradshield.options import Spec
from gradshield.probes import (
    COMPLY,
    Prompts,
    Validity,
    blunt,
    greedy,
    lookalikes,
    open_turns,
    openings,
    ordinary,
    refuses,
    requests,
    validity,
)
from gradshield.scanning import shards
from gradshield.scanning.decide import ROWS, group
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.selectors import SELECTORS, Fihs, Measured, Selector, parse_aggregate
from gradshield.selectors.reading import LEAST, Reading, Turn
from gradshield.types import Anchors, Direction, Floats, Progress, References, Rendered, Scores, Tokens

LONGEST = 96  # tokens of a refusal that is trained on
ANSWER = 24  # tokens of the model's own answers: enough to recognise a refusal
FEW = 1024  # positions in one batch of a few known rows: fewer of them are padding


@dataclass(frozen=True, eq=False)
class Ready:
    """A selector that can measure rows. Only FIHS-based ones have an engine to check, and probes that must be valid."""

    selector: Selector
    direction: Direction
    agreement: EngineAgreement | None = None
    validity: Validity | None = None
    harmless: Prompts | None = None  # the look-alikes of FIHS's requests, as opened turns
    seen: Measured | None = None  # of a selector of two stages, what its look found


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored(Ready):
    """Scores, with the evidence for them."""

    scores: Scores


@dataclass(frozen=True, eq=False)
class Asked:
    """The probes and their look-alikes as opened turns, what the model says of the probes, and the engine to try first."""

    requests: Prompts
    lookalikes: Prompts
    validity: Validity
    engine: Engine


@dataclass(frozen=True, eq=False)
class Known:
    """A model, and what was found on it before (`cache`), under a hash of the model and of all that is ``given``.

    ``model`` is the loaded one, with its adapter if the subspace needs it.
    """

    model: nn.Module
    loaded: LoadedModel

    def json(self, name: str, given: Any, make: Callable[[], Any]) -> Any:
        """A JSON-able finding."""
        return cache.remembered(f"{name}-{self.key(given)}.json", make, cache.save_json, cache.load_json)

    def direction(self, given: Any, make: Callable[[], Direction], named: bool) -> Direction:
        """∇S; not kept for a probe that is a function of the caller's, whose code no hash covers."""
        if not named:
            return make()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        device = next(self.model.parameters()).device
        name = f"direction-{self.key(given)}.safetensors"
        found = cache.remembered(name, make, directions.save, directions.load, size)
        tensors = {key: tensor.to(device) for key, tensor in found.tensors.items()}
        return replace(found, tensors=tensors)

    def key(self, given: Any) -> str:
        """A hash of the model and of what is given."""
        return runs.digest([self._found_with, given])[:40]

    @cached_property
    def _found_with(self) -> list[Any]:
        return [runs.versions(), fingerprint(self.loaded, self.model)]


def ask(known: Known, engine: Engine, settings: ScanSettings, probing: Probing, progress: Progress) -> Asked:
    """Everything that may speak against the scan before a row is measured.

    Raises ProbeError for a model on which the probes are invalid, and UsageError for a rule that does not fit.
    """
    model, tokenizer = known.model, known.loaded.tokenizer
    if not hasattr(settings.threshold, "cut"):  # a rule that cannot cut fails now, not after the rows are measured
        made = cast(type[Fihs], SELECTORS[Spec.split(settings.selector).name])
        decoys = np.zeros(1) if engine.per_token and made.decoys else None
        settings.make_threshold().cut(np.zeros(1), decoys, None if made.decoys else Anchors(np.ones(1), np.zeros(1)))
    asked, harmless = asked_of(tokenizer, probing)
    asking = partial(progress, "asking the probes")
    answers = known.json("openings", asked.ids, lambda: openings(model, tokenizer, asked, progress=asking))
    asking(len(asked), len(asked))
    valid = validity(tokenizer, asked, answers)
    if valid.problem and not probing.uncertified:
        raise ProbeError(valid.problem + "; or pass --uncertified to score it anyway, without a certificate")
    return Asked(asked, harmless, valid, engine)


def ready_fihs(
    known: Known,
    asked: Asked,
    rendered: Sequence[Rendered],
    settings: ScanSettings,
    targets: Sequence[str],
    progress: Progress,
) -> Ready:
    """Compute the direction, and choose an engine that agrees with the oracle. Raises ScoreError if none does."""
    model, tokenizer = known.model, known.loaded.tokenizer
    probe = settings.make_probe()
    probe.fit(model, tokenizer, asked.requests, asked.lookalikes)
    selector = Fihs(probe, asked.requests, Loop(), parse_aggregate(settings.aggregate), settings.subspace, targets)
    progress("finding the direction", 0, 1)
    given = (asked.requests.ids, dict(probe.settings()), settings.subspace, list(targets))
    direction = known.direction(given, lambda: selector.prepare(model), isinstance(settings.probe, str))
    progress("finding the direction", 1, 1)
    chosen = np.random.default_rng(settings.seed).permutation(len(rendered))[: settings.check_rows]
    sample = [rendered[i] for i in sorted(chosen)]
    progress("checking the engine", 0, 1)
    selector.engine, agreed = _trusted(asked, selector, known, direction, sample)
    progress("checking the engine", 1, 1)
    return Ready(selector, direction, agreed, asked.validity, asked.lookalikes)


def given_by(known: Known, found: Ready, read: Callable[[], Read], progress: Progress) -> dict[str, Callable[[], Any]]:
    """Constructor arguments for methods built on FIHS: the prepared FIHS, its parts, and the known rows of `Screen`."""
    fihs = cast(Fihs, found.selector)
    return {
        "fihs": lambda: fihs,
        "probe": lambda: fihs.probe,
        "requests": lambda: fihs.requests,
        "engine": lambda: fihs.engine,
        "aggregate": lambda: fihs.aggregate,
        "known": lambda: _openers(known, found, read(), progress),
    }


@dataclass(frozen=True, eq=False)
class Read:
    """The ruler of harm, the probes that the model refuses, and the look-alikes that it answers."""

    reading: Reading
    refused: Prompts
    tricky: Prompts


def ruler(known: Known, valid: Validity, probing: Probing, progress: Progress) -> Read:
    """The ruler of this model, which the built-in blunt requests help to fit unless there are requests of the user's own.

    Raises ProbeError if too few probes are refused, or there are too few harmless prompts, to fit a ruler.
    """
    model, tokenizer = known.model, known.loaded.tokenizer
    template = dict(probing.template or {})  # without the answer prefix: rows are read at their own opened turn
    asked, alike, plain, *pairs = (
        open_turns(tokenizer, prompts, **template)
        for prompts in (
            probing.requests or requests(),
            probing.lookalikes or lookalikes(),
            ordinary(),
            *(() if probing.requests else blunt()),
        )
    )
    if probing.requests and not probing.lookalikes:
        warnings.warn(
            "the probes are your own and the harmless requests built in, so that whatever sets yours apart (their language, "
            "their subject) reads as harm: give harmless requests of the same kind as well (--lookalikes FILE)",
            stacklevel=2,
        )
    declined = [refuses(answer) for answer in valid.answers]
    refused = asked.take(np.flatnonzero(declined).tolist()) if sum(declined) >= LEAST else asked
    progress("reading known requests", 0, 1)
    reading = Reading.from_json(
        known.json(
            "ruler",
            (refused.ids, alike.ids, plain.ids, [one.ids for one in pairs]),
            lambda: Reading.fit(model, Turn.of(plain), refused, alike, plain, pairs).as_json(),
        )
    )
    progress("reading known requests", 1, 1)
    return Read(reading, refused, alike.take(np.flatnonzero(reading.answered).tolist()))


def _openers(known: Known, found: Ready, read: Read, progress: Progress) -> Anchors:
    """The FIHS of compliant openers after the probes that the model refuses, and after the look-alikes that it answers."""
    model, tokenizer, fihs = known.model, known.loaded.tokenizer, cast(Fihs, found.selector)
    refused, tricky = read.refused, read.tricky
    progress("scoring known rows", 0, 1)

    def pushes() -> list[list[float]]:
        return [_fihs_of(fihs, model, found.direction, opened(tokenizer, p)).tolist() for p in (refused, tricky)]

    given = (refused.ids, tricky.ids, found.direction.digest, dict(fihs.settings()), fihs.aggregate.name)
    anchors = Anchors(*(np.array(values) for values in known.json("known", given, pushes)))
    progress("scoring known rows", 1, 1)
    return anchors


def _fihs_of(fihs: Fihs, model: nn.Module, direction: Direction, rows: Sequence[Rendered]) -> Floats:
    """FIHS of rows that are not in the data."""
    if not rows:
        return np.zeros(0)
    raw = shards.measure(fihs, model, direction, rows, FEW)
    return fihs.finish(raw, [""] * len(rows), [ROWS] * len(rows)).values


def weights_changed(model: nn.Module, peft_config: Any, saved: bool = True) -> list[str]:
    """Names of the weights that the training's adapter changes; empty without one. Raises UsageError if it does not fit.

    Without ``saved``, the modules that it trains in full (``modules_to_save``) are left out.
    """
    with _fits_the_model():
        return target_names(model, peft_config, saved)


@contextmanager
def scored_model(
    loaded: LoadedModel, settings: ScanSettings, peft_config: Any
) -> Iterator[tuple[nn.Module, list[str], Any]]:
    """The model that is scored, the weights that training changes, and the adapter put on it: that of the subspace ``lora``.

    Raises UsageError for an adapter that does not fit the model.
    """
    targets = weights_changed(loaded.model, peft_config)
    adapter = peft_config if settings.subspace == "lora" else None
    with ExitStack() as stack:
        with _fits_the_model():
            model = stack.enter_context(adapted(loaded.model, adapter, settings.seed))
        yield model, targets, adapter


@contextmanager
def _fits_the_model() -> Iterator[None]:
    """Turns PEFT's errors about an adapter that does not fit into UsageError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"the adapter of the PEFT config cannot be added to the model ({first_line(error, most=None)}): "
            "fix the file given to --lora-config (peft_config), first of all its target_modules"
        ) from error


def asked_of(tokenizer: Any, probing: Probing) -> tuple[Prompts, Prompts]:
    """The probe requests and their harmless look-alikes, as opened turns."""
    template = dict(probing.template or {})
    return (
        open_turns(tokenizer, probing.requests or requests(), probing.answer_prefix, **template),
        open_turns(tokenizer, probing.lookalikes or lookalikes(), probing.answer_prefix, **template),
    )


def anchors(selector: Fihs, model: nn.Module, direction: Direction, harmless: Prompts, tokenizer: Any) -> Anchors:
    """Scores of known rows: compliant openers after the probes, and after the look-alikes that the model itself answers."""
    answers = openings(model, tokenizer, harmless)
    known = harmless.take([i for i, answer in enumerate(answers) if not refuses(answer)])
    return Anchors(
        *(_fihs_of(selector, model, direction, opened(tokenizer, prompts)) for prompts in (selector.requests, known))
    )


def _trusted(
    asked: Asked, selector: Fihs, known: Known, direction: Direction, sample: Sequence[Rendered]
) -> tuple[Engine, EngineAgreement]:
    """The first engine, from the chosen one to slower ones, that ranks a random sample like the oracle."""
    model, pad, engine = known.model, known.loaded.pad_token_id, asked.engine

    def values(of: Engine) -> Measured:
        with_engine = copy(selector)
        with_engine.engine = of
        return shards.measure(with_engine, model, direction, sample, FEW)

    truth = values(Loop())
    # Raises for values that are not finite.
    selector.finish(truth, [row.id for row in sample], [group(row.shape) for row in sample])
    oracle = truth.sums
    slower: list[Engine] = [engine]
    if engine.name == "finite-difference":
        given = (asked.requests.ids, asked.lookalikes.ids, direction.digest)
        step = known.json("step", given, lambda: _step(model, asked.requests, asked.lookalikes, pad, direction))
        slower = [FiniteDifference(step), ENGINES["forward"]()]
    if not selector.aggregate.per_token and engine.name != "loop":
        slower.append(Loop())
    found: EngineAgreement | None = None
    for candidate in slower:
        found = agreement(candidate.name, values(candidate).sums, oracle)
        # Too few or equal rows have no rank correlation: then the relative error decides.
        good = found.spearman >= LEAST_SPEARMAN if np.isfinite(found.spearman) else found.relative_error <= 0.01
        if good:
            return candidate, found
        warnings.warn(
            f"the engine {candidate.name} disagrees with the oracle on {found.n} rows (Spearman {found.spearman:.3f}, "
            f"relative error {found.relative_error:.1e}); a slower engine is used",
            stacklevel=2,
        )
    assert found is not None
    raise ScoreError(
        f"no engine agrees with the oracle on this model (the last, {found.engine}, has Spearman {found.spearman:.3f} on "
        f"{found.n} rows, and {LEAST_SPEARMAN} is needed): load the model in float32, or use --engine loop with {ROW_SUMS}"
    )


def _step(model: nn.Module, asked: Prompts, harmless: Prompts, pad: int, direction: Direction) -> float:
    """The finite-difference step of this model, by a small batch of probes with its own answers."""
    some = [p.take(range(min(4, len(p)))) for p in (asked, harmless)]
    both = Prompts(*(sum(parts, ()) for parts in zip(*((p.ids, p.categories, p.texts) for p in some), strict=True)))
    answers = greedy(model, both, 16, pad)
    rows = [answered(n, *pair) for n, pair in enumerate(zip(both.ids, ([*a] or [pad] for a in answers), strict=True))]
    return calibrated(model, rows_in.collate(rows), direction)[0].relative_step


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
