"""From a fine-tuning set to a safe one: the one place that wires the stages. Read it from top to bottom."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gradshield import data as rows_in
from gradshield import models
from gradshield.data import templates
from gradshield.errors import DataError, EmptyDataError, ProbeError, ScoreError, UsageError
from gradshield.gradients import (
    ENGINES,
    Agreement,
    Engine,
    Loop,
    adapted,
    agreement,
    calibrated,
    pick,
    target_names,
)
from gradshield.gradients import direction as directions
from gradshield.models import LoadedModel
from gradshield.pipeline import outputs, shards
from gradshield.pipeline.options import check_positions, render_config, text_config
from gradshield.pipeline.settings import ScanSettings
from gradshield.probes import Prompts, Validity, digest, greedy, lookalikes, open_turns, requests, validity
from gradshield.selectors import Fihs, Measured, parse_aggregate
from gradshield.types import Bools, Cut, Direction, Example, Rendered, Scores, Selection, Tokens

if TYPE_CHECKING:
    from peft import PeftConfig

Progress = Callable[[str, int, int], None]
TRL_SHAPES = ("messages", "prompt-completion", "text", "preference")
LEAST_SPEARMAN = 0.99  # below it an engine's ranking is not the oracle's


@dataclass(frozen=True)
class Probing:
    """What the model is asked: the requests S is taken on, their harmless look-alikes, and how a turn is opened.

    ``answer_prefix`` is put at the start of every probed answer (a closed thinking block); ``template`` goes to the chat
    template. ``uncertified`` scores a model whose probes are not valid, and says so in everything that is written.
    """

    requests: Sequence[Mapping[str, str]] = ()
    lookalikes: Sequence[Mapping[str, str]] = ()
    answer_prefix: str = ""
    template: Mapping[str, Any] | None = None
    uncertified: bool = False


def scan(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    training_args: Any = None,
    max_length: int | None = None,
    output: str | Path | None = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    format: str | None = None,
    strict: bool = False,
    allow: Iterable[str] = (),
    labels: Sequence[int] | None = None,
    command: str = "gradshield.scan",
    progress: Progress = lambda stage, done, total: None,
) -> Selection:
    """Score every row by FIHS, find the cut, and part the rows that stay from those that go.

    Parameters
    ----------
    data
        A path (JSONL, JSON, CSV, Parquet), a hub name, a ``datasets.Dataset`` or a list of dicts.
    model, tokenizer
        A path or hub name, or the model itself with its tokenizer. The caller's model is bit-identical afterwards.
    peft_config
        The adapter that training will add: scores are then taken in its subspace.
    training_args
        The ``SFTConfig`` of the training, so that what is scored is what is trained. Without it the loss covers response
        tokens only, and rows are cut at ``max_length`` tokens (1,024, or the model's own limit if that is less).
    output
        A folder for the rows, the scores, the report and the manifest; an interrupted scan into it goes on where it stopped.
    allow
        Ids of rows that a person has cleared: they stay, whatever they score.
    labels
        0 or 1 (harmful) per input row, for measuring only; they never touch the decision.

    Raises
    ------
    UsageError, DataError, ModelError
        As in `gradshield.errors`; nothing is written to ``output`` before the data and the model have been read.
    """
    began = time.monotonic()
    settings, probing = settings or ScanSettings(), probing or Probing()
    if output is not None:
        outputs.check(output)
    read = rows_in.read(
        data, format=format, strict=strict, text_field=getattr(training_args, "dataset_text_field", "text")
    )
    if labels is not None and len(labels) != read.source.rows:
        raise UsageError(
            f"there are {len(labels)} labels for {read.source.rows} rows: give one label (0 or 1) for every row of the input"
        )
    if labels is not None and not set(labels) <= {0, 1}:
        raise UsageError("a label is neither 0 nor 1: give 1 for a harmful row and 0 for any other")
    loaded = _with_template(_loaded(model, tokenizer))
    limit = getattr(text_config(loaded.model), "max_position_embeddings", None)
    config = render_config(training_args, max_length, limit, probing.template or {})
    result = rows_in.render_all(read.examples, loaded.tokenizer, config, read.source, strict)
    if not result.rendered:
        raise EmptyDataError(
            f"no row of {read.source.name} can be scored within {config.max_length} tokens, line {result.quarantined[0].line}: "
            f"{result.quarantined[0].reason}; raise --max-length, or check the rows with `gradshield show`"
        )
    check_positions(loaded.model, result.rendered, limit)
    subspace = _subspace(settings, loaded.model, peft_config)
    with _adapted(loaded.model, peft_config if subspace == "lora" else None, settings.seed) as scored_model:
        scored = _score(
            scored_model, loaded, result.rendered, settings, subspace, probing, peft_config, output, progress
        )
        cuts = _cut(scored.scores, settings)
        beyond = np.array([v > cuts[s].value for v, s in zip(scored.scores.values, scored.scores.shapes, strict=True)])
        cleared = np.isin(np.array(scored.scores.ids), list(allow)) & beyond
        removed = beyond & ~cleared
        gone = [row for row, out in zip(result.rendered, removed, strict=True) if out]
        categories = _categories(scored_model, scored, gone, removed, settings, progress)
    by_row = {example.row: example for example in read.examples}
    kept = [row for row, out in zip(result.rendered, removed, strict=True) if not out]
    selection = Selection(
        scores=scored.scores,
        removed=removed,
        categories=categories,
        cuts=cuts,
        quarantined=tuple(sorted((*read.quarantined, *result.quarantined), key=lambda q: q.row)),
        cleared=tuple(int(row) for row in scored.scores.rows[cleared]),
        kept=_trainable(by_row, kept, read.source),
        manifest=outputs.manifest(
            command=command,
            source=read.source,
            loaded=loaded,
            settings={
                **settings.as_dict(),
                "subspace": scored.direction.subspace,
                "engine": scored.agreement.engine,
                "engine_step": getattr(scored.selector.engine, "relative_step", None),
                "render": {k: v for k, v in asdict(config).items() if k != "packing"},
                "probe_found": dict(scored.selector.probe.settings()),
                "probe_sha256": digest([dict(p) for p in probing.requests or requests()]),
                "direction_sha256": scored.direction.digest,
                "answer_prefix": probing.answer_prefix,
                "format": format,
            },
            seconds=time.monotonic() - began,
        ),
        certified=not scored.validity.problem,
    )
    selection = outputs.with_results(selection, scored.agreement, scored.validity, read, labels, by_row)
    if output is not None:
        outputs.write(
            selection, Path(output), read, by_row, result.rendered, loaded.tokenizer, scored.agreement, labels
        )
    return selection


@dataclass(frozen=True, eq=False)
class _Scored:
    selector: Fihs
    direction: Direction
    scores: Scores
    agreement: Agreement
    validity: Validity


def _score(
    model: nn.Module,
    loaded: LoadedModel,
    rendered: Sequence[Rendered],
    settings: ScanSettings,
    subspace: str,
    probing: Probing,
    peft_config: Any,
    output: str | Path | None,
    progress: Progress,
) -> _Scored:
    """Probe, direction, engine, measurement: everything that needs the model for every row."""
    tokenizer = loaded.tokenizer
    template = dict(probing.template or {})
    asked = open_turns(tokenizer, probing.requests or requests(), probing.answer_prefix, **template)
    harmless = open_turns(tokenizer, probing.lookalikes or lookalikes(), probing.answer_prefix, **template)
    progress("probing the model", 0, 1)
    valid = validity(model, tokenizer, asked)
    if valid.problem and not probing.uncertified:
        raise ProbeError(valid.problem + "; or pass --uncertified to score it all the same, with nothing certified")
    probe = settings.make_probe()
    probe.fit(model, tokenizer, asked, harmless)
    aggregate = parse_aggregate(settings.aggregate)
    targets = _targets(model, peft_config) if subspace == "targets" else ()
    selector = Fihs(probe, asked, Loop(), aggregate, subspace, targets)
    direction = selector.prepare(model)
    progress("probing the model", 1, 1)
    chosen = pick(settings.engine, model, aggregate.per_token)
    if isinstance(settings.threshold, str):  # a rule that cannot cut is told now, not after the rows are measured
        settings.make_threshold().cut(np.zeros(1), np.zeros(1) if chosen.per_token else None)
    sample = _sample(rendered, settings)
    selector.engine, agreed = _trusted(chosen, selector, model, direction, sample, asked, harmless, loaded.pad_token_id)
    folder = None
    if output is not None:  # nothing was written so far: a scan that cannot begin leaves no folder behind
        work = outputs.prepare(output) / outputs.WORK
        directions.save(direction, work / "direction.safetensors")
        folder = work / "shards"
    raw = shards.measure(
        selector,
        model,
        direction,
        rendered,
        settings.token_budget,
        folder,
        lambda done, total: progress("scoring rows", done, total),
    )
    scores = selector.finish(raw, [row.id for row in rendered], [group(row.shape) for row in rendered])
    return _Scored(selector, direction, scores, agreed, valid)


def _subspace(settings: ScanSettings, model: nn.Module, peft_config: Any) -> str:
    """``auto`` takes the weights that training will change where it is told of an adapter, else all of them."""
    if settings.subspace != "auto":
        return settings.subspace
    return "targets" if peft_config is not None or hasattr(model, "peft_config") else "all"


def _loaded(model: Any, tokenizer: Any) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        found = models.load(model)
        return found if tokenizer is None else replace(found, tokenizer=tokenizer)
    return models.wrap(model, tokenizer)


def _with_template(loaded: LoadedModel) -> LoadedModel:
    """The model with a copy of its tokenizer that has the default chat template, where its own has none; warns then."""
    default = templates.override(loaded.tokenizer, None)
    if default is None:
        return loaded
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.chat_template = default
    return replace(loaded, tokenizer=tokenizer)


def _targets(model: nn.Module, peft_config: Any) -> list[str]:
    with _fits_the_model():
        return target_names(model, peft_config)


@contextmanager
def _adapted(model: nn.Module, peft_config: Any, seed: int) -> Iterator[nn.Module]:
    """`adapted`, with an adapter that does not fit the model as a UsageError."""
    with ExitStack() as stack:
        with _fits_the_model():
            found = stack.enter_context(adapted(model, peft_config, seed))
        yield found


@contextmanager
def _fits_the_model() -> Iterator[None]:
    """Raises UsageError for what PEFT says of an adapter that does not fit."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise UsageError(
            f"the adapter of the PEFT config cannot be put on the model ({type(error).__name__}: {reason}): "
            "mend the file given to --lora-config (peft_config), first of all its target_modules"
        ) from error


def group(shape: str) -> str:
    """Rows of one group share a scale, and are cut together: preference pairs apart from everything else."""
    return "preference" if shape == "preference" else "rows"


def _sample(rendered: Sequence[Rendered], settings: ScanSettings) -> list[Rendered]:
    chosen = np.random.default_rng(settings.seed).permutation(len(rendered))[: settings.check_rows]
    return [rendered[i] for i in sorted(chosen)]


def _trusted(
    engine: Engine,
    selector: Fihs,
    model: nn.Module,
    direction: Direction,
    sample: Sequence[Rendered],
    asked: Prompts,
    harmless: Prompts,
    pad: int,
) -> tuple[Engine, Agreement]:
    """The first engine, from the chosen one to slower ones, whose ranking of a random sample is the oracle's."""
    truth = _measured(Loop(), selector, model, direction, sample)
    selector.finish(truth, [row.id for row in sample], [group(row.shape) for row in sample])  # names what is not finite
    oracle = truth.sums
    slower: list[Engine] = [engine]
    if engine.name == "finite-difference":
        slower[0] = calibrated(model, _calibration(model, asked, harmless, pad), direction)[0]
        slower.append(ENGINES["forward"]())
    if not selector.aggregate.per_token and engine.name != "loop":
        slower.append(Loop())
    found: Agreement | None = None
    for candidate in slower:
        found = agreement(candidate.name, _measured(candidate, selector, model, direction, sample).sums, oracle)
        # Too few rows, or equal ones, have no ranking: then the relative error decides.
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
        f"{found.n} rows, and {LEAST_SPEARMAN} is needed): load the model in float32, or use --aggregate sum --engine loop"
    )


def _measured(
    engine: Engine, selector: Fihs, model: nn.Module, direction: Direction, rows: Sequence[Rendered]
) -> Measured:
    with_engine = copy(selector)
    with_engine.engine = engine
    return shards.measure(with_engine, model, direction, rows, 4096)


def _calibration(model: nn.Module, asked: Prompts, harmless: Prompts, pad: int) -> Any:
    """A small batch to find the finite-difference step on: probes with the model's own answers, whatever the data is."""
    some = [p.take(range(min(8, len(p)))) for p in (asked, harmless)]
    rows: list[Rendered] = []
    for prompts in some:
        for prompt, answer in zip(prompts.ids, greedy(model, prompts, 16, pad), strict=True):
            ids = np.array([*prompt, *(answer or [pad])], dtype=np.int64)
            loss = np.arange(len(ids)) >= len(prompt)
            rows.append(Rendered(len(rows), "", "calibration", (Tokens(ids, loss),)))
    return rows_in.collate(rows)


def _cut(scores: Scores, settings: ScanSettings) -> dict[str, Cut]:
    rule = settings.make_threshold()
    cuts = {}
    for name in sorted(set(scores.shapes)):
        own = np.array([s == name for s in scores.shapes])
        cuts[name] = rule.cut(scores.values[own], None if scores.decoys is None else scores.decoys[own])
    return cuts


def _categories(
    model: nn.Module,
    scored: _Scored,
    gone: Sequence[Rendered],
    removed: Bools,
    settings: ScanSettings,
    progress: Progress,
) -> tuple[str, ...]:
    """The harm each removed row pulls toward: the category whose own direction, at unit length, it follows furthest."""
    selector = scored.selector
    names = sorted(set(selector.requests.categories))
    if not gone or len(names) < 2:
        only = names[0] if len(names) == 1 else ""
        return tuple(only if out else "" for out in removed)
    every = selector.by_category(model)
    pulls = []
    for k, name in enumerate(every.names):
        one = Direction(
            {n: v[k : k + 1] for n, v in every.tensors.items()}, (name,), every.subspace, (every.scales[k],), ""
        )
        raw: Measured = shards.measure(selector, model, one, gone, settings.token_budget)
        tokens = raw.tokens or tuple(np.array([s]) for s in raw.sums)
        pulls.append([selector.aggregate(t) * every.scales[k] for t in tokens])
        progress("naming the harm", k + 1, len(names))
    best = iter(np.argmax(np.array(pulls), axis=0).tolist())
    return tuple(every.names[next(best)] if out else "" for out in removed)


def _weighted(example: Example) -> bool:
    """Whether some assistant turn has weight 0, which TRL does not know."""
    return any(
        message["role"] == "assistant" and not trained
        for conversation in example.conversations
        for message, trained in zip(conversation.messages or (), conversation.trained, strict=False)
    )


def _trainable(by_row: Mapping[int, Example], kept: Sequence[Rendered], source: Any) -> Any:
    """The kept rows for a trainer: the caller's own Dataset where TRL knows its shape, else tokens and labels.

    Rows that no single trainer takes, such as preference pairs among other rows, are given as they came.
    """
    import datasets

    own = [by_row[row.row] for row in kept]
    known = all(e.shape in TRL_SHAPES and not _weighted(e) for e in own)
    if source.kind == "dataset" and known:
        return rows_in.take(own, source)
    try:
        return rows_in.to_trl(own, kept) if kept else datasets.Dataset.from_list([])
    except DataError:
        return rows_in.take(own, source)
