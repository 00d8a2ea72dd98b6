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
from gradshield.types import Selection

if TYPE_CHECKING:
    from gradshield.pipeline.certify import certify, check
    from gradshield.pipeline.compare import compare
    from gradshield.pipeline.estimate import estimate
    from gradshield.pipeline.evaluate import evaluate
    from gradshield.pipeline.recut import recut
    from gradshield.pipeline.scan import scan
    from gradshield.pipeline.settings import Probing, ScanSettings
    from gradshield.pipeline.train import train

__version__ = version("gradshield")
__all__ = [
    "GradShieldError",
    "Probing",
    "ScanSettings",
    "Selection",
    "__version__",
    "certify",
    "check",
    "compare",
    "estimate",
    "evaluate",
    "recut",
    "scan",
    "train",
]

_HOMES = {
    "scan": "gradshield.pipeline.scan",
    "Probing": "gradshield.pipeline.settings",
    "ScanSettings": "gradshield.pipeline.settings",
    "recut": "gradshield.pipeline.recut",
    "train": "gradshield.pipeline.train",
    "estimate": "gradshield.pipeline.estimate",
    "evaluate": "gradshield.pipeline.evaluate",
    "certify": "gradshield.pipeline.certify",
    "check": "gradshield.pipeline.certify",
    "compare": "gradshield.pipeline.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradshield' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
