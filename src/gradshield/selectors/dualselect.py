"""DualSelect: safety references and task rows selected together, step by step, during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from gradshield.data import collate
from gradshield.errors import UsageError
from gradshield.gradients import Engine, pick
from gradshield.gradients.base import DeviceBatch, gradient, norm, scoring
from gradshield.models.logits import logits_at, predicting
from gradshield.models.modules import in_float64
from gradshield.options import Option, check
from gradshield.selectors.base import ONLINE, trainable
from gradshield.types import Batch, Bools, Direction, Floats, Rendered

_ENTRIES = 1024  # most likely tokens whose log-probability under θ0 is kept per position; the rest is one entry
_ROUNDING = 1e-5  # a preservation gradient below this share of the task gradient's norm is rounding (1e-7 at θ0)


@ONLINE.register("dualselect")
class DualSelect:
    """Selects the safety references that training endangers most, and drops the task rows that pull against them.

    Paper: arXiv 2606.09866. Equation: w = softmax((a KL_i/max KL - (1 - a) cos(∇KL_i, ∇L_task))/τ), the k largest kept;
    r = ∇Σ w_i KL_i; a row stays unless <∇L_row, r> < 0; g <- g - <g, r>/<r, r> r where <g, r> < 0.
    Departures: it follows the paper's abstract; the rest is our choice. KL(θ0 ‖ θ) is the mean over a reference's answer
    tokens, taken over θ0's 1,024 most likely tokens and all others as one. Preservation is divided by its largest value in the
    pool, since a cosine is bounded and a KL is not; ``weight`` a = 0.5 and ``temperature`` τ = 0.1 were not tuned. r is the
    gradient of the weighted KL over the trainable parameters, kept until the next refresh; rows and the correction are
    compared with it at the current weights. The task gradient of a refresh is that of the candidate batch's mean token loss.
    Steps are counted in batches. Everything is measured in evaluation mode. At most a share ``drop`` of a batch is dropped:
    with 1.0, a task whose harmless rows also pull against the references is hardly learned, and the remaining rows agree with
    r, so that there is little to correct. A batch without a compatible row keeps its best one. After a resume the warm-up is
    not repeated, and r is recomputed at the first batch. In distributed training (torch.distributed) the task gradient is
    averaged over the processes, and all share one r.
    """

    name = "dualselect"

    def __init__(
        self,
        references: Sequence[Rendered],
        warmup: Annotated[int, Option(int, least=0)] = 10,
        refresh: Annotated[int, Option(int, least=1)] = 10,
        temperature: Annotated[float, Option(above=0)] = 0.1,
        top: Annotated[int, Option(int, least=1)] = 8,
        weight: Annotated[float, Option(least=0, most=1)] = 0.5,
        drop: Annotated[float, Option(least=0, most=1)] = 0.5,
        correction: bool = True,
        engine: Engine | None = None,
    ) -> None:
        """``references`` are harmful requests with the model's own refusals. No row is dropped in the first ``warmup`` batches;
        after that the direction is recomputed every ``refresh`` batches from the ``top`` references of largest weight.
        ``drop`` is the largest share of a batch to drop, the least compatible rows first. ``engine`` computes the
        compatibilities; None lets `gradients.pick` choose.

        Raises UsageError for a value out of range, or references without a loss token.
        """
        numbers = {
            "warmup": warmup,
            "refresh": refresh,
            "temperature": temperature,
            "top": top,
            "weight": weight,
            "drop": drop,
        }
        check(DualSelect, **numbers)
        counted = [any(tokens.loss.any() for tokens in row.sequences) for row in references]
        if not counted or not all(counted):
            raise UsageError(
                f"dualselect got {len(counted)} references, {sum(counted)} of them with a loss token: give at least one "
                "harmful request with the model's own refusal, the loss over the refusal"
            )
        self.references = list(references)
        self.warmup, self.refresh, self.temperature, self.top = warmup, refresh, temperature, top
        self.weight, self.drop, self.correction, self.engine = weight, drop, correction, engine
        self._settings = {**numbers, "correction": correction}
        self.position = 0  # index of the next batch of the training; a trainer that resumes sets it
        self._start: list[Callable[[nn.Module], Tensor]] = []
        self._direction: Direction | None = None
        self._counts = dict.fromkeys(("batches", "rows", "dropped", "refreshes", "steps", "corrections"), 0)
        self._refreshed: list[dict[str, float]] = []

    @property
    def least(self) -> int:
        """The smallest batch from which one row may be dropped."""
        return max(2, math.ceil(1 / self.drop - 1e-9)) if self.drop > 0 else 1

    def begin(self, model: nn.Module) -> None:
        """Record θ0's log-probabilities on the references, and reset the state of an earlier run."""
        self.position, self._direction, self._refreshed = 0, None, []
        self._counts = dict.fromkeys(self._counts, 0)
        with scoring(model), torch.no_grad():
            self._start = [_preservation(model, collate([row])) for row in self.references]

    def choose(self, model: nn.Module, batch: Batch) -> Bools:
        """Which rows of the batch train: all in the warm-up, later those that do not raise the preservation loss.

        Raises UsageError before `begin`.
        """
        if not self._start:
            raise UsageError("dualselect got choose() before begin(): call begin(model) before the first step")
        since = self.position - self.warmup
        rows = np.unique(batch.rows)
        self.position += 1
        self._counts["batches"] += 1
        self._counts["rows"] += len(rows)
        if since < 0:
            return np.ones(len(rows), dtype=np.bool_)
        if since % self.refresh == 0 or not self._refreshed:
            self._direction = self._induced(model, batch)
        if self._direction is None or self.drop == 0:
            return np.ones(len(rows), dtype=np.bool_)
        keep = kept(self.compatibility(model, batch), self.drop)
        self._counts["dropped"] += int((~keep).sum())
        return keep

    def compatibility(self, model: nn.Module, batch: Batch) -> Floats:
        """<∇L_row, r> at the current weights, by row in ascending order: below zero, a step on the row raises the preservation
        loss. Zeros without a direction."""
        rows = np.unique(batch.rows)
        if self._direction is None:
            return np.zeros(len(rows))
        engine = self.engine or pick("auto", model, per_token=False)
        found = engine.directional(model, batch, self._direction).values[0]
        values = -(found.sum(-1) if found.dim() == 2 else found).numpy() * batch.coefficients
        return np.array([float(values[batch.rows == row].sum()) for row in rows])

    def correct(self, model: nn.Module) -> None:
        """Remove from ``.grad`` the component that would raise the preservation loss, if the two conflict."""
        self._counts["steps"] += 1
        if self._direction is None or not self.correction:
            return
        pairs = [
            (p.grad, self._direction.tensors[name][0].to(p.grad.device, p.grad.dtype))
            for name, p in model.named_parameters()
            if p.grad is not None and name in self._direction.tensors
        ]
        size = sum(_dot(r, r) for _, r in pairs)
        along = sum(_dot(g, r) for g, r in pairs)
        if along >= 0 or size <= 0:
            return
        self._counts["corrections"] += 1
        with torch.no_grad():
            for g, r in pairs:
                g.sub_(r, alpha=along / size)

    def record(self) -> Mapping[str, Any]:
        """The settings and counts. ``conflict`` is the mean over refreshes of the pool's mean negative cosine with the task
        gradient, ``preservation`` that of its mean KL in nats; None before the first refresh. Counts and means cover this
        process only, not a training that was stopped before a resume."""
        means = {
            name: float(np.mean([entry[name] for entry in self._refreshed])) if self._refreshed else None
            for name in ("conflict", "preservation")
        }
        return {
            "name": self.name,
            **self._settings,
            "engine": self.engine.name if self.engine else "auto",
            "references": len(self.references),
            **self._counts,
            **means,
        }

    def _induced(self, model: nn.Module, batch: Batch) -> Direction | None:
        """r, the gradient of the chosen references' weighted preservation loss; None if it vanishes, as at θ0.

        The same in every process: correcting averaged gradients by different r would let the models diverge.
        """
        with scoring(model, trainable(model)) as parameters, torch.enable_grad():
            task = _averaged(gradient(_mean_loss(model, batch), parameters), parameters)
            losses, cosines = [], []
            for start in self._start:
                loss = start(model)
                losses.append(float(loss.detach()))
                cosines.append(_cosine(gradient(loss, parameters), task))
            weights = reference_weights(losses, cosines, self.weight, self.temperature, self.top)
            r = {name: torch.zeros_like(p) for name, p in parameters.items()}
            for start, w in zip(self._start, weights.tolist(), strict=True):
                if w > 0:
                    for name, g in gradient(start(model), parameters).items():
                        r[name].add_(g, alpha=w)
            r = _averaged(r, parameters)
            theta = norm(parameters.values())
        self._counts["refreshes"] += 1
        self._refreshed.append({"conflict": -float(np.mean(cosines)), "preservation": float(np.mean(losses))})
        size = norm(r.values())
        if not _ROUNDING * norm(task.values()) < size < float("inf"):
            return None
        tensors = {name: g.unsqueeze(0) for name, g in r.items() if bool(g.any())}
        return Direction(tensors, ("preservation",), (theta / size,), "")


def reference_weights(
    losses: Sequence[float], cosines: Sequence[float], weight: float, temperature: float, top: int
) -> Floats:
    """The weight of each reference, summing to one, zero outside the ``top`` largest (R,).

    The maximum over the simplex of Σ w_i s_i + temperature · entropy(w) is softmax(s / temperature); s_i is ``weight`` times the
    preservation loss in units of the pool's largest, minus (1 - weight) times the cosine with the task gradient.
    """
    values = np.asarray(losses, dtype=np.float64)
    largest = max(float(values.max()), 0.0)
    scores = weight * (values / largest if largest > 0 else 0.0 * values) - (1 - weight) * np.asarray(cosines)
    order = np.argsort(-scores, kind="stable")[:top]
    out = np.zeros(len(values))
    out[order] = np.exp((scores[order] - scores[order[0]]) / temperature)
    weights: Floats = out / out.sum()
    return weights


def kept(compatibility: Floats, drop: float) -> Bools:
    """Which rows to keep (B,): drops incompatible rows (below zero), at most ⌊drop · B⌋, the worst first; never all rows."""
    count = min(int(drop * len(compatibility) + 1e-9), len(compatibility) - 1)
    keep = np.ones(len(compatibility), dtype=np.bool_)
    keep[np.argsort(compatibility, kind="stable")[:count]] = False
    return keep | ~(compatibility < 0)


def _preservation(model: nn.Module, batch: Batch) -> Callable[[nn.Module], Tensor]:
    """KL(θ0 ‖ θ) of one reference as a function of the model at θ, in nats, differentiable; ``model`` is at θ0.

    The mean over its M answer tokens. Of θ0 the log-probabilities of the likeliest tokens are kept, (M, E), and the rest as one.
    """
    data = DeviceBatch.of(batch, model)
    where = predicting(data.loss)  # (B, T)
    logits = logits_at(model, data.ids, data.attention, where)
    tokens = logits.topk(min(_ENTRIES, logits.shape[-1]), -1).indices
    start, others = _coarse(logits, tokens)

    def divergence(now: nn.Module) -> Tensor:
        logs, rest = _coarse(logits_at(now, data.ids, data.attention, where), tokens)
        each = (start.exp() * (start - logs)).sum(-1)
        if others is not None and rest is not None:
            each = each + others.exp() * (others - rest)
        return each.mean()

    return divergence


def _coarse(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the given tokens (M, E), and of all others combined (M,)."""
    total = logits.logsumexp(-1, keepdim=True)
    logs = logits.gather(-1, tokens) - total
    if tokens.shape[-1] == logits.shape[-1]:
        return logs, None
    others = logits.scatter(-1, tokens, float("-inf"))
    return logs, others.logsumexp(-1) - total.squeeze(-1)


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The trainer's loss: the mean over the batch's loss tokens, in nats."""
    data = DeviceBatch.of(batch, model)
    each = data.nll(model).sum(-1)
    signs = torch.as_tensor(batch.coefficients, dtype=each.dtype, device=each.device)
    return (signs * each).sum() / data.loss.sum()


def _averaged(gradient: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The mean over the training's processes; a missing gradient (an expert without tokens) counts as zero."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return dict(gradient)
    count = distributed.get_world_size()
    mean = {name: gradient.get(name, torch.zeros_like(p)) / count for name, p in parameters.items()}
    for tensor in mean.values():
        distributed.all_reduce(tensor)
    return mean


def _dot(a: Tensor, b: Tensor) -> float:
    return float((in_float64(a) * in_float64(b)).sum())


def _cosine(reference: Mapping[str, Tensor], task: Mapping[str, Tensor]) -> float:
    """Cosine of a reference's gradient with the task's; 0 if it vanishes, as at θ0."""
    size, of_task = norm(reference.values()), norm(task.values())
    if size <= _ROUNDING * of_task or of_task == 0:
        return 0.0
    return sum(_dot(g, task[name]) for name, g in reference.items() if name in task) / (size * of_task)
