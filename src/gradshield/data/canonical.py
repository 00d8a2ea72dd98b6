"""A row's content as bytes that do not depend on key order or spacing, for ids and content hashes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gradshield.data.messages import RowError

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # the backslash is not itself escaped
ID_LENGTH = 16  # hex digits: 64 bits, so that a million rows collide with probability 3e-8


def canonical(row: Any) -> bytes:
    """The row as JSON in UTF-8 with sorted keys. Raises RowError if some of it is not text."""
    try:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
        content = text.encode()
    except UnicodeEncodeError:
        raise RowError("it holds half of a surrogate pair, which is not text") from None
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RowError(f"it cannot be written as JSON ({error})") from None
    if _NUL.search(text):
        raise RowError("it has NUL characters")
    return content


def json_line(row: Mapping[str, Any]) -> bytes:
    """The row as one line of JSON in its own key order, for rows that were not bytes."""
    return json.dumps(row, ensure_ascii=False, default=_plain).encode(errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """Values that JSON lacks: mappings, arrays, dates, bytes."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else str(value)
