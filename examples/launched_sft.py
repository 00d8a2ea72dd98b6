"""Scan once, then fine-tune on all processes of a launcher: accelerate launch --num_processes 8 examples/launched_sft.py

A long scan is a command of its own before it (gradshield scan ... --workers 8); this one is short, so that the first process
does it and the others wait. Runs on a CPU too, with the bundled lab models: torchrun --nproc_per_node 2 examples/launched_sft.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import gettempdir

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gradshield as gs
from gradshield import lab
from gradshield.gradients import target_names
from gradshield.gradients.alignment import alignment
from gradshield.training import AsFT, penalised


def main(folder: Path) -> None:
    args = SFTConfig(
        str(folder / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        assistant_only_loss=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32").to(args.device)
    base = AutoModelForCausalLM.from_pretrained(lab.checkpoint("base"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    state = PartialState()
    if state.is_main_process:
        rows = lab.mix("topic", harm="explicit", ratio=0.1, n=120)[0]
        asked = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
        given = {"model": model, "tokenizer": tokenizer, "training_args": args, "probing": asked}
        gs.scan(rows, **given, output=folder / "screened")
    state.wait_for_everyone()
    kept = load_dataset("json", data_files=str(folder / "screened" / "kept.jsonl"), split="train")
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    asft = AsFT(alignment(model, base, target_names(model, lora)))
    trained = {"train_dataset": kept, "processing_class": tokenizer, "peft_config": lora}
    trainer = penalised(SFTTrainer, [asft])(model, args=args, **trained)
    trainer.train()
    trainer.save_model()  # the first process writes
    if state.is_main_process:
        print(f"{len(kept)} rows kept; AsFT's penalty at the end {asft.record()['value']:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else gettempdir()))
