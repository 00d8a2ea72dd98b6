"""The registry of methods that select rows during training, at the current weights."""

from __future__ import annotations

from gradshield.registry import Registry
from gradshield.types import OnlineSelection

ONLINE: Registry[type[OnlineSelection]] = Registry("online selection")
