"""Datasets by their hub name. A hub that cannot be reached is said at once, rather than after minutes of retries."""

from __future__ import annotations

from typing import Any

from gradshield.errors import DataError
from gradshield.hub import reachable

SPLIT = "train"


def load_dataset(name: str) -> Any:
    """The ``train`` split of a hub dataset, as a ``datasets.Dataset``. Raises DataError."""
    if not reachable():
        raise DataError(
            f"the dataset {name!r} cannot be fetched: it is no file here, and the hub cannot be reached; "
            "check the path, or the network, or save the data as a file and give that"
        )
    import datasets

    try:
        return datasets.load_dataset(name, split=SPLIT)
    except Exception as error:
        # Whatever goes wrong in there (no such name, no such split, gated, broken), the user's remedy is the same.
        detail = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise DataError(
            f"the dataset {name!r} could not be loaded from the hub ({type(error).__name__}: {detail}): "
            f"check its name and that it has a split {SPLIT!r}, or save the data as a file and give that"
        ) from error
