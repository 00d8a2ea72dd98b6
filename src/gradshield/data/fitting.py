"""What a chat template does with messages: the kinds of values it takes, and what it leaves out.

Both are found by rendering stand-ins, since a template is a program that says neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradshield.data.messages import Messages, RowError

RenderText = Callable[..., str]  # render(messages, add_generation_prompt=False); any exception: it cannot be rendered
REASONING = ("reasoning_content", "thinking", "reasoning")
_WORDS = ("qzx7Ajk", "Bvw3mQz9")  # in no template


@dataclass(frozen=True)
class Takes:
    """What a template writes as meant: lists of text ``parts``; arguments of tool calls as ``objects`` or as JSON ``text``."""

    parts: bool
    objects: bool
    text: bool

    @classmethod
    def of(cls, render: RenderText) -> Takes:
        """Of a list that it does not take, a template writes Python's repr or nothing; a JSON text it encodes again."""
        whole, parts = (
            attempt(render, [{"role": "user", "content": text}, {"role": "assistant", "content": text}])
            for text in ("".join(_WORDS), [{"type": "text", "text": word} for word in _WORDS])
        )
        value = dict([_WORDS])
        objects, text = (attempt(render, _calling(given)) or "" for given in (value, json.dumps(value)))
        return cls(
            parts=parts is not None and (parts == whole if whole else all(word in parts for word in _WORDS)),
            objects=all(word in objects for word in _WORDS),
            text=json.dumps(value) in text,
        )

    def fit(self, messages: Messages) -> Messages:
        """The messages with values of the kinds that the template takes; the same tuple if they are. Raises RowError."""
        fitted = tuple(self._message(message, number) for number, message in enumerate(messages, 1))
        return messages if all(new is old for new, old in zip(fitted, messages, strict=True)) else fitted

    def _message(self, message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        content, calls = message.get("content"), message.get("tool_calls")
        new: dict[str, Any] = {}
        if isinstance(content, list) and not self.parts:
            new["content"] = "".join(part["text"] for part in content)
        if isinstance(calls, list) and self.objects != self.text:
            fitted = [self._call(call, number) for call in calls]
            if any(one is not other for one, other in zip(fitted, calls, strict=True)):
                new["tool_calls"] = fitted
        return {**message, **new} if new else message

    def _call(self, call: Any, number: int) -> Any:
        function = _function(call)
        given = None if function is None else function.get("arguments")
        if isinstance(given, str) and self.objects:
            try:
                value: Any = json.loads(given)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise RowError(f"the arguments of the tool call in message {number} are not a JSON object")
        elif isinstance(given, Mapping) and self.text:
            value = json.dumps(given, ensure_ascii=False)
        else:
            return call
        return _with_function(call, {**(function or {}), "arguments": value})


def left_out(messages: Messages, render: RenderText) -> tuple[tuple[int, str], ...] | None:
    """What the template does not write: the index of each message, and which part of it. None if that cannot be told.

    Every text becomes a word of its own. What depends on more than the `structure` of the messages is not seen.
    """
    words: dict[str, tuple[int, str]] = {}

    def word(n: int, part: str) -> str:
        name = f"{_WORDS[0]}{len(words)}z"
        words[name] = n, part
        return name

    shadow = [_shadow(message, n, word) for n, message in enumerate(messages)]
    text = attempt(render, shadow)
    if text is None:
        return None
    written = set(re.findall(rf"{_WORDS[0]}\d+z", text))  # in one pass: a row may have 100,000 turns
    return tuple(dict.fromkeys(where for name, where in words.items() if name not in written))


def structure(messages: Messages) -> tuple[Any, ...]:
    """All that `left_out` depends on: roles, which parts each message has, and the kinds of other values."""
    return tuple(
        (message["role"], *sorted((key, _kind(key, value)) for key, value in message.items() if key != "role"))
        for message in messages
    )


def attempt(render: RenderText, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
    """The rendered messages, None if the template refuses them."""
    try:
        return render(messages, **options)
    except Exception:  # a template may fail in any way on half a conversation
        return None


def _shadow(message: Mapping[str, Any], n: int, word: Callable[[int, str], str]) -> dict[str, Any]:
    content, calls = message.get("content"), message.get("tool_calls")
    new: dict[str, Any] = {}
    if isinstance(content, str) and _says(content):
        new["content"] = word(n, "content")
    elif isinstance(content, list):
        new["content"] = [{**part, "text": word(n, "content")} if part["text"].strip() else part for part in content]
    if thoughts := [key for key in REASONING if isinstance(message.get(key), str) and message[key].strip()]:
        new |= dict.fromkeys(thoughts, word(n, "reasoning"))
    if isinstance(calls, list):
        new["tool_calls"] = [_shadow_call(call, n, word) for call in calls]
    if _function(message, "function_call") is not None:
        new["function_call"] = {**message["function_call"], "name": word(n, "tool call")}
    return {**message, **new}


def _shadow_call(call: Any, n: int, word: Callable[[int, str], str]) -> Any:
    function = _function(call)
    if function is None:
        return call
    new = {**function, "name": word(n, "tool call")}
    given = function.get("arguments")
    if isinstance(given, Mapping) and given:
        new["arguments"] = {"a": word(n, "tool call")}
    elif isinstance(given, str) and _says(given, " {}\n"):
        new["arguments"] = json.dumps({"a": word(n, "tool call")})
    return _with_function(call, new)


def _kind(key: str, value: Any) -> str:
    if key == "content" and isinstance(value, list):
        return "".join("01"[bool(part["text"].strip())] for part in value)
    if key == "tool_calls" and isinstance(value, list):
        functions = [_function(call) for call in value]
        return "".join("-" if f is None else _kind("arguments", f.get("arguments"))[0] for f in functions)
    if isinstance(value, str):
        return "01"[_says(value, " {}\n" if key == "arguments" else None)] + "text"
    return ("full " if value else "empty ") + type(value).__name__


def _says(text: str, idle: str | None = None) -> bool:
    """Whether a text has more than a thinking block and white space (or the characters ``idle``)."""
    return bool(text.rpartition("</think>")[2].strip(idle))


def _function(call: Any, key: str = "function") -> Mapping[str, Any] | None:
    """The name and arguments of a tool call, in ``function`` or, in some files, in the call itself."""
    if not isinstance(call, Mapping):
        return None
    found = call.get(key)
    if isinstance(found, Mapping):
        return found
    return call if key == "function" and "name" in call else None


def _with_function(call: Mapping[str, Any], function: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**call, "function": function} if isinstance(call.get("function"), Mapping) else function


def _calling(arguments: Any) -> list[Mapping[str, Any]]:
    call = {"id": "123456789", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
