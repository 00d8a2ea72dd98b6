"""The filter and AsFT in a plain SFTTrainer script: the lines with a number are GradShield's, the rest is the script as it was.

Runs on a CPU in under a minute with the bundled lab models: python examples/filter_and_asft_sft.py
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import gradshield as gs  # 1
from gradshield import lab
from gradshield.gradients import target_names
from gradshield.gradients.alignment import alignment
from gradshield.training import AsFT, penalised  # 2


def main() -> None:
    dataset = Dataset.from_list(lab.mix("topic", harm="explicit", ratio=0.1, n=120)[0])
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(lab.checkpoint("base"), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint("aligned"))
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    asked = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, max_steps=5, assistant_only_loss=True, use_cpu=True, bf16=False)
        kept = gs.scan(dataset, model=model, tokenizer=tokenizer, training_args=args, probing=asked).kept  # 3
        asft = AsFT(alignment(model, base, target_names(model, lora)))  # 4
        trainer = penalised(SFTTrainer, [asft])(  # 5
            model, args=args, train_dataset=kept, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
    print(f"{len(kept)} of {len(dataset)} rows kept; AsFT's penalty at the end {asft.record()['value']:.4f}")


if __name__ == "__main__":
    main()
