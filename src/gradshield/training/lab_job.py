"""A fine-tuning job on the bundled lab: its models, recipe, adapter and requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from gradshield import lab
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.scanning.rows import prepare
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.training.course import Job, Needs


@lru_cache(maxsize=2)
def lab_model(name: str) -> LoadedModel:
    """The checkpoint ``base`` or ``aligned``, loaded once; training uses a copy."""
    return loading.load(lab.checkpoint(name), dtype="float32")


def lab_probing() -> Probing:
    """The lab's own requests and look-alikes, the only ones its model knows."""
    return Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))


def lab_job(
    task: str,
    data: Any,
    labels: Sequence[int] | None,
    seed: int,
    training: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> Job:
    """Rows of ``task``, trained by the lab's recipe; ``training`` and ``lora`` override its options."""
    options = {**lab.recipe(task), **(training or {})}
    answers = {"max_length": options.get("max_length"), "assistant_only_loss": None}
    return Job(
        rows=prepare(data, lab_model("aligned"), training_args=answers),
        options=options,
        peft_config=peft_config({**lab.LORA, **(lora or {})}),
        needs=Needs(base=lab_model("base")),
        labels=labels,
        settings=ScanSettings(seed=seed),
        probing=lab_probing(),
        seed=seed,
    )
