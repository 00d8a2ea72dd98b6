"""The row shapes: which keys a row has, and how it becomes conversations.

A shape is recognised by its keys alone; a row with the keys but the wrong types is reported as a bad row of that shape, not as
a row of no shape. Everything downstream sees only ``Conversation``.
"""

# ruff: noqa: SIM905 (a list of words is read as words)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from gradshield.data.messages import Messages, RowError, from_gemini, from_sharegpt, kind_of, messages, parsed, short
from gradshield.data.trl import IGNORED
from gradshield.errors import UsageError, did_you_mean
from gradshield.registry import Registry
from gradshield.types import Conversation, shared_length

Row = Mapping[str, Any]
Keys = frozenset[str]

# Arguments of ``apply_chat_template`` itself, not variables of the template.
RENDERING = tuple(
    "chat_template|conversation|tools|add_generation_prompt|continue_final_message|tokenize|sanitize_control_tokens|padding|"
    "truncation|max_length|return_tensors|return_dict|return_assistant_tokens_mask|tokenizer_kwargs".split("|")
)
TRL_SHAPES = ("tokens", "preference", "kto", "prompt-completion", "messages", "text")
TRL_KEYS = frozenset("prompt|completion|messages|chosen|rejected|text".split("|"))  # by which TRL tells them


class Shape:
    """One row shape. ``keys`` must all be present (and not None) for a row to be of this shape.

    ``also`` are keys that it reads if they are there, and ``names`` other names of its keys, which count where the key itself
    is missing.
    """

    keys: ClassVar[tuple[str, ...]]
    also: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def fits(cls, keys: Keys) -> bool:
        """Whether a row with these keys has those of this shape. None counts as missing: tables pad rows with it."""
        return keys.issuperset(cls.keys)

    @classmethod
    def named(cls, keys: Keys) -> dict[str, str] | None:
        """The column of each key that a row has under another name; None if it has a key under two."""
        missing = {key: keys.intersection(names) for key, names in cls.names.items() if key not in keys}
        if any(len(columns) > 1 for columns in missing.values()):
            return None
        return {key: column for key, columns in missing.items() for column in columns}

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        """The row's sequences: one, or two for a preference pair. Raises RowError."""
        raise NotImplementedError


SHAPES: Registry[type[Shape]] = Registry("format")  # where a row fits several, the first counts


@dataclass(frozen=True)
class Format:
    """How rows are read.

    Parameters
    ----------
    name
        A shape (`gradshield methods`) for every row; None finds each row's from its keys.
    columns
        Your column for a key of the shapes, where it has another name: ``{"prompt": "question", "completion": "answer"}``. A
        shape with such a key goes before the others, except plain text.
    strict
        A row that cannot be used is an error, instead of being set aside.

    Raises
    ------
    UnknownNameError
        No such shape.
    UsageError
        A column for a key that no shape has, or one that is not a string.

    Examples
    --------
    >>> import gradshield as gs
    >>> gs.show([{"q": "Name a colour.", "a": " blue"}], format=gs.Format(columns={"prompt": "q", "completion": "a"})).shape
    'prompt-completion'
    """

    name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        if self.name is not None:
            SHAPES[self.name]
        known = sorted({key for name in SHAPES for key in (*SHAPES[name].keys, *SHAPES[name].also)})
        for key, column in self.columns.items():
            if not isinstance(column, str):
                raise UsageError(f"the column for {key!r} is {short(column)}: give its name, a string")
            if key not in known:
                hint = did_you_mean(key, known)
                raise UsageError(
                    f"the columns name {key!r}, which is no key of a format: {hint + ' ' if hint else ''}give KEY=COLUMN "
                    f"with a key of {', '.join(known)}"
                )

    @classmethod
    def of(cls, given: str | Format | None) -> Format:
        """A format from its name; None finds each row's shape."""
        return given if isinstance(given, Format) else cls(given)

    def trained(self, args: Any) -> Format:
        """This format with the column of plain text that TRL's training arguments name."""
        name = getattr(args, "dataset_text_field", "text")
        return self if name == "text" else replace(self, columns={"text": name, **self.columns})

    def decide(self, row: Row, shape: str | None = None) -> Decided:
        """How a row is read; ``shape`` is known where it was read before."""
        column = self.columns.get("label", "label")
        judged = str(row.get(column, row.get("label"))).lower() in ("true", "false")
        keys = frozenset(key for key in self._known.intersection(row) if row[key] is not None)
        return _decided(shape or self.name, tuple(self.columns.items()), keys, judged)

    @cached_property
    def _known(self) -> Keys:
        """Every column that may count."""
        made = [SHAPES[name] for name in SHAPES]
        return frozenset(chain(self.columns.values(), *(chain(o.keys, o.also, *o.names.values()) for o in made)))


class Decided(NamedTuple):
    """How a row is read.

    ``shape``   its shape; None if it fits none
    ``names``   the row's own column of each key under another name
    ``others``  the other shapes that fit
    ``unread``  its columns under other names of keys that it has
    """

    shape: str | None
    names: Mapping[str, str] = MappingProxyType({})
    others: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``alpaca (question as instruction, answer as output), not text``, or ``alpaca, without its question``."""
        names = ", ".join(f"{column[:40]} as {key}" for key, column in self.names.items())
        found = f"{self.shape} ({names})" if names else str(self.shape)
        found += f", not {' or '.join(self.others)}" if self.others else ""
        return found + (f", without its {' and '.join(self.unread)}" if self.unread else "")

    def convert(self, row: Row) -> tuple[Conversation, ...]:
        """The row's sequences. Raises RowError."""
        if self.names:
            kept = _moved(frozenset(row), self.names).difference(self.names)
            row = {key: row[key] for key in row if key in kept} | {k: row[column] for k, column in self.names.items()}
        return SHAPES[str(self.shape)].convert(row)


@lru_cache(1024)  # most rows of a file have the same keys
def _decided(name: str | None, columns: tuple[tuple[str, str], ...], keys: Keys, judged: bool) -> Decided:
    given = {key: column for key, column in columns if column in keys}
    keys, fits = _moved(keys, given), {}
    for shape in SHAPES if name is None else [name]:
        names = SHAPES[shape].named(keys)
        # A label that is a number may be a class, unless the user says that it is not.
        if names is None or (shape == "kto" and name is None and not judged):
            continue
        if SHAPES[shape].fits(_moved(keys, names)):
            fits[shape] = names
    asked = [shape for shape in fits if shape != "text" and not given.keys().isdisjoint(SHAPES[shape].keys)]
    chosen = next(iter(asked or fits), None)
    if chosen is None:
        return Decided(None)
    read = (*SHAPES[chosen].keys, *SHAPES[chosen].also)
    names = {key: column for key, column in given.items() if key in read}
    names |= {key: given.get(column, column) for key, column in fits[chosen].items()}  # the row's own column
    others = tuple(shape for shape in fits if shape != chosen and SHAPES[shape].fits(keys))
    alike = (column for key, columns in SHAPES[chosen].names.items() for column in columns if key in keys)
    return Decided(
        chosen,
        names,
        others,
        tuple(column for column in alike if column in keys.difference(read, fits[chosen].values())),
    )


def _moved(keys: Keys, names: Mapping[str, str]) -> Keys:
    """The keys of a row with some of its columns under other names; one of text may also be the prompt, as in TRL."""
    return keys.difference(column for key, column in names.items() if key != "text").union(names)


@SHAPES.register("tokens")
class TokensShape(Shape):
    """Tokens: `input_ids`, with `labels` (-100 outside the loss), or `completion_mask` or `assistant_masks` (1 inside it)."""

    keys = ("input_ids",)
    also = ("labels", "completion_mask", "assistant_masks", "attention_mask")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        columns = {key: _integers(row[key], key) for key in (*cls.keys, *cls.also) if row.get(key) is not None}
        ids = columns.pop("input_ids")
        for key, values in columns.items():
            if len(values) != len(ids):
                raise RowError(f"{key} has {len(values)} values for {len(ids)} input_ids")
        labels = columns.get("labels")
        if labels is not None and any(label not in (IGNORED, own) for label, own in zip(labels, ids, strict=True)):
            raise RowError(f"labels must repeat the input_ids, or be {IGNORED} outside the loss")
        masks = [columns[key] for key in ("completion_mask", "assistant_masks") if key in columns]
        counted = [all(each) for each in zip(*masks, strict=True)] if masks else [True] * len(ids)
        if labels is not None:
            counted = [label != IGNORED for label in labels]
        real = columns.get("attention_mask") or [1] * len(ids)
        places = [place for place, own in enumerate(real) if own]
        if not places:
            raise RowError("input_ids is empty")
        return (Conversation(ids=tuple(ids[p] for p in places), counted=tuple(counted[p] for p in places)),)


@SHAPES.register("preference")
class PreferenceShape(Shape):
    """Preference pair: `chosen` and `rejected`, strings or messages, with `prompt` or a common beginning."""

    keys = ("chosen", "rejected")
    also = ("prompt", "tools", "chat_template_kwargs")
    # OpenAI's names: there ``input`` is an object with ``messages`` and ``tools``.
    names: ClassVar = {
        "prompt": ("question", "query", "instruction", "input"),
        "chosen": ("preferred_output",),
        "rejected": ("non_preferred_output",),
    }

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        prompt, chosen, rejected = (_turns(row.get(key)) for key in ("prompt", "chosen", "rejected"))
        if isinstance(prompt, Mapping):
            row = {**row, "tools": row.get("tools") or prompt.get("tools")}
            prompt = prompt.get("messages")
        if isinstance(chosen, str) and isinstance(rejected, str):
            if prompt is None:
                prompt, chosen, rejected = _split(chosen, rejected)
            prompt = _string(prompt, "prompt")
            return (
                Conversation(prompt=prompt, completion=_answer(chosen, "chosen")),
                Conversation(prompt=prompt, completion=_answer(rejected, "rejected"), coefficient=-1.0),
            )
        if isinstance(chosen, list) and isinstance(rejected, list):
            good, bad = messages(chosen, "chosen"), messages(rejected, "rejected")
            if isinstance(prompt, list):
                asked = messages(prompt, "prompt")
            elif isinstance(prompt, str) and good[0]["role"] == bad[0]["role"] == "assistant":
                asked = ({"role": "user", "content": prompt},)
            else:  # no prompt, or a string that repeats the first turn: the prompt is the common beginning
                asked, good, bad = _split(good, bad)
            return (_answered(asked, good, row), _answered(asked, bad, row, coefficient=-1.0))
        raise _unlike("chosen and rejected", chosen, rejected)


@SHAPES.register("kto")
class KtoShape(Shape):
    """Judged answer: `prompt`, `completion` and `label`: false where training pushes away from the completion (KTO)."""

    keys = ("prompt", "completion", "label")
    also = ("tools", "chat_template_kwargs")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        if (label := str(row["label"]).lower()) not in ("true", "false", "1", "0"):
            raise RowError(f"label must be true or false, got {short(row['label'])}")
        return (_completed(row, 1.0 if label in ("true", "1") else -1.0),)


@SHAPES.register("prompt-completion")
class PromptCompletionShape(Shape):
    """Prompt and answer: `prompt` and `completion`, both strings or both lists of messages (TRL)."""

    keys = ("prompt", "completion")
    also = ("tools", "chat_template_kwargs")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        return (_completed(row),)


@SHAPES.register("messages")
class ChatShape(Shape):
    """Chat: `messages`, a list of {role, content} (OpenAI, TRL), with `tools`, tool turns and `weight` 0 or 1."""

    keys = ("messages",)
    also = ("tools", "chat_template_kwargs")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        return (_chat(messages(row["messages"], "messages"), row),)


@SHAPES.register("sharegpt")
class ShareGPTShape(Shape):
    """Chat: `conversations`, a list of {from, value} with human, gpt, system, tool and function_call turns (ShareGPT)."""

    keys = ("conversations",)
    also = ("system", "tools", "chat_template_kwargs")

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        turns = parsed(row["conversations"])
        if isinstance(turns, list):
            turns = [from_sharegpt(turn) for turn in turns]
        return (_chat(_with_system(messages(turns, "conversations"), row), row),)


@SHAPES.register("gemini")
class GeminiShape(Shape):
    """Chat: `contents`, a list of {role, parts} with user and model turns, and optionally `systemInstruction` (Gemini)."""

    keys = ("contents",)
    also = ("systemInstruction", "tools", "chat_template_kwargs")
    names: ClassVar = {"systemInstruction": ("system_instruction",)}

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        turns, system = parsed(row["contents"]), row.get("systemInstruction")
        if isinstance(system, str):
            system = {"parts": [{"text": system}]}
        if system is not None and not isinstance(system, Mapping):
            raise RowError(f"systemInstruction must be an object with parts, got {kind_of(system)}")
        if isinstance(turns, list):
            turns = [from_gemini(turn) for turn in ([{**system, "role": "system"}, *turns] if system else turns)]
        return (_chat(messages(turns, "contents"), row),)


@SHAPES.register("alpaca")
class AlpacaShape(Shape):
    """Instruction: `instruction`, `output`, and optionally `input` and `system` (Alpaca); question and answer, and the like."""

    keys = ("instruction", "output")
    also = ("input", "system", "tools", "chat_template_kwargs")
    names: ClassVar = {
        "instruction": ("question", "query", "prompt", "text_input", "input_text"),
        "input": ("context",),
        "output": ("answer", "response", "completion", "output_text"),
        "system": ("system_prompt",),
    }

    @classmethod
    def named(cls, keys: Keys) -> dict[str, str] | None:
        """A question next to an instruction is its input."""
        found = super().named(keys)
        asked = keys.intersection(cls.names["instruction"])
        if found is None or not asked or "instruction" not in keys or "input" in keys:
            return found
        return None if len(asked) > 1 or "input" in found else {**found, "input": next(iter(asked))}

    @classmethod
    def fits(cls, keys: Keys) -> bool:
        """An ``input`` may be all that there is of the request."""
        return "output" in keys and not keys.isdisjoint(("instruction", "input"))

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        instruction, given = (_string(row.get(key) or "", key) for key in ("instruction", "input"))
        answer = _answer(row["output"], "output")
        if not (instruction + given).strip():
            raise RowError("instruction and input are both empty")
        request = "\n\n".join(part for part in (instruction, given) if part)
        asked = _with_system(({"role": "user", "content": request},), row)
        return (_answered(asked, ({"role": "assistant", "content": answer},), row),)


@SHAPES.register("text")
class TextShape(Shape):
    """Plain text: `text`, every token of which counts in the loss."""

    keys = ("text",)

    @classmethod
    def convert(cls, row: Row) -> tuple[Conversation, ...]:
        return (Conversation(completion=_answer(row["text"], "text")),)


def shape_keys() -> str:
    """Every shape with its keys, for messages: ``messages (messages), prompt-completion (prompt + completion), …``."""
    return ", ".join(f"{name} ({' + '.join(SHAPES[name].keys)})" for name in SHAPES)


def as_trl(row: Row, shape: str, conversations: tuple[Conversation, ...]) -> bool:
    """Whether TRL reads the row as it is read here: by its shape, and with the same messages, all of them trained on."""
    made = SHAPES[shape]
    if shape == "tokens":  # TRL looks at nothing else
        # By default it skips the mask of a completion; and it trains on padding.
        masked = row.get("labels") is None and row.get("completion_mask") is not None
        return not masked and len(conversations[0].ids) == len(parsed(row["input_ids"]))
    others = TRL_KEYS.difference((*made.keys, *made.also))
    if shape not in TRL_SHAPES or any(row.get(key) is not None for key in others):
        return False
    if shape == "kto" and not isinstance(row["label"], bool):
        return False
    own = {id(turn) for key in TRL_KEYS if isinstance(row.get(key), list) for turn in row[key]}
    for one in conversations:
        turns = one.messages or ()
        if one.weightless or not own.issuperset(map(id, turns)) or (turns and isinstance(row.get("prompt"), str)):
            return False
    return True


def _completed(row: Row, coefficient: float = 1.0) -> Conversation:
    prompt, completion = _turns(row["prompt"]), _turns(row["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation(prompt=prompt, completion=_answer(completion, "completion"), coefficient=coefficient)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _answered(messages(prompt, "prompt"), messages(completion, "completion"), row, coefficient)
    raise _unlike("prompt and completion", prompt, completion)


def _unlike(names: str, one: Any, other: Any) -> RowError:
    return RowError(f"{names} must be two strings or two lists of messages, got {kind_of(one)} and {kind_of(other)}")


def _turns(value: Any) -> Any:
    """The messages of a string that is a JSON list of them; anything else unchanged."""
    turns = parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    whole = isinstance(turns, list) and turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns)
    return turns if whole else value


def _answered(prompt: Messages, answer: Messages, row: Row, coefficient: float = 1.0) -> Conversation:
    return _chat(prompt + answer, row, len(prompt), coefficient)


def _chat(turns: Messages, row: Row, prompt_turns: int | None = None, coefficient: float = 1.0) -> Conversation:
    """Check that there is an answer to train on, and collect the template's other arguments."""
    answers = [n for n in range(prompt_turns or 0, len(turns)) if turns[n]["role"] == "assistant"]
    if not answers:
        raise RowError("there is no assistant turn to train on")
    trained = tuple(message["role"] == "assistant" and _weight(message) for message in turns)
    if not any(trained[n] for n in answers):
        raise RowError("every assistant turn has weight 0, so there is nothing to train on")
    for n in answers:
        if trained[n] and not _says_something(turns[n]):
            raise RowError(f"the answer in message {n + 1} is empty")
    return Conversation(
        messages=turns,
        trained=trained,
        prompt_turns=prompt_turns,
        tools=_tools(row.get("tools")),
        template_kwargs=_template_kwargs(row.get("chat_template_kwargs")),
        coefficient=coefficient,
    )


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return bool((content or "").strip() or message.get("tool_calls") or message.get("function_call"))


def _weight(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"weight must be 0 or 1, got {short(weight)}")
    return weight is None or bool(weight)


def _tools(value: Any) -> Messages | None:
    value = parsed(value)
    if isinstance(value, str) and value.strip():
        raise RowError("tools is a string that is not JSON")
    if not value or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(f"tools must be a list of objects, got {kind_of(value)}")
    return tuple(value)


def _template_kwargs(value: Any) -> Mapping[str, Any]:
    value = parsed(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"chat_template_kwargs must be an object, got {kind_of(value)}")
    if taken := not_variables(value):
        raise RowError(f"chat_template_kwargs has {taken[0]}, which a row may not set")
    return dict(value)


def not_variables(template: Mapping[str, Any]) -> list[str]:
    """Those names that are arguments of rendering, not variables of a chat template."""
    return sorted(name for name in RENDERING if name in template)


def _with_system(turns: Messages, row: Row) -> Messages:
    """The turns, after the row's own system prompt if they have none."""
    system = _string(row.get("system") or "", "system")
    return ({"role": "system", "content": system}, *turns) if system and turns[0]["role"] != "system" else turns


def _integers(value: Any, field: str) -> list[int]:
    value = parsed(value)
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise RowError(f"{field} must be a list of integers, got {short(value)}")
    return value


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{field} must be a string, got {kind_of(value)}")
    return value


def _answer(value: Any, field: str) -> str:
    if not _string(value, field).strip():
        raise RowError(f"{field} is empty")
    return str(value)


def _split(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both texts, or both lists of messages, begin with, and the rest of each. A space at the boundary is the answers'."""
    shared = shared_length(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if len(answer) == shared:
            raise RowError(f"{name} holds nothing beyond what both answers share, and there is no prompt of its own")
    return chosen[:shared], chosen[shared:], rejected[shared:]
