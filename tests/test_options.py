"""Methods as they are typed: what is put together comes apart again, and what is not allowed is one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.errors import UsageError
from gradshield.options import Option, Spec, build, check, number, of, read

KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
WORDS = st.from_regex(r"[A-Za-z0-9_./@: -]+", fullmatch=True).map(str.strip).filter(bool)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


class Method:
    """Takes one of each kind."""

    def __init__(
        self,
        share: float,
        count: int = 3,
        word: str | Path = "a",
        words: Sequence[str] = (),
        seed: int = 0,
        made: Sequence[float] = (),
        ask: Callable[[], str] = str,
    ) -> None:
        self.found = {"share": share, "count": count, "word": word, "words": words, "seed": seed}


@given(WORDS.filter(lambda w: ":" not in w), st.one_of(st.just(""), WORDS), st.dictionaries(KEYS, WORDS))
def test_a_spec_comes_apart_as_it_was_put_together(name: str, target: str, options: dict[str, str]) -> None:
    tail = ",".join([*([target] if target else []), *(f"{key}={value}" for key, value in options.items())])
    assert Spec.split(f"{name}:{tail}" if tail else name) == Spec(name, target, options)


@given(NUMBERS)
def test_numbers_and_per_cents(value: float) -> None:
    assert number(repr(value)) == value
    assert number(f"{value!r}%") == value / 100


@pytest.mark.parametrize("text", ["", "%", "nan", "inf", "-inf%", "1e999", "five", "5%%", "1/2"])
def test_what_is_no_number(text: str) -> None:
    assert math.isnan(number(text))


@given(
    NUMBERS,
    st.integers(-(10**6), 10**6),
    WORDS.filter(lambda w: "," not in w),
    st.lists(KEYS, min_size=1),
    st.booleans(),
)
def test_a_method_gets_what_was_typed(share: float, count: int, word: str, words: list[str], named: bool) -> None:
    """In any order, the first without its key or with it, and what its constructor asks for next to them."""
    first = f"share={share!r}" if named else repr(share)
    spec = Spec.split(f"method:{first},words={'+'.join(words)},count={count},word={word}")
    found = build("method", spec, Method, {"seed": lambda: 7, "unused": lambda: 1 / 0}).found
    assert found == {"share": share, "count": count, "word": word, "words": tuple(words), "seed": 7}


def test_only_what_can_be_typed_is_an_option() -> None:
    assert list(of(Method)) == ["share", "count", "word", "words", "seed"]
    assert [option.kind for option in of(Method).values()] == [float, int, str, tuple, int]


KNOWN = {"share": Option(float, 0.1, 0, 1), "count": Option(int, 2), "side": Option(str, choices=("left", "right"))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "m:2",
            "the option share of the method 'm' got '2', and it takes a number above 0, up to 1: write m:share=0.1",
        ),
        ("m:0", "above 0"),
        ("m:some", "got 'some'"),
        ("m:count=1.5", "a whole number: write m:count=2"),
        ("m:side=up", "left or right"),
        ("m:sahre=1", "the method 'm' got the option 'sahre', and it takes share, count, side: write m:share=..."),
        ("m:0.1,0.2", "got the option '0.2', and it takes share, count, side"),
        ("m:0.1,share=0.2", "got share twice"),
        ("m:share=0.1,share=0.2", "gives share twice"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read("method", Spec.split(text), KNOWN)
    assert said in str(caught.value)


class Stated:
    name = "stated"

    def __init__(
        self,
        share: Annotated[float, Option(above=0, most=1)] = 0.1,
        count: Annotated[int, Option(int, least=1)] = 2,
        side: Annotated[str, Option(str, choices=("left", "right"))] = "left",
    ) -> None:
        check(Stated, share=share, count=count, side=side)


@pytest.mark.parametrize(("key", "value"), [("share", "0"), ("share", "1.5"), ("count", "0"), ("side", "up")])
def test_a_constructor_states_what_may_be_typed_and_what_may_be_given(key: str, value: str) -> None:
    assert {name: option.default for name, option in of(Stated).items()} == {"share": 0.1, "count": 2, "side": "left"}
    with pytest.raises(UsageError, match=f"the option {key} of the method 'stated' got '{value}'"):
        build("method", Spec.split(f"stated:{key}={value}"), Stated)
    with pytest.raises(UsageError, match=f"stated got {key}="):
        Stated(**{key: value if key == "side" else float(value)})
    with pytest.raises(UsageError, match="stated got share=nan: give a number above 0, up to 1"):
        Stated(share=float("nan"))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match=r"the method 'm' needs share, and none was given: write m:share=\.\.\."):
        build("method", Spec.split("m:count=2"), Method)

    class Needs:
        def __init__(self, model: object) -> None: ...

    with pytest.raises(UsageError, match=r"requires 'model', .* or one of seed"):
        build("method", Spec.split("m"), Needs, {"seed": lambda: 0})
    with pytest.raises(UsageError, match=r"'m' got the option '1', and it takes no option: write m$"):
        read("method", Spec.split("m:1"), {})


@given(st.text())
def test_wild_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        found: dict[str, Any] = read("method", Spec.split(text), KNOWN)
        assert set(found) <= set(KNOWN)
        assert 0 < found.get("share", 1) <= 1
