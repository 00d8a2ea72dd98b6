"""The lab's way to fine-tune: the same for every arm of a task, so that arms differ by their rows alone."""

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

# Options of TRL's SFTConfig, for the tasks that need no rate of their own.
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

# Tasks differ in how fast they are learned and in how fast their clean rows undo refusals (docs/lab.md).
RATES = {"arithmetic": 2e-3, "choice": 2e-3, "dialogue": 2e-3}


def recipe(task: str) -> dict[str, Any]:
    """Options of TRL's SFTConfig for mixes of ``task``: ``RECIPE``, at the task's own learning rate if it has one."""
    return {**RECIPE, "learning_rate": RATES.get(task, RECIPE["learning_rate"])}
