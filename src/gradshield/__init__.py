"""GradShield: keep language models aligned while they are fine-tuned.

    import gradshield as gs
    selection = gs.scan(dataset, model=model, tokenizer=tokenizer, peft_config=peft_config)
    SFTTrainer(model, train_dataset=selection.kept, ...)

Importing this package is cheap: torch and transformers are loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gradshield.errors import GradShieldError

if TYPE_CHECKING:
    from gradshield.comparison.compare import compare
    from gradshield.data.shapes import Format
    from gradshield.evaluation.certify import certify, check
    from gradshield.evaluation.evaluate import evaluate
    from gradshield.evaluation.exam import Exam, Exams
    from gradshield.scanning.cut import cut
    from gradshield.scanning.estimate import estimate
    from gradshield.scanning.scan import scan
    from gradshield.scanning.selection import Selection
    from gradshield.scanning.settings import Probing, ScanSettings
    from gradshield.scanning.show import show
    from gradshield.scanning.workers import Workers
    from gradshield.training.course import Needs
    from gradshield.training.train import train

__version__ = version("gradshield")
__all__ = [
    "Exam",
    "Exams",
    "Format",
    "GradShieldError",
    "Needs",
    "Probing",
    "ScanSettings",
    "Selection",
    "Workers",
    "__version__",
    "certify",
    "check",
    "compare",
    "cut",
    "estimate",
    "evaluate",
    "scan",
    "show",
    "train",
]

_HOMES = {
    "scan": "gradshield.scanning.scan",
    "Format": "gradshield.data.shapes",
    "Selection": "gradshield.scanning.selection",
    "Probing": "gradshield.scanning.settings",
    "ScanSettings": "gradshield.scanning.settings",
    "cut": "gradshield.scanning.cut",
    "show": "gradshield.scanning.show",
    "Workers": "gradshield.scanning.workers",
    "Needs": "gradshield.training.course",
    "train": "gradshield.training.train",
    "estimate": "gradshield.scanning.estimate",
    "evaluate": "gradshield.evaluation.evaluate",
    "Exam": "gradshield.evaluation.exam",
    "Exams": "gradshield.evaluation.exam",
    "certify": "gradshield.evaluation.certify",
    "check": "gradshield.evaluation.certify",
    "compare": "gradshield.comparison.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradshield' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
