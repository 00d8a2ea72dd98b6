"""Which of several processes this is, where ``accelerate launch`` or ``torchrun`` started more than one."""

from __future__ import annotations

import os

MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")  # what a launcher sets; some job schedulers set two of them


def processes() -> int:
    """How many processes a launcher started; 1 where there was none."""
    return int(os.environ["WORLD_SIZE"]) if all(mark in os.environ for mark in MARKS) else 1


def first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return processes() == 1 or os.environ["RANK"] == "0"
