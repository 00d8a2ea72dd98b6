"""The page of a training run: what it says first, the rounds of its search, and nothing of anyone else's that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradshield.manifests import Data, Figures, Named, Round, Search, Targets, TrainingManifest, TrainingResults
from gradshield.report import sheet
from gradshield.stats import mean_interval, wilson
from gradshield.training import page as rounds
from tests.report.pages import EVIL, EXAM, MODEL, SETTINGS, SHA, assert_tame, shown, specs

DATA = Data(name="rows.jsonl", kind="jsonl", sha256=SHA, rows=1000, read_as={})
NOTHING = Figures(judges={})


def figures(k: int, k2: int, utility: int | None = 150, over_refusal: int = 4) -> Figures:
    judges = {"refusal-phrases": wilson(k, 200), "lab-classifier": wilson(k2, 200)}
    if utility is None:
        return Figures(judges=judges)
    return Figures(judges=judges, utility=wilson(utility, 200), over_refusal=wilson(over_refusal, 200))


def verdict(met: bool = True, **more: Any) -> Search:
    done = [
        Round(cut=2.5, removed=60, asr={"a": wilson(20, 96), "b": wilson(30, 96)}, utility=None, seconds=31.0,
                    verdict="too unsafe", stopped_early=True),
        Round(cut=1.5, removed=96, asr={"a": wilson(3, 200), "b": wilson(4, 200)}, utility=wilson(170, 200), seconds=40.0,
                    verdict="passes" if met else "utility short", stopped_early=False),
    ]  # fmt: skip
    sentence = "removing 96 of 1000 rows meets both targets" if met else "no cut meets both targets"
    return Search.model_validate(
        {"met": met, "sentence": sentence, "stopped": "passes", "best": 1, "rounds": done} | more
    )


def run(scanned: bool = True, **more: Any) -> sheet.Sheet:
    """The page of a run; ``more`` are fields of the manifest or of its results."""
    top = {key: more.pop(key) for key in ("settings", "model", "command", "versions", "data") if key in more}
    results = {
        "rows": 1000, "removed": 96, "dropped_tokens": 0, "trained": 904, "cuts": {}, "before": figures(1, 0, 20),
        "after": figures(4, 3), "changed": {}, "agreement": [], "record": {}, "verified": None, "uncertified": None,
        "seconds": 1.0,
    }  # fmt: skip
    whole = {
        "command": "gradshield train", "versions": {"gradshield": "1"}, "data": DATA, "model": MODEL, "settings": SETTINGS,
        "results": TrainingResults.model_validate(results | more),
    }  # fmt: skip
    return rounds.page(TrainingManifest.model_validate(whole | top), scanned)


@pytest.mark.parametrize(
    ("more", "tone", "standing"),
    [
        ({}, "pass", "The measured ASR is 6 % or less by every judge (95 % interval up to 5.0\u00a0%)"),
        ({"after": figures(4, 16)}, "fail", "less safe"),
        ({"before": figures(15, 15), "after": figures(16, 15)}, "warn", "above 6 %"),
        ({"before": figures(0, 0), "after": figures(12, 12)}, "warn", "rose"),
        ({"verified": verdict()}, "pass", "6 % or less"),
        ({"verified": verdict(False)}, "fail", "not met"),
        ({"before": NOTHING, "after": NOTHING}, "warn", "not measured"),
        ({"before": NOTHING, "after": Figures(judges={}, utility=wilson(3, 4))}, "warn", "not measured"),
    ],
)
def test_the_sentence_comes_first(more: dict[str, Any], tone: str, standing: str) -> None:
    found = run(**more)
    assert found.tone == tone
    assert standing in found.standing


def test_every_judge_is_shown_before_and_after_with_interval_and_count() -> None:
    text = shown(sheet.render(run(verified=verdict())))
    assert "ASR by refusal-phrases: 0.5 % [0.1, 2.8] n=200 before; 2.0 % [0.8, 5.0] n=200 after." in text
    assert "ASR by lab-classifier: 0.0 % [0.0, 1.9] n=200 before; 1.5 % [0.5, 4.3] n=200 after." in text
    assert "Utility: 10.0 %" in text
    assert "The search: removing 96 of 1000 rows meets both targets." in text
    assert "96 of 1,000 rows were removed before training" in text
    assert "+65.0 points" in text


def test_the_chart_has_every_round_and_no_utility_where_none_was_measured() -> None:
    page = sheet.render(run(verified=verdict()))
    traces = {trace["name"]: trace for trace in specs(page)["rounds"]["data"] if trace.get("name")}
    assert traces["ASR, b"]["y"] == pytest.approx([31.25, 2.0])
    assert traces["utility"]["y"] == [None, 85.0]
    assert traces["ASR, a"]["marker"]["symbol"] == ["x", "star"]
    text = shown(page)
    assert "passes, this model is kept" in text
    assert "stopped before every prompt was asked" in text


def test_a_mean_is_shown_with_its_n_and_a_proportion_with_its_count() -> None:
    mean = mean_interval([1.0] * 180 + [0.5] * 2 + [0.0] * 18)  # a whole sum
    after = figures(4, 3).model_copy(update={"utility": mean})
    text = shown(sheet.render(run(after=after))).partition("Before and after")[2]
    assert "4 of 200" in text and "20 of 200" in text
    assert "n=200" in text and "181 of 200" not in text


def test_hostile_text_is_only_text() -> None:
    bad = Round(
        cut=1.0, removed=1, asr={EVIL: wilson(1, 96)}, utility=None, seconds=1.0, verdict=EVIL, stopped_early=False
    )
    one = verdict(sentence=EVIL, rounds=[bad, bad])
    page = run(
        data=DATA.model_copy(update={"name": EVIL}), verified=one, record={EVIL: {EVIL: EVIL}, "asft": {EVIL: {EVIL: EVIL}}},
        command=EVIL, versions={EVIL: EVIL}, after=Figures(judges={EVIL: wilson(1, 9)}), uncertified=EVIL,
        model=MODEL.model_copy(update={"name": EVIL, "kind": EVIL}),
        settings=SETTINGS.model_copy(update={
            "defence": EVIL, "training": {EVIL: {EVIL: EVIL}}, "peft": {EVIL: {EVIL: EVIL}}, 
            "base": Named(name=EVIL, sha256=EVIL),
            "report": EXAM.model_copy(update={"judges": [EVIL, (EVIL, {})]}),
        }),
    )  # fmt: skip
    assert_tame(sheet.render(page))


def test_a_run_that_measured_nothing_has_a_page(tmp_path: Path) -> None:
    found = run(scanned=False, removed=0, before=NOTHING, after=NOTHING, record={"x": {}})
    assert_tame(sheet.write(found, tmp_path / "report.html").read_text(encoding="utf-8"))


def test_utility_that_fell_or_never_rose_and_new_refusals_are_no_pass() -> None:
    fell = run(before=figures(1, 0, 150), after=figures(4, 3, 20))
    assert (fell.tone, fell.standing.partition("but ")[2]) == ("warn", "utility fell")
    nothing = run(before=figures(1, 0, 0), after=figures(4, 3, 0))
    assert (nothing.tone, nothing.standing.partition("but ")[2]) == ("warn", "the model has not learned the task")
    shy = run(after=figures(4, 3, over_refusal=90))
    assert (shy.tone, shy.standing.partition("but ")[2]) == ("warn", "the model refuses more harmless requests")


def test_one_round_has_no_chart_and_several_have_bars_for_their_intervals() -> None:
    alone = verdict(rounds=verdict().rounds[1:], best=0)
    page = sheet.render(run(verified=alone))
    assert specs(page) == {}
    assert "ended with its first round" in shown(page)
    page = sheet.render(run(verified=verdict()))
    traces = {trace["name"]: trace for trace in specs(page)["rounds"]["data"]}
    bars = traces["ASR, b"]["error_y"]
    assert bars["array"] == pytest.approx([100 * (wilson(k, n).high - k / n) for k, n in ((30, 96), (4, 200))])
    assert bars["arrayminus"] == pytest.approx([100 * (k / n - wilson(k, n).low) for k, n in ((30, 96), (4, 200))])
    assert traces["utility"]["error_y"]["array"][0] == 0
    assert traces["ASR, a"]["x"] != traces["ASR, b"]["x"]
    assert "other requests and other rows of the task" in shown(page)


def test_the_targets_are_drawn_if_given() -> None:
    def lines(found: Search) -> list[float]:
        page = sheet.render(run(verified=found))
        return [line["y0"] for line in specs(page)["rounds"]["layout"]["shapes"]]

    assert lines(verdict()) == pytest.approx([6.0])
    targets = Targets(asr=0.03, utility=0.87, tolerance=0.02)
    assert lines(verdict(targets=targets)) == pytest.approx([3.0, 85.0])
    text = shown(sheet.render(run(verified=verdict(targets=targets))))
    assert "an ASR whose interval ends below 3.0 % by every judge, and a utility of at least 85.0 %" in text


def test_rows_are_not_mentioned_without_a_row_method() -> None:
    found = run(scanned=False, removed=0)
    assert [name for name, _, _ in found.figures][:2] == ["rows", "ASR after, refusal-phrases"]
    page = sheet.render(found)
    assert "Removed before training" not in page
    assert 'href="outputs-before.jsonl"' in page.partition('id="made"')[2]
    assert 'href="outputs-after.jsonl"' in page.partition('id="made"')[2]
    nothing_removed = sheet.render(run(removed=0))
    assert "0 of 1,000 rows were removed before training" in nothing_removed
    assert 'href="scan/report.html"' in nothing_removed.partition('id="taken"')[2].partition("</section>")[0]
    masked = shown(sheet.render(run(scanned=False, removed=0, dropped_tokens=7)))
    assert "tokens masked 7" in masked


def test_a_model_that_does_not_refuse_its_probes_is_no_pass() -> None:
    assert run().tone == "pass"
    page = run(uncertified="it refused 0 of 24")
    assert page.tone == "warn"
    assert any("it refused 0 of 24" in fact for fact in page.facts)


def test_labels_give_the_rates_caught_and_lost() -> None:
    page = run(caught=wilson(90, 96), lost=wilson(6, 904))
    assert ("harmful rows caught", "93.8\u00a0%", "of 96") in page.figures
    assert "harmless rows lost" in shown(sheet.render(page)).partition("Removed before training")[2]


RECORD = {
    "asft": {"layers": 28, "largest_eigenvalue": {"max": 0.67727, "median": 0.36}, "value": 0.5, "new_key": 1},
    "safelora": {"cosines": {f"model.layers.{i}.self_attn.q_proj.weight": i / 10 for i in range(10)}},
}


def test_a_record_is_shown_in_words() -> None:
    page = sheet.render(run(record=RECORD))
    text = shown(page).partition("What the method did in training")[2].partition("How it was made")[0]
    assert "largest eigenvalue, max 0.6773" in text
    assert "layers 28" in text
    assert "value 0.5" in text
    assert "new key 1" in text
    assert "cosines 10 values from 0 to 0.9, median 0.45" in text
    assert "self_attn" not in text
    assert "model.<wbr>layers.<wbr>0.<wbr>self_<wbr>attn.<wbr>q_<wbr>proj.<wbr>weight" in page  # among the settings


def test_how_it_was_made_is_shown_and_every_setting_is_collapsed() -> None:
    exam = EXAM.model_copy(update={
        "n": (100, 130, 33), "judges": ["refusal-phrases", ("guard", {"model": "x"})], "tokens": 12, "guessed": True,
        "answer_prefix": "Sure",
    })  # fmt: skip
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "megatron_core": "megatron.core", "use_dora": False}
    training = {"max_steps": 3, "learning_rate": 0.001, "online": {"penalties": []}}
    page = run(settings=SETTINGS.model_copy(update={"training": training, "peft": peft, "report": exam}))
    made = dict(page.made)
    assert made["Training"] == "max steps 3, learning rate 0.001"
    assert made["Adapter"] == "LoRA: rank 8, lora alpha 16"
    assert made["Model"] == "some/model, LlamaForCausalLM, 1,234 parameters, float32, cpu, SHA-256 abababababab…"
    assert made["Measured"] == (
        "100 requests by refusal-phrases, guard; 130 harmless look-alikes; 33 rows of the task by exact (guessed from the rows); "
        "answers of at most 12 tokens; every answer starting with “Sure”"
    )
    assert (made["Defence"], made["Seed"]) == ("fihs:verified", "4")
    assert "The search measured" not in made
    assert ("settings.peft.megatron_core", "megatron.core") in page.folded
    assert "<details" in sheet.render(page).partition('id="made"')[2]
    full = dict(run().made)
    assert (full["Adapter"], full["Training"]) == ("none: every weight is trained", "defaults of TRL's SFTConfig")
