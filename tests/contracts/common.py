"""Rows, directions and adapters on the tiny models, and everything of a model that an engine must leave as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from gradshield.data import collate
from gradshield.gradients import Derivatives, Loop, adapted, gradient_direction, parameter_names
from gradshield.types import Batch, Direction, Rendered, Tokens
from tests.tiny import VOCABULARY, tiny_model

SUBSPACES = ("all", "last:1", "lora")
PROMPTS = torch.tensor([[1, 3, 40, 50, 60, 4], [1, 3, 71, 45, 33, 4], [1, 3, 102, 201, 55, 4]])


def rows(lengths: tuple[int, ...] = (9, 30, 14, 22, 6, 27, 12, 19, 8, 24, 16, 11, 29), seed: int = 0) -> list[Rendered]:
    """Rows of these lengths: mostly a prompt and an answer; every third has two trained turns, one only its last token."""
    draw = np.random.default_rng(seed)
    made = []
    for i, length in enumerate(lengths):
        loss = np.zeros(length, dtype=bool)
        loss[length // 3 :] = True
        if i % 3 == 2:  # two answers, a question between them
            loss[length // 2 : length // 2 + 3] = False
        if i == 4:
            loss[:-1] = False
        made.append(Rendered(i, f"id{i}", "messages", (Tokens(draw.integers(5, VOCABULARY, length), loss),)))
    return made


def batch_of(made: list[Rendered]) -> Batch:
    return collate(made)


def gap(model: nn.Module) -> Tensor:
    """The paper's kind of score: one logit minus another after the prompt, averaged over three prompts."""
    last = model(input_ids=PROMPTS).logits[:, -1]
    return (last[:, 20] - last[:, 30]).mean()


def reluctance(model: nn.Module) -> Tensor:
    """Another score, of several tokens: the negative log-likelihood of what ends the prompts."""
    return -model(input_ids=PROMPTS).logits[:, 2:4].log_softmax(-1)[..., 45].mean()


def lora(arch: str, target: Any = None, **more: Any) -> LoraConfig:
    """An adapter on the attention's q and v (GPT-2's fused c_attn, a transposed Conv1D)."""
    if arch == "gpt2":
        return LoraConfig(
            r=4,
            lora_dropout=0.2,
            target_modules=target or ["c_attn"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
            **more,
        )
    dropout = 0.0 if target == "all-linear" else 0.2  # PEFT's adapters of fused experts allow none
    return LoraConfig(
        r=4, lora_dropout=dropout, target_modules=target or ["q_proj", "v_proj"], task_type="CAUSAL_LM", **more
    )


def two_directions(model: nn.Module, subspace: str) -> Direction:
    scores: dict[str, list[Callable[[nn.Module], Tensor]]] = {"gap": [gap], "reluctance": [reluctance]}
    return gradient_direction(model, scores, parameter_names(model, subspace))


def one(direction: Direction, k: int) -> Direction:
    """Direction k alone."""
    return Direction(
        {name: t[k : k + 1] for name, t in direction.tensors.items()},
        direction.names[k : k + 1],
        direction.scales[k : k + 1],
        direction.digest,
    )


@dataclass(frozen=True)
class Case:
    """One architecture and subspace, with two directions and what the oracle says of 13 ragged rows."""

    arch: str
    subspace: str
    model: nn.Module
    batch: Batch
    direction: Direction
    oracle: Derivatives


@contextmanager
def case(arch: str, subspace: str, target: Any = None, **more: Any) -> Iterator[Case]:
    with adapted(tiny_model(arch), lora(arch, target, **more) if subspace == "lora" else None, seed=1) as model:
        batch = batch_of(rows())
        direction = two_directions(model, subspace)
        yield Case(arch, subspace, model, batch, direction, Loop().directional(model, batch, direction))


def row_sums(found: Derivatives, per_token: bool) -> np.ndarray:
    """(K, B), whatever the engine gives."""
    return (found.values.sum(-1) if per_token else found.values).numpy()


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _bytes(tensor: Tensor | None) -> Any:
    return None if tensor is None else (id(tensor), tensor.data_ptr(), tensor.detach().numpy().tobytes())


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model, and of torch, that must not change: compare two of these with ==."""
    found: dict[str, Any] = {"grad enabled": torch.is_grad_enabled(), "random": torch.get_rng_state().numpy().tobytes()}
    for name, module in model.named_modules():
        found[f"{name}: module"] = (id(module), type(module), module.training, sorted(module.__dict__))
        found[f"{name}: hooks"] = {kind: list(getattr(module, kind)) for kind in _HOOKS}
        found[f"{name}: forward"] = "forward" in module.__dict__
        found[f"{name}: children"] = {k: id(child) for k, child in module._modules.items()}
        for attribute, parameter in module._parameters.items():
            # Reading .grad of a leaf is quiet; parameters are looked up in the slot, where a stand-in would be.
            grad = None if parameter is None else parameter.grad
            flag = None if parameter is None else parameter.requires_grad
            found[f"{name}.{attribute}"] = (_bytes(parameter), flag, type(parameter), _bytes(grad))
        for attribute, buffer in module._buffers.items():
            found[f"{name}.{attribute} (buffer)"] = _bytes(buffer)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        found[f"config {id(config)}"] = {
            key: str(value) for key, value in vars(config).items()
        }  # with _experts_implementation
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return [key for key in before.keys() | after.keys() if before.get(key, "absent") != after.get(key, "absent")]
