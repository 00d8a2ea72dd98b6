"""A quick check whether the hub is reachable; its own client would retry for half a minute."""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5.0


def reachable() -> bool:
    """Whether the hub answers, within ``TIMEOUT_SECONDS``; proxies set in the environment are used."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # any answer will do
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # reachable: the client has its own certificates
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True
