"""The text of each token, for colouring: the pieces concatenate to the decoded sequence."""

from __future__ import annotations

from typing import Any

from gradshield.types import Tokens

# Decoders depend on neighbours (a leading space is dropped at the very start), so a token is decoded after a few others.
CONTEXT = 4
# Longest run of byte tokens that form one piece: a UTF-8 character has up to four bytes.
LONGEST = 8
BROKEN = "\ufffd"


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
