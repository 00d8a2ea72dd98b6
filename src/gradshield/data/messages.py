"""Chat turns as people write them, to the messages that a chat template takes: roles, text parts, tool calls."""

# ruff: noqa: SIM905 (a list of words is read as words)

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Messages = tuple[Mapping[str, Any], ...]

CALL = "function_call"  # its content is the call as JSON
# Every role name, in lower case, and the template's.
ROLES = {
    **{name: name for name in "system|developer|user|assistant|tool|function".split("|")},
    "human": "user",
    **dict.fromkeys("gpt|model|chatgpt|bot|bing".split("|"), "assistant"),
    **dict.fromkeys((CALL, "tool_call"), CALL),
    **dict.fromkeys(("tool_response", "observation"), "tool"),
    "function_response": "function",
}
CONTENTS = ("text", "value")  # other names of a turn's content
TEXTS = ("text", "input_text", "output_text", None)  # types of a part that holds text


class RowError(ValueError):
    """A row with the keys of its shape that cannot be used; the text is the reason, one clause."""


def messages(value: Any, field: str) -> Messages:
    """The messages, each the row's own unless it has to change. ``value`` is a list of them, or one as JSON. Raises RowError."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise RowError(f"{field} must be a list of messages that is not empty, got {kind_of(value)}")
    found: list[Mapping[str, Any]] = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of {field}"
        if not isinstance(message, Mapping):
            raise RowError(f"{where} must be an object, got {kind_of(message)}")
        role = message.get("role")
        known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise RowError(f"{where} has role {short(role)}, not one of {', '.join(ROLES)}")
        found += _as_messages(message, known, where)
    return tuple(found)


def parsed(value: Any) -> Any:
    """The value of a string of JSON; anything else, and a string that is not JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _as_messages(message: Mapping[str, Any], role: str, where: str) -> Iterator[Mapping[str, Any]]:
    """The message with the template's role; of one with tool results, each result as a message of the role tool before it."""
    content, changed = message.get("content"), role != message["role"]
    if content is None and (own := [message[key] for key in CONTENTS if isinstance(message.get(key), str)]):
        content, changed = own[0], True
    if content is None and role == "user":
        raise RowError(f"{where} has no content (its keys: {short(', '.join(map(str, message)))})")
    if role == CALL:
        yield {**message, "role": "assistant", **_called(content, where)}
        return
    texts, calls = content, []
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            if isinstance(part, Mapping) and kind in TEXTS and isinstance(part.get("text"), str):
                texts.append(part if kind == "text" else {"type": "text", "text": part["text"]})
            elif kind == "tool_use" and isinstance(part.get("name"), str):
                calls.append(_call(part.get("id"), part["name"], part.get("input")))
            elif kind == "tool_result":
                yield _result(part, where)
            else:
                raise RowError(f"the content of {where} has a part that is not text ({short(kind)})")
            changed |= kind != "text"
        if content and not texts and not calls:  # nothing but results
            return
    elif content is not None and not isinstance(content, str):
        raise RowError(f"the content of {where} must be a string or a list of text parts, got {kind_of(content)}")
    if calls:
        message = {**message, "tool_calls": [*(message.get("tool_calls") or ()), *calls]}
    if not changed:
        yield message
        return
    yield {key: value for key, value in message.items() if key not in CONTENTS} | {"role": role, "content": texts or ""}


def _called(content: Any, where: str) -> dict[str, Any]:
    """The content and tool calls of a turn that is a call, or several, as JSON; of one that is not JSON, its text."""
    if not isinstance(content, str):
        raise RowError(f"the content of {where} must be a string, got {kind_of(content)}")
    calls = parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return {"content": content}
    given = [_call(None, call["name"], call.get("arguments", call.get("parameters"))) for call in calls]
    return {"content": "", "tool_calls": given}


def _call(name: Any, function: str, arguments: Any) -> dict[str, Any]:
    known = {"type": "function", "function": {"name": function, "arguments": {} if arguments is None else arguments}}
    return known if name is None else {"id": name, **known}


def _result(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = part.get("content")
    if isinstance(content, list):
        if not all(isinstance(text, Mapping) and isinstance(text.get("text"), str) for text in content):
            raise RowError(f"the content of {where} has a tool result that is not text")
        content = "".join(text["text"] for text in content)
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of {where} has a tool result that is not text, but {kind_of(content)}")
    known = {"tool_call_id": part.get("tool_use_id"), "name": part.get("name")}
    return {"role": "tool", "content": content or "", **{key: name for key, name in known.items() if name is not None}}


def from_sharegpt(turn: Any) -> Any:
    """A turn with ``from`` and ``value`` as a message; anything else unchanged."""
    if not isinstance(turn, Mapping) or turn.get("from") is None:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return {"role": turn["from"], "content": turn.get("value"), **rest}


def from_gemini(turn: Any) -> Any:
    """A turn of Gemini's ``contents`` as a message; anything else unchanged."""
    if not isinstance(turn, Mapping) or turn.get("parts") is None:
        return turn
    given = turn["parts"]
    parts = [_gemini_part(part) for part in (given if isinstance(given, list) else [given])]
    parts = [{"text": part} if isinstance(part, str) else part for part in parts]
    if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        return {"role": turn.get("role") or "user", "content": "".join(part["text"] for part in parts)}
    return {"role": turn.get("role") or "user", "content": parts}


def _gemini_part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    call = part.get("functionCall", part.get("function_call"))
    if isinstance(call, Mapping):
        return {"type": "tool_use", "name": call.get("name"), "input": call.get("args")}
    result = part.get("functionResponse", part.get("function_response"))
    if isinstance(result, Mapping):
        response = json.dumps(result.get("response"), ensure_ascii=False, default=str)
        return {"type": "tool_result", "name": result.get("name"), "content": response}
    return part


def kind_of(value: Any) -> str:
    """A value's type in words, for a reason."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def short(value: Any) -> str:
    """A value as Python writes it, at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
