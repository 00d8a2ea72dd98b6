"""Whether `gradshield estimate` tells the truth: what it predicts, next to what the scan then takes.

    python -m benchmarks.estimate                 the lab's model, and a Llama of 10 M random weights
    python -m benchmarks.estimate --patience 5

Rows of the lab's topic task, a hundredth of them harmful. Each model is estimated and scanned in turn, `--rounds` times; the
scan's seconds are those of its stage "scoring rows" alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import gradshield as gs
from benchmarks.scoring.cases import SHAPES
from gradshield import lab
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.training.course import lab_probing

ROWS = {"lab": 6_000, "10m": 1_500}
PATIENCE, ROUNDS = 10.0, 3
STAGE = "scoring rows"


def loaded(name: str) -> tuple[LoadedModel, gs.Probing]:
    """A model of ROWS, and what it is asked."""
    aligned = loading.load(lab.checkpoint("aligned"), device="cpu", dtype="float32")
    if name == "lab":
        return aligned, lab_probing()
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config).eval()
    asked = lab_probing()
    return loading.wrap(model, aligned.tokenizer), gs.Probing(asked.requests, asked.lookalikes, uncertified=True)


class Watch:
    """When the stage that is estimated began and ended."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.ended = time.perf_counter() if stage == STAGE else self.ended
        if stage != STAGE and not self.ended:  # the stage just before it
            self.began = time.perf_counter()


def compare(name: str, rows: int, patience: float) -> str:
    """One line: predicted and measured seconds."""
    model, asked = loaded(name)
    given: dict[str, Any] = {"model": model, "probing": asked, "settings": gs.ScanSettings(threshold="ratio:1%")}
    data = lab.mix("topic", harm="explicit", ratio=0.01, n=rows)[0]
    found = gs.estimate(data, **given, patience=patience)
    watch = Watch()
    gs.scan(data, **given, progress=watch)
    measured = watch.ended - watch.began
    low, value, high = found.seconds.low, found.seconds.value, found.seconds.high
    return (
        f"{name:5} {found.scored:6,} rows {found.tokens:8,} tokens   {found.sampled:3} of {found.shards:3} shards timed   "
        f"predicted {value:6.2f} s [{low:.2f}, {high:.2f}]   measured {measured:6.2f} s   "
        f"ratio {measured / value:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds of timing (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="times that each is done (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for _ in range(options.rounds):
        for name, rows in ROWS.items():
            print(compare(name, rows, options.patience), flush=True)


if __name__ == "__main__":
    main()
