"""The choice of chat template, and what a template does with messages.

A template is a program that does not say which kinds of values it takes, what it leaves out and where it writes each answer:
all of it is found by rendering stand-ins.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradshield.data.messages import Messages, RowError, parsed
from gradshield.errors import ModelError
from gradshield.types import shared_length

# One turn is ``<|role|>\n`` + content + end of sequence + ``\n``; what the model writes is content + end of sequence:
#
#     <|user|>
#     What is the capital of France?</s>
#     <|assistant|>
#     Paris.</s>
#
# Tool calls follow the content as JSON. Newlines keep the content's tokens separate from the header's.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|tools|>\\n' + tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% set text = m.content | default('') %}"
    "{% if text is not string %}{% set text = text | map(attribute='text') | join %}{% endif %}"
    "{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ text }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ text + (eos_token | default('')) }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def special_tokens(tokenizer: Any) -> str:
    """A regular expression of the tokens that a tokenizer takes whole, the longest first; empty without any."""
    known = {*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab()} - {""}
    return "|".join(map(re.escape, sorted(known, key=len, reverse=True)))


_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_markers(template: str) -> bool:
    """Whether the template marks what the assistant writes with ``{% generation %}``."""
    return _MARKERS.search(template) is not None


def missing(tokenizer: Any) -> str | None:
    """The default template, with a warning, for a tokenizer that has none; None for one that has its own."""
    if tokenizer.chat_template:
        return None
    warnings.warn(
        "the tokenizer has no chat template, so messages are rendered with GradShield's default one "
        "(<|role|>, newline, content, end of sequence): set tokenizer.chat_template if you train with another",
        UserWarning,
        stacklevel=4,
    )
    return DEFAULT_CHAT_TEMPLATE


def marked_copy(tokenizer: Any, needed: bool) -> str | None:
    """TRL's marked copy of the tokenizer's template, which it trains with under ``assistant_only_loss=True``.

    None if the template marks the answers itself; without ``needed``, also if TRL is not installed or has no copy. Raises
    ModelError if markers are needed, and neither the template nor TRL has them.
    """
    if not tokenizer.chat_template:
        return None
    try:
        if has_markers(tokenizer.get_chat_template()):
            return None
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer)
    except Exception as error:  # TRL renders a conversation, and a template is the model's own program
        if not needed:
            return None
        remedy = "install gradshield[train]" if isinstance(error, ImportError) else "add the markers to the template"
        raise ModelError(
            "assistant_only_loss=True needs a chat template with {% generation %} markers, and the tokenizer's has "
            f"none that TRL can add: {remedy}, or leave assistant_only_loss out to find responses by difference"
        ) from None


# ---- what a template does with messages ------------------------------------------------------------------------------


RenderText = Callable[..., str]  # render(messages, add_generation_prompt=False); any exception: it cannot be rendered
REASONING = ("reasoning_content", "thinking", "reasoning")
# In no template. They share neither their first nor their last character, so that the common prefix and suffix of two
# renderings belong to the template.
_WORDS = ("qzx7Ajk", "Bvw3mQz9")


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
            value = parsed(given)
            if not isinstance(value, dict):
                raise RowError(f"the arguments of the tool call in message {number} are not a JSON object")
        elif isinstance(given, Mapping) and self.text:
            value = json.dumps(given, ensure_ascii=False)
        else:
            return call
        return _with_function(call, {**(function or {}), "arguments": value})


Shadow = tuple[list[dict[str, Any]], dict[str, tuple[int, str]]]


def shadow(messages: Messages) -> Shadow:
    """The messages with a word of its own in place of every text, and of each word the message's index and the part it is in."""
    words: dict[str, tuple[int, str]] = {}

    def word(n: int, part: str) -> str:
        name = f"{_WORDS[0]}{len(words)}z"
        words[name] = n, part
        return name

    return [_shadow(message, n, word) for n, message in enumerate(messages)], words


def left_out(of: Shadow, render: RenderText) -> tuple[tuple[int, str], ...]:
    """What the template does not write: the index of each message, and which part of it; nothing if that cannot be found out."""
    text = attempt(render, of[0])
    if text is None:
        return ()
    written = set(re.findall(rf"{_WORDS[0]}\d+z", text))  # in one pass: a row may have 100,000 turns
    return tuple(dict.fromkeys(where for name, where in of[1].items() if name not in written))


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


# ---- each assistant turn, found by difference ------------------------------------------------------------------------


Span = tuple[int, int]


def turn_span(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, render: RenderText, ends: str
) -> Span | None:
    """Span in ``text`` (the rendered ``messages``) that the model writes in a turn; None if it cannot be found.

    It runs from the first character that the model writes to the token that ends its turn, inclusive. ``ends`` is a regular
    expression of the special tokens, one of which may end a turn; empty without any.
    """
    before = attempt(render, messages[:turn], add_generation_prompt=True)
    bare = attempt(render, messages[:turn])
    opening = before[len(bare) :] if before and bare is not None and before.startswith(bare) else ""
    until = attempt(render, messages[: turn + 1])
    if opening and until and before and text.startswith(before) and text.startswith(until) and len(until) > len(before):
        return len(before), _close(text, len(before), len(until), ends)
    # The template has no generation prompt, or renders earlier turns differently once later ones follow (reasoning models
    # drop old reasoning): change only the content of this turn and compare.
    span = _by_substitution(messages, turn, text, render, ends, bare or "", opening)
    if span is None and bare and until and text.startswith(until) and until.startswith(bare):
        # A tool call in place of the content: all that the turn adds, after what it shares with the generation prompt.
        start = len(bare) + shared_length(opening, until[len(bare) :])
        span = (start, _close(text, start, len(until), ends)) if len(until) > start else None
    return span


def _by_substitution(
    messages: Sequence[Mapping[str, Any]], turn: int, text: str, render: RenderText, ends: str, bare: str, opening: str
) -> Span | None:
    around = _surroundings(messages, turn, render)
    if around is None:
        return None
    start = len(_shared(text, around[0]))
    end = len(text) - len(_shared(text[start:][::-1], around[1][::-1]))
    if opening.strip():
        # The model also writes what is between its header and the content, such as a thinking block. The generation prompt
        # may hold a closed one, where the row has its own. Earlier turns may be written differently: then the last header.
        header = opening.split(maxsplit=1)[0]  # a special token or a name, where a turn begins
        at = text.find(header, len(bare), start) if text.startswith(bare) else text.rfind(header, 0, start)
        if at >= 0:
            start = min(start, at + shared_length(opening[opening.index(header) :], text[at:]))
    last = _surroundings(messages[: turn + 1], turn, render)
    # A turn with only tool calls lacks the white space that would separate them from content.
    tails = (last[1], last[1].lstrip()) if last else ("",)
    end += max(len(_shared(text[end:], tail)) for tail in tails)
    end = _close(text, start, _outside_specials(text, start, end, ends), ends)
    return (start, end) if end > start else None


def _surroundings(messages: Sequence[Mapping[str, Any]], turn: int, render: RenderText) -> tuple[str, str] | None:
    """What the template writes before and after the content of a turn; None if it does not write that content."""
    first, second = (attempt(render, _with_content(messages, turn, stand_in)) for stand_in in _WORDS)
    if first is None or second is None or first == second:
        return None
    head = _shared(first, second)
    tail = _shared(first[len(head) :][::-1], second[len(head) :][::-1])[::-1]
    return head, tail


def _with_content(messages: Sequence[Mapping[str, Any]], turn: int, content: str) -> list[Mapping[str, Any]]:
    parts = isinstance(messages[turn].get("content"), list)
    value: Any = [{"type": "text", "text": content}] if parts else content
    return [{**m, "content": value} if n == turn else m for n, m in enumerate(messages)]


def _shared(left: str, right: str) -> str:
    """The beginning that two texts have in common."""
    return left[: shared_length(left, right)]


def _close(text: str, start: int, end: int, ends: str) -> int:
    """Exclude the white space that a template writes after the token that ends the turn."""
    kept = text[start:end].rstrip()
    if ends and re.search(f"(?:{ends})$", kept):
        return start + len(kept)
    return end


def _outside_specials(text: str, start: int, end: int, ends: str) -> int:
    """``end``, moved back if it is inside a special token: two of them may share a prefix."""
    inside = (m.start() for m in re.finditer(ends or r"(?!)", text[start:]) if m.start() < end - start < m.end())
    return start + next(inside, end - start)
