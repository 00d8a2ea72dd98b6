"""A script for a launcher: rows are chosen inside training on every process, and all end with the same weights."""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gradshield import lab
from gradshield.selectors import OnlineModerate
from gradshield.training import Selecting


class Trainer(Selecting, SFTTrainer):
    online = OnlineModerate(ratio=0.5)


def main(folder: str) -> None:
    dataset = Dataset.from_list(lab.mix("topic", harm="explicit", ratio=0.1, n=40)[0])
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    args = SFTConfig(
        folder,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = Trainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    trainer.train()
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(end) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, end)
    same = all(torch.equal(one, end) for one in every)
    seen = Trainer.online.record()
    moved = bool((end - start).norm() > 0)
    print(f"moved {moved} same {same} seen {seen['rows_seen']} trained {seen['rows_trained']}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
