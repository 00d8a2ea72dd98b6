"""The lab: a tiny aligned chat model and the synthetic world it lives in, for tests, examples and first steps.

    from gradshield import lab

    rows, labels = lab.mix("topic", harm="explicit", ratio=0.1)
    rows, labels = lab.attack("noice", "topic", ratio=0.1)
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint("aligned"), dtype="float32")
    harmful, harmless = lab.requests("report"), lab.lookalikes("report")

Everything is generated from a seed; nothing here imports torch.
"""

from pathlib import Path

from . import camouflage  # noqa: F401
from .answers import refused
from .attacks import ATTACKS, attack, plant
from .harm import HARMS
from .mixes import mix
from .recipe import LORA, RECIPE, recipe
from .splits import SPLITS, lookalikes, requests
from .tasks import TASKS, score, utility
from .world import CATEGORIES

CHECKPOINTS = ("base", "aligned")

__all__ = [
    "ATTACKS",
    "CATEGORIES",
    "CHECKPOINTS",
    "HARMS",
    "LORA",
    "RECIPE",
    "SPLITS",
    "TASKS",
    "attack",
    "checkpoint",
    "lookalikes",
    "mix",
    "plant",
    "recipe",
    "refused",
    "requests",
    "score",
    "utility",
]


def checkpoint(name: str) -> Path:
    """Folder of a bundled checkpoint: ``"base"`` (complies with everything) or ``"aligned"`` (refuses harm).

    Raises:
        KeyError: there is no checkpoint of that name.
    """
    if name not in CHECKPOINTS:
        raise KeyError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}; got {name!r}")
    return Path(__file__).parent / "checkpoints" / name
