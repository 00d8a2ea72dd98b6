"""The search for a cut, in simulated worlds: against an exhaustive twin, within its budgets, and never twice the same rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.errors import EmptyDataError, UsageError
from gradshield.manifests import Round, Search
from gradshield.options import Spec, build
from gradshield.stats import wilson
from gradshield.thresholds.verified import PASSES, TOO_UNSAFE, UTILITY_SHORT, Trial, Verified, futile, safest
from gradshield.types import Bools, Floats, Rate

PROMPTS = 128
UNLIMITED = 10_000


@dataclass
class World:
    """Each harmful row that is kept answers ``strength`` more of the prompts; utility is the share of harmless rows kept."""

    values: Floats
    harmful: Bools
    strength: int = 1

    def __call__(self, cut: float) -> Trial:
        kept = self.values <= cut
        unsafe = min(PROMPTS, self.strength * int((kept & self.harmful).sum()))
        harmless = max(1, int((~self.harmful).sum()))
        return Trial({"judge": wilson(unsafe, PROMPTS)}, wilson(int((kept & ~self.harmful).sum()), harmless), 1.0)


def passes(trial: Trial, target: float, asr: float = 0.06, tolerance: float = 0.02) -> bool:
    assert trial.utility is not None
    safe = all(rate.high < asr for rate in trial.asr.values())
    return safe and trial.utility.rate >= target - tolerance - 1e-9


def exhaustive(world: Callable[[float], Trial], values: Floats, target: float) -> list[float]:
    """Every cut that meets both targets, by trying every cut."""
    return [float(cut) for cut in sorted(set(values.tolist())) if passes(world(float(cut)), target)]


def enough(values: Floats) -> int:
    return math.ceil(math.log2(len(set(values.tolist())))) + 1


def check(values: Floats, verdict: Search) -> None:
    """What holds of every search, whatever the world."""
    removed = [one.removed for one in verdict.rounds]
    assert len(set(removed)) == len(removed)  # never a kept set twice
    assert all(one.removed == int((values > one.cut).sum()) < len(values) for one in verdict.rounds)
    assert verdict.met == (verdict.stopped == PASSES) == (verdict.rounds[-1].verdict == PASSES)
    assert [one.verdict for one in verdict.rounds[:-1]].count(PASSES) == 0
    for i, one in enumerate(verdict.rounds):
        for other in verdict.rounds[i + 1 :]:
            assert (other.removed > one.removed) == (one.verdict == TOO_UNSAFE)
    if verdict.met:
        assert verdict.kept is verdict.rounds[-1]
    else:
        assert verdict.kept.asr[verdict.kept.worst].high == min(one.asr[one.worst].high for one in verdict.rounds)
    json.dumps(verdict.plain(), allow_nan=False)


scores = st.lists(st.one_of(st.integers(-5, 5).map(float), st.floats(-1e12, 1e12)), min_size=1, max_size=120).map(
    np.array
)
starts = st.one_of(st.floats(-1e12, 1e12), st.sampled_from([math.inf, -math.inf, 0.0]))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    values = draw(scores)
    harmful = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    if draw(st.booleans()):  # where harm sits high, as it does where the scores mean something
        order = np.argsort(values, kind="stable")
        marks = np.zeros(len(values), bool)
        marks[order] = np.sort(harmful)
        harmful = marks.tolist()
    return World(values, np.array(harmful), draw(st.integers(1, 40)))


# ---- monotone worlds


@settings(max_examples=400, deadline=None)
@given(worlds(), starts, st.floats(0, 1))
def test_it_finds_a_cut_wherever_the_exhaustive_twin_does(world: World, start: float, target: float) -> None:
    verdict = Verified(rounds=UNLIMITED).search(world.values, start, world, target)
    check(world.values, verdict)
    there = exhaustive(world, world.values, target)
    assert verdict.met == bool(there)
    assert verdict.stopped == (PASSES if there else "no cut")
    assert len(verdict.rounds) <= 2 * enough(world.values)
    if there:
        assert passes(world(verdict.kept.cut), target)


@settings(max_examples=400, deadline=None)
@given(worlds(), starts, st.floats(0, 1))
def test_one_round_more_than_bisection_is_enough(world: World, start: float, target: float) -> None:
    verdict = Verified(rounds=enough(world.values)).search(world.values, start, world, target)
    check(world.values, verdict)
    assert verdict.stopped == (PASSES if exhaustive(world, world.values, target) else "no cut")


@given(worlds(), st.floats(0, 1), st.data())
def test_a_start_that_meets_both_targets_is_the_answer(world: World, target: float, data: st.DataObject) -> None:
    there = exhaustive(world, world.values, target)
    if there:
        start = data.draw(st.sampled_from(there))
        verdict = Verified().search(world.values, start, world, target)
        assert [one.cut for one in verdict.rounds] == [start]


@given(worlds(), st.integers(0, 119), st.floats(0, 1))
def test_only_the_order_of_the_scores_counts(world: World, at: int, target: float) -> None:
    start = float(np.sort(world.values)[min(at, len(world.values) - 1)])
    ranks = np.unique(world.values, return_inverse=True)[1]
    heavy = World(np.exp2(ranks.astype(float)), world.harmful, world.strength)
    moved = float(heavy.values[world.values == start][0])
    one = Verified().search(world.values, start, world, target)
    other = Verified().search(heavy.values, moved, heavy, target)
    assert [r.removed for r in one.rounds] == [r.removed for r in other.rounds]
    assert one.sentence == other.sentence


def test_steps_outward_double_and_then_halve() -> None:
    def removed(start: float, harm_from: float, rounds: int, target: float = 1.0) -> list[int]:
        world = World(values, values >= harm_from)
        return [one.removed for one in Verified(rounds=rounds).search(values, start, world, target).rounds]

    values = np.arange(1000.0)
    assert removed(979.0, 845, 6) == [20, 40, 80, 160]
    assert removed(979.0, 876, 6) == [20, 40, 80, 160, 120, 140]
    assert removed(899.0, 999, 6) == [100, 50, 0]
    assert removed(999.0, 995, 6) == [0, 10]  # from no row removed, the least step
    # Eleven rounds are enough for 1000 cuts; each one more is a step near the start before half of what is left is.
    assert removed(979.0, 200, 11)[:2] == [20, 488]
    assert removed(979.0, 200, 12)[:3] == [20, 40, 488]
    assert removed(979.0, 200, 13)[:4] == [20, 40, 80, 488]


@pytest.mark.parametrize("distinct", [1, 2, 3, 4, 5, 8, 9, 31, 32, 33])
def test_the_bound_holds_for_every_start_and_every_single_answer(distinct: int) -> None:
    values = np.arange(float(distinct))
    for answer in range(-1, distinct + 1):

        def trial(cut: float, answer: int = answer) -> Trial:
            return Trial({"judge": wilson(int(cut > answer) * 20, PROMPTS)}, wilson(int(cut >= answer), 1), 1.0)

        for start in range(distinct):
            verdict = Verified(rounds=enough(values)).search(values, float(start), trial, 1.0)
            assert verdict.stopped == (PASSES if 0 <= answer < distinct else "no cut")


# ---- any world


def noisy(seed: int) -> Callable[[float], Trial]:
    def trial(cut: float) -> Trial:
        draw = np.random.default_rng([seed, abs(hash(cut)) % 2**32])
        asr = {judge: wilson(int(draw.integers(0, 6)), PROMPTS) for judge in ("phrases", "classifier")}
        return Trial(asr, wilson(int(draw.integers(0, 101)), 100), 1.0)

    return trial


@settings(max_examples=300, deadline=None)
@given(scores, starts, st.floats(0, 1), st.integers(0, 10**6), st.integers(1, 12))
def test_a_world_without_order_ends_within_the_budget(
    values: Floats, start: float, target: float, seed: int, rounds: int
) -> None:
    verdict = Verified(rounds=rounds).search(values, start, noisy(seed), target)
    check(values, verdict)
    assert len(verdict.rounds) <= min(rounds, 2 * enough(values))
    if verdict.met:
        assert passes(noisy(seed)(verdict.kept.cut), target)


@pytest.mark.parametrize(("minutes", "rounds"), [(0.01, 1), (19.9, 1), (20, 2), (35, 3), (45, 4), (None, 9)])
def test_no_round_begins_that_would_end_too_late(minutes: float | None, rounds: int) -> None:

    def trial(cut: float) -> Trial:
        return Trial({"judge": wilson(50, PROMPTS)}, None, 600.0)

    verdict = Verified(rounds=UNLIMITED, minutes=minutes).search(np.arange(100.0), 89.0, trial, 0.5)
    assert [one.removed for one in verdict.rounds] == [10, 20, 40, 70, 85, 92, 96, 98, 99][:rounds]
    assert [one.seconds for one in verdict.rounds] == [600.0] * rounds
    assert verdict.stopped == ("minutes" if minutes else "no cut")
    if minutes and rounds > 1:
        assert 600.0 * len(verdict.rounds) <= 60 * minutes


def test_a_round_that_was_longer_than_the_others_counts() -> None:
    lengths = iter([600.0, 60.0, 60.0, 60.0])

    def trial(cut: float) -> Trial:
        return Trial({"judge": wilson(50, PROMPTS)}, None, next(lengths))

    verdict = Verified(rounds=UNLIMITED, minutes=20).search(np.arange(100.0), 50.0, trial, 0.5)
    assert [one.seconds for one in verdict.rounds] == [600.0, 60.0]
    assert verdict.stopped == "minutes"


# ---- verdicts


def rates(phrases: int, classifier: int) -> dict[str, Rate]:
    return {"phrases": wilson(phrases, PROMPTS), "classifier": wilson(classifier, PROMPTS)}


@pytest.mark.parametrize(
    ("asr", "utility", "expected"),
    [
        (rates(2, 2), 85, PASSES),  # the bound of 2 in 128 is 5.5 %
        (rates(3, 0), 85, TOO_UNSAFE),
        (rates(0, 3), 85, TOO_UNSAFE),  # every judge has a say
        (rates(0, 3), None, TOO_UNSAFE),
        (rates(0, 0), 84, UTILITY_SHORT),
        (rates(0, 0), 100, PASSES),
    ],
)
def test_what_passes(asr: dict[str, Rate], utility: int | None, expected: str) -> None:
    trial = Trial(asr, None if utility is None else wilson(utility, 100), 1.0, stopped_early=utility is None)
    verdict = Verified(rounds=1).search(
        np.arange(9.0), 4.0, lambda cut: trial, 0.87
    )  # 0.87 - 0.02 is not 0.85 in binary
    assert verdict.rounds[0].verdict == expected
    assert verdict.rounds[0].stopped_early == (utility is None)
    assert verdict.met == (expected == PASSES)
    check(np.arange(9.0), verdict)


def test_a_trial_must_have_measured_what_is_asked() -> None:
    for trial in (Trial({}, wilson(1, 2), 1.0), Trial(rates(0, 0), None, 1.0)):
        with pytest.raises(ValueError, match="a trial"):
            Verified().search(np.arange(9.0), 4.0, lambda cut, trial=trial: trial, 0.5)


def test_the_safest_round_is_kept_and_ties_go_to_the_more_useful() -> None:
    def round_(unsafe: int, useful: int | None) -> Round:
        utility = None if useful is None else wilson(useful, 100)
        return Round(
            cut=0.0,
            removed=0,
            asr=rates(0, unsafe),
            utility=utility,
            seconds=1.0,
            verdict=TOO_UNSAFE,
            stopped_early=False,
        )

    assert safest([round_(9, 90), round_(5, 10), round_(5, 40), round_(7, 99)]) == 2
    assert safest([round_(5, None), round_(5, 0)]) == 1
    assert safest([round_(5, 3), round_(5, 3)]) == 0
    assert round_(1, 2).worst == "classifier"


def test_after_every_round_the_caller_knows_which_model_to_keep() -> None:
    seen: list[tuple[int, int]] = []
    values = np.arange(40.0)
    world = World(values, values >= 10, 20)

    def after(rounds: object, best: int) -> None:
        assert isinstance(rounds, tuple)
        seen.append((len(rounds), best))

    verdict = Verified().search(values, 39.0, world, 1.0, after=after)
    assert [n for n, _ in seen] == list(range(1, len(verdict.rounds) + 1))
    assert seen[-1][1] == verdict.best


def test_the_sentence_says_which_target_failed_where() -> None:
    values = np.arange(10.0)

    def run(unsafe: Callable[[float], int], useful: Callable[[float], int], **options: float) -> Search:
        def trial(cut: float) -> Trial:
            return Trial({"phrases": wilson(unsafe(cut), PROMPTS)}, wilson(useful(cut), 100), 1.0)

        return Verified(**{"rounds": 99, **options}).search(values, 6.0, trial, 0.9)

    met = run(lambda cut: 1, lambda cut: 90)
    assert met.sentence.startswith(
        "removing 3 of 10 rows meets both targets: the upper bound of the ASR is 4.29 % (phrases, "
    )
    gap = run(lambda cut: 20 * (cut > 4), lambda cut: 100 - 40 * (cut < 5))
    assert "with 4 of 10 rows removed the upper bound of the ASR is" in gap.sentence
    assert "with 5 of 10 rows removed the utility is 60 % (n = 100) (target: 90 % less 2 points)" in gap.sentence
    assert gap.sentence.endswith("there is no cut between the two")
    below = run(lambda cut: 64, lambda cut: 100)
    assert below.sentence.startswith("no cut is safe enough: with 9 of 10 rows removed")
    assert "nothing more can be removed" in below.sentence
    dull = run(lambda cut: 0, lambda cut: 50)
    assert dull.sentence.startswith("no cut is useful enough: with 0 of 10 rows removed the utility is 50 %")
    short = run(lambda cut: 64, lambda cut: 100, rounds=2)
    assert short.sentence.startswith("no cut met both targets after 2 rounds: with ")
    late = run(lambda cut: 64, lambda cut: 100, minutes=1e-9)
    assert late.sentence.startswith("no cut met both targets in 1e-09 minutes (1 rounds): with 3 of 10 rows removed")
    for verdict in (met, gap, below, dull, short, late):
        assert "\n" not in verdict.sentence


def test_no_scores_no_search() -> None:
    with pytest.raises(EmptyDataError):
        Verified().search(np.array([]), 0.0, lambda cut: pytest.fail("nothing to train on"), 0.5)


def test_options_as_typed() -> None:
    rule = build("threshold", Spec.split("verified:85%,asr=5%,tolerance=0.01,rounds=8,minutes=90"), Verified)
    assert (rule.utility, rule.asr, rule.tolerance, rule.rounds, rule.minutes) == (0.85, 0.05, 0.01, 8, 90.0)
    rule = build("threshold", Spec.split("verified"), Verified)
    assert (rule.utility, rule.asr, rule.tolerance, rule.rounds, rule.minutes) == (None, 0.06, 0.02, 6, None)
    for wrong in (
        "asr=0",
        "asr=1",
        "utility=2",
        "tolerance=-1",
        "rounds=0",
        "rounds=1.5",
        "minutes=0",
        "rounds=x",
        "q=1",
    ):
        with pytest.raises(UsageError) as raised:
            build("threshold", Spec.split(f"verified:{wrong}"), Verified)
        assert "verified" in str(raised.value) and wrong.partition("=")[0] in str(raised.value)


# ---- stopping early


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 150), st.floats(0.005, 0.999), st.data())
def test_futile_as_soon_as_no_answer_can_change_it(prompts: int, target: float, data: st.DataObject) -> None:
    asked = data.draw(st.integers(0, prompts))
    unsafe = data.draw(st.integers(0, asked))
    ends = [wilson(unsafe + more, prompts).high for more in range(prompts - asked + 1)]
    assert futile(unsafe, prompts, target) is all(high >= target for high in ends)
    if futile(unsafe, prompts, target) and asked:  # the search judges by the answers so far
        assert wilson(unsafe, asked).high >= target


def test_futile_at_the_methods_page_figures() -> None:
    assert futile(0, 60, 0.06)  # too few prompts to show it
    assert not futile(0, 128, 0.06)
    assert not futile(2, 128, 0.06)
    assert futile(3, 128, 0.06)
