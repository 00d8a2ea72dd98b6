"""All settings that change a scan's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradshield.errors import UsageError
from gradshield.gradients import ENGINES, check_subspace
from gradshield.manifests import Scoring
from gradshield.probes import PROBES, FunctionProbe, Probe
from gradshield.selectors import SELECTORS, check, parse_aggregate
from gradshield.thresholds import Threshold
from gradshield.thresholds import parse as parse_threshold


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
    ``uncertified`` scores a model whose probes are not valid, and marks every output as not certified.
    """

    requests: Sequence[Mapping[str, str]] = ()
    lookalikes: Sequence[Mapping[str, str]] = ()
    answer_prefix: str = ""
    template: Mapping[str, Any] | None = None
    uncertified: bool = False
