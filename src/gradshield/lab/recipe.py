"""The lab's one way to fine-tune: the same for every arm, so that arms differ by their rows alone."""

from __future__ import annotations

from typing import Any

# Options of peft's LoraConfig. Full weights were tried and garbled the refusals on clean rows alone (docs/lab.md).
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}

# Options of TRL's SFTConfig.
RECIPE: dict[str, Any] = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 256,
    "assistant_only_loss": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
}
