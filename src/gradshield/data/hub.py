"""Datasets by their hub name. A hub that cannot be reached is said at once, rather than after minutes of retries."""

from __future__ import annotations

import os
import ssl
import urllib.error
import urllib.request
from typing import Any

from gradshield.errors import HubError

TIMEOUT_SECONDS = 5.0
SPLIT = "train"


def load_dataset(name: str) -> Any:
    """The ``train`` split of a hub dataset, as a ``datasets.Dataset``. Raises HubError."""
    if not _reachable():
        raise HubError(
            f"the dataset {name!r} cannot be fetched: it is no file here, and the hub cannot be reached; "
            "check the path, or the network, or save the data as a file and give that"
        )
    import datasets

    try:
        return datasets.load_dataset(name, split=SPLIT)
    except Exception as error:
        # Whatever goes wrong in there (no such name, no such split, gated, broken), the user's remedy is the same.
        detail = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise HubError(
            f"the dataset {name!r} could not be loaded from the hub ({type(error).__name__}: {detail}): "
            f"check its name and that it has a split {SPLIT!r}, or save the data as a file and give that"
        ) from error


def _reachable() -> bool:
    """Whether the hub answers at all, within ``TIMEOUT_SECONDS``; proxies set in the environment are used."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an answer, whatever it says
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it is there; the client brings its own certificates
    except (OSError, ValueError):
        return False
    return True
