"""Rates by judge, the rule for judges that cannot tell, agreement, over-refusal and utility."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from gradshield.errors import DataError, EmptyDataError
from gradshield.evaluation.asr import agreement, asr, attacked, over_refusal
from gradshield.evaluation.generate import Prompt
from gradshield.evaluation.task_files import utility
from gradshield.judges import FunctionJudge, RefusalPhrases
from gradshield.stats import mcnemar, wilson


def _scripted(answers: Sequence[str]) -> Callable[[Sequence[Prompt]], list[str]]:
    def generate(prompts: Sequence[Prompt]) -> list[str]:
        assert len(prompts) == len(answers)
        return list(answers)

    return generate


def _harm(_prompt: str, answer: str) -> bool | None:
    return None if "?" in answer else "harm" in answer


ANSWERS = ["Sure, harm", "I cannot help. But harm", "I cannot help", "what?", "harmless? no", "ok", "", "Sure, harm"]
REQUESTS = [{"prompt": f"request {i}", "category": "weapons"} for i in range(len(ANSWERS))]
JUDGES = (RefusalPhrases(), FunctionJudge("harm", _harm))


def test_every_judge_has_its_own_rate_and_every_row_its_verdicts() -> None:
    result = asr(_scripted(ANSWERS), REQUESTS, JUDGES)
    assert result.rates["asr/refusal-phrases"] == wilson(5, 8)
    # Two that the judge could not decide count as attacks that succeeded, and are reported.
    assert result.rates["asr/harm"] == wilson(3 + 2, 8)
    assert result.rates["undecided/harm"] == wilson(2, 8)
    assert "undecided/refusal-phrases" not in result.rates
    assert [row["answer"] for row in result.outputs] == ANSWERS
    assert result.outputs[1]["prompt"] == "request 1"
    assert result.outputs[1]["category"] == "weapons"
    assert result.outputs[1]["verdicts"]["harm"]["unsafe"] is True
    assert "i cannot" in result.outputs[1]["verdicts"]["refusal-phrases"]["reason"]


def test_empty_answers_are_counted_apart() -> None:
    """No judge calls them unsafe: 0 % ASR of a model that answers nothing is not safety."""
    assert asr(_scripted(ANSWERS), REQUESTS, JUDGES).rates["empty"] == wilson(1, 8)
    silent = asr(_scripted(["", " \n"]), REQUESTS[:2], JUDGES[:1]).rates
    assert (silent["asr/refusal-phrases"].k, silent["empty"]) == (0, wilson(2, 2))
    assert "empty" not in asr(_scripted(["no"]), REQUESTS[:1], JUDGES[:1]).rates


def test_before_and_after_are_compared_by_row() -> None:
    before = asr(_scripted(["Sure"] * 8), REQUESTS, JUDGES)
    after = asr(_scripted(["I cannot help"] * 8), REQUESTS, JUDGES)
    test = mcnemar(*(attacked(found.outputs, "refusal-phrases") for found in (before, after)))
    assert (test.only_before, test.only_after) == (8, 0)
    assert test.p == pytest.approx(2 / 2**8)


def test_agreement_is_cohens_kappa_over_what_both_decided() -> None:
    result = asr(_scripted(ANSWERS), REQUESTS, JUDGES)
    (found,) = agreement(result)
    phrases, harm = [1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1]
    assert found.judges == ("refusal-phrases", "harm")
    assert found.n == 6
    assert found.kappa == pytest.approx(cohen_kappa_score(phrases, harm))
    assert None not in (found.kappa, found.low, found.high)
    assert found.low < found.kappa < found.high
    assert found.differ == (1, 3, 4, 5)
    assert agreement(result) == agreement(result)


def test_agreement_without_variation_has_no_kappa() -> None:
    (found,) = agreement(asr(_scripted(["I cannot help"] * 8), REQUESTS, JUDGES))
    assert (found.kappa, found.low, found.n, found.differ) == (None, None, 8, ())
    assert agreement(asr(_scripted(["ok"] * 8), REQUESTS, JUDGES[:1])) == ()


def test_a_judge_reads_the_last_user_turn() -> None:
    seen: list[str] = []
    judge = FunctionJudge("spy", lambda prompt, _answer: bool(seen.append(prompt)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    result = asr(_scripted(["x"]), [{"prompt": turns}], [judge])
    assert seen == ["c"]
    assert result.outputs[0]["category"] is None


def test_requests_that_cannot_be_asked() -> None:
    with pytest.raises(EmptyDataError, match="no request"):
        asr(_scripted([]), [], JUDGES)
    with pytest.raises(DataError, match="request 0 has no 'prompt', only 'text'"):
        asr(_scripted(["x"]), [{"text": "hi"}], JUDGES)
    with pytest.raises(DataError, match="different names"):
        asr(_scripted(["x"]), [{"prompt": "hi"}], [RefusalPhrases(), RefusalPhrases()])


def test_over_refusal_counts_refusals_silence_and_doubt() -> None:
    answers = ["I cannot help", "", "Mix the flour", "Mix the water"]
    lookalikes = [{"prompt": "bake"}] * 4
    assert over_refusal(_scripted(answers), lookalikes, RefusalPhrases()).rates == {"over_refusal": wilson(2, 4)}
    unsure = FunctionJudge("unsure", lambda _prompt, answer: None if answer == "" else "Mix" in answer)
    result = over_refusal(_scripted(answers), lookalikes, unsure)
    assert result.rates == {"over_refusal": wilson(2, 4), "undecided/unsure": wilson(1, 4)}


def _exact(row: Any, answer: str) -> float:
    return float(row["reference"] == answer)


def test_utility_of_right_and_wrong_is_a_proportion() -> None:
    rows = [{"prompt": str(i), "reference": "a"} for i in range(4)]
    result = utility(_scripted(["a", "b", "a", "a"]), rows, _exact)
    assert result.rates == {"utility": wilson(3, 4)}
    assert [row["score"] for row in result.outputs] == [1, 0, 1, 1]
    assert result.outputs[1] == {"prompt": "1", "reference": "a", "answer": "b", "score": 0.0}


def test_utility_of_degrees_is_a_mean_with_its_interval() -> None:
    values = np.random.default_rng(0).random(50)
    rows = [{"prompt": "q", "value": value} for value in values]
    rate = utility(_scripted(["x"] * 50), rows, lambda row, _answer: row["value"]).rates["utility"]
    assert rate.rate == pytest.approx(values.mean())
    assert values.mean() - 0.12 < rate.low < rate.rate < rate.high < values.mean() + 0.12


def test_rows_without_use() -> None:
    with pytest.raises(EmptyDataError, match="no row"):
        utility(_scripted([]), [], _exact)
    with pytest.raises(DataError, match="row 0 scored 7"):
        utility(_scripted(["x"]), [{"prompt": "q"}], lambda _row, _answer: 7.0)
