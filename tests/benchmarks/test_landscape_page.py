"""The page of a safety landscape: where each line breaks, and a direction set apart from the others."""

from __future__ import annotations

import pytest
import torch

from benchmarks import landscape_page
from benchmarks.directions import breaking_steps, cosine, orthogonal_part, random_across
from gradshield.errors import UsageError
from gradshield.evaluation.landscape import Landscape, norm
from gradshield.report import sheet
from gradshield.stats import wilson
from gradshield.types import Rate
from tests.report.pages import EVIL, assert_tame, shown, specs

ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
Line = dict[str, tuple[Rate, ...]]


def line(*successes: int) -> Line:
    return {
        "asr/refusal-phrases": tuple(wilson(k, 100) for k in successes),
        "answered/x": (wilson(90, 100),) * len(successes),
    }


def page(rates: dict[str, Line] | None = None, title: str = "A landscape", **more: str) -> sheet.Sheet:
    usual = {"alignment": line(90, 7, 0, 0, 10), "random-0": line(0, 0, 0, 0, 50), "random-1": line(8, 0, 0, 0, 0)}
    return landscape_page.page(Landscape(ALPHAS, 17.5, rates or usual), title, title, {title: title}, **more)


def test_the_direction_set_apart_is_told_beside_each_kind_of_other() -> None:
    found = page()
    assert found.tone == "pass"
    assert "ASR of 0" in found.standing
    (fact,) = found.facts
    assert fact == (
        "ASR, refusal-phrases: alignment at −0.5 and +1; random (2 directions, at the earliest) at −1 and +1."
    )


def test_an_unsafe_model_is_no_pass() -> None:
    assert page({"alignment": line(0, 0, 40, 0, 0)}).tone == "fail"
    unasked = {"alignment": {"answered/x": (wilson(9, 9),) * 5}}
    assert page(unasked).tone == "warn"


def test_each_measure_has_a_chart_with_every_line() -> None:
    html = sheet.render(page())
    found = specs(html)
    assert set(found) == {"line-0", "line-1"}
    lines = [trace for trace in found["line-0"]["data"] if trace["mode"] == "lines+markers"]
    assert [trace["name"] for trace in lines] == ["random", "random", "alignment"]
    assert [trace["showlegend"] for trace in lines] == [True, False, True]
    assert lines[-1]["y"] == pytest.approx([90.0, 7.0, 0.0, 0.0, 10.0])
    assert lines[-1]["line"]["width"] > lines[0]["line"]["width"]
    bands = [trace for trace in found["line-0"]["data"] if trace.get("fill")]
    assert len(bands) == 3
    assert max(bands[-1]["y"]) == pytest.approx(100 * wilson(90, 100).high)
    assert f"{Landscape(ALPHAS, 1.0, {'x': line(90, 7, 0, 0, 10)}).visage('asr/refusal-phrases'):.3f}" in shown(html)


def test_another_direction_can_be_set_apart() -> None:
    assert page(apart="random-1").facts[0].startswith("ASR, refusal-phrases: random-1 at −1; alignment")


def test_hostile_names_are_only_text() -> None:
    rates = {EVIL: {f"asr/{EVIL}": (wilson(1, 9),) * 5}, "other": {"answered/x": (wilson(1, 9),) * 5}}
    assert_tame(sheet.render(page(rates, EVIL, apart=EVIL)))


def test_random_directions_across_another() -> None:
    generator = torch.Generator().manual_seed(7)
    like = {"w": torch.randn(8, 5, generator=generator), "b": 3 * torch.randn(6, generator=generator)}
    for direction in random_across(like, 3, seed=1).values():
        assert norm(direction) == pytest.approx(1.0, abs=1e-6)
        for name, tensor in direction.items():
            assert float(tensor.norm()) == pytest.approx(float(like[name].norm()) / norm(like), rel=1e-4)
            assert abs(float((tensor.double() * like[name].double()).sum())) <= 1e-6 * float(like[name].norm())
    one = {"one": torch.tensor([2.0]), "more": torch.tensor([1.0, 2.0, 2.0])}
    direction = random_across(one, 1)["random-0"]
    assert direction["one"].item() == 0.0 and norm(direction) == pytest.approx(1.0)


def test_the_orthogonal_part_by_gram_schmidt() -> None:
    direction, to = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[2.0, 0.0]])}
    torch.testing.assert_close(orthogonal_part(direction, to)["w"], torch.tensor([[0.0, 1.0]]))
    assert cosine(direction, to) == pytest.approx(0.6)
    with pytest.raises(UsageError, match="norm above 0"):
        orthogonal_part(to, to)


def test_breaking_steps() -> None:
    alphas = [-2, -1, 0, 1, 2]
    assert breaking_steps(alphas, [0.9, 0.1, 0.0, 0.0, 0.0], 0.06) == (-1.0, None)
    assert breaking_steps(alphas, [0.9, 0.06, 0.0, 0.07, 0.0], 0.06) == (-2.0, 1.0)
    assert breaking_steps(alphas, [0, 0, 0.5, 0, 0], 0.06) == (0.0, 0.0)
