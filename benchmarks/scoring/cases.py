"""What every arm is given: one model, its rows, and the direction ∇S of each subspace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradshield import lab
from gradshield.data import batches, collate
from gradshield.errors import UsageError
from gradshield.gradients import Loop, adapted, calibrated, target_names
from gradshield.gradients import direction as directions
from gradshield.models import loading
from gradshield.models.loading import choose_device, choose_dtype, keep_freed_memory
from gradshield.probes import FunctionProbe, Probe, PromptBatch, Prompts, first_logits
from gradshield.scanning.preparing import asked_of
from gradshield.scanning.rows import prepare
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.scanning.shards import label_budget
from gradshield.selectors import Fihs, parse_aggregate
from gradshield.training.course import lab_probing
from gradshield.types import Batch, Direction, Rendered, Tokens

CATEGORIES = 4  # harm categories that become directions of their own
CALIBRATION = 256  # tokens on which the step of finite differences is found
KINDS = "categories"  # the key of those directions, over the adapter

# Llama-like shapes; the weights are random. 10m and 125m are for a CPU, the others for a GPU.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "10m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": False},
    "125m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "vocab_size": 50304, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """How to make a case again, in another process too. ``few`` rows are what the slow arms are timed on; None is all."""

    model: str
    rows: int
    few: int | None
    seed: int
    threads: int
    device: str
    folder: str
    dtype: str = "auto"
    data: str | None = None
    labels: str | None = None
    disposable: bool = False


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its rows. ``source`` are the rows as given; None with random weights, which no scan would accept."""

    spec: Spec
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    rendered: Sequence[Rendered]
    probe: Probe
    asked: Prompts
    source: Sequence[Mapping[str, Any]] | None = None
    name: str | Path = ""
    tokenizer: Any = None
    probing: Probing = field(default_factory=Probing)
    truth: Sequence[int] | None = None
    adapter: Any = field(default_factory=lambda: peft_config(lab.LORA))
    budget: int = ScanSettings.token_budget

    @property
    def few(self) -> Sequence[Rendered]:
        """The rows that slow arms are timed on: the first ones."""
        return self.rendered[: self.spec.few]

    def batches(self, rows: Sequence[Rendered]) -> list[Batch]:
        """The batches of a scan."""
        return list(batches(rows, self.budget, label_budget(self.model)))

    @contextmanager
    def carrying(self, subspace: str) -> Iterator[nn.Module]:
        """The model, with the adapter of a training where the subspace is that adapter's."""
        with adapted(self.model, self.adapter if subspace == "lora" else None, self.spec.seed) as model:
            yield model

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """A model that may be changed for good: a copy, or the case's own in a process that ends after it."""
        yield self.model if self.spec.disposable else deepcopy(self.model)

    @cache  # noqa: B019 (a case lives as long as the run)
    def direction(self, key: str) -> Direction:
        """∇S over a subspace, or of KINDS, as `prepare_directions` saved it."""
        found = directions.load(Path(self.spec.folder) / f"{key}.safetensors")
        tensors = {name: tensor.to(self.device) for name, tensor in found.tensors.items()}
        return Direction(tensors, found.names, found.scales, found.digest)

    def step(self, subspace: str) -> float | None:
        """The finite-difference step found for a subspace; None where none was (half precision)."""
        steps: dict[str, float] = json.loads((Path(self.spec.folder) / "steps.json").read_text(encoding="utf-8"))
        return steps.get(subspace)


def open_case(spec: Spec) -> Case:
    """The model, and the rows that it is measured on."""
    keep_freed_memory()  # as the command does; every arm has it, the floor and the peers too
    torch.set_num_threads(spec.threads)
    device = choose_device(spec.device)
    dtype = choose_dtype(spec.dtype, device)
    return _random_weights(spec, device, dtype) if spec.model in SHAPES else _real(spec, dtype)


def prepare_directions(case: Case, subspaces: Sequence[str]) -> None:
    """Take ∇S over each subspace, and the step of finite differences, once; both are outside every timing."""
    folder, steps = Path(case.spec.folder), {}
    lengths = np.cumsum([len(tokens.ids) for row in case.rendered for tokens in row.sequences])
    sample = collate(case.rendered[: 1 + int((lengths < CALIBRATION).sum())])
    for subspace in subspaces:
        with case.carrying(subspace) as model:
            selector = Fihs(
                case.probe, case.asked, Loop(), parse_aggregate("sum"), subspace, target_names(model, case.adapter)
            )
            direction = selector.prepare(model)
            directions.save(direction, folder / f"{subspace}.safetensors")
            if case.dtype in (torch.float32, torch.float64):
                steps[subspace] = calibrated(model, sample, direction)[0].relative_step
            if subspace == "lora":
                kinds = sorted(set(case.asked.categories))
                parts = []
                for kind in kinds:
                    selector.requests = case.asked.take([i for i, of in enumerate(case.asked.categories) if of == kind])
                    parts.append(replace(selector.prepare(model), names=(kind,)))
                joined = together(parts)
                directions.save(joined, folder / f"{KINDS}.safetensors")
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def together(parts: Sequence[Direction]) -> Direction:
    """Directions of one subspace as one of all; a parameter that some do not move is zero there."""
    like = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    tensors = {
        name: torch.cat([part.tensors.get(name, torch.zeros_like(one)) for part in parts]) for name, one in like.items()
    }
    names = tuple(name for part in parts for name in part.names)
    scales = tuple(scale for part in parts for scale in part.scales)
    return Direction(tensors, names, scales, directions.digest(names, tensors))


def leading(direction: Direction, count: int) -> Direction:
    """The first ``count`` directions of several."""
    tensors = {name: tensor[:count] for name, tensor in direction.tensors.items()}
    return Direction(tensors, direction.names[:count], direction.scales[:count], direction.digest)


# ---- models ---------------------------------------------------------------------------------------------------------


def _real(spec: Spec, dtype: torch.dtype) -> Case:
    """The lab's model on a mix of the lab, or a model of the caller's on rows of the caller's."""
    if spec.model == "lab":
        name, probing = lab.checkpoint("aligned"), lab_probing()
        ratio = 0.1
        source, truth = lab.mix("dialogue", "explicit", ratio, n=round(spec.rows * (1 - ratio)), seed=spec.seed)
    elif spec.data is None:
        raise UsageError(f"the model {spec.model} needs rows: give them with --data FILE (and --labels FILE)")
    else:
        name, probing = Path(spec.model), Probing()
        source = [json.loads(line) for line in Path(spec.data).read_text(encoding="utf-8").splitlines() if line.strip()]
        truth = None if spec.labels is None else json.loads(Path(spec.labels).read_text(encoding="utf-8"))
    rows = prepare(source, loading.load(name, device=spec.device, dtype=dtype))
    loaded, rendered = rows.loaded, rows.rendered[: spec.rows]
    asked, harmless = asked_of(loaded.tokenizer, probing)
    probe = ScanSettings().make_probe()
    probe.fit(loaded.model, loaded.tokenizer, asked, harmless)
    return Case(
        spec,
        loaded.model,
        loaded.device,
        loaded.dtype,
        rendered,
        probe,
        asked,
        source,
        name,
        loaded.tokenizer,
        probing,
        None if truth is None else [truth[row.row] for row in rendered],
    )


def _random_weights(spec: Spec, device: torch.device, dtype: torch.dtype) -> Case:
    """A Llama of random weights, ragged rows of 32 to 128 random tokens whose second half is the answer, and an S of its own."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(spec.seed)
    config = LlamaConfig(**SHAPES[spec.model], max_position_embeddings=512, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    draw = np.random.default_rng(spec.seed)

    def row(i: int) -> Rendered:
        length = int(draw.integers(32, 129))
        ids = draw.integers(5, config.vocab_size, length)
        return Rendered(i, str(i), "rows", (Tokens(ids, np.arange(length) >= length // 2),))

    rendered = [row(i) for i in range(spec.rows)]
    prompts = tuple(tuple(draw.integers(5, config.vocab_size, 12).tolist()) for _ in range(CATEGORIES))
    asked = Prompts(prompts, tuple(f"kind {i}" for i in range(CATEGORIES)), ("",) * CATEGORIES)
    return Case(spec, model, device, dtype, rendered, FunctionProbe(gap), asked)


def gap(model: nn.Module, batch: PromptBatch) -> Tensor:
    """One logit minus another at the first response position: a token gap between two tokens of no meaning."""
    logits = first_logits(model, batch)  # (B, V)
    return (logits[:, 3] - logits[:, 4]).mean()
