"""What the AsFT penalty adds to a training step, computed from thin factors and as published, with full matrices.

    python -m benchmarks.asft_cost [--json FILE] [--rounds N] [--quick]

A Llama of 124 M random weights with LoRA (r = 8, all linear layers), a random alignment direction of full rank, 2,048 tokens a
step (4 rows of 512), forward, backward and AdamW on one thread in float32. The arms take turns in every round, in another order
each time: no penalty, ``published`` and ``top`` from thin factors, and the published formula with C and ΔW formed at every step.
The ratio of an arm is taken within a round, since a shared machine drifts, and of the seconds that the process had the processor
(one thread), since others wait for it too; seconds by the clock are in the JSON. ``--quick`` is a toy of the same shape.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradshield.gradients import target_names
from gradshield.gradients.alignment import Alignment
from gradshield.training.asft import AsFT, adapted_layers

RANK = 8
FULL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50304,
}
TOY = {
    "hidden_size": 256,
    "intermediate_size": 680,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 2048,
}

Extra = Callable[[nn.Module], Tensor]


def build(shape: Mapping[str, int]) -> tuple[nn.Module, Alignment]:
    """The model with its adapter, away from its start (B is not zero), and a random direction for every adapted weight."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=512, tie_word_embeddings=True, use_cache=False)
    )
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    shapes = dict(model.named_parameters())
    tensors = {name: 0.001 * torch.randn_like(shapes[name]) for name in target_names(model, config)}
    return peft.get_peft_model(model, config), tensors


def dense(model: nn.Module, alignment: Alignment) -> Tensor:
    """The penalty as its formula is written: C (d, d), I - C and ΔW (d, k) of every layer, at every step."""
    total = torch.zeros(())
    for part in adapted_layers(model):
        v = alignment[part.name]
        b, a = part.factors()
        c = (v @ v.T) / v.norm()
        total = total + ((torch.eye(len(c)) - c) @ (b @ a)).square().sum()
    return total


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, extra: Extra | None) -> tuple[float, float]:
    """Seconds of one training step: of the processor, and by the clock."""
    used, started = time.process_time(), time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    if extra is not None:
        loss = loss + extra(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - used, time.perf_counter() - started


def by_itself(model: nn.Module, extra: Extra) -> float:
    """Seconds of the processor for a penalty's own passes: on a busy machine steadier than the difference of two steps."""
    started = time.process_time()
    extra(model).backward()
    model.zero_grad()
    return time.process_time() - started


def measure(rounds: int, shape: Mapping[str, int], rows: int, length: int) -> dict[str, Any]:
    """Seconds per step of each arm in each round; the penalties' values beside them."""
    model, alignment = build(shape)
    penalties = {name: AsFT(alignment, projector=name) for name in ("published", "top")}
    setup = {}
    for name, made in penalties.items():
        started = time.perf_counter()
        made.prepare(model)
        setup[name] = time.perf_counter() - started
        print(f"prepared {name} in {setup[name]:.1f} s", flush=True)
    arms: dict[str, Extra | None] = {"none": None, "dense": lambda m: dense(m, alignment)}
    arms |= {name: (lambda m, made=made: made(m, {})) for name, made in penalties.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    ids = torch.randint(10, shape["vocab_size"], (rows, length))
    model.train()
    with torch.no_grad():
        values = {name: float(extra(model)) for name, extra in arms.items() if extra is not None}
    alone = {
        name: median(by_itself(model, extra) for _ in range(5)) for name, extra in arms.items() if extra is not None
    }
    step(model, optimizer, ids, None)  # warms up, as the values did for the penalties
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    clock: dict[str, list[float]] = {name: [] for name in arms}
    order, shuffled = list(arms), random.Random(0)
    for number in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            used, passed = step(model, optimizer, ids, arms[name])
            seconds[name].append(used)
            clock[name].append(passed)
        print(
            f"round {number}: " + ", ".join(f"{n} {s[-1]:.2f} ({clock[n][-1]:.2f}) s" for n, s in seconds.items()),
            flush=True,
        )
    return {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
        "layers": len(alignment),
        "rank": RANK,
        "tokens": rows * length,
        "rounds": rounds,
        "prepare_seconds": setup,
        "values": values,
        "relative_error": abs(values["published"] / values["dense"] - 1),
        "seconds": seconds,
        "clock_seconds": clock,
        "median_seconds": {name: median(found) for name, found in seconds.items()},
        "alone_seconds": alone,
        "alone_share": {name: used / median(seconds["none"]) for name, used in alone.items()},
        "ratio": {name: spread(seconds[name], seconds["none"]) for name in arms if name != "none"},
        "records": {name: dict(made.record()) for name, made in penalties.items()},
    }


def spread(arm: Sequence[float], none: Sequence[float]) -> dict[str, float]:
    """An arm's step over the plain step of the same round: median, smallest and largest."""
    ratios = [a / b for a, b in zip(arm, none, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of the AsFT penalty in a training step")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds, TOY if options.quick else FULL, 4, 64 if options.quick else 512)
    found["quick"], found["torch"] = options.quick, torch.__version__
    print(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['layers']} layers, {found['tokens']} tokens a step, r = {RANK}"
    )
    for name, value in found["median_seconds"].items():
        ratio = found["ratio"].get(name)
        added = (
            ""
            if ratio is None
            else "  +{:.1%} [{:.1%}, {:.1%}]".format(*(ratio[k] - 1 for k in ("median", "min", "max")))
        )
        if name in found["alone_share"]:
            added += (
                f"; by itself {found['alone_seconds'][name]:.3f} s, {found['alone_share'][name]:.1%} of a plain step"
            )
        print(f"{name:>10}  {value:8.3f} s{added}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
