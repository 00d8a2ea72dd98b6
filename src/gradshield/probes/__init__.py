"""Differentiable unsafety scores, their requests, and the check that they are valid on a model.

Importing this package registers every built-in probe.
"""

from gradshield.probes.base import (
    PROBES,
    SPLITS,
    FunctionProbe,
    Probe,
    PromptBatch,
    Prompts,
    alike,
    blunt,
    first_logits,
    first_token,
    greedy,
    lookalikes,
    open_turns,
    ordinary,
    read_prompts,
    requests,
)
from gradshield.probes.contrast import COMPLY, Contrast
from gradshield.probes.refusal_nll import RefusalNll
from gradshield.probes.token_gap import TokenGap
from gradshield.probes.token_set import TokenSet
from gradshield.probes.validity import Validity, only_refuses, openings, pivots, refuses, validity
