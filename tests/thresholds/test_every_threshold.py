"""What is asked of every registered threshold: a finite number, the same each time, whatever the order of the rows."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.errors import DataError, EmptyDataError, UnknownNameError, UsageError
from gradshield.thresholds import THRESHOLDS, Threshold, parse
from gradshield.thresholds.conformal import Conformal
from gradshield.thresholds.fixed import Fixed
from gradshield.types import Anchors, Cut, Floats

NAMES = list(THRESHOLDS)
SHAPES = {
    "one row": np.array([0.3]),
    "two rows": np.array([0.3, 7.0]),
    "three rows": np.array([0.3, 7.0, -2.0]),
    "zeros": np.zeros(40),
    "constant": np.full(40, 0.1),
    "all negative": -np.random.default_rng(0).gamma(2.0, size=60),
    "ties": np.repeat([0.0, 1.0, 2.0, 9.0], 25),
    "two values": np.repeat([0.0, 1.0], [95, 5]),
    "cauchy": np.random.default_rng(1).standard_cauchy(400),
    "far outlier": np.append(np.random.default_rng(2).normal(size=300), 1e12),
    "tiny": 1e-12 * np.random.default_rng(3).normal(size=200),
    "normal": np.random.default_rng(4).normal(size=300),
}


def made(name: str) -> Threshold:
    """The threshold at its defaults; two need an option."""
    if name == "conformal":
        return Conformal(np.random.default_rng(9).normal(size=200))
    return Fixed(0.5) if name == "fixed" else THRESHOLDS[name]()


KNOWN = Anchors(np.linspace(0.6, 1.4, 40), np.linspace(-0.5, 0.5, 40))


def cut_by(name: str, values: Floats, decoys: Floats | None = None) -> Cut:
    """The threshold's cut, with rows of known kind where it needs them: their floor would move the others."""
    return made(name).cut(values, decoys, KNOWN if name == "anchored" else None)


def decoys_of(values: Floats) -> Floats:
    return np.random.default_rng(7).permutation(values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_a_finite_number_that_depends_on_the_scores_alone(name: str, shape: str) -> None:
    values = SHAPES[shape]
    decoys = decoys_of(values)
    kept = values.copy(), decoys.copy()
    cut = cut_by(name, values, decoys)
    assert isinstance(cut, Cut) and type(cut.value) is float and np.isfinite(cut.value)
    assert cut.rule == name
    assert cut_by(name, values, decoys) == cut  # also the detail
    assert np.array_equal(values, kept[0]) and np.array_equal(decoys, kept[1])
    order = np.random.default_rng(1).permutation(len(values))
    moved = cut_by(name, values[order], decoys[order])
    assert moved.value == pytest.approx(cut.value, rel=1e-6, abs=1e-18)
    assert np.array_equal(values > moved.value, values > cut.value)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("fixed", "conformal", "anchored")])
@given(constant=st.floats(-1e6, 1e6, allow_subnormal=False), n=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_equal_scores_are_all_kept(name: str, constant: float, n: int) -> None:
    """Equal rows, so none may be removed: also where their mean is not quite the constant."""
    values = np.full(n, constant)
    assert not (values > made(name).cut(values, values).value).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_an_error(name: str) -> None:
    with pytest.raises(EmptyDataError, match="no scores to cut"):
        made(name).cut(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("name", NAMES)
def test_without_decoys_a_rule_works_or_says_that_it_needs_them(name: str) -> None:
    values = SHAPES["normal"]
    if name in ("decoy", "competition"):
        with pytest.raises(UsageError, match=rf"'{name}' needs a decoy.*adaptive, ratio or fixed"):
            made(name).cut(values)
    else:
        assert cut_by(name, values).value == cut_by(name, values, decoys_of(values)).value


@pytest.mark.parametrize(("shift", "scale"), [(-64.0, 1.0), (1024.0, 32.0), (0.0, 0.125)])
@pytest.mark.parametrize("name", ["adaptive", "ratio"])
@pytest.mark.parametrize("harm", [0, 40])
def test_shift_and_scale_move_the_cut_along(name: str, shift: float, scale: float, harm: int) -> None:
    draw = np.random.default_rng(3)
    values = np.concatenate([draw.normal(size=300), draw.normal(20, 1, size=harm)])
    plain, moved = made(name).cut(values), made(name).cut(scale * values + shift)
    assert moved.value == pytest.approx(scale * plain.value + shift, rel=1e-7, abs=1e-7)
    assert np.array_equal(scale * values + shift > moved.value, values > plain.value)
    assert plain.detail.get("branch") == moved.detail.get("branch")


@pytest.mark.parametrize("scale", [2.0**-20, 0.125, 3.0, 1e6])
@pytest.mark.parametrize("name", ["decoy", "competition", "conformal"])
def test_scale_moves_the_cut_along(name: str, scale: float) -> None:
    draw = np.random.default_rng(5)
    values = np.concatenate([draw.gamma(2.0, size=400), draw.normal(30, 2, size=30)])
    decoys = np.concatenate([draw.gamma(2.0, size=400), draw.gamma(3.0, size=30)])
    rule, scaled = made(name), made(name)
    if name == "conformal":
        scaled = Conformal(scale * rule.clean)
    plain, moved = rule.cut(values, decoys), scaled.cut(scale * values, scale * decoys)
    assert (values > plain.value).any()
    assert moved.value == pytest.approx(scale * plain.value, rel=1e-9)
    assert np.array_equal(scale * values > moved.value, values > plain.value)


GOOD = {
    "decoy": {"q": 0.2},
    "decoy:q=0.1": {"q": 0.1},
    "decoy:0.1": {"q": 0.1},
    "decoy:": {"q": 0.2},
    "decoy:10%": {"q": 0.1},
    "competition": {"q": 0.2, "lost": 0.004, "alpha": 0.05},
    "competition:0.1,alpha=0.01": {"q": 0.1, "lost": 0.004, "alpha": 0.01},
    "competition:lost=1%,q=0.3": {"q": 0.3, "lost": 0.01, "alpha": 0.05},
    "adaptive": {"alpha": 10.0, "seed": 3},
    "adaptive:alpha=12": {"alpha": 12.0, "seed": 3},
    "ratio:5%": {"share": 0.05},
    "ratio:share=0.25": {"share": 0.25},
    "anchored": {"least": 0.5},
    "anchored:0.8": {"least": 0.8},
    "fixed:3.2": {"value": 3.2},
    "fixed:-1e-3": {"value": -1e-3},
    "conformal:clean/scores.parquet": {"clean": "clean/scores.parquet", "alpha": 0.01},
    "conformal:a.parquet,alpha=5%": {"clean": "a.parquet", "alpha": 0.05},
}


@pytest.mark.parametrize("text", GOOD)
def test_options_as_typed(text: str) -> None:
    rule = parse(text, seed=3)
    assert rule.name == text.split(":")[0]
    assert vars(rule) == pytest.approx(GOOD[text])


def test_every_threshold_is_parsed_here() -> None:
    assert {text.split(":")[0] for text in GOOD} == set(NAMES)


BAD = {  # what must be in the sentence, in addition to the rule's name: what was got, what is allowed
    "decoy:q=1": ["option q", "1", "strictly between 0 and 1", "write decoy:q=0.2"],
    "decoy:q=0": ["option q", "0", "between 0 and 1"],
    "decoy:q=-0.1": ["option q", "-0.1", "between 0 and 1"],
    "decoy:q=nan": ["option q", "'nan'", "number"],
    "decoy:q=": ["option q", "''", "number"],
    "decoy:q=many": ["option q", "'many'", "number", "write decoy:q=0."],
    "decoy:alpha=0.1": ["'alpha'", "takes q", "write decoy:q=..."],
    "decoy:0.1,0.2": ["'0.2'", "takes q"],
    "decoy:100%": ["option q", "between 0 and 1"],
    "competition:q=2": ["option q", "2", "between 0 and 1"],
    "competition:lost=x": ["option lost", "'x'", "number"],
    "competition:tail=1": ["'tail'", "takes q, lost, alpha"],
    "adaptive:seed=3": ["'seed'", "takes alpha"],
    "adaptive:alpha=inf": ["option alpha", "'inf'", "number"],
    "ratio:150%": ["option share", "'150%'", "between 0 and 1"],
    "ratio:%": ["option share", "'%'", "number"],
    "fixed": ["needs value", "write fixed:value=..."],
    "fixed:": ["needs value", "write fixed:value=..."],
    "fixed:nan": ["option value", "'nan'", "number"],
    "fixed:high": ["option value", "'high'", "number"],
    "anchored:0": ["option least", "0", "between 0 and 1"],
    "conformal": ["needs clean", "write conformal:clean=..."],
    "conformal:a.parquet,alpha=0": ["option alpha", "0", "between 0 and 1"],
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_option_is_one_sentence_with_what_was_got_and_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message and repr(text.split(":")[0]) in message
    assert all(part in message for part in BAD[text]), message
    assert caught.value.exit_code == 2


def test_an_unknown_threshold_lists_what_there_is() -> None:
    for text in ("", ":0.1", "decoys", "fixed 3"):
        with pytest.raises(UnknownNameError) as caught:
            parse(text)
        assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_share_options_are_checked_by_the_constructor_too(name: str) -> None:
    rule = THRESHOLDS[name]
    shares = set(inspect.signature(rule).parameters) & {"q", "lost", "share"} | (
        {"alpha"} if name != "adaptive" else set()
    )
    for key in shares & set(inspect.signature(rule).parameters):
        more = {"clean": np.zeros(9)} if name == "conformal" else {}
        for value in (0, 1, -1, float("nan")):
            with pytest.raises(UsageError, match=rf"{name} got {key}=.*: give a number strictly between 0 and 1"):
                rule(**{key: value, **more})


def test_the_clean_file_is_read_and_errors_name_it(tmp_path: object) -> None:
    import pathlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = pathlib.Path(str(tmp_path))
    clean = np.random.default_rng(0).normal(size=150)
    pq.write_table(pa.table({"row": np.arange(150), "score": clean}), folder / "scores.parquet")
    from_file = parse(f"conformal:{folder}/scores.parquet").cut(np.zeros(1))
    assert from_file == Conformal(clean).cut(np.zeros(1))
    one, both = ["rows"] * 150, ["rows"] * 149 + ["preference"]
    pq.write_table(pa.table({"score": clean, "group": one}), folder / "one.parquet")
    assert parse(f"conformal:{folder}/one.parquet").cut(np.zeros(1)) == from_file
    pq.write_table(pa.table({"score": clean, "group": both}), folder / "both.parquet")
    with pytest.raises(DataError, match=r"both\.parquet.* 2 groups of rows \(preference, rows\)"):
        parse(f"conformal:{folder}/both.parquet").cut(np.zeros(1))
    (folder / "text.parquet").write_text("no parquet")
    pq.write_table(pa.table({"row": np.arange(3)}), folder / "other.parquet")
    for name, what in (("none", "not a file"), ("text", "could not be read"), ("other", "could not be read")):
        with pytest.raises(DataError, match=rf"{name}\.parquet.*{what}.*scores\.parquet of a scan of clean rows"):
            parse(f"conformal:{folder}/{name}.parquet").cut(np.zeros(1))


def test_a_cut_between_rows_of_known_kind_looks_at_no_row_of_the_data() -> None:
    cuts = {made("anchored").cut(values, None, KNOWN).value for values in SHAPES.values()}
    # 90 % of the harmless lie below 0.4, 85 % of the harmful above 0.72: the cut is halfway, unless that is too little.
    assert len(cuts) == 1 and cuts.pop() == pytest.approx((0.4 + 0.72) / 2)
    near = Anchors(KNOWN.harmful - 0.5, KNOWN.harmless)
    assert made("anchored").cut(np.zeros(3), None, near).value == 0.5


@pytest.mark.parametrize("known", [None, Anchors(np.zeros(0), np.ones(5)), Anchors(np.ones(5), np.zeros(0))])
def test_without_rows_of_known_kind_it_says_what_to_do(known: Anchors | None) -> None:
    with pytest.raises(UsageError, match=r"'anchored' needs scores of rows of known kind.*selector screen"):
        made("anchored").cut(np.zeros(3), None, known)
