"""A comparison as Markdown and page: pooled right, honest about rivals and gaps, and safe with any name."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.comparison import outcome
from gradshield.comparison import page as compared
from gradshield.comparison.grid import CellResult
from gradshield.comparison.page import LEVELS, level
from gradshield.manifests import Round, Search
from gradshield.report import sheet
from gradshield.stats import Difference, wilson
from gradshield.types import Rate
from tests.report.pages import CONFIG, EVIL, assert_tame, comparison, make_cell, shown, specs


def slow_wilson(k: int, n: int) -> tuple[float, float]:
    """The two values of p at which |k/n - p| is 1.96 standard errors, found by halving."""

    def bound(toward: float) -> float:
        inside, outside = k / n, toward
        for _ in range(200):
            p = (inside + outside) / 2
            if (k / n - p) ** 2 <= 1.959963984540054**2 * p * (1 - p) / n:
                inside = p
            else:
                outside = p
        return inside

    return bound(0.0), bound(1.0)


counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None, max_examples=50)
@given(st.lists(counts, min_size=1, max_size=6))
def test_rates_are_pooled_by_their_counts(found: list[tuple[int, int]]) -> None:
    """Against every answer written out one by one."""
    answers = [i < k for k, n in found for i in range(n)]
    mine = outcome.pooled([wilson(k, n) for k, n in found])
    assert mine is not None
    assert mine.n == len(answers)
    assert mine.rate == pytest.approx(sum(answers) / len(answers))
    assert (mine.low, mine.high) == pytest.approx(slow_wilson(sum(answers), len(answers)), abs=1e-9)
    assert mine.least == min(k / n for k, n in found)
    assert mine.most == max(k / n for k, n in found)


def test_means_of_real_scores_are_not_taken_for_counts() -> None:
    """Their k is rounded, and Wilson of rounded counts would say something else."""
    scores = Rate(0.437, 0.40, 0.48, 100, 44)
    one = outcome.pooled([scores])
    assert one is not None
    assert (one.rate, one.low, one.high) == pytest.approx((0.437, 0.40, 0.48))
    both = outcome.pooled([scores, Rate(0.6, 0.5, 0.7, 300, 180)])
    assert both is not None
    assert both.rate == pytest.approx((100 * 0.437 + 300 * 0.6) / 400)
    assert both.rate - both.low == pytest.approx(math.hypot(0.25 * 0.037, 0.75 * 0.1))
    assert both.high - both.rate == pytest.approx(math.hypot(0.25 * 0.043, 0.75 * 0.1))


def test_what_was_not_measured_is_left_out() -> None:
    assert outcome.pooled([None]) is None
    left = outcome.pooled([None, wilson(1, 10)])
    assert left is not None
    assert (left.n, left.cells) == (10, 1)


def test_totals_against_loops() -> None:
    cells = [
        make_cell("screen", seed, k, k2, harm=harm, ratio=ratio)
        for seed, harm, ratio, k, k2 in (
            (0, "none", 0.0, 100, 100), (0, "explicit", 0.1, 8, 12), (1, "explicit", 0.1, 12, 13), (0, "own", 0.0, 30, 2),
        )
    ]  # fmt: skip
    (one,) = outcome.totals(cells)
    risky = [cell for cell in cells if cell.harm != "none"]
    for judge in ("refusal-phrases", "lab-classifier"):
        rates = [cell.judges[judge].rate for cell in cells]
        assert one.worst[judge].rate == max(rates)
        assert one.safe[judge] == (sum(value <= 0.06 for value in rates), 4)
        assert one.mean_asr[judge] == pytest.approx(sum(c.judges[judge].rate for c in risky) / 3)
        assert one.harmed[judge].n == 600
    assert one.held == (1, 4)  # both judges of one cell: 8 and 12 of 200
    assert one.caught is not None
    assert (one.caught.n, one.caught.rate) == (400, 0.9)


def test_differences_are_averaged_over_cells() -> None:
    found = [Difference(d, d - 0.03, d + 0.04, 200, 0.95, "tango") for d in (-0.02, 0.01, -0.04)]
    mine = outcome.mean_difference([*found, None])
    assert mine is not None
    assert mine.rate == pytest.approx(-0.05 / 3)
    assert mine.rate - mine.low == pytest.approx(math.sqrt(3) * 0.03 / 3)
    assert mine.high - mine.rate == pytest.approx(math.sqrt(3) * 0.04 / 3)


def square(markdown: str, defence: str) -> str:
    """The first table row of a defence."""
    return next(line for line in markdown.splitlines() if line.startswith(f"| `{defence}` |"))


def test_the_markdown_says_the_pooled_figures_of_each_judge() -> None:
    text = compared.markdown(
        comparison([make_cell("screen", 0, 2, 20), make_cell("screen", 1, 6, 60), make_cell("none", 0, 180)])
    )
    low, high = slow_wilson(8, 400)
    other = slow_wilson(80, 400)
    phrases = f"2.0 [{100 * low:.1f}, {100 * high:.1f}]"
    classifier = f"20.0 [{100 * other[0]:.1f}, {100 * other[1]:.1f}]"
    assert f"{phrases} / {classifier} · 90.0<br>seeds 10.0–30.0 · 90.0–90.0" in square(text, "screen")
    assert "seeds" not in square(text, "none")
    assert "by refusal-phrases / lab-classifier" in text
    assert "3 trained models, 2.0 h" in text
    assert re.search(r"Where judges differ.*`screen`: lab-classifier 20\.0", text, re.S)
    assert "- Seeds: 0, 1\n" in text


def test_a_rival_that_is_safer_is_named_and_one_that_is_not_is_not() -> None:
    cells = [
        make_cell("screen", 0, 20), make_cell("better", 0, 0), make_cell("worse", 0, 90),
        make_cell("useful", 0, 18, utility=wilson(190, 200)), make_cell("elsewhere", 5, 0), make_cell("alike", 0, 19),
    ]  # fmt: skip
    standings, wins = outcome.against(outcome.mixes(cells))
    tally = {one.rival: (one.safer, one.less_safe, one.more_useful, one.clearly_more_useful) for one in standings}
    assert tally == {"better": (1, 0, 0, 0), "worse": (0, 1, 0, 0), "useful": (0, 0, 1, 0), "alike": (0, 0, 0, 0)}
    assert {(win.rival, win.judge) for win in wins} == {
        ("better", "refusal-phrases"), ("better", "lab-classifier"), ("useful", None)
    }  # fmt: skip
    text = compared.markdown(comparison(cells))
    assert "| ASR, refusal-phrases | 0.0 \\[0.0, 1.9\\] % | 10.0 \\[6.6, 14.9\\] % | clear |" in text
    assert "| utility | 95.0" in text
    assert "within the intervals" in text


def test_a_useful_rival_that_is_less_safe_wins_nothing() -> None:
    cells = [make_cell("screen", 0, 0), make_cell("loose", 0, 60, utility=wilson(200, 200))]
    standings, wins = outcome.against(outcome.mixes(cells))
    assert wins == []
    assert (standings[0].less_safe, standings[0].more_useful) == (1, 0)


def test_rivals_are_compared_over_the_seeds_that_both_have() -> None:
    cells = [make_cell("screen", 0, 0), make_cell("screen", 1, 150), make_cell("other", 0, 2)]
    _, wins = outcome.against(outcome.mixes(cells))
    assert wins == []


FAILURE = "every row scored above the cut: choose another cut"


def test_failed_missing_and_empty() -> None:
    bare = CellResult(task="t", harm="own", ratio=0.0, seed=0, defence="asft", seconds=1.0)
    failed = bare.model_copy(update={"defence": "loss", "failed": FAILURE})
    text = compared.markdown(comparison([make_cell("screen"), bare, failed]))
    assert "| `loss` | failed |" in text
    assert FAILURE in text
    assert "| `asft` | – / – · – |" in text
    page = sheet.render(compared.page(comparison([make_cell("screen"), bare, failed])))
    assert FAILURE in shown(page)
    for whole in (comparison([]), comparison([bare]), comparison([failed])):
        assert compared.markdown(whole)
        assert_tame(sheet.render(compared.page(whole)))


def verified(met: bool, rounds: int, **more: str) -> Search:
    done = [
        Round(cut=1.0 - i, removed=i, asr={"a": wilson(9 - i, 200), "b": wilson(9, 200)}, utility=None, seconds=1.0,
                    verdict="too unsafe", stopped_early=False)
        for i in range(rounds)
    ]  # fmt: skip
    found = {"met": met, "sentence": f"sentence of {rounds}", "stopped": "rounds", "best": 0, "rounds": done}
    return Search.model_validate(found | more)


def test_searches_come_with_their_rounds_and_those_that_met_nothing_first() -> None:
    cells = [
        make_cell("screen:verified", 0, verified=verified(True, 3)),
        make_cell("screen:verified", 1, verified=verified(False, 5)),
    ]
    text = compared.markdown(comparison(cells))
    assert "1 of 2 searches met both targets." in text
    assert text.index("sentence of 5") < text.index("sentence of 3")
    page = sheet.render(compared.page(comparison(cells)))
    assert page.count('<circle class="unsafe"') == 8


def test_hostile_names_are_only_text() -> None:
    cells = [
        make_cell(
            EVIL,
            0,
            3,
            task=EVIL,
            harm=EVIL,
            judges={EVIL: wilson(3, 200)},
            verified=verified(True, 1, sentence=EVIL),
        ),
        make_cell(EVIL, 1, failed=EVIL),
        make_cell("screen", 0, 50, task=EVIL, harm=EVIL, judges={EVIL: wilson(50, 200)}),
    ]
    config = CONFIG.model_dump() | {
        "model": EVIL, "base": EVIL, "training": {EVIL: EVIL}, "lora": {"peft_type": EVIL}, "requests": {"report": EVIL},
        "datasets": [{"name": EVIL, "train": EVIL, "task": EVIL, "metric": EVIL, "training": {EVIL: EVIL}}],
    }  # fmt: skip
    whole = comparison(cells, command=EVIL, versions={EVIL: EVIL}, defences={EVIL: EVIL}, config=config)
    assert_tame(sheet.render(compared.page(whole)))
    text = compared.markdown(whole)
    assert "\u202e" not in text
    outside = re.sub(r"(?<!\\)`[^`]*`", "", text)  # an escaped backtick begins no code
    assert "<script" not in outside
    assert "<img" not in outside
    assert "://" not in outside
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in rows if "sentence" not in line}
    heads = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|---")}
    assert bars <= heads


def test_two_thousand_cells_stay_readable() -> None:
    cells = [
        make_cell(f"d{d}", seed, d * 10, task=f"t{t}", harm=harm, ratio=ratio)
        for t in range(5) for harm, ratio in (("none", 0.0), ("explicit", 0.01), ("explicit", 0.1), ("covert", 0.1))
        for seed in range(5) for d in range(20)
    ]  # fmt: skip
    assert len(cells) == 2000
    whole = comparison(cells)
    text = compared.markdown(whole)
    assert len(text) < 200_000
    assert "t4" in text
    page = sheet.render(compared.page(whole))
    assert len(page.encode()) < 8_000_000
    assert len(specs(page)["trade"]["data"]) == 20


def test_tints_follow_the_asr() -> None:
    assert [level(end) for end in LEVELS] == list(range(len(LEVELS)))
    assert level(0.0) == 0
    assert level(1.0) == len(LEVELS)
    page = sheet.render(compared.page(comparison([make_cell("screen", 0, 2, 30)])))
    assert 'class="heat-3"' in page.partition("<table")[2]  # 15 % by the worse judge


@pytest.mark.parametrize(("k", "tone", "rival"), [(0, "pass", 40), (0, "pass", 0), (60, "fail", 60), (60, "fail", 0)])
def test_the_verdict_is_about_the_default(k: int, tone: str, rival: int) -> None:
    found = compared.page(comparison([make_cell("screen", 0, k), make_cell("asft", 0, rival)]))
    assert found.tone == tone
    assert ("asft is clearly safer somewhere" in found.verdict) == (k > rival)
    assert "screen cell" in found.standing


def test_a_grid_on_which_nothing_was_at_stake_is_no_pass() -> None:
    def page(*cells: CellResult) -> tuple[str, tuple[str, ...]]:
        found = compared.page(comparison(list(cells)))
        return found.tone, found.facts

    tone, facts = page(make_cell("screen", 0, 0), make_cell("none", 0, 12), make_cell("none", 0, 0, harm="none"))
    assert tone == "warn"
    assert "The undefended model stayed safe too: none is at 6 % or below in its one cell with harm" in facts[0]
    assert page(make_cell("screen", 0, 0), make_cell("none", 0, 13)) == ("pass", ())
    assert page(make_cell("screen", 0, 0), make_cell("none", 0, 0, 13)) == ("pass", ())  # by one judge it is not safe
    tone, facts = page(make_cell("screen"), make_cell("none", 0, 50), make_cell("none", 1, 0))
    assert tone == "pass"
    assert facts[0].startswith("In 1 of 2 cells with harm the undefended model")
    tone, facts = page(make_cell("screen"))
    assert "(none) was not measured" in facts[0]
    tone, facts = page(make_cell("screen", harm="none"), make_cell("none", 0, 50, harm="none"))
    assert tone == "warn"
    assert "No cell has harm in its rows" in facts[0]


def test_a_grid_on_which_nothing_was_learned_or_finished_is_no_pass() -> None:
    none = make_cell("none", 0, 90)
    useless = {"utility": wilson(8, 200)}
    found = compared.page(comparison([make_cell("screen", **useless), none.model_copy(update=useless)]))
    assert found.tone == "warn"
    assert "the highest utility of any defence is 4.0 %" in found.facts[0]
    found = compared.page(comparison([make_cell("screen", **useless), none]))
    assert (found.tone, found.facts) == ("pass", ())  # another defence did learn it
    other = make_cell("screen", task="sums", **useless)
    found = compared.page(comparison([make_cell("screen"), none, other]))
    assert found.tone == "warn"
    assert found.facts[0].startswith("No model learned sums:")
    found = compared.page(comparison([make_cell("screen"), none, make_cell("screen", 1, failed=FAILURE)]))
    assert found.tone == "warn"
    assert found.facts == ("1 of 2 screen cells failed and are not counted.",)
    assert "that finished" in found.standing
    text = compared.markdown(comparison([make_cell("screen", **useless), none.model_copy(update=useless)]))
    assert "- Caution: No model learned its task" in text
    assert "**Every screen cell is at 6 % or below, but read the cautions.**" in text


def test_a_safer_rival_of_no_use_is_named_with_its_utility() -> None:
    found = compared.page(comparison([make_cell("screen", 0, 60), make_cell("asft", 0, 0, utility=wilson(0, 200))]))
    assert "asft (utility 0.0 %) is clearly safer" in found.verdict


OWN = CONFIG.model_dump() | {
    "model": "some/model", "base": "some/base", "training": {"max_steps": 3}, "lora": {"r": 8}, "judges": ["typed"],
    "requests": {"report": "asked.jsonl"}, "answer_tokens": 12, "task_rows": 50,
    "datasets": [
        {"name": "news", "train": "rows.jsonl", "task": "held.jsonl", "training": {"num_train_epochs": 2}}
    ],
}  # fmt: skip


def test_the_training_is_described_on_the_page_and_in_the_markdown() -> None:
    whole = comparison([make_cell("screen", 2), make_cell("none", 10)], config=OWN)
    made = dict(compared.page(whole).made)
    wanted = {
        "Model": "some/model", "Model before its alignment": "some/base", "Training": "max steps 3",
        "Training on news": "num train epochs 2", "Adapter": "LoRA: rank 8", "Judges": "refusal-phrases, lab-classifier",
        "Requests": "report from asked.jsonl", "Longest answer": "12 tokens", "Seeds": "2, 10", "Rows of a dataset": "1,000",
        "Utility": "news by the metric of its rows; at most 50 rows of each", "Rows trained on": "910",
    }  # fmt: skip
    assert made.items() >= wanted.items()
    text = compared.markdown(whole)
    for name, value in wanted.items():
        assert f"- {name}: {value}\n" in text
    where = {"model": "a/../../models/mine", "base": "b/../base", "requests": {"report": "a/b/../asked.jsonl"}}
    made = dict(compared.page(comparison([make_cell("screen")], config=OWN | where)).made)
    shown = (made["Model"], made["Model before its alignment"], made["Requests"])
    assert shown == ("../models/mine", "base", "report from a/asked.jsonl")
    lab = dict(compared.page(comparison([make_cell("screen")])).made)
    assert (lab["Training"], lab["Adapter"]) == ("the lab's own recipe for each task", "the lab's own LoRA")
    known = comparison(
        [make_cell("screen")],
        recipes={"a": {"learning_rate": 1e-3}, "b": {"learning_rate": 2e-3}},
        adapter={"r": 4},
    )
    lab = dict(compared.page(known).made)
    assert lab["Training on a"] == "learning rate 0.001"
    assert lab["Training on b"] == "learning rate 0.002"
    assert lab["Adapter"] == "LoRA: rank 4"


def test_every_defence_has_its_mark_and_the_target_is_on_the_chart() -> None:
    cells = [make_cell(name) for name in ("clean", "other", "screen", "screen:verified")] + [make_cell("none", 0, 5)]
    figure = specs(sheet.render(compared.page(comparison(cells))))["trade"]
    assert figure["layout"]["xaxis"]["range"][1] >= 8
    marks = {trace["name"]: trace["marker"] for trace in figure["data"]}
    assert len({mark["symbol"] for mark in marks.values()}) == len(marks) == 5
    assert list(marks)[-1] == "other" and set(list(marks)[:2]) == {"clean", "none"}
    assert marks["screen"]["color"] == marks["screen:verified"]["color"] != marks["other"]["color"]
    many = [make_cell(f"a-rather-long-name-{i}") for i in range(20)]
    figure = specs(sheet.render(compared.page(comparison(many))))["trade"]
    assert len({trace["name"] for trace in figure["data"]}) == 20


def test_costs_that_are_shared_stand_in_no_table() -> None:
    text = compared.markdown(comparison([make_cell("screen"), make_cell("other")]))
    assert "seconds" not in text
    assert "| Cells compared |" in text.replace("| Rival ", "")
    page = shown(sheet.render(compared.page(comparison([make_cell("screen"), make_cell("other")]))))
    assert "Seconds" not in page
    assert "Cells compared" in page
    assert "2.0 h" in page


def test_write_leaves_one_file(tmp_path: Path) -> None:
    sheet.write(compared.page(comparison([make_cell("screen")])), tmp_path / "results.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.html"]
    assert (tmp_path / "results.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
