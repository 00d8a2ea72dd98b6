"""The peers, each used the way its documentation shows, on the same rows and along the same v, in float32 or the model's dtype.

    bergson          scores the rows against one query gradient q = -v, kept in memory, over the linear layers of the decoder
                     (what it tracks): backward passes with hooks, Σ <∇L, q>
    bergson-output   the same scores by its forward mode (``token_influence="output"``), attention in its math form
    kronfluence      pairwise scores with the strategy identity, over the same layers; it takes the query's gradient itself, from
                     S, outside the clock; its scores are <∇S, ∇L>, so the sign is turned
    vmap             ``torch.func``: vmap of grad gives one gradient a row, multiplied with q
    opacus           GradSampleModule gives one gradient a row, multiplied with q

All sum the loss over a row's response tokens, as ours do, so that every score is FIHS itself: the scale is 1. All pad on the
right within batches of like length. What keeps a gradient per row takes as many rows at once as fit 1 GiB of gradients.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.scoring.arms import ORACLE, Arm, Run, Scored
from benchmarks.scoring.cases import Case
from gradshield.types import Direction, Rendered

IGNORED = -100
GRADIENTS = 2**30  # bytes of gradients that are kept per row, at once
LAYERS = "targets"  # the subspace that the attribution libraries cover: the decoder's linear layers
INSTALL = "pip install -c constraints.txt -e '.[bench]' (docs/performance.md)"


def peers() -> list[Arm]:
    """Every peer; its name begins with the package that it needs."""
    made = (
        ("bergson", LAYERS, partial(bergson, "gradient")),
        ("bergson-output", LAYERS, partial(bergson, "output")),
        ("kronfluence", LAYERS, kronfluence),
        ("vmap", "all", vmap),
        ("opacus", "all", opacus),
    )
    return [Arm(f"{name}/{over}", "peer", ready, f"{ORACLE}/{over}", slow=True) for name, over, ready in made]


def missing(arm: Arm) -> str | None:
    """Why a peer cannot run here, with the remedy; None where it can."""
    package = arm.name.partition("/")[0].partition("-")[0]
    if package == "vmap" or find_spec(package) is not None:
        return None
    return f"{package} is not installed: {INSTALL}"


# ---- rows as the peers take them -------------------------------------------------------------------------------------


def labelled(row: Rendered) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, IGNORED where a token does not count."""
    (tokens,) = row.sequences
    return tokens.ids.tolist(), np.where(tokens.loss, tokens.ids, IGNORED).tolist()


def padded(rows: Sequence[Rendered], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, T), right-padded. Causal attention needs no mask for that."""
    pairs = [labelled(row) for row in rows]
    width = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in pairs], device=device)
    labels = torch.tensor([t + [IGNORED] * (width - len(t)) for _, t in pairs], device=device)
    return ids, labels


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood summed over the tokens that count."""
    kept = logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(kept, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def by_length(rows: Sequence[Rendered], most: int) -> list[list[int]]:
    """Positions of the rows, longest first, in groups of at most ``most``."""
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n].sequences[0].ids))
    return [order[i : i + most] for i in range(0, len(order), most)]


def rows_at_once(case: Case, rows: Sequence[Rendered], bytes_each: int = 0) -> int:
    """Rows of one batch: within the token budget of a scan, and within GRADIENTS."""
    longest = max(len(row.sequences[0].ids) for row in rows)
    least = case.budget // longest
    return max(1, min(least, GRADIENTS // bytes_each) if bytes_each else least)


# ---- attribution libraries -------------------------------------------------------------------------------------------


@contextmanager
def bergson(influence: str, case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, Scorer
    from bergson.data import allocate_batches, pad_and_tensor
    from bergson.score.output_influence import output_token_influence, query_directions
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset

    pairs = [labelled(row) for row in rows]
    data = Dataset.from_dict(
        {"input_ids": [i for i, _ in pairs], "labels": [t for _, t in pairs], "length": [len(i) for i, _ in pairs]}
    )
    with tempfile.TemporaryDirectory() as folder, case.lent() as model, _silent():
        config = IndexConfig(run_path=f"{folder}/run", token_batch_size=case.budget)
        config.partial_run_path.mkdir()
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)  # so that the backward pass reaches every layer
        prefix = f"{model.base_model_prefix}."
        query = {
            name.removeprefix(prefix).removesuffix(".weight"): -v.flatten(1)
            for name, v in case.direction(LAYERS).tensors.items()
        }

        def scorer() -> Any:
            writer = InMemorySequenceScoreWriter(len(rows), 1)
            return Scorer(query, list(query), writer, case.device, case.dtype)

        def by_gradient() -> Scored:
            made = scorer()
            collector = InMemoryCollector(
                model=model.base_model,
                data=data,
                cfg=config,
                processor=GradientProcessor(),
                target_modules=set(query),
                scorer=made,
            )
            chunks = allocate_batches(data["length"][:], config.token_batch_size)
            CollectorComputer(model, data, collector=collector, batches=chunks, cfg=config).run_with_collector_hooks()
            return Scored(made.writer.scores.T.double().numpy())

        def by_output() -> Scored:
            made = scorer()
            targets = InMemoryCollector.discover_targets(model.base_model, set(query))
            moves = query_directions(model, made.query_grads_t, targets)
            for chunk in allocate_batches(data["length"][:], config.token_batch_size):
                part = data[chunk]
                x, y, _, _ = pad_and_tensor(part["input_ids"], labels=part["labels"], device=case.device)
                rates, _ = output_token_influence(model, x, y, moves, config)
                made.write_scores(chunk, rates.sum(1))
            return Scored(made.writer.scores.T.double().numpy())

        # The fused attention kernels have no forward mode.
        with sdpa_kernel(SDPBackend.MATH) if influence == "output" else nullcontext():
            yield by_output if influence == "output" else by_gradient


@contextmanager
def kronfluence(case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    layers = [name.removesuffix(".weight") for name in case.direction(LAYERS).tensors]
    began = [0.0]  # when the first training batch was asked for

    class Fihs(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            began[0] = began[0] or time.perf_counter()
            ids, labels = padded(batch, case.device)
            return loss(model(ids).logits, labels)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return case.probe(model, case.asked.take(batch).batch(case.device)) * (len(batch) / len(case.asked))

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = Fihs()
    with tempfile.TemporaryDirectory() as folder, case.lent() as model, _silent():
        analyzer = Analyzer(
            "bench",
            prepare_model(model, task),
            task,
            cpu=case.device.type == "cpu",
            disable_tqdm=True,
            output_dir=folder,
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=list))
        order = [n for chunk in by_length(rows, len(rows)) for n in chunk]
        train, query = [rows[n] for n in order], list(range(len(case.asked)))
        analyzer.fit_all_factors("identity", train, 1, factor_args=FactorArguments(strategy="identity"))

        def run() -> Scored:
            entered, began[0] = time.perf_counter(), 0.0
            analyzer.compute_pairwise_scores(
                "scores",
                "identity",
                query,
                train,
                per_device_query_batch_size=16,
                per_device_train_batch_size=rows_at_once(case, rows),
                score_args=ScoreArguments(aggregate_query_gradients=True),
                overwrite_output_dir=True,
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"]  # (1, N)
            values = np.zeros((1, len(rows)))
            values[0, order] = -found[0].double().numpy()
            return Scored(values, outside=began[0] - entered)

        yield run


# ---- a gradient per row ----------------------------------------------------------------------------------------------


@contextmanager
def vmap(case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    from torch.func import functional_call, grad
    from torch.func import vmap as over_rows

    v = case.direction("all")
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    chunks = by_length(rows, rows_at_once(case, rows, _bytes(case.model)))

    def one(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(case.model, weights, (ids.unsqueeze(0),), {"use_cache": False}).logits
        return loss(logits, labels.unsqueeze(0))

    per_row = over_rows(grad(one), in_dims=(None, 0, 0))

    def run() -> Scored:
        values = np.zeros((1, len(rows)))
        for chunk in chunks:
            ids, labels = padded([rows[n] for n in chunk], case.device)
            values[0, chunk] = _along(per_row(parameters, ids, labels), v)
        return Scored(values)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule, and would run row by row
        yield run


@contextmanager
def opacus(case: Case, rows: Sequence[Rendered]) -> Iterator[Run]:
    from opacus import GradSampleModule

    v = case.direction("all")
    chunks = by_length(rows, rows_at_once(case, rows, _bytes(case.model)))
    with case.lent() as model, _silent():
        model.requires_grad_(True)
        # Rotary embeddings are buffers, which the strict form does not allow; it works in training mode only.
        wrapped = GradSampleModule(model.train(), loss_reduction="sum", strict=False)
        named = dict(model.named_parameters())

        def run() -> Scored:
            values = np.zeros((1, len(rows)))
            for chunk in chunks:
                ids, labels = padded([rows[n] for n in chunk], case.device)
                loss(wrapped(ids, use_cache=False).logits, labels).backward()
                values[0, chunk] = _along({name: p.grad_sample for name, p in named.items()}, v)
                wrapped.zero_grad(set_to_none=True)
            return Scored(values)

        yield run
        wrapped.remove_hooks()


def _along(gradients: dict[str, Tensor], v: Direction) -> Any:
    """-<∇L_i, v> for each row i of (B, *shape) gradients."""
    total = sum(-(gradients[name].flatten(1) @ tensor.flatten(1).T) for name, tensor in v.tensors.items())
    return total[:, 0].detach().double().cpu().numpy()


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def _silent() -> Iterator[None]:
    """Without the peers' own progress bars and notes."""
    logging.disable(logging.INFO)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
