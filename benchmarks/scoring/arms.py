"""Our arms: the floor, the oracle, every engine over every subspace, several directions at once.

An arm is made ready outside the clock (adapter on the model, direction loaded, rows in batches) and then run inside it,
again and again. It gives one value for every row and direction, and one per token where it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.scoring.cases import CATEGORIES, KINDS, Case, leading
from gradshield.gradients import ENGINES, SUBSPACES, Engine
from gradshield.gradients.base import DeviceBatch
from gradshield.models.logits import token_nll
from gradshield.types import Batch, Direction, Floats, Rendered

FLOOR = "floor"
GROUPS = ("floor", "ours", "directions", "oracle", "peer")  # in the order of the tables
ORACLE = "loop"
LAST = "last:25%"  # what stands for last:k


@dataclass(frozen=True, eq=False)
class Scored:
    """``values`` is (K, N) in the order of the rows, None where an arm scores nothing; ``tokens`` the N rows' own values.

    ``outside`` are seconds within the run that are not the arm's: a peer that takes the query's gradient itself.
    """

    values: Floats | None
    tokens: Sequence[Floats] | None = None
    outside: float = 0.0


Run = Callable[[], Scored]
Ready = Callable[[Case, Sequence[Rendered]], AbstractContextManager[Run]]


@dataclass(frozen=True, eq=False)
class Arm:
    """``truth`` names the arm that its values are compared with; ``slow`` ones are timed on the case's few rows."""

    name: str
    group: str
    ready: Ready
    truth: str | None = None
    slow: bool = False


def subspaces() -> list[str]:
    """Every subspace that there is, ``last:k`` by its usual share."""
    return [LAST if name == "last:k" else name for name in SUBSPACES]


def ours(case: Case) -> list[Arm]:
    """Every arm of the case that is not a peer's, the floor first."""
    arms = [Arm(FLOOR, "floor", floor)]
    for engine in ENGINES:
        for subspace in subspaces():
            arms.append(
                Arm(
                    f"{engine}/{subspace}",
                    "oracle" if engine == ORACLE else "ours",
                    partial(engine_ready, engine, subspace),
                    f"{ORACLE}/{subspace}",
                    slow=engine == ORACLE,
                )
            )
    for count in (2, CATEGORIES):
        several = partial(directions_ready, "perturbation", count)
        arms.append(Arm(f"perturbation/lora/K={count}", "directions", several, f"{ORACLE}/lora/K={count}"))
    return arms


def truths() -> list[Arm]:
    """Oracles that are run once, untimed: those of several directions."""
    return [
        Arm(f"{ORACLE}/lora/K={n}", "oracle", partial(directions_ready, ORACLE, n), slow=True) for n in (2, CATEGORIES)
    ]


# ---- how each is made ready ------------------------------------------------------------------------------------------


@contextmanager
def floor(case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    """One batched, length-bucketed forward pass with loss: the batches of a scan, logits of response positions only."""
    made = case.batches(rows)

    def run() -> Scored:
        with torch.inference_mode():
            for batch in made:
                data = DeviceBatch.of(batch, case.model)
                token_nll(case.model, data.ids, data.attention, data.loss).double().cpu()
        return Scored(None)

    yield run


@contextmanager
def engine_ready(engine: str, subspace: str, case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    """An engine along ∇S of a subspace; finite differences with the step that was found for it, as in a scan."""
    chosen = ENGINES[engine]()
    step = case.step(subspace)
    if hasattr(chosen, "relative_step") and step is not None:
        chosen.relative_step = step
    with case.carrying(subspace) as model:
        yield partial(_directional, chosen, model, case.direction(subspace), case.batches(rows), rows)


@contextmanager
def directions_ready(engine: str, count: int, case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    """Several harm categories at once, over the adapter."""
    with case.carrying("lora") as model:
        some = leading(case.direction(KINDS), count)
        yield partial(_directional, ENGINES[engine](), model, some, case.batches(rows), rows)


def _directional(
    engine: Engine, model: nn.Module, direction: Direction, made: Sequence[Batch], rows: Sequence[Rendered]
) -> Scored:
    place = {row.row: n for n, row in enumerate(rows)}
    values = np.zeros((len(direction.names), len(rows)))
    tokens: list[list[Floats]] = [[] for _ in rows]
    for batch in made:
        found = engine.directional(model, batch, direction).values.numpy()  # (K, B) or (K, B, T)
        where = [place[int(row)] for row in batch.rows]
        sums = found.sum(2) if engine.per_token else found
        np.add.at(values, (slice(None), where), sums * batch.coefficients)
        if engine.per_token:
            for b, n in enumerate(where):
                tokens[n].append(batch.coefficients[b] * found[0, b][batch.loss[b]])
    return Scored(values, [np.concatenate(parts) for parts in tokens] if engine.per_token else None)
