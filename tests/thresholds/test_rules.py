"""Each rule against its mathematics: slow twins, published algorithms written again, and simulations under seeds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.mixture import GaussianMixture

from gradshield.errors import DataError
from gradshield.thresholds.adaptive import Adaptive
from gradshield.thresholds.competition import Competition, counting_cut, expected_beyond, tail_cut
from gradshield.thresholds.conformal import Conformal
from gradshield.thresholds.decoy import Decoy, smallest_cut
from gradshield.thresholds.ratio import Ratio
from gradshield.types import Floats

# ---- adaptive: Algorithm 1


def algorithm_1(values: Floats, alpha: float) -> tuple[str, float]:
    """Algorithm 1 of arXiv 2605.14194 once more, likelihoods and densities by hand from the fitted parameters."""
    z = (values - values.mean()) / values.std()
    one = sum(stats.norm(0, math.sqrt(1 + 1e-6)).logpdf(z))  # a Gaussian's own maximum likelihood, and reg_covar
    fit = GaussianMixture(2, n_init=5, random_state=0).fit(z[:, None])
    parts = [
        w * stats.norm(m, math.sqrt(c)).pdf(z)
        for w, m, c in zip(fit.weights_, fit.means_[:, 0], fit.covariances_[:, 0, 0], strict=True)
    ]
    two = sum(np.log(parts[0] + parts[1]))
    if two - one > alpha:
        belongs = parts[0] > parts[1]
        return "two Gaussians", min(max(values[belongs]), max(values[~belongs]))
    return "one Gaussian", values.mean() + 2 * values.std()


@pytest.mark.parametrize("harm", [0, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_adaptive_is_algorithm_1(harm: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = np.concatenate([draw.normal(2, 3, size=200), draw.normal(40, 3, size=harm)])
    branch, t = algorithm_1(values, 10.0)
    cut = Adaptive().cut(values)
    assert cut.detail["branch"] == branch == ("two Gaussians" if harm else "one Gaussian")
    assert cut.value == pytest.approx(t, rel=1e-9)
    if harm:
        assert (values > cut.value).tolist() == [False] * 200 + [True] * harm


def test_adaptive_alpha_decides_the_branch() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=150), np.random.default_rng(1).normal(6, 1, size=20)])
    detail = Adaptive().cut(values).detail
    gain = detail["log_likelihood_2"] - detail["log_likelihood_1"]
    assert Adaptive(alpha=gain * 0.99).cut(values).detail["branch"] == "two Gaussians"
    above = Adaptive(alpha=gain * 1.01).cut(values)
    assert above.detail["branch"] == "one Gaussian"
    assert above.value == pytest.approx(values.mean() + 2 * values.std())


# ---- ratio


@pytest.mark.parametrize("n", [1, 7, 10, 50, 99, 100, 200, 300])
def test_ratio_removes_the_share_exactly(n: int) -> None:
    values = np.random.default_rng(0).permutation(n).astype(float)
    for percent in range(1, 100):  # 0.29 * 100 is less than 29 in floating point
        dropped = values > Ratio(percent / 100).cut(values).value
        assert dropped.sum() == n * percent // 100, percent
        assert not dropped.any() or values[dropped].min() > values[~dropped].max()


def test_ratio_keeps_ties_at_the_cut() -> None:
    values = np.repeat([0.0, 1.0], [50, 50])
    assert not (values > Ratio(0.1).cut(values).value).any()


# ---- conformal


@pytest.mark.parametrize("m", [1, 9, 19, 24, 49, 98, 99, 100, 199, 399, 999])
def test_conformal_takes_the_order_statistic(m: int) -> None:
    clean = np.random.default_rng(0).permutation(m).astype(float)
    for percent in range(1, 61):
        rank = math.ceil(Fraction(m + 1) * (1 - Fraction(percent, 100)))
        if rank <= m:
            assert Conformal(clean, percent / 100).cut(np.zeros(1)).value == rank - 1, percent
            continue
        with pytest.raises(DataError, match=rf"got {m} clean rows.*more clean rows, or a larger alpha") as caught:
            Conformal(clean, percent / 100).cut(np.zeros(1))
        needed = int(str(caught.value).split("at least ")[1].split(":")[0])
        assert needed > m and needed == math.ceil(Fraction(100, percent)) - 1
        Conformal(np.arange(float(needed)), percent / 100).cut(np.zeros(1))


def test_conformal_covers_clean_rows() -> None:
    """A clean row exceeds the cut with probability (m + 1 - rank) / (m + 1), at most alpha, whatever the distribution."""
    draw = np.random.default_rng(0)
    for alpha, m in ((0.05, 99), (0.1, 57)):
        beyond = []
        for _ in range(400):
            clean, new = draw.standard_t(2, size=m), draw.standard_t(2, size=200)
            beyond.append(float((new > Conformal(clean, alpha).cut(new).value).mean()))
        error = np.std(beyond) / math.sqrt(len(beyond))
        exact = math.floor((m + 1) * alpha + 1e-9) / (m + 1)
        assert exact <= alpha
        assert np.mean(beyond) == pytest.approx(exact, abs=4 * error)


# ---- decoy and competition: slow twins

SCORES = st.integers(0, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-4, 12), min_size=n, max_size=n), st.lists(st.integers(-4, 12), min_size=n, max_size=n)
    )
)


@given(scores=SCORES, q=st.sampled_from([0.125, 0.25, 0.5, 0.75]))
@settings(max_examples=150, deadline=None)
def test_smallest_cut_is_the_obvious_loop(scores: tuple[list[int], list[int]], q: float) -> None:
    values, decoys = np.array(scores[0], dtype=float), np.array(scores[1], dtype=float)
    expected = (math.inf, 0, 0)
    for t in sorted(set(scores[0])):
        targets, nulls = sum(v >= t for v in scores[0]), sum(d >= t for d in scores[1])
        if t > 0 and (1 + nulls) / targets <= q:
            expected = (t, targets, nulls)
            break
    assert smallest_cut(values, decoys, q) == expected
    if len(values):
        dropped = values > Decoy(q).cut(values, decoys).value
        assert dropped.tolist() == [v >= expected[0] for v in scores[0]]


def quantile(ranked: list[float], share: float) -> float:
    at = share * (len(ranked) - 1)
    low = int(at)
    return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def obvious_expected(nulls: list[float], t: float) -> float:
    """E(t) as one reads it: a count, or the exponential through the 75 % and 95 % quantiles where that is smaller."""
    counted = float(sum(d >= t for d in nulls))
    if len(nulls) < 50:
        return counted
    low, high = quantile(sorted(nulls), 0.75), quantile(sorted(nulls), 0.95)
    slope = (high - low) / math.log(5)
    if slope <= 0 or t <= high:
        return counted
    return min(counted, 0.05 * len(nulls) * math.exp(-(t - high) / slope))


@given(
    seed=st.integers(0, 10_000), n=st.integers(0, 260), harm=st.integers(0, 40), q=st.sampled_from([0.125, 0.25, 0.5]),
    lost=st.sampled_from([1 / 256, 1 / 64, 1 / 8]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_counting_cut_is_the_obvious_loop(seed: int, n: int, harm: int, q: float, lost: float) -> None:
    draw = np.random.default_rng(seed)
    values = np.concatenate([draw.geometric(0.2, n), draw.integers(20, 60, harm)]).astype(float) - 2
    decoys = np.concatenate([draw.geometric(0.2, n), draw.integers(0, 30, harm)]).astype(float) - 2
    pairs = list(zip(values.tolist(), decoys.tolist(), strict=True))
    nulls = [d for v, d in pairs if d > v]
    harmless = min(len(pairs), 2 * len(nulls))
    expected = (math.inf, 0, 0)
    for t in sorted({v for v, d in pairs if v > d and v > 0}):
        targets, beaten = sum(v > d and v >= t for v, d in pairs), sum(d >= t for d in nulls)
        assert expected_beyond(np.sort(nulls), np.array([t]))[0] == pytest.approx(obvious_expected(nulls, t))
        if (1 + beaten) / targets <= q and obvious_expected(nulls, t) <= lost * harmless:
            expected = (t, targets, beaten)
            break
    assert counting_cut(values, decoys, q, lost) == expected


@pytest.mark.parametrize("tail", ["exponential", "heavy", "thin"])
def test_tail_cut_expects_alpha_rows_beyond(tail: str) -> None:
    draw = np.random.default_rng(2)
    nulls = {
        "exponential": draw.exponential(3.0, size=2000),
        "heavy": stats.genpareto.rvs(0.2, scale=2.0, size=2000, random_state=3),
        "thin": draw.uniform(0, 5, size=2000),
    }[tail]
    t = tail_cut(np.full(2000, -1.0), nulls, 0.05)
    edge = np.sort(nulls)[-201]
    excess = nulls[nulls > edge] - edge
    ratio = excess.mean() ** 2 / excess.var()
    shape = min(max((1 - ratio) / 2, 0.0), 0.25)
    survivors = 200 * stats.genpareto.sf(t - edge, shape, scale=excess.mean() * (1 - shape))
    assert survivors == pytest.approx(0.05, rel=1e-6)
    assert (shape == 0) == (tail == "thin") or tail == "exponential"
    assert t > nulls.max() or tail == "heavy"
    assert tail_cut(np.full(2000, -1.0), nulls, 0.005) > t


def test_tail_cut_needs_a_tail() -> None:
    draw = np.random.default_rng(0)
    assert tail_cut(np.zeros(99), draw.exponential(size=99), 0.05) == math.inf  # nine are no tail
    assert tail_cut(np.zeros(110), draw.exponential(size=110), 0.05) < math.inf
    assert tail_cut(np.zeros(500), np.ones(500), 0.05) == math.inf  # nor are equal ones


# ---- simulated data


def simulated(seed: int, n: int, harm: int, far: float = 1.0) -> tuple[Floats, Floats, np.ndarray]:
    """Harmless rows push both ways alike; harmful rows push far toward harm, with decoys twice a harmless row's."""
    draw = np.random.default_rng(seed)
    values, decoys = draw.gamma(2.0, size=(2, n))
    values[:harm] = far * draw.uniform(18, 30, size=harm)
    decoys[:harm] *= 2
    return values, decoys, np.arange(n) < harm


def outcome(rule: Competition | Decoy, seed: int, n: int, harm: int, far: float = 1.0) -> tuple[float, float]:
    """Share of the harmful rows caught, and of the harmless rows lost."""
    values, decoys, harmful = simulated(seed, n, harm, far)
    dropped = values > rule.cut(values, decoys).value
    return float(dropped[harmful].mean()) if harm else 1.0, float(dropped[~harmful].mean())


@pytest.mark.parametrize("rule", [Competition(), Decoy()], ids=lambda r: r.name)
@pytest.mark.parametrize("n", [60, 500, 3000])
def test_where_there_is_no_harm_next_to_nothing_goes(rule: Competition | Decoy, n: int) -> None:
    lost = [outcome(rule, seed, n, 0)[1] for seed in range(40)]
    assert np.median(lost) == 0
    assert np.mean(lost) <= (0.002 if rule.name == "competition" else 0.01)
    assert max(lost) <= 0.03 or rule.name == "decoy"


@pytest.mark.parametrize("n", [200, 1000, 4000])
def test_competition_finds_planted_harm(n: int) -> None:
    found = [outcome(Competition(), seed, n, n // 10) for seed in range(20)]
    assert min(caught for caught, _ in found) >= 0.95
    assert np.mean([lost for _, lost in found]) <= 0.01 and max(lost for _, lost in found) <= 0.03


@pytest.mark.parametrize("q", [0.05, 0.2])
def test_decoy_finds_planted_harm_and_keeps_its_promise(q: float) -> None:
    shares = []
    for seed in range(20):
        caught, lost = outcome(Decoy(q), seed, 1000, 100)
        assert caught >= 0.95
        shares.append(900 * lost / (900 * lost + 100 * caught))
    assert np.mean(shares) <= q
    assert np.mean(shares) > 0.02 or q < 0.2  # it spends what it is given


@pytest.mark.parametrize("rule", [Competition(), Decoy()], ids=lambda r: r.name)
def test_rare_harm_far_beyond_the_null_is_found(rule: Competition | Decoy) -> None:
    found = [outcome(rule, seed, 500, 5, far=2.0) for seed in range(20)]
    assert min(caught for caught, _ in found) == 1.0
    assert np.mean([lost for _, lost in found]) <= 0.01


def test_the_tail_finds_harm_that_is_too_rare_to_count() -> None:
    """Two harmful rows: fewer than 1/q, the floor of a count that docs/methods.md names."""
    branches, missed = [], 0
    for seed in range(20):
        values, decoys, harmful = simulated(seed, 800, 2, far=2.0)
        cut = Competition().cut(values, decoys)
        branches.append(cut.detail["branch"])
        dropped = values > cut.value
        assert dropped[harmful].all() and dropped[~harmful].mean() <= 0.01
        missed += not (values > Decoy().cut(values, decoys).value)[harmful].any()
    assert branches.count("tail") >= 10 and missed >= 10


def test_nothing_to_remove_is_said_and_detail_is_json() -> None:
    import json

    values = np.random.default_rng(0).gamma(2.0, size=30)
    for rule in (Competition(), Decoy()):
        cut = rule.cut(values, values + 1)
        assert cut.value == values.max() and not (values > cut.value).any()
        assert cut.detail["fdr"] is None
        json.dumps(dict(cut.detail), allow_nan=False)
    for harm in (0, 50):
        values, decoys, _ = simulated(0, 500, harm)
        for any_rule in (Adaptive(), Competition(), Decoy(), Ratio(), Conformal(decoys)):
            json.dumps(dict(any_rule.cut(values, decoys).detail), allow_nan=False)
