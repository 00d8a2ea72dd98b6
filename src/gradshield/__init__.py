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

from gradshield.errors import GradShieldError as GradShieldError

if TYPE_CHECKING:  # for type checkers, what `__getattr__` finds
    from gradshield.comparison.compare import compare as compare
    from gradshield.data.shapes import Format as Format
    from gradshield.evaluation.certify import certify as certify
    from gradshield.evaluation.certify import check as check
    from gradshield.evaluation.evaluate import evaluate as evaluate
    from gradshield.evaluation.exam import Exam as Exam
    from gradshield.evaluation.exam import Exams as Exams
    from gradshield.scanning.cut import cut as cut
    from gradshield.scanning.decide import Selection as Selection
    from gradshield.scanning.estimate import estimate as estimate
    from gradshield.scanning.scan import scan as scan
    from gradshield.scanning.settings import Probing as Probing
    from gradshield.scanning.settings import ScanSettings as ScanSettings
    from gradshield.scanning.show import show as show
    from gradshield.scanning.workers import Workers as Workers
    from gradshield.training.course import Needs as Needs
    from gradshield.training.train import train as train

__version__ = version("gradshield")
_HOMES = {
    "scan": "gradshield.scanning.scan",
    "Format": "gradshield.data.shapes",
    "Selection": "gradshield.scanning.decide",
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
__all__ = ["GradShieldError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradshield' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
