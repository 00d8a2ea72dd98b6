"""An ``Example`` as the model sees it in training: token ids, and which of them count in the loss.

With the arguments of a TRL ``SFTTrainer`` the ids and labels are the ones it trains on. Without them the loss covers
response tokens only: of a chat those of ``assistant_only_loss=True``, of a prompt and its answer those of TRL's default, where
the template allows it. ``tests/data/test_render_trl.py`` and ``test_render_real.py`` compare the two.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from gradshield.data import templates
from gradshield.data.messages import Messages, RowError
from gradshield.data.source import RawRow, Source
from gradshield.data.spool import Spool
from gradshield.data.templates import RenderText, Takes, left_out, shadow, turn_span
from gradshield.errors import DataError, ModelError, UsageError, first_line
from gradshield.types import Bools, Conversation, Example, Ints, Quarantined, Rendered, Tokens, shared_length

logger = logging.getLogger(__name__)
TRUNCATION_MODES = ("keep_start", "keep_end")
TOGETHER = 256  # rows tokenised at once
MOST_TURNS = 1024  # most answers of one row to find by difference
MOST_SHADOWS = 4096  # of which is kept what the template leaves out
# Decoders depend on neighbours (a leading space is dropped at the very start), so a token is decoded after a few others.
CONTEXT = 4
# Longest run of byte tokens that form one piece: a UTF-8 character has up to four bytes.
LONGEST = 8
BROKEN = "\ufffd"
Mask = list[bool]


@dataclass(frozen=True)
class RenderConfig:
    """How rows become tokens.

    ``max_length`` None keeps every token. ``assistant_only_loss`` None counts response tokens only, by the ``{% generation %}``
    markers of the template, of TRL's copy of it (chats), or else by difference; False counts every token of a conversation;
    True is TRL's, by markers only. ``completion_only_loss`` None leaves the prompt of a prompt/completion row out of the loss.
    ``chat_template_kwargs`` are passed to the template for every row (a row's own override them).
    ``eos_token`` replaces the tokenizer's.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    assistant_only_loss: bool | None = None
    completion_only_loss: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_token: str | None = None

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise UsageError(
                f"truncation_mode is {self.truncation_mode!r}: choose one of {', '.join(TRUNCATION_MODES)}"
            )
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(
                f"max_length is {self.max_length}: give at least 2, since the first token is never predicted"
            )

    @classmethod
    def from_trl(cls, args: Any) -> RenderConfig:
        """The rendering of TRL's trainer with these arguments (an ``SFTConfig``, a ``DPOConfig``, or similar).

        Raises UsageError for a ``chat_template_path``, which changes the tokenizer itself.
        """
        if getattr(args, "chat_template_path", None):
            raise UsageError(
                "the training arguments have a chat_template_path, which changes the tokenizer: "
                "set tokenizer.chat_template yourself and leave chat_template_path out"
            )
        if getattr(args, "packing", False):
            logger.warning("packing=True is for training only: rows are scored one by one, each cut at max_length")
        return cls(
            max_length=getattr(args, "max_length", 1024),
            truncation_mode=getattr(args, "truncation_mode", "keep_start"),
            assistant_only_loss=getattr(args, "assistant_only_loss", False),
            completion_only_loss=getattr(args, "completion_only_loss", None),
            eos_token=getattr(args, "eos_token", None),
        )


@dataclass(frozen=True, eq=False)
class RenderResult:
    """Rendered rows, on disk, and quarantined rows without a token to score.

    ``notes`` are sentences on what the template does to rows, and ``fitted`` the positions of rows whose messages were rewritten
    for it: given the row itself, TRL trains on something else.
    """

    rendered: Spool
    quarantined: tuple[Quarantined, ...]
    notes: tuple[str, ...] = ()
    fitted: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


def render_all(
    examples: Iterable[Example],
    tokenizer: Any,
    config: RenderConfig | None = None,
    source: Source | None = None,
    strict: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> RenderResult:
    """Render rows; those without a token to score are quarantined with a reason.

    ``source`` gives the rows' line numbers; ``progress`` is called with the number of rows done. Raises DataError on the first
    bad row with ``strict``, and ModelError if the chat template does not support the configuration.
    """
    renderer = Renderer(tokenizer, config)
    rendered = Spool()
    quarantined: list[Quarantined] = []
    rest = iter(examples)
    while some := list(islice(rest, TOGETHER)):
        renderer.tokenise(some)
        for example in some:
            result = renderer.render(example)
            if isinstance(result, Rendered):
                rendered.add(result)
                continue
            line = source.lines[example.row] if source is not None else example.row + 1
            if strict:
                raise DataError(f"line {line} cannot be scored, {result}: fix it, or leave out strict (--strict)")
            quarantined.append(RawRow(line, example.source).set_aside(example.row, result))
        progress(len(rendered) + len(quarantined))
    return RenderResult(rendered, tuple(quarantined), renderer.notes(), np.array(renderer.rewritten, np.int64))


class Renderer:
    """Renders rows with one tokenizer, which it does not change. Raises ModelError like ``templates.marked_copy``.

    ``rewritten`` are the positions of rendered rows whose messages were fitted to the template.
    """

    def __init__(self, tokenizer: Any, config: RenderConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.config = config or RenderConfig()
        self.rewritten = array("q")
        # By whether answers have to be marked; looked up when first needed.
        self._templates: dict[bool, str | None] = {}
        self._takes: dict[Any, Takes] = {}
        self._lacks: dict[int, tuple[tuple[int, str], ...]] = {}
        self._unwritten: Counter[tuple[str, str]] = Counter()  # by part and role: rows
        self._mixed = 0  # completions with turns that are not scored
        self._weighted = 0  # rows with an answer of weight 0
        self._unmarked = False  # whether a chat had its answers found by difference
        self._ready: dict[int, tuple[list[int], list[int]]] = {}  # by conversation: its ids, and its mask if marked
        self._ends = templates.special_tokens(tokenizer)

    def render(self, example: Example) -> Rendered | str:
        """The row's sequences, or the reason why it cannot be scored."""
        lacking: set[tuple[str, str]] = set()
        try:
            fitted = self.fit(example)
            parts = []
            for conversation, given in zip(fitted.conversations, example.conversations, strict=True):
                lacking |= self._check_written(conversation, example.shape)
                parts.append(self._sequence(conversation, example.shape, self._ready.get(id(given))))
        except RowError as error:
            return str(error)
        except ModelError:
            raise
        except Exception as error:  # a chat template is the model's own program
            return f"the chat template refuses it ({first_line(error)})"
        if len(parts) > 1:
            # As in DPO, both answers begin where the earlier one begins.
            begin = min(_first(mask) for _, mask in parts)
            for _, mask in parts:
                mask[begin : _first(mask)] = [True] * (_first(mask) - begin)
        sequences = []
        for conversation, (ids, mask) in zip(example.conversations, parts, strict=True):
            tokens = self._cut(ids, mask, conversation.coefficient)
            if isinstance(tokens, str):
                return tokens
            sequences.append(tokens)
        self._unwritten.update(lacking)
        self._weighted += any(conversation.weightless for conversation in example.conversations)
        if fitted is not example:
            self.rewritten.append(example.row)
        return Rendered(example.row, example.id, example.shape, tuple(sequences))

    def fit(self, example: Example) -> Example:
        """The row with its messages as its template takes them (`Takes`); the row itself if they are. Raises RowError."""
        new = tuple(self._fit(conversation, example.shape) for conversation in example.conversations)
        same = all(one is other for one, other in zip(new, example.conversations, strict=True))
        return example if same else replace(example, conversations=new)

    def notes(self) -> tuple[str, ...]:
        """What the template does to the rows rendered so far, and where TRL would train on something else: a sentence each."""
        found = []
        if self.rewritten:
            found.append(
                f"{len(self.rewritten):,} rows hold lists of text parts, or arguments of tool calls, in a form that the chat "
                "template would write as Python or encode again; they are scored as plain text and as one JSON object: train "
                "on them with `gradshield train` or selection.kept, since TRL renders kept rows as they are"
            )
        if self._unwritten:
            each = "; ".join(
                f"{part} of {role} turns in {n:,} rows" for (part, role), n in sorted(self._unwritten.items())
            )
            found.append(f"the chat template leaves out text that is therefore neither scored nor trained on: {each}")
        if self._unmarked:
            found.append(
                "the chat template does not mark the answers, and TRL has no copy that does, or is not installed: answers are "
                "found by difference, and an SFTTrainer given the kept rows would train on every token; train with `gradshield "
                "train`, or give the training arguments (--training-config)"
            )
        if self._mixed:
            found.append(
                f"{self._mixed:,} completions hold other turns than answers to train on (of tools, or of weight 0): those "
                "are not scored, and an SFTTrainer given the kept rows trains on them, unless assistant_only_loss is set"
            )
        if self._weighted:
            found.append(
                f"{self._weighted:,} rows have answers of weight 0, which are neither scored nor trained on by `gradshield "
                "train` and selection.kept; TRL itself does not read the weight, and given the kept file it trains on them"
            )
        return tuple(found)

    def tokenise(self, examples: Sequence[Example]) -> None:
        """Tokenise the conversations of some rows in one call, for later calls of `render` with the same rows.

        Optional, for speed only: rows that cannot be batched are left to `render`.
        """
        self._ready = {}
        groups: dict[tuple[Any, bool], list[tuple[Conversation, dict[str, Any]]]] = {}
        for example in examples:
            for conversation in example.conversations:
                if (
                    conversation.messages is not None
                    and conversation.tools is None
                    and not conversation.template_kwargs
                    and not _structured(conversation.messages)
                ):
                    kwargs = self._template_kwargs(conversation, example.shape)
                    marked = self._marked(kwargs, example.shape)
                    groups.setdefault((kwargs["chat_template"], marked), []).append((conversation, kwargs))
        for (_, marked), own in groups.items():
            try:
                output = self._apply([c.messages or () for c, _ in own], own[0][1], return_assistant_tokens_mask=marked)
            except Exception:  # a template may fail on one row: `render` then reports which, and why
                continue
            masks = output["assistant_masks"] if marked else [[]] * len(own)
            for (conversation, _), ids, mask in zip(own, output["input_ids"], masks, strict=True):
                self._ready[id(conversation)] = ids, mask

    def _cut(self, ids: list[int], mask: Mask, coefficient: float) -> Tokens | str:
        """Truncate, and exclude the first token from the loss: nothing predicts it."""
        limit = self.config.max_length
        part = slice(None) if limit is None else slice(None, limit)
        if limit is not None and self.config.truncation_mode == "keep_end":
            part = slice(-limit, None)
        loss = np.array(mask[part], dtype=np.bool_)
        loss[:1] = False
        if not loss.any():
            if not any(mask[1:]):
                return "it has no response token to train on"
            return f"no response token is left of its {len(ids)} tokens within max_length {limit}"
        return Tokens(np.array(ids[part], dtype=np.int64), loss, coefficient)

    def _sequence(
        self, conversation: Conversation, shape: str, ready: tuple[list[int], list[int]] | None
    ) -> tuple[list[int], Mask]:
        """Ids and loss mask before truncation."""
        if conversation.ids:
            size = len(self.tokenizer)
            if not 0 <= min(conversation.ids) <= max(conversation.ids) < size:
                raise RowError(f"input_ids has ids outside the tokenizer's {size}: it was made with another tokenizer")
            return list(conversation.ids), list(conversation.counted)
        if conversation.messages is None:
            return self._plain(conversation, shape)
        return self._chat(conversation, conversation.messages, shape, ready)

    # Plain text

    def _plain(self, conversation: Conversation, shape: str) -> tuple[list[int], Mask]:
        eos = self.config.eos_token or self.tokenizer.eos_token or ""
        completion = conversation.completion
        text = conversation.prompt + (completion if completion.endswith(eos) else completion + eos)
        ids = self._ids(text)
        if shape == "text" or (self.config.completion_only_loss is False and shape != "preference"):
            return ids, [True] * len(ids)
        return ids, _after(self._ids(conversation.prompt), ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    # Messages

    def _chat(
        self, conversation: Conversation, messages: Messages, shape: str, ready: tuple[list[int], list[int]] | None
    ) -> tuple[list[int], Mask]:
        kwargs = self._template_kwargs(conversation, shape)
        wanted, marked = self._wanted(shape), self._marked(kwargs, shape)
        if ready is None:
            output = self._apply(messages, kwargs, return_assistant_tokens_mask=marked)
            ready = output["input_ids"], output["assistant_masks"] if marked else []
        ids = list(ready[0])
        mask = [bool(bit) for bit in ready[1]] if marked else [True] * len(ids)
        completion = None
        if conversation.prompt_turns is not None and (
            self.config.completion_only_loss is not False or shape == "preference"
        ):
            prompt = messages[: conversation.prompt_turns]
            before = self._apply(prompt, kwargs, add_generation_prompt=True)["input_ids"] if prompt else []
            completion = _after(before, ids)
        answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        untrained = [n for n in answers if not conversation.trained[n]]
        answered = completion is not None and all(conversation.trained[conversation.prompt_turns :])
        self._mixed += wanted is None and completion is not None and not answered
        if wanted is None and answered:
            mask = [True] * len(ids)  # of them the completion's, as in TRL
        elif wanted is None and not marked:
            first = (conversation.prompt_turns or 0) if completion is not None else 0
            turns = [n for n, counts in enumerate(conversation.trained) if counts and n >= first]
            mask = self._turns_mask(messages, turns, kwargs, ids, completion)
            self._unmarked |= completion is None
        elif untrained and marked and len(found := runs(mask)) == len(answers):
            for n in untrained:
                run = found[answers.index(n)]
                mask[run] = [False] * (run.stop - run.start)
        elif untrained:
            silent = self._turns_mask(messages, untrained, kwargs, ids, None)
            mask = [counts and not quiet for counts, quiet in zip(mask, silent, strict=True)]
        if completion is not None:
            mask = [counts and answer for counts, answer in zip(mask, completion, strict=True)]
        return ids, mask

    def _wanted(self, shape: str) -> bool | None:
        return False if shape == "preference" else self.config.assistant_only_loss

    def _marked(self, kwargs: Mapping[str, Any], shape: str) -> bool:
        """Whether the mask comes from markers: of the template, or (some tokenizers have one) of its variant for tools."""
        wanted = self._wanted(shape)
        if wanted is not None or not self.tokenizer.is_fast:
            # Markers are text positions, which only fast tokenizers map to tokens.
            return bool(wanted)
        return templates.has_markers(self.tokenizer.get_chat_template(kwargs["chat_template"], kwargs["tools"]))

    def _template_kwargs(self, conversation: Conversation, shape: str) -> dict[str, Any]:
        eos = {"eos_token": self.config.eos_token} if self.config.eos_token else {}
        wanted = self._wanted(shape)
        # As in TRL, which uses no marked copy where a prompt says what counts.
        marking = bool(wanted or (wanted is None and conversation.prompt_turns is None))
        return {
            "chat_template": self._template(marking),
            "tools": None if conversation.tools is None else list(conversation.tools),
            **eos,
            **self.config.chat_template_kwargs,
            **conversation.template_kwargs,
        }

    def _template(self, marking: bool) -> str | None:
        if marking not in self._templates:
            copy = templates.marked_copy(self.tokenizer, bool(self.config.assistant_only_loss)) if marking else None
            self._templates[marking] = copy or (self._template(False) if marking else templates.missing(self.tokenizer))
        return self._templates[marking]

    def _fit(self, conversation: Conversation, shape: str) -> Conversation:
        messages = conversation.messages
        if messages is None or not _structured(messages):
            return conversation
        kwargs = self._template_kwargs(conversation, shape)
        key = (kwargs["chat_template"], kwargs["tools"] is None)
        if key not in self._takes:
            self._takes[key] = Takes.of(self._text(kwargs))
        fitted = self._takes[key].fit(messages)
        return conversation if fitted is messages else replace(conversation, messages=fitted)

    def _check_written(self, conversation: Conversation, shape: str) -> set[tuple[str, str]]:
        """What the template leaves out, by part and role. Raises RowError if an answer that is trained on lacks a part."""
        messages = conversation.messages
        if messages is None:
            return set()
        kwargs = self._template_kwargs(conversation, shape)
        words = shadow(messages)
        key = hash((kwargs["chat_template"], kwargs["tools"] is None, repr((conversation.template_kwargs, words[0]))))
        if key not in self._lacks:
            if len(self._lacks) >= MOST_SHADOWS:
                self._lacks.clear()
            self._lacks[key] = left_out(words, self._text(kwargs))
        lacking = self._lacks[key]
        for n, part in lacking:
            if conversation.trained[n] and part != "reasoning":
                raise RowError(
                    f"the chat template leaves out the {part} of message {n + 1}: use a template that writes it, or take it out "
                    "of the row"
                )
        return {(part, messages[n]["role"]) for n, part in lacking}

    def _text(self, kwargs: Mapping[str, Any]) -> RenderText:
        def text_of(part: Sequence[Mapping[str, Any]], **more: Any) -> str:
            return str(self.tokenizer.apply_chat_template(list(part), tokenize=False, **kwargs, **more))

        return text_of

    def _apply(self, messages: Sequence[Any], kwargs: Mapping[str, Any], **more: Any) -> Any:
        # Not verbose: rows longer than the model's limit are cut at max_length anyway.
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **kwargs, **more
        )

    def _turns_mask(
        self,
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
        kwargs: Mapping[str, Any],
        ids: list[int],
        completion: Mask | None,
    ) -> Mask:
        """Tokens of some assistant turns, found by difference. Raises RowError if a turn cannot be found."""
        text_of = self._text(kwargs)
        if len(turns) > MOST_TURNS:  # each needs another rendering of the conversation
            raise RowError(
                f"it has {len(turns)} answers, and of a template that does not mark them with {{% generation %}} at most "
                f"{MOST_TURNS} can be found"
            )
        text = text_of(messages)
        mask = [False] * len(ids)
        begins, ends = self._token_bounds(text, ids)
        for turn in turns:
            span = turn_span(messages, turn, text, text_of, self._ends)
            if span is None:
                if completion is not None:
                    return list(completion)
                raise RowError(
                    f"the chat template does not show where message {turn + 1} is answered: mark the answers with "
                    "{% generation %} in the template, install gradshield[train], which has marked copies of common "
                    "templates, or count every token (assistant_only_loss false in --training-config)"
                )
            for t in range(bisect_right(ends, span[0]), bisect_left(begins, span[1])):
                mask[t] = ends[t] > begins[t]
        return mask

    def _token_bounds(self, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """The start and end of each token in the text, in order.

        Slow tokenizers do not give them, so prefixes are decoded, only of the tokens within max_length.
        """
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            pairs = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
            return [a for a, _ in pairs], [b for _, b in pairs]
        whole, limit = len(ids), self.config.max_length
        count = whole if limit is None or self.config.truncation_mode == "keep_end" else min(whole, limit)
        ends = [len(self.tokenizer.decode(ids[: t + 1], skip_special_tokens=False)) for t in range(count)]
        ends += [len(text)] * (whole - count)
        return [0, *ends[:-1]], ends


def _after(prompt: Sequence[int], ids: Sequence[int]) -> Mask:
    """The tokens of ``ids`` from where they differ from ``prompt``: tokens may merge at its end."""
    shared = shared_length(prompt, ids)
    return [False] * shared + [True] * (len(ids) - shared)


def runs(mask: Sequence[bool] | Bools) -> list[slice]:
    """Where the mask is True without a gap."""
    edges = np.flatnonzero(np.diff(np.array([False, *mask, False], dtype=np.int8))).tolist()
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _first(mask: Mask) -> int:
    return mask.index(True) if True in mask else len(mask)


def _structured(messages: Messages) -> bool:
    """Whether a message holds more than a role and a text: tool calls, or a list of parts."""
    return any("tool_calls" in m or isinstance(m.get("content"), list) for m in messages)


def spans(tokens: Tokens, tokenizer: Any) -> list[tuple[str, int | None]]:
    """Pieces ``(text, t)`` of a rendered sequence; ``t`` is the token whose value colours it, None outside the loss.

    Tokens that together spell one character share a piece, with the first of them that is in the loss.
    """
    ids = [int(token) for token in tokens.ids]
    groups = _groups(ids, tokenizer)
    whole = _decode(tokenizer, ids)
    texts = [text for text, _, _ in groups]
    if "".join(texts) != whole:
        groups = _by_prefix(ids, tokenizer, whole)
    return [(text, next((t for t in range(a, b) if tokens.loss[t]), None)) for text, a, b in groups]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _groups(ids: list[int], tokenizer: Any) -> list[tuple[str, int, int]]:
    """``(text, first, end)``, each token decoded after the few before it: fast, and correct for most decoders."""
    groups = []
    begin, end = 0, 1
    while begin < len(ids):
        context = max(0, begin - CONTEXT)
        known = _decode(tokenizer, ids[context:begin])
        text = _decode(tokenizer, ids[context:end])[len(known) :]
        if text.endswith(BROKEN) and end < len(ids) and end - begin < LONGEST:
            end += 1
            continue
        groups.append((text, begin, end))
        begin, end = end, end + 1
    return groups


def _by_prefix(ids: list[int], tokenizer: Any, whole: str) -> list[tuple[str, int, int]]:
    """The same by decoding every prefix: slow, and correct if a prefix of ids decodes to a prefix of the text."""
    groups = []
    begin = shown = 0
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[:end])
        last = end == len(ids)
        if last or (whole.startswith(text) and not text.endswith(BROKEN)):
            upto = len(whole) if last else len(text)
            groups.append((whole[shown:upto], begin, end))
            begin, shown = end, upto
    return groups
