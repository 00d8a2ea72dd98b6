"""Signed webhook calls, as the OpenAI API makes them, so that ``client.webhooks.unwrap`` checks them.

Source: Standard Webhooks 1.0.0 (webhook-id, webhook-timestamp, webhook-signature: ``v1,`` and the base64 HMAC-SHA256 of id,
timestamp and body, joined by dots).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time

import httpx2
import structlog

from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store
from gradshield.gateway.tables import Delivery

PREFIX = "whsec_"
ATTEMPTS = 10  # over about three days
FIRST = 5.0  # seconds before the second attempt; each later one waits four times as long, up to a day
DAY = 86_400.0
log = structlog.get_logger("gradshield.gateway.webhooks")


def new_secret() -> str:
    """A secret for `signature`, as the receiving end needs it."""
    return PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def signature(secret: str, id: str, timestamp: int, body: str) -> str:
    """The value of the header webhook-signature."""
    key = base64.b64decode(secret.removeprefix(PREFIX)) if secret.startswith(PREFIX) else secret.encode()
    return "v1," + base64.b64encode(hmac.digest(key, f"{id}.{timestamp}.{body}".encode(), hashlib.sha256)).decode()


def deliver(settings: Settings, store: Store) -> int:
    """Make every call that is due; how many there were. A call that fails is made again later."""
    due = store.due()
    if not due:
        return 0
    with httpx2.Client(timeout=10, follow_redirects=False) as client:
        for one in due:
            error = _called(client, settings, one)
            again = None
            if error is not None and one.attempt < ATTEMPTS:
                again = time.time() + min(DAY, FIRST * 4 ** (one.attempt - 1))
            if error is not None:
                log.warning("a webhook call failed", url=one.url, attempt=one.attempt, error=error)
            store.called(one.id, error, again)
    return len(due)


def _called(client: httpx2.Client, settings: Settings, one: Delivery) -> str | None:
    """One call; what went wrong. The id stays the same over the attempts, so that the receiving end knows a repetition."""
    now = int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": one.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(settings.webhook_secret.get_secret_value(), one.id, now, one.body),
    }
    try:
        response = client.post(one.url, content=one.body.encode(), headers=headers)
    except httpx2.HTTPError as error:
        return type(error).__name__
    return None if response.is_success else f"status {response.status_code}"
