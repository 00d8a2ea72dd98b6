"""The row shapes: which keys a row has, and how it becomes conversations.

A shape is recognised by its keys alone; a row with the keys but the wrong types is reported as a bad row of that shape, not as
a row of no shape. Everything downstream sees only ``Conversation``.
"""

# ruff: noqa: SIM905 (a list of words is read as words)

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from gradshield.registry import Registry
from gradshield.types import Conversation

Row = Mapping[str, Any]
Messages = tuple[Mapping[str, Any], ...]

# Arguments of ``apply_chat_template`` itself, not variables of the template.
RENDERING = tuple(
    "chat_template|conversation|tools|add_generation_prompt|continue_final_message|tokenize|sanitize_control_tokens|padding|"
    "truncation|max_length|return_tensors|return_dict|return_assistant_tokens_mask|tokenizer_kwargs".split("|")
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Role names in ShareGPT and its variants.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "tool_response", "observation"), "tool"),
    **dict.fromkeys(("function", "function_response"), "function"),
}


class RowError(ValueError):
    """A row with the keys of its shape that cannot be used; the text is the reason, one clause."""


class Shape:
    """One row shape. ``keys`` must all be present (and not None) for a row to be of this shape."""

    keys: ClassVar[tuple[str, ...]]

    @classmethod
    def fits(cls, row: Row) -> bool:
        """Whether the row has the keys of this shape. None counts as missing: tables pad rows with it."""
        return all(row.get(key) is not None for key in cls.keys)

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        """The row's sequences: one, or two for a preference pair. Raises RowError."""
        raise NotImplementedError


SHAPES: Registry[type[Shape]] = Registry("format")


@SHAPES.register("messages")
class ChatShape(Shape):
    """Chat: `messages`, a list of {role, content} (OpenAI, TRL), with `tools`, tool turns and `weight` 0 or 1."""

    keys = ("messages",)

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        messages = _messages(row["messages"], "messages")
        return (_chat(messages, row),)


@SHAPES.register("prompt-completion")
class PromptCompletionShape(Shape):
    """Prompt and answer: `prompt` and `completion`, both strings or both lists of messages (TRL)."""

    keys = ("prompt", "completion")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return (Conversation(prompt=prompt, completion=_answer(completion, "completion")),)
        if isinstance(prompt, list) and isinstance(completion, list):
            return (_answered(_messages(prompt, "prompt"), _messages(completion, "completion"), row),)
        raise RowError(
            "prompt and completion must be two strings or two lists of messages, "
            f"got {kind_of(prompt)} and {kind_of(completion)}"
        )


@SHAPES.register("alpaca")
class AlpacaShape(Shape):
    """Instruction: `instruction`, `output`, and optionally `input` and `system` (Alpaca)."""

    keys = ("instruction", "output")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        instruction = _string(row["instruction"], "instruction")
        given = _string(row.get("input") or "", "input")
        answer = _answer(row["output"], "output")
        if not (instruction + given).strip():
            raise RowError("instruction and input are both empty")
        request = f"{instruction}\n\n{given}" if given else instruction
        prompt = (*_system(row), {"role": "user", "content": request})
        return (_answered(prompt, ({"role": "assistant", "content": answer},), row),)


@SHAPES.register("sharegpt")
class ShareGPTShape(Shape):
    """Chat: `conversations`, a list of {from, value} with human, gpt, system and tool turns (ShareGPT)."""

    keys = ("conversations",)

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        turns = row["conversations"]
        if not isinstance(turns, list) or not turns:
            raise RowError(f"conversations must be a list of turns that is not empty, got {kind_of(turns)}")
        messages = tuple(cls._message(turn, number) for number, turn in enumerate(turns, 1))
        if messages[0]["role"] != "system":
            messages = _system(row) + messages
        return (_chat(messages, row),)

    @staticmethod
    def _message(turn: Any, number: int) -> Mapping[str, Any]:
        if not isinstance(turn, Mapping):
            raise RowError(f"turn {number} of conversations must be an object, got {kind_of(turn)}")
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise RowError(
                f"turn {number} of conversations has role {_short(role)}, not one of {_list(SHAREGPT_ROLES)}"
            )
        if not isinstance(text, str):
            raise RowError(f"the value of turn {number} of conversations must be a string, got {kind_of(text)}")
        rest = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content") and v is not None}
        return {"role": SHAREGPT_ROLES[role], "content": text, **rest}


@SHAPES.register("text")
class TextShape(Shape):
    """Plain text: `text`, every token of which counts in the loss."""

    keys = ("text",)

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        return (Conversation(completion=_answer(row["text"], "text")),)


@SHAPES.register("preference")
class PreferenceShape(Shape):
    """Preference pair: `chosen` and `rejected`, strings or messages, with `prompt` or a common beginning."""

    keys = ("chosen", "rejected")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            if prompt is None:
                prompt, chosen, rejected = _split_strings(chosen, rejected)
            prompt = _string(prompt, "prompt")
            return (
                Conversation(prompt=prompt, completion=_answer(chosen, "chosen")),
                Conversation(prompt=prompt, completion=_answer(rejected, "rejected"), coefficient=-1.0),
            )
        if isinstance(chosen, list) and isinstance(rejected, list):
            good, bad = _messages(chosen, "chosen"), _messages(rejected, "rejected")
            if isinstance(prompt, list):
                asked = _messages(prompt, "prompt")
            else:  # no prompt, or a string that repeats the first turn: the prompt is the common beginning
                asked, good, bad = _split_messages(good, bad)
            return (_answered(asked, good, row), _answered(asked, bad, row, coefficient=-1.0))
        raise RowError(
            "chosen and rejected must be two strings or two lists of messages, "
            f"got {kind_of(chosen)} and {kind_of(rejected)}"
        )


def detect(row: Row) -> list[str]:
    """Names of the shapes whose keys the row has."""
    return [name for name in SHAPES if SHAPES[name].fits(row)]


def shape_keys() -> str:
    """Every shape with its keys, for messages: ``messages (messages), prompt-completion (prompt + completion), …``."""
    return ", ".join(f"{name} ({' + '.join(SHAPES[name].keys)})" for name in SHAPES)


def _chat(messages: Messages, row: Row) -> Conversation:
    return _conversation(messages, None, row, 1.0)


def _answered(prompt: Messages, answer: Messages, row: Row, coefficient: float = 1.0) -> Conversation:
    return _conversation(prompt + answer, len(prompt), row, coefficient)


def _conversation(messages: Messages, prompt_turns: int | None, row: Row, coefficient: float) -> Conversation:
    """Check that there is an answer to train on, and collect the template's other arguments."""
    answers = [n for n in range(prompt_turns or 0, len(messages)) if messages[n]["role"] == "assistant"]
    if not answers:
        raise RowError("there is no assistant turn to train on")
    trained = tuple(message["role"] == "assistant" and _weight(message) for message in messages)
    if not any(trained[n] for n in answers):
        raise RowError("every assistant turn has weight 0, so there is nothing to train on")
    for n in answers:
        if trained[n] and not _says_something(messages[n]):
            raise RowError(f"the answer in message {n + 1} is empty")
    return Conversation(
        messages=messages,
        trained=trained,
        prompt_turns=prompt_turns,
        tools=_tools(row.get("tools")),
        template_kwargs=_template_kwargs(row.get("chat_template_kwargs")),
        coefficient=coefficient,
    )


def _messages(value: Any, field: str) -> Messages:
    """The messages, unchanged, after checking each. Raises RowError."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{field} must be a list of messages that is not empty, got {kind_of(value)}")
    for number, message in enumerate(value, 1):
        where = f"message {number} of {field}"
        if not isinstance(message, Mapping):
            raise RowError(f"{where} must be an object, got {kind_of(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{where} has role {_short(role)}, not one of {_list(ROLES)}")
        _check_content(message.get("content"), where)
    return tuple(value)


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RowError(f"the content of {where} must be a string or a list of text parts, got {kind_of(content)}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = _short(part.get("type")) if isinstance(part, Mapping) else kind_of(part)
            raise RowError(f"the content of {where} has a part that is not text ({found})")


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return bool((content or "").strip() or message.get("tool_calls") or message.get("function_call"))


def _weight(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"weight must be 0 or 1, got {_short(weight)}")
    return weight is None or bool(weight)


def _tools(value: Any) -> Messages | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("tools is a string that is not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(f"tools must be a list of objects, got {kind_of(value)}")
    return tuple(value)


def _template_kwargs(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"chat_template_kwargs must be an object, got {kind_of(value)}")
    if taken := sorted(name for name in RENDERING if name in value):
        raise RowError(f"chat_template_kwargs has {taken[0]}, which a row may not set")
    return dict(value)


def _system(row: Row) -> Messages:
    system = _string(row.get("system") or "", "system")
    return ({"role": "system", "content": system},) if system else ()


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{field} must be a string, got {kind_of(value)}")
    return value


def _answer(value: Any, field: str) -> str:
    if not _string(value, field).strip():
        raise RowError(f"{field} is empty")
    return str(value)


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix, and the rest of each. A space at the boundary belongs to the answers."""
    shared = common(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], _own(chosen[shared:], "chosen"), _own(rejected[shared:], "rejected")


def _split_messages(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    shared = common(chosen, rejected)
    return chosen[:shared], _own(chosen[shared:], "chosen"), _own(rejected[shared:], "rejected")


def common(left: Any, right: Any) -> int:
    """How many leading items (characters, messages, tokens) two sequences share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))


def _own(rest: Any, field: str) -> Any:
    if not rest:
        raise RowError(f"{field} holds nothing beyond what both answers share, and there is no prompt of its own")
    return rest


def kind_of(value: Any) -> str:
    """A value's type in words, for a reason."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _list(names: Any) -> str:
    return ", ".join(names)
