"""What the routes of the API and of the pages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from gradshield.gateway.chat import Chats
from gradshield.gateway.content import Content
from gradshield.gateway.dashboard.session import Sessions
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store


@dataclass(eq=False)
class Gateway:
    """One server's parts. ``send`` puts a job into the queue."""

    settings: Settings
    store: Store
    content: Content
    send: Callable[[str], None]
    chats: Chats
    sessions: Sessions
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
