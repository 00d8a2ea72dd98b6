"""All settings that change a scan's numbers, and what the options of a training mean for it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

from gradshield.data import RenderConfig
from gradshield.data.trl import check_names
from gradshield.errors import DataError, UsageError, did_you_mean
from gradshield.gradients import ENGINES, check_subspace
from gradshield.manifests import Scoring
from gradshield.models.modules import learned_positions
from gradshield.probes import PROBES, FunctionProbe, Probe, alike, lookalikes, requests
from gradshield.scanning.decide import PREFERENCE
from gradshield.selectors import SELECTORS, check, parse_aggregate
from gradshield.thresholds import Threshold
from gradshield.thresholds import parse as parse_threshold

DEFAULT_MAX_LENGTH = 1024  # TRL's own default
_SFT_TYPES: dict[str, tuple[type, ...]] = {
    "max_length": (int, type(None)),
    "truncation_mode": (str,),
    "assistant_only_loss": (bool, type(None)),
    "completion_only_loss": (bool, type(None)),
    "dataset_text_field": (str,),
    "eos_token": (str, type(None)),
    "packing": (bool,),
    "chat_template_path": (str, type(None)),
}
_ALIKE = 0.75  # similarity from which a name counts as a misspelt option; no other TRL option is that close


@dataclass(frozen=True)
class ScanSettings:
    """How rows are scored and cut. The defaults are one choice for all data; docs/methods.md explains it.

    ``selector``      a name of SELECTORS, with its options as typed (``larf``, ``larf:opening``, ``guard:llm:MODEL@URL``)
    ``probe``         a name of PROBES, a Probe, or a function of (model, PromptBatch) to a scalar
    ``aggregate``     from a row's tokens to its score (AGGREGATES)
    ``subspace``      all, targets, lora, last:k (SUBSPACES)
    ``engine``        a name of ENGINES, or auto
    ``threshold``     a rule with its options as typed (``anchored:0.8``), or a Threshold; None is the selector's default
    ``seed``          for the adapter's initialisation, the oracle's sample and the mixture's start
    ``token_budget``  positions in one batch, padding included
    ``check_rows``    rows that are scored again by the oracle
    """

    probe: str | Probe | Callable[..., Any] = "token_gap"
    aggregate: str = "push"
    subspace: str = "all"
    engine: str = "auto"
    threshold: str | Threshold | None = None
    seed: int = 0
    token_budget: int = 4096
    check_rows: int = 16
    selector: str = "screen"

    def __post_init__(self) -> None:
        """Raises UsageError for invalid settings, before a model is loaded."""
        check(self.selector)
        parse_aggregate(self.aggregate)
        if isinstance(self.probe, str):
            PROBES[self.probe]
        if self.engine != "auto":
            ENGINES[self.engine]
        check_subspace(self.subspace)
        self.make_threshold()
        for name, least in (("token_budget", 16), ("check_rows", 3), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name} is {getattr(self, name)}, and it must be at least {least}: give a larger number"
                )

    def make_probe(self) -> Probe:
        """A fresh probe, not yet fitted to a model."""
        if isinstance(self.probe, str):
            return PROBES[self.probe]()
        return self.probe if hasattr(self.probe, "fit") else FunctionProbe(self.probe)  # type: ignore[return-value, arg-type]

    def make_threshold(self) -> Threshold:
        """The rule that cuts."""
        if self.threshold is not None and not isinstance(self.threshold, str):
            return self.threshold
        return parse_threshold(self.threshold or self.rule, self.seed)

    @property
    def rule(self) -> str:
        """The threshold as typed, by default the selector's."""
        if self.threshold is None:
            return SELECTORS[self.selector.partition(":")[0]].rule
        return self.threshold if isinstance(self.threshold, str) else self.threshold.name

    def record(self) -> Scoring:
        """For the manifest."""
        probe = self.probe if isinstance(self.probe, str) else self.make_probe().name
        return Scoring(**{**vars(self), "probe": probe, "threshold": self.rule})


@dataclass(frozen=True)
class Probing:
    """The probe requests that S is taken on, their harmless look-alikes, and how a turn is opened.

    ``answer_prefix`` starts every probed answer (a closed thinking block); ``template`` holds arguments of the chat template.
    ``uncertified`` scores a model whose probes are not valid, or are look-alikes too, and marks every output as not certified.
    """

    requests: Sequence[Mapping[str, str]] = ()
    lookalikes: Sequence[Mapping[str, str]] = ()
    answer_prefix: str = ""
    template: Mapping[str, Any] | None = None
    uncertified: bool = False

    def __post_init__(self) -> None:
        if self.uncertified or not (self.requests or self.lookalikes):
            return
        harmful, harmless = (
            {alike(row["prompt"]) for row in rows if isinstance(row, Mapping) and isinstance(row.get("prompt"), str)}
            for rows in (self.requests or requests(), self.lookalikes or lookalikes())
        )
        if both := len(harmful & harmless):
            raise UsageError(
                f"{both:,} {'request is' if both == 1 else 'requests are'} among both the probes and the look-alikes, and "
                "look-alikes are harmless: give --lookalikes requests that the model should answer, or pass --uncertified"
            )


def peft_config(options: Mapping[str, Any]) -> Any:
    """The PEFT config of the adapter that training will add; None without options. Raises UsageError for a bad one."""
    if not options:
        return None
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    kinds: dict[str, Any] = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(str(options.get("peft_type", "LORA")).upper())
    if kind is not None and "peft_version" not in options:  # a file written by PEFT may be from another version
        known = [f.name for f in fields(kind)]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f"see the fields of peft.{kind.__name__}"
                raise UsageError(f"the config of the adapter has the unknown option {name!r}: {hint}")
    try:
        return PeftConfig.from_peft_type(  # type: ignore[no-untyped-call]
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", **options}
        )
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"--lora-config is not a PEFT config ({error}): give the adapter_config.json of a PEFT adapter, or its options"
        ) from None


def trl_options(options: Any) -> Any:
    """The training options that change what is scored, as an object like ``SFTConfig`` or ``DPOConfig``; None without any.

    An object is returned as it is. Unlike that of an ``SFTConfig``, ``assistant_only_loss`` may be None: only response tokens
    count, whatever the template.

    Raises UsageError for an option that does not exist, or of the wrong type.
    """
    if not isinstance(options, Mapping):
        return options
    _check_names(options)
    for name, kinds in _SFT_TYPES.items():
        if name in options and type(options[name]) not in kinds:
            allowed = " or ".join({type(None): "null", bool: "true or false"}.get(k, k.__name__) for k in kinds)
            raise UsageError(f"the training config's {name} is {options[name]!r}, and it takes {allowed}: fix the file")
    return SimpleNamespace(**options) if options else None


def check_trainer(options: Any, shapes: Collection[str]) -> None:
    """Raises UsageError for an option of `trl_options` that the trainer of rows of these shapes does not have."""
    if isinstance(options, SimpleNamespace):
        pairs = PREFERENCE in shapes
        given = [name for name, value in vars(options).items() if value is not None]
        with suppress(ImportError):  # then close names were checked
            check_names(given, None if pairs and len(shapes) > 1 else pairs)


def _check_names(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a misspelt option, which would silently change the tokens that are scored.

    TRL, which knows all names, takes seconds to import and may not be installed: then only names close to an option that is
    read are reported.
    """
    others = {name: value for name, value in options.items() if name not in _SFT_TYPES}
    if not others:
        return
    try:
        check_names(others)
    except ImportError:
        for name in others:
            near = difflib.get_close_matches(name, _SFT_TYPES, n=1, cutoff=_ALIKE)
            if near:
                raise UsageError(
                    f"unknown training option {name!r}: did you mean {near[0]!r}? "
                    "(to have every name checked, install gradshield[train])"
                ) from None


def render_config(training_args: Any, limit: int | None, template: Mapping[str, Any]) -> RenderConfig:
    """How rows become tokens: as in the given training, else response tokens only, cut at 1,024 tokens.

    ``limit`` is the number of positions of the model.
    """
    if training_args is None:
        longest = min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
        return RenderConfig(max_length=longest, chat_template_kwargs=dict(template))
    config = RenderConfig.from_trl(training_args)
    return replace(config, chat_template_kwargs={**config.chat_template_kwargs, **template})


def check_positions(model: Any, longest: int, limit: int | None) -> None:
    """Raises DataError if the longest row has more tokens than the model has learned positions (GPT-2, OPT).

    Rotary positions have no limit: rows longer than what the model was made for are warned of.
    """
    if limit is None or longest <= limit:
        return
    remedy = f"give --max-length {limit}, or a training config with that max_length"
    if learned_positions(model):
        raise DataError(f"a row has {longest} tokens, and the model has positions for {limit}: {remedy}")
    warnings.warn(
        f"a row has {longest} tokens, and the model was trained on {limit} positions, beyond which its gradients say little: "
        f"{remedy}",
        stacklevel=2,
    )
