"""What choosing rows by their gradient norms costs inside training, against training on every row.

    python -m benchmarks.moderate_cost --json moderate-cost.json

Two models: the lab's, with the lab's adapter, and a Llama of about ten million parameters, all of them trained. A plain
step trains on all rows of a batch (forward, backward, AdamW); the online step takes the losses and gradient norms of the
same rows and trains on the fifth that it chose. The steps are timed in turn, round after round, on one thread, so that
whatever else the machine does falls on both. Printed are medians over the rounds, and the median, least and greatest ratio
within a round. Both steps of a round see the same rows, so the ratio of their times is also that per candidate row.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.types import Batch, Bools

ROUNDS, BATCH = 9, 16
Step = Callable[[Batch], Any]


def lab_case(rounds: int) -> tuple[Any, list[Batch]]:
    """The lab's aligned model with its adapter as training begins, and batches of its rows."""
    from peft import LoraConfig, get_peft_model

    from gradshield import lab
    from gradshield.data import collate, read, render_all
    from gradshield.models import loading

    loaded = loading.load(lab.checkpoint("aligned"), dtype="float32")
    rows, _ = lab.mix("topic", harm="explicit", ratio=0.1)
    made = render_all(read(rows).examples, loaded.tokenizer).rendered
    batches = [collate(made[i * BATCH : (i + 1) * BATCH]) for i in range(rounds)]
    return get_peft_model(loaded.model, LoraConfig(**lab.LORA)), batches


def llama_case(rounds: int) -> tuple[Any, list[Batch]]:
    """A random Llama of about ten million parameters, and ragged random rows whose second half is the answer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from gradshield.data import collate
    from gradshield.types import Rendered, Tokens

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    draw = np.random.default_rng(0)

    def row(i: int) -> Rendered:
        length = int(draw.integers(48, 129))
        return Rendered(i, str(i), "rows", (Tokens(draw.integers(5, 8192, length), np.arange(length) >= length // 2),))

    return AutoModelForCausalLM.from_config(config), [collate(map(row, range(BATCH))) for _ in range(rounds)]


def taken(batch: Batch, chosen: Bools) -> Batch:
    """The chosen rows, without the padding that none of them needs."""
    width = int(batch.attention[chosen].sum(1).max())
    cut = (chosen, slice(0, width))
    return Batch(batch.ids[cut], batch.attention[cut], batch.loss[cut], batch.rows[chosen], batch.coefficients[chosen])


def steps(model: Any) -> dict[str, Step]:
    """Both steps by name, each on a copy of the model with an optimiser of its own."""
    from gradshield.selectors import OnlineModerate

    def plain(own: Any) -> Step:
        import torch

        optimiser = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-5)

        def step(batch: Batch) -> None:
            ids, attention = torch.as_tensor(batch.ids), torch.as_tensor(batch.attention, dtype=torch.long)
            labels = ids.masked_fill(~torch.as_tensor(batch.loss), -100)
            own(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return step

    def online(own: Any) -> Step:
        train, method = plain(own), OnlineModerate()
        method.begin(own)

        def step(batch: Batch) -> None:
            chosen = method.choose(own, numbered(batch))
            train(taken(batch, chosen))

        return step

    return {name: make(copy.deepcopy(model).train()) for name, make in (("plain", plain), ("online", online))}


def numbered(batch: Batch) -> Batch:
    """Rows 0 to B - 1, as a trainer's batch has them."""
    return Batch(batch.ids, batch.attention, batch.loss, np.arange(len(batch.rows)), batch.coefficients)


def compare(model: Any, batches: list[Batch]) -> dict[str, Any]:
    """Seconds of each step by round, the first round thrown away, and their ratios to the plain step of the same round."""
    times: dict[str, list[float]] = {}
    made = steps(model)
    for turn, batch in enumerate(batches):
        order = list(made) if turn % 2 else list(made)[::-1]
        for name in order:
            began = time.perf_counter()
            made[name](batch)
            times.setdefault(name, []).append(time.perf_counter() - began)
    kept = {name: np.array(seconds[1:]) for name, seconds in times.items()}
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": BATCH,
        "rounds": len(batches) - 1,
        "seconds": {name: float(np.median(kept[name])) for name in made},
    }
    ratios = kept["online"] / kept["plain"]
    found["online"] = {"ratio": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
    return found


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, case in (("lab, adapter", lab_case), ("llama, all", llama_case)):
        found = results[name] = compare(*case(options.rounds + 1))
        print(
            f"{name}: {found['trained']:,} of {found['parameters']:,} parameters, {BATCH} rows, {found['rounds']} rounds"
        )
        print("  median seconds a step: " + ", ".join(f"{n} {s:.3f}" for n, s in found["seconds"].items()))
        print("  online / plain: {ratio:.2f} (from {low:.2f} to {high:.2f})".format(**found["online"]))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
