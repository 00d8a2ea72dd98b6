"""Numbers are checked, not trusted: engines against the oracle, weights that are not finite, memory that runs out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradshield as gs
from gradshield.errors import DataError, ModelError, ProbeError, ScoreError, UsageError
from gradshield.gradients import ROW_SUMS, Derivatives, FiniteDifference, Forward
from gradshield.scanning import shards
from gradshield.selectors import Fihs
from tests.common import HALF, PROBING, chats, command, jsonl, save_model, scan, scan_arguments, write
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = chats(12)
ODD = {"messages": [{"role": "user", "content": "Z"}, {"role": "assistant", "content": "The answer is fine."}]}


def _garbage(monkeypatch: pytest.MonkeyPatch, *engines: type, value: float | None = None) -> None:
    """Engines that give values of the right form and no meaning."""
    generator = torch.Generator().manual_seed(0)

    for engine in engines:
        real = engine.directional

        def wrong(self: Any, model: Any, batch: Any, direction: Any, real: Any = real) -> Derivatives:
            found = real(self, model, batch, direction)
            noise = torch.randn(found.values.shape, generator=generator, dtype=torch.float64)
            return Derivatives(noise if value is None else torch.full_like(found.values, value), found.nll)

        monkeypatch.setattr(engine, "directional", wrong)


def test_the_manifest_names_engine_and_agreement(tmp_path: Path) -> None:
    for engine in ("finite-difference", "forward"):
        scan(
            ROWS,
            output=tmp_path,
            settings=gs.ScanSettings(engine=engine, threshold="ratio:50%", check_rows=5, selector="fihs"),
        )
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["settings"]["engine"] == manifest["results"]["agreement"]["engine"] == engine
        assert manifest["results"]["agreement"]["n"] == 5
        assert manifest["results"]["agreement"]["relative_error"] < 1e-2
        assert manifest["results"]["agreement"]["spearman"] >= 0.99
        assert (manifest["settings"]["engine_step"] is None) == (engine == "forward")


@pytest.mark.parametrize("value", [None, 1.0, float("nan")], ids=["noise", "constant", "nan"])
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_an_engine_that_disagrees_is_replaced(value: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = scan(ROWS, settings=gs.ScanSettings(engine="forward", threshold="ratio:50%", selector="fihs"))
    _garbage(monkeypatch, FiniteDifference, value=value)
    with pytest.warns(UserWarning, match="finite-difference disagrees with the oracle on 12 rows"):
        selection = scan(ROWS)
    assert selection.manifest.settings.engine == selection.manifest.results.agreement.engine == "forward"
    assert selection.manifest.settings.engine_step is None
    assert np.array_equal(selection.scores.values, honest.scores.values)


def test_the_oracle_itself_takes_over_where_row_sums_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _garbage(monkeypatch, FiniteDifference, Forward)
    with pytest.warns(UserWarning, match="the engine forward disagrees"):
        selection = scan(ROWS, settings=gs.ScanSettings(aggregate="sum", threshold="ratio:50%", selector="fihs"))
    assert selection.manifest.settings.engine == "loop"
    assert selection.scores.decoys is None
    honest = scan(
        ROWS, settings=gs.ScanSettings(aggregate="sum", engine="loop", threshold="ratio:50%", selector="fihs")
    )
    assert np.array_equal(selection.scores.values, honest.scores.values)


def test_what_an_error_advises_for_row_sums_works() -> None:
    with pytest.raises(UsageError, match="row sums only") as caught:
        scan(ROWS, settings=gs.ScanSettings(engine="perturbation", selector="fihs"))
    assert ROW_SUMS in str(caught.value)
    for threshold in ("adaptive", "ratio:5%", "fixed:0"):
        assert threshold.rstrip("0") in ROW_SUMS
        scan(
            ROWS, settings=gs.ScanSettings(engine="perturbation", aggregate="sum", threshold=threshold, selector="fihs")
        )


@pytest.mark.filterwarnings("ignore:the engine")
def test_without_an_engine_that_agrees_there_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _garbage(monkeypatch, FiniteDifference, Forward)
    with pytest.raises(ScoreError, match="no engine agrees with the oracle"):
        scan(ROWS, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- weights that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_gives_no_number(value: float, place: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(place).view(-1)[3] = value
    with pytest.raises(ScoreError, match="gradient of the unsafety score 'all' has norm"):
        scan(ROWS, model=model, tokenizer=tiny_tokenizer(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:the engine")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [4, 40], ids=["in the sample", "beyond it"])
def test_rows_that_score_no_number_are_named(value: float, count: int, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (token,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    with pytest.raises(ScoreError, match=rf"not finite \(rows {count}\)"):
        scan([*chats(count), ODD], model=model, tokenizer=tokenizer, output=tmp_path / "out")
    assert not [path for path in tmp_path.glob("out/*") if path.is_file()]


def test_the_command_says_it_in_one_sentence(probes: Path, tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.lm_head.weight[5] = float("inf")

    data = write(tmp_path / "data.jsonl", jsonl(ROWS))
    done = command(*scan_arguments(data, save_model(tmp_path / "model", spoil), tmp_path / "out", probes))
    assert done.code == 4
    assert "check the model's weights" in done.sentence
    assert not (tmp_path / "out").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
def test_batches_are_halved_when_memory_runs_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"prompt": f"Say {n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(5)]
    rows = [*ROWS, *pairs]
    honest = scan(rows)
    measure, sizes = Fihs.measure, []

    def scarce(self: Fihs, model: Any, direction: Any, batch: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 3:
            raise error
        return measure(self, model, direction, batch)

    monkeypatch.setattr(Fihs, "measure", scarce)
    selection = scan(rows)
    assert max(sizes) > 3
    assert selection.scores.ids == honest.scores.ids
    assert np.array_equal(selection.removed, honest.removed)
    size = np.abs(honest.scores.values).max()
    assert np.abs(selection.scores.values - honest.scores.values).max() <= 1e-3 * size
    assert np.array_equal(selection.scores.lengths, honest.scores.lengths)
    assert selection.manifest.settings.engine == honest.manifest.settings.engine


def test_a_row_too_long_for_the_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Fihs.measure

    def scarce(self: Fihs, model: Any, direction: Any, batch: Any) -> Any:
        if 7 in batch.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(self, model, direction, batch)

    monkeypatch.setattr(Fihs, "measure", scarce)
    with pytest.raises(ModelError, match=r"row 7 \(\d+ tokens\) does not fit into memory by itself"):
        scan(ROWS)


def test_another_runtime_error_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Fihs, "measure", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        scan(ROWS)


def test_batches_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, areas, labels = shards.batches, [], []

    def noted(rows: Any, budget: int, most: int) -> Any:
        for batch in batches(rows, budget, most):
            if budget == 128:
                areas.append(batch.ids.size)
                labels.append(int(batch.loss.sum()))
            yield batch

    monkeypatch.setattr(shards, "batches", noted)
    monkeypatch.setattr(shards, "LOGITS_BUDGET", 300 * 40)
    scan(ROWS, settings=gs.ScanSettings(threshold="ratio:50%", token_budget=128, selector="fihs"))
    assert len(areas) >= 3 and max(labels) <= 40 and max(areas) <= 128


# ---- what a model cannot do -----------------------------------------------------------------------------------------


def test_learned_positions_have_an_end() -> None:
    long = {"prompt": "a", "completion": " word" * 300}
    kept = scan([long, *ROWS], model=tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    assert kept.manifest.settings.render["max_length"] == 512
    with pytest.raises(DataError, match="the model has positions for 512"):
        scan([long, *ROWS], model=tiny_model("gpt2"), tokenizer=tiny_tokenizer(), training_args={"max_length": 2000})
    with pytest.warns(UserWarning, match="and the model was trained on 512 positions"):
        rotary = scan([long, *ROWS], training_args={"max_length": 2000})
    assert rotary.scores.lengths is not None
    assert rotary.scores.lengths[0] > 600


def test_rows_that_the_model_has_positions_for_are_not_warned_of() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scan(ROWS, training_args={"max_length": 2000})
    assert not [one for one in said if "positions" in str(one.message)]


def test_a_model_that_thinks_is_reported() -> None:
    thinking = gs.Probing(requests=PROBING.requests, answer_prefix="<think>")
    with pytest.raises(ProbeError, match="by thinking"):
        scan(ROWS, probing=thinking)


def test_an_own_probe_and_an_own_rule() -> None:
    from gradshield.types import Cut

    class Median:
        name = "median"

        def cut(self, values: Any, decoys: Any = None, anchors: Any = None) -> Cut:
            assert len(values) == len(decoys) == 12  # an own rule sees the real scores only
            return Cut(float(np.median(values)), self.name)

    def gap(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return (logits[torch.arange(len(batch.last)), batch.last][:, 57]).mean()

    selection = scan(ROWS, settings=gs.ScanSettings(probe=gap, threshold=Median(), selector="fihs"))
    assert selection.removed.sum() == 6
    assert selection.manifest.settings.threshold == "median"
    assert HALF.probe == "token_gap"
