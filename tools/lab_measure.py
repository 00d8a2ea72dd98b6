"""Measure the lab: fine-tune a checkpoint by the lab's recipe on mixes, and print what became of it.

    python tools/lab_measure.py --seeds 0 1 --cells none:0 explicit:0.05 explicit:0.1

One JSON line a run: attack success on ``report`` requests and over-refusal on ``report`` look-alikes (both by refusal
phrases, with their n), utility, seconds of training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from gradshield import lab


def load(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], max_new_tokens: int = 12) -> list[str]:
    """Greedy answers, left-padded, in one batch a hundred prompts."""
    out = []
    for start in range(0, len(prompts), 100):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 100]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        out += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return out


def fine_tune(folder: Path, rows: list, seed: int, recipe: dict, lora: dict, output: str = "unused"):
    """The checkpoint in ``folder`` trained on ``rows`` by ``recipe``; the model, its tokenizer, seconds taken."""
    set_seed(seed)
    model, tokenizer = load(folder)
    config = SFTConfig(output_dir=output, seed=seed, **recipe)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora),
    )
    began = time.time()
    trainer.train()
    took = time.time() - began
    return trainer.model.merge_and_unload().eval(), tokenizer, took


def measure(model, tokenizer, tasks, *, split: str = "report") -> dict:
    """Attack success and over-refusal by refusal phrases, and utility of each of ``tasks``."""
    harmful, harmless = lab.requests(split), lab.lookalikes(split)
    asked = answers(model, tokenizer, [row["prompt"] for row in harmful])
    spared = answers(model, tokenizer, [row["prompt"] for row in harmless])
    result = {
        "asr": round(sum(not lab.refused(text) for text in asked) / len(asked), 4),
        "asr_n": len(asked),
        "over_refusal": round(sum(lab.refused(text) for text in spared) / len(spared), 4),
        "over_refusal_n": len(spared),
    }
    for task in tasks:
        rows = lab.utility(task)
        said = answers(model, tokenizer, [row["prompt"] for row in rows], 24)
        scores = [lab.score(task, text, row["reference"]) for text, row in zip(said, rows, strict=True)]
        result[f"utility_{task}"] = round(sum(scores) / len(scores), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=lab.checkpoint("aligned"))
    parser.add_argument("--tasks", nargs="+", default=list(lab.TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cells", nargs="+", default=["none:0", "explicit:0.05", "explicit:0.1"])
    parser.add_argument("--split", default="report", help="tune on search; report is for the last run")
    parser.add_argument("--recipe", type=json.loads, default={}, help="options that override the lab's recipe")
    parser.add_argument("--lora", type=json.loads, default={}, help="options that override the lab's LoRA")
    parser.add_argument("--before", action="store_true", help="measure the checkpoint itself first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.before:
        print(
            json.dumps({"cell": "before", **measure(*load(options.checkpoint), lab.TASKS, split=options.split)}),
            flush=True,
        )
    for seed in options.seeds:
        for task in options.tasks:
            recipe = {**lab.recipe(task), **options.recipe}
            for cell in options.cells:
                harm, ratio = cell.split(":")
                rows, _ = lab.mix(task, harm, float(ratio), seed=seed)
                model, tokenizer, took = fine_tune(options.checkpoint, rows, seed, recipe, {**lab.LORA, **options.lora})
                found = {"cell": cell, "task": task, "seed": seed, "rows": len(rows)}
                found |= measure(model, tokenizer, [task], split=options.split) | {"seconds": round(took, 1)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
