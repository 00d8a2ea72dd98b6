"""One fine-tuning job under any defence: which rows train, the defence's part in training, and the trained model.

    job ──scored──▶ Chosen ──dataset──▶ tokens and labels ──fit──▶ Fitted

What several defences of one job share is computed once: scores, reference rows, the alignment direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from gradshield import data as rows_in
from gradshield import lab
from gradshield.errors import DataError, EmptyDataError, UsageError
from gradshield.gradients.alignment import Alignment, alignment
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.options import asked
from gradshield.runs import digest, versions
from gradshield.scanning.decide import PREFERENCE, Decision, caught_and_lost, decide, reviewed
from gradshield.scanning.outputs import words
from gradshield.scanning.preparing import Scored, asked_of, refusals, scored_model, weights_changed
from gradshield.scanning.rows import Prepared, load, prepare
from gradshield.scanning.scoring import score
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.selectors import ONLINE
from gradshield.training import PENALTIES
from gradshield.training.defences import Defence
from gradshield.types import Bools, Cut, Floats, Progress, Rendered, quiet

# Options that rendering has already applied: the rows carry their mask and are truncated.
RENDERED = {
    *("max_length", "truncation_mode", "dataset_text_field", "eos_token", "assistant_only_loss", "completion_only_loss")
}
JUDGED = {PREFERENCE, "kto"}  # shapes of rows with an answer that training moves away from
POOL = 32  # safety references for methods that use all of them in every step


@dataclass(frozen=True, eq=False)
class Needs:
    """What some defences need in addition to the model and the rows.

    ``base`` is the model before its alignment, for ``asft`` and ``safelora``; ``origin`` is the aligned model, if training starts
    from a later one: the alignment direction is ``origin`` minus ``base``. ``safety_rows`` (a file or a list) are for
    ``safeinstruct`` and ``dualselect``; without any, the model's own refusals of the probes are used.
    """

    base: Any = None
    origin: Any = None
    safety_rows: Any = ()

    def loaded(self, progress: Progress = quiet) -> Needs:
        """The same, with its models loaded."""
        named = (self.base, self.origin)
        base, origin = (None if model is None else load(model, progress=progress) for model in named)
        return replace(self, base=base, origin=origin)


@dataclass(frozen=True, eq=False)
class Job:
    """The model, rows and options of a training, the same for every defence.

    ``options`` go to TRL's ``SFTConfig``, or to ``DPOConfig`` where the rows are preference pairs. The models of ``needs`` are
    loaded. ``labels`` (1 = harmful, per input row) are used by the oracle and the figures only. Rows with an id in ``allow``
    train, whatever they score.
    """

    rows: Prepared
    options: Mapping[str, Any]
    peft_config: Any = None
    needs: Needs = field(default_factory=Needs)
    labels: Sequence[int] | None = None
    settings: ScanSettings = field(default_factory=ScanSettings)
    probing: Probing = field(default_factory=Probing)
    allow: frozenset[str] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for an adapter on the model, and for rows that no trainer here takes."""
        if self.rows.loaded.is_peft:
            raise UsageError(
                "the model already has an adapter, and training would add another: give the plain model, or merge the adapter "
                "first (gradshield train --merge saves such a model)"
            )
        method_of(self.rows.read)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The rows that train under a defence: ``removed`` is aligned with ``rows``, ``dropped_tokens`` counts masked loss tokens."""

    rows: tuple[Rendered, ...]
    removed: Bools
    cuts: Mapping[str, Cut]
    scored: Scored | None = None
    dropped_tokens: int = 0


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained model, its adapter merged if requested, the defence's record of the training, and the tokens of all its steps."""

    model: Any
    record: Mapping[str, Any]
    tokens: int


class Course:
    """A job, with the results that its defences share. Raises UsageError if TRL is not installed."""

    def __init__(self, job: Job, progress: Progress = quiet) -> None:
        require_trl()
        self.job, self.progress = job, progress
        self._scored: dict[str, Scored] = {}

    @property
    def loaded(self) -> LoadedModel:
        """The model before training."""
        return self.job.rows.loaded

    @property
    def _options(self) -> dict[str, Any]:
        """The options without those that rendering has applied."""
        return {k: v for k, v in self.job.options.items() if k not in RENDERED}

    @cached_property
    def _safety(self) -> rows_in.ReadResult:
        loaded, given = self.loaded, self.job.needs.safety_rows
        if not given:
            given = refusals(loaded, asked_of(loaded.tokenizer, self.job.probing)[0])
        if not given:
            raise UsageError(
                "the model refuses none of the probes, so there are no safety rows: give your own with --safety-rows"
            )
        return rows_in.read(str(given) if isinstance(given, str | Path) else list(given))

    @cached_property
    def safety(self) -> tuple[Rendered, ...]:
        """Safety rows as tokens: the given ones, else the model's own complete refusals of the probes."""
        read = self._safety
        found = rows_in.render_all(read.examples, self.loaded.tokenizer, self.job.rows.config, read.source).rendered
        if not found or any(row.shape in JUDGED for row in found):
            raise DataError(
                f"the safety rows {read.source.name} hold preference pairs, answers with a label, or no usable row: give "
                "requests with refusals, as chat rows or prompt and completion"
            )
        return tuple(found)

    @cached_property
    def alignment(self) -> Alignment:
        """Aligned minus base, for every weight that the training's adapter changes."""
        model = self.loaded.model
        names = weights_changed(model, self.job.peft_config, saved=False) or _linear(model)
        return alignment((self.job.needs.origin or self.loaded).model, self.job.needs.base.model, names)

    def scored(self, selector: str) -> Scored:
        """Every row's score by a selector, computed once."""
        if selector not in self._scored:
            job = self.job
            settings = replace(job.settings, selector=selector, threshold=None)
            with scored_model(self.loaded, settings, job.peft_config) as (model, targets, _):
                self._scored[selector] = score(model, job.rows, settings, job.probing, targets, None, self.progress)
        return self._scored[selector]

    def know(self, selector: str, scored: Scored) -> None:
        """Use scores that were measured elsewhere."""
        self._scored[selector] = scored

    def settings(self, defence: Defence) -> ScanSettings:
        """The job's scan settings, with the defence's selector and threshold if it names them."""
        named: dict[str, Any] = {"selector": defence.selector, "threshold": None if defence.like else defence.threshold}
        return replace(self.job.settings, **{name: value for name, value in named.items() if value is not None})

    def decision(self, defence: Defence) -> tuple[Scored, Decision]:
        """The scores of the defence's selector, and the defence's cut."""
        assert defence.selector is not None
        scored = self.scored(defence.selector)
        if defence.like is not None:
            return scored, self._as_many(scored, defence.like)
        return scored, decide(scored.scores, self.settings(defence).make_threshold(), self.job.allow)

    def _as_many(self, scored: Scored, other: Defence) -> Decision:
        """A cut that removes as many rows as another defence, or fewer if scores at the cut are tied."""
        if other.verified is not None or other.mask or (other.selector is None and not other.oracle):
            raise UsageError(
                f"'as:{other.spec}' needs the number of rows that {other.spec!r} removes, which is not known before training: "
                "name a defence that removes rows by a cut"
            )
        count, values = int(self.chosen(other).removed.sum()), scored.scores.values
        cut = Cut(float(np.sort(values)[::-1][count]) if count < len(values) else -np.inf, f"as {other.spec}")
        return Decision(dict.fromkeys(sorted(set(scored.scores.shapes)), cut), values > cut.value, ())

    def chosen(self, defence: Defence, cut: float | None = None) -> Chosen:
        """The rows that train; ``cut`` replaces the threshold's. Raises EmptyDataError if none is left."""
        defence.require(self.job.needs.base, self.job.labels)
        rows = tuple(self.job.rows.rendered)
        if defence.oracle:
            return _left(Chosen(rows, self._harmful(), {}))
        if defence.selector is None:
            return Chosen(rows, np.zeros(len(rows), dtype=bool), {})
        scored, decision = self.decision(defence)
        cuts, removed = decision.cuts, decision.removed
        if cut is not None:
            cuts = {name: Cut(cut, "verified") for name in cuts}
            removed = reviewed(scored.scores, cuts, self.job.allow).removed
        if not defence.mask:
            return _left(Chosen(rows, removed, cuts, scored))
        aggregate = getattr(scored.selector, "aggregate", None)
        if aggregate is None or scored.scores.tokens is None:
            raise UsageError(
                "token-mask needs a score for every token, and the engine gives none: use --engine auto, "
                "finite-difference or forward"
            )
        limits = np.array([cuts[name].value for name in scored.scores.shapes])
        kept = [
            masked(row, values, limit, aggregate) if out else row
            for row, values, limit, out in zip(rows, scored.scores.tokens, limits, removed, strict=True)
        ]
        lost = sum(_counted(a) - _counted(b) for a, b in zip(rows, kept, strict=True))
        empty = np.array([_counted(row) == 0 for row in kept])
        return _left(Chosen(tuple(kept), empty, cuts, scored, lost))

    def drawn(self, count: int) -> Chosen:
        """The rows without ``count`` of them, drawn at random by content and seed."""
        values = self.scored("random").scores.values
        removed = np.zeros(len(values), dtype=bool)
        removed[np.argsort(values, kind="stable")[len(values) - count :]] = True
        return Chosen(tuple(self.job.rows.rendered), removed, {})

    def beyond(self, chosen: Chosen) -> Bools:
        """Rows whose score is beyond their cut: the removed ones, or with a mask those that lost tokens."""
        if chosen.scored is None:
            return chosen.removed
        return reviewed(chosen.scored.scores, chosen.cuts, self.job.allow).removed

    def counts(self, chosen: Chosen) -> dict[str, Any]:
        """Rows, removed rows and dropped tokens, and with labels the rates caught and lost. JSON-able."""
        removed = chosen.removed
        found = {"rows": len(chosen.rows), "removed": int(removed.sum()), "dropped_tokens": chosen.dropped_tokens}
        return found if self.job.labels is None else found | caught_and_lost(removed, self._harmful())

    def _harmful(self) -> Bools:
        labels = self.job.labels
        assert labels is not None
        return np.array([bool(labels[row.row]) for row in self.job.rows.rendered])

    def dataset(self, defence: Defence, chosen: Chosen) -> list[dict[str, list[int]]]:
        """Tokens and labels of every row that trains, in input order, with safety rows spread among them.

        Raises UsageError for a defence that does not work on these rows.
        """
        method_of(self.job.rows.read, defence)
        rows = _as_tokens([row for row, out in zip(chosen.rows, chosen.removed, strict=True) if not out])
        if defence.safe_share:
            count = max(1, round(defence.safe_share * len(rows)))
            pool = _as_tokens(self.safety)
            places = np.linspace(0, len(rows), count, endpoint=False).astype(int)[::-1]
            for number, place in enumerate(places):
                rows.insert(int(place), pool[number % len(pool)])
        return rows

    def fit(
        self,
        defence: Defence,
        dataset: Sequence[Mapping[str, Any]],
        stage: str = "training",
        merge: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
        output_dir: str | None = None,
        resume: bool = False,
    ) -> Fitted:
        """A trained copy of the model."""
        from gradshield.training import safelora
        from gradshield.training.fit import fit

        defence.require(self.job.needs.base, self.job.labels)
        followed = Followed(lambda step, total: self.progress(stage, step, total))
        given = {"alignment": lambda: self.alignment, "references": self._pool, "seed": lambda: self.job.seed}

        def made(kind: Any, options: Mapping[str, Any]) -> Any:
            return kind(**asked(kind, given), **options)

        penalties = [made(PENALTIES[name], options) for name, options in defence.penalties]
        online = made(ONLINE[defence.online[0]], defence.online[1]) if defence.online is not None else None
        record: dict[str, Any] = {}

        def finish(model: Any) -> None:
            if defence.project is not None:
                start: Any = self.loaded.model if self.job.peft_config is None else None
                record["safelora"] = asdict(safelora.project(model, self.alignment, start=start, **defence.project))

        model: Any = self.loaded.model
        trained = fit(
            model,
            self.loaded.tokenizer,
            dataset,
            self._options | {"max_length": None},
            self.job.peft_config,
            seed=self.job.seed,
            merge=merge and self.job.peft_config is not None,
            output_dir=output_dir,
            callbacks=[*callbacks, followed],
            penalties=penalties,
            online=online,
            finish=finish,
            resume=resume,
        )
        acting = [*penalties, *([online] if online is not None else [])]
        return Fitted(trained, record | {one.name: dict(one.record()) for one in acting}, followed.tokens)

    def _pool(self) -> list[Rendered]:
        """``POOL`` safety references, evenly spaced over the safety rows."""
        places = np.unique(np.linspace(0, len(self.safety) - 1, POOL).round().astype(int))
        return [self.safety[i] for i in places]

    def safety_digest(self, defence: Defence) -> str | None:
        """A hash of the safety rows as tokens; None for a defence that does not use them."""
        return digest(_as_tokens(self.safety)) if defence.safety else None

    def safety_requests(self, defence: Defence) -> list[dict[str, str]]:
        """The requests of the given safety rows, a ``prompt`` each; empty for a defence that does not use them."""
        if not self.job.needs.safety_rows or not defence.safety:
            return []
        return [{"prompt": words(example, self.loaded.tokenizer)[0]} for example in self._safety.examples]

    def key(self, defence: Defence, dataset: Sequence[Mapping[str, Any]]) -> str:
        """A hash of everything that the trained model depends on: start, rows, training, seed, chat template and versions.

        Two defences may share it.
        """
        job, loaded = self.job, self.loaded
        base = [m.digest for m in (job.needs.base, job.needs.origin) if m is not None] if defence.needs_base else None
        safety = _as_tokens(self._pool()) if defence.refers else None
        peft = None if job.peft_config is None else job.peft_config.to_dict()
        start = [loaded.digest, str(loaded.dtype), loaded.source and loaded.source.quantize]
        whole = [start, base, dataset, self._options, peft, job.seed, defence.training, safety]
        return digest([*whole, getattr(loaded.tokenizer, "chat_template", None), versions()])[:24]


class Followed(TrainerCallback):  # type: ignore[misc]
    """Reports the steps done and all steps, first with 0; ``tokens`` are those of all, before a resumption too, no padding."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress, self.tokens = progress, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    on_step_end = on_train_begin  # both say how far it is

    def on_train_end(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.tokens = state.num_input_tokens_seen


def require_trl() -> None:
    """Raises UsageError if TRL is not installed, without importing it, which takes seconds."""
    if find_spec("trl") is None:
        raise UsageError("training needs TRL, which is not installed: run pip install 'gradshield[train]'")


def method_of(read: rows_in.ReadResult, defence: Defence | None = None) -> str:
    """The method that rows are trained with: ``dpo`` for preference pairs, else ``supervised``.

    Raises UsageError for rows that no trainer here takes, and for a defence with a part that does not work on pairs.
    """
    shapes = set(read.examples.shapes.counts())
    if "kto" in shapes:
        raise UsageError(
            f"{read.source.name} holds answers with a label, all of which supervised training would move toward: scan them "
            "and train on the kept rows with TRL's KTOTrainer, or give --format prompt-completion if the label means nothing"
        )
    if PREFERENCE not in shapes:
        return "supervised"
    if len(shapes) > 1:
        raise UsageError(
            f"{read.source.name} mixes preference pairs with other rows, which no trainer takes together: put them in "
            "separate files"
        )
    if defence is not None and (part := defence.single):
        raise UsageError(
            f"{read.source.name} holds preference pairs, which are trained with DPO, and the defence {defence.spec!r} has "
            f"{part}, which works on single answers only: leave it out"
        )
    return "dpo"


def _left(chosen: Chosen) -> Chosen:
    if chosen.removed.all():
        raise EmptyDataError("the defence leaves no row to train on: loosen its threshold, or give more data")
    return chosen


def _linear(model: Any) -> list[str]:
    """Names of the weights of linear layers, which full training changes; without the head, which may be tied."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def masked(row: Rendered, values: Floats, cut: float, aggregate: Callable[[Floats], float]) -> Rendered:
    """The row with the fewest highest-scoring loss tokens masked that bring its score down to the cut.

    ``values`` (n,) are the FIHS of the row's loss tokens in order, ``aggregate`` scores those that remain. If no number of tokens
    suffices, all are masked.
    """
    kept = np.ones(len(values), dtype=bool)
    for t in np.argsort(-values, kind="stable"):
        if aggregate(values[kept]) <= cut:
            break
        kept[t] = False
        if not kept.any():
            break
    sequences, start = [], 0
    for tokens in row.sequences:
        places = np.flatnonzero(tokens.loss)
        loss = tokens.loss.copy()
        loss[places[~kept[start : start + len(places)]]] = False
        sequences.append(replace(tokens, loss=loss))
        start += len(places)
    return replace(row, sequences=tuple(sequences))


def _counted(row: Rendered) -> int:
    return sum(int(tokens.loss.sum()) for tokens in row.sequences)


def _as_tokens(rows: Sequence[Rendered]) -> list[dict[str, list[int]]]:
    return [rows_in.labelled(row) for row in rows]


# ---- a job on the bundled lab: its models, recipe, adapter and requests ----------------------------------------------


@lru_cache(maxsize=2)
def lab_model(name: str) -> LoadedModel:
    """The checkpoint ``base`` or ``aligned``, loaded once; training uses a copy."""
    return loading.load(lab.checkpoint(name), dtype="float32")


def lab_probing() -> Probing:
    """The lab's own requests and look-alikes, the only ones its model knows."""
    return Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))


def lab_job(
    task: str,
    data: Any,
    labels: Sequence[int] | None,
    seed: int,
    training: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> Job:
    """Rows of ``task``, trained by the lab's recipe; ``training`` and ``lora`` override its options."""
    options = {**lab.recipe(task), **(training or {})}
    answers = {"max_length": options.get("max_length"), "assistant_only_loss": None}
    return Job(
        rows=prepare(data, lab_model("aligned"), training_args=answers),
        options=options,
        peft_config=peft_config({**lab.LORA, **(lora or {})}),
        needs=Needs(base=lab_model("base")),
        labels=labels,
        settings=ScanSettings(seed=seed),
        probing=lab_probing(),
        seed=seed,
    )
