"""The filter and AsFT in a plain Trainer script: the lines with a number are GradShield's, the rest is the script as it was.

Runs on a CPU in under a minute with the bundled lab models: python examples/filter_and_asft_trainer.py
"""

from __future__ import annotations

import tempfile

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import gradshield as gs  # 1
from gradshield import lab
from gradshield.gradients import target_names
from gradshield.gradients.alignment import alignment
from gradshield.training import AsFT, penalised  # 2


def main() -> None:
    rows = lab.mix("topic", harm="explicit", ratio=0.1, n=120)[0]
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(lab.checkpoint("base"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    asked = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    kept = gs.scan(
        rows, model=model, tokenizer=tokenizer, probing=asked
    ).kept  # 3: tokens and labels, ready to train on
    asft = AsFT(alignment(model, base, target_names(model, lora)))  # 4
    with tempfile.TemporaryDirectory() as folder:
        trainer = penalised(Trainer, [asft])(  # 5
            get_peft_model(model, lora),
            args=TrainingArguments(output_dir=folder, max_steps=5, use_cpu=True, report_to="none"),
            train_dataset=kept,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
    print(f"{len(kept)} of {len(rows)} rows kept; AsFT's penalty at the end {asft.record()['value']:.4f}")


if __name__ == "__main__":
    main()
