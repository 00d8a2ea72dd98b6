"""A script for a launcher: rows are chosen inside training on every process, and all end with the same weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gradshield import lab
from gradshield.probes import open_turns
from gradshield.scanning.preparing import answers
from gradshield.selectors import DualSelect, OnlineModerate
from gradshield.training import Selecting


class Trainer(Selecting, SFTTrainer):
    pass


def chooser(method: str, model: Any, tokenizer: Any) -> Any:
    if method == "moderate":
        return OnlineModerate(ratio=0.5)
    asked = open_turns(tokenizer, lab.requests("direction")[:12])
    pool = answers(model, tokenizer, asked, tokenizer.pad_token_id, refused=True)
    return DualSelect(pool, warmup=1, refresh=2, top=3)


def train(folder: str, method: str) -> None:
    dataset = Dataset.from_list(lab.mix("topic", harm="explicit", ratio=0.5, n=40)[0])
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    args = SFTConfig(
        folder,
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = Trainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.online = online = chooser(method, model, tokenizer)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    trainer.train()
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(end) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, end)
    same = all(torch.equal(one, end) for one in every)
    moved = bool((end - start).norm() > 0)
    seen = online.record()
    counted = f"seen {seen['rows_seen']} trained {seen['rows_trained']}" if method == "moderate" else ""
    counted = counted or f"seen {seen['rows']} corrected {seen['corrections'] > 0}"
    # In one write: a launcher runs its processes unbuffered, and the end of a line would come after another's beginning.
    sys.stdout.write(f"{method} moved {moved} same {same} {counted}\n")


if __name__ == "__main__":
    for method in ("moderate", "dualselect"):
        train(f"{sys.argv[1]}/{method}", method)
    distributed.destroy_process_group()
