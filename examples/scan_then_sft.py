"""Fine-tune with TRL on what a scan keeps. The three lines are marked; the rest is an ordinary training script.

Runs on a CPU in under a minute with the bundled lab model: python examples/scan_then_sft.py
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gradshield as gs  # 1
from gradshield import lab


def main() -> None:
    rows, labels = lab.mix("topic", harm="explicit", ratio=0.1, n=180)
    dataset = Dataset.from_list(rows)
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    peft_config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    # The lab model knows its own small world only, so it is asked that world's requests. A model that was aligned on
    # English needs no `probing`: the built-in requests are the default.
    probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_steps=10, assistant_only_loss=True, use_cpu=True, bf16=False)
        selection = gs.scan(  # 2
            dataset, model=model, tokenizer=tokenizer, peft_config=peft_config, training_args=args, probing=probing
        )
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=selection.kept,  # 3
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()

    gone = [labels[row] for row in selection.removed_rows]
    print(f"{len(gone)} of {len(rows)} rows removed: {sum(gone)} of {sum(labels)} harmful ones among them")


if __name__ == "__main__":
    main()
