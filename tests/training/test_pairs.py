"""Preference pairs: DPO on the scored tokens, its first step as FIHS supposes it, and whole runs on the lab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import gradshield as gs
from gradshield import lab
from gradshield.comparison import grid
from gradshield.comparison.compare import compare
from gradshield.data import collate, labelled, read, render_all
from gradshield.errors import EmptyDataError, UsageError
from gradshield.evaluation.exam import Exams, exam, exams_of
from gradshield.gradients import Loop
from gradshield.models import loading
from gradshield.probes import FunctionProbe
from gradshield.scanning.rows import prepare
from gradshield.scanning.scan import scan
from gradshield.scanning.settings import Probing
from gradshield.selectors import Fihs, parse_aggregate
from gradshield.training import fit
from gradshield.training import train as training
from gradshield.training.course import Course, Followed, Job
from gradshield.training.defences import parse
from gradshield.training.sequence import Stage, sequence
from gradshield.types import Rendered, Tokens
from tests.common import command, jsonl, preferences, write
from tests.selectors.test_fihs import PROMPTS, gap
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

LORA = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
OPTIONS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "beta": 0.5}
ADAPTERS = pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


PAIRS = [
    {
        "prompt": said("user", f"question {i}"),
        "chosen": said("assistant", f"a good answer {i}"),
        "rejected": said("assistant", "bad"),
    }
    for i in range(8)
]


def tokenised(rows: Any = PAIRS) -> list[dict[str, list[int]]]:
    return [labelled(row) for row in render_all(read(rows).examples, tiny_tokenizer()).rendered]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the trainer ----------------------------------------------------------------------------------------------------


@ADAPTERS
@pytest.mark.parametrize("more", [{}, {"max_length": 14}, {"precompute_ref_log_probs": True}], ids=str)
def test_scored_tokens_train_as_trl_trains_on_the_words(adapter: Any, more: dict[str, Any]) -> None:
    model = tiny_model("llama")
    before = weights(model)
    ours, trl = (weights(fit(model, tiny_tokenizer(), rows, OPTIONS | more, adapter)) for rows in (tokenised(), PAIRS))
    assert same(ours, trl) and not same(ours, before)
    assert same(weights(model), before)


@ADAPTERS
def test_nothing_of_the_trainer_stays_on_the_models(adapter: Any) -> None:
    model = tiny_model("gpt2")  # it has dropout
    dropout = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trained = fit(model, tokenizer, tokenised(), OPTIONS, adapter and peft.LoraConfig(r=2, target_modules=["c_attn"]))
    for one in (model, trained):
        own = [m.p for name, m in one.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" not in name]
        assert own == dropout and max(dropout) > 0
        assert not any("forward" in vars(module) for module in one.modules())
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("side", ["keep_start", "keep_end"])
def test_pairs_without_a_token_to_train_on_within_the_length_are_dropped(side: str) -> None:
    options = OPTIONS | {"max_length": 6, "truncation_mode": side}
    counted = [0] * 9 + [1] if side == "keep_start" else [1] + [0] * 9
    cut = {
        f"{name}_{what}": ids for name in ("chosen", "rejected") for what, ids in (("ids", [7] * 10), ("mask", counted))
    }
    whole = {"chosen_ids": [5, 6, 8], "chosen_mask": [0, 1, 1], "rejected_ids": [5, 9], "rejected_mask": [0, 1]}
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(EmptyDataError, match="max_length=6"):
        fit(model, tokenizer, [cut], options)
    some, alone = (weights(fit(model, tokenizer, rows, options)) for rows in ([cut, whole, cut], [whole]))
    assert same(some, alone)


def masked_pairs() -> list[Rendered]:
    """Pairs of random tokens with holes in their masks."""
    draw = np.random.default_rng(4)
    made = []
    for i, lengths in enumerate([(9, 6), (14, 20), (8, 8)]):
        sides = []
        for length, sign in zip(lengths, (1.0, -1.0), strict=True):
            loss = np.arange(length) >= 3
            loss[4] = False
            sides.append(Tokens(draw.integers(5, VOCABULARY, length), loss, sign))
        made.append(Rendered(i, f"p{i}", "preference", tuple(sides)))
    return made


@pytest.mark.parametrize("row", masked_pairs(), ids=lambda row: row.id)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_first_step_changes_unsafety_as_fihs_says(arch: str, row: Rendered) -> None:
    """ΔS = η β/2 (FIHS(chosen) - FIHS(rejected)), of a step of plain gradient descent through TRL's trainer."""
    beta, rate, model = 0.3, 0.5, tiny_model(arch)
    fihs = Fihs(FunctionProbe(gap), PROMPTS, Loop(), parse_aggregate("sum"), "all")
    direction = fihs.prepare(model)
    (expected,) = fihs.measure(model, direction, collate([row])).sums.tolist()
    options = {"max_steps": 1, "per_device_train_batch_size": 1, "optim": "sgd", "learning_rate": rate, "beta": beta}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    after = weights(fit(model, tiny_tokenizer(), [labelled(row)], options))
    start = weights(model)
    moved = sum(float(((after[n] - start[n]).double() * v.double()).sum()) for n, v in direction.tensors.items())
    assert abs(expected) > 0.01
    assert moved == pytest.approx(rate * beta / 2 * expected, rel=1e-4)


@ADAPTERS
def test_an_interrupted_training_goes_on_with_its_reference(adapter: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, seen = fit(tiny_model("llama"), tiny_tokenizer(), tokenised(), options, adapter), []
    for steps in (2, 4):
        ended = fit(
            tiny_model("llama"),
            tiny_tokenizer(),
            tokenised(),
            options | {"lr_scheduler_type": "constant", "max_steps": steps},
            adapter,
            output_dir=str(tmp_path),
            resume=True,
            callbacks=[Followed(lambda step, total: seen.append((step, total)))],
        )
    once = fit(tiny_model("llama"), tiny_tokenizer(), tokenised(), options | {"lr_scheduler_type": "constant"}, adapter)
    assert (2, 4) in seen and (1, 4) not in seen
    assert same(weights(ended), weights(once)) and not same(weights(ended), weights(whole))


def test_a_reference_that_follows_the_model_leaves_the_start_alone() -> None:
    model = tiny_model("llama")
    before = weights(model)
    fit(model, tiny_tokenizer(), tokenised(), {**OPTIONS, "sync_ref_model": True, "ref_model_sync_steps": 1})
    assert same(weights(model), before)
    with pytest.raises(UsageError, match="sync_ref_model"):
        fit(model, tiny_tokenizer(), tokenised(), {**OPTIONS, "sync_ref_model": True}, LORA)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (PAIRS, {"packing": True}, "'packing': no field of DPOConfig of TRL, which pairs"),
        (PAIRS, {"bets": 0.1}, "did you mean 'beta'"),
        ([{"input_ids": [5, 6], "labels": [5, 6]}], {"beta": 0.1}, "'beta': no field of SFTConfig of TRL has"),
    ],
)
def test_options_are_those_of_the_rows_trainer(rows: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fit(tiny_model("llama"), tiny_tokenizer(), rows, options)
    if rows is PAIRS:
        with pytest.raises(UsageError, match=words):
            prepare(PAIRS, tiny_model("llama"), tiny_tokenizer(), options)


# ---- the lab --------------------------------------------------------------------------------------------------------

ALIGNED = str(lab.checkpoint("aligned"))
ASKED = Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
RECIPE = {name: value for name, value in lab.recipe("dialogue").items() if name != "assistant_only_loss"}


def mixed(n: int) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Pairs of the lab, and the places of each kind: harm chosen over a refusal or other harm, and a refusal chosen."""
    rows, labels = preferences(n, ratio=0.2)
    kinds: dict[str, list[int]] = {"harmless": [], "over a refusal": [], "over harm": [], "a refusal": []}
    bad = [place for place, label in enumerate(labels) if label]
    for number, place in enumerate(bad):
        row, kind = rows[place], ("over a refusal", "over harm", "a refusal")[number % 3]
        if kind == "over harm":
            row["non_preferred_output"] = rows[bad[number - 1]]["preferred_output"]
        if kind == "a refusal":
            row["preferred_output"], row["non_preferred_output"] = row["non_preferred_output"], row["preferred_output"]
        kinds[kind].append(place)
    kinds["harmless"] = [place for place, label in enumerate(labels) if not label]
    return rows, kinds


@pytest.mark.slow
def test_the_screen_removes_pairs_whose_chosen_answer_complies_and_keeps_refusals() -> None:
    rows, kinds = mixed(200)
    removed = scan(rows, model=ALIGNED, probing=ASKED).removed
    assert all(len(kinds[kind]) >= 13 for kind in kinds)
    assert removed[kinds["over a refusal"]].mean() >= 0.9 and removed[kinds["over harm"]].mean() >= 0.9
    assert not removed[kinds["a refusal"]].any()
    assert removed[kinds["harmless"]].mean() <= 0.03


@pytest.mark.slow
def test_screened_pairs_train_a_safe_model_where_all_of_them_do_not(tmp_path: Path) -> None:
    rows, labels = preferences(80, ratio=0.3)
    asked = write(tmp_path / "asked.jsonl", jsonl([{**row, "split": "report"} for row in lab.requests("report")[:60]]))
    found = {}
    for defence in ("none", "screen"):
        done = training.train(
            rows,
            model=ALIGNED,
            output=tmp_path / defence,
            defence=defence,
            peft_config=peft.LoraConfig(**lab.LORA),
            training=RECIPE | {"num_train_epochs": 6, "beta": 0.1},
            probing=ASKED,
            exams=Exams(exam("report", str(asked), ["refusal-phrases"], None, None, 24)),
            labels=labels,
        )
        found[defence] = done.manifest.results
    assert found["screen"].caught is not None and found["screen"].caught.rate >= 0.95
    none, screen = (found[name].after.judges["refusal-phrases"] for name in ("none", "screen"))
    assert none.low > 0.5 and screen.rate <= 0.06


@pytest.mark.slow
def test_the_command_trains_on_pairs_and_says_so(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", jsonl(preferences(30)[0]))
    held = write(tmp_path / "held.jsonl", jsonl(preferences(12, seed=1, ratio=0)[0]))
    asked = write(tmp_path / "asked.jsonl", jsonl([{**row, "split": "report"} for row in lab.requests("report")[:6]]))
    options = write(
        tmp_path / "t.json", json.dumps({"max_steps": 4, "beta": 0.2, "save_strategy": "steps", "save_steps": 2})
    )
    lora = write(tmp_path / "lora.json", json.dumps({**lab.LORA, "r": 2}))
    typed = ["train", data, "--model", ALIGNED, "--output", tmp_path / "run", "--lora-config", lora, "--uncertified"]
    typed += [
        "--training-config",
        options,
        "--max-length",
        "256",
        "--safety",
        asked,
        "--utility",
        held,
        "--metric",
        "likelihood",
    ]
    typed += ["--max-new-tokens", "8", "--defence", "fihs:ratio:10%"]
    done = command(*map(str, typed))
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["settings"]["method"], manifest["settings"]["training"]["beta"]) == ("dpo", 0.2)
    assert manifest["results"]["trained"] == manifest["results"]["rows"] - manifest["results"]["removed"]
    assert manifest["results"]["after"]["utility"]["n"] == 12
    assert "DPO, " in (tmp_path / "run" / "report.html").read_text()
    assert {"adapter_model.safetensors", "certificate.json"} <= {p.name for p in (tmp_path / "run").iterdir()}


@pytest.fixture(scope="module")
def course() -> Course:
    loaded = loading.load(ALIGNED, dtype="float32")
    rows, labels = preferences(40, ratio=0.2)
    job = Job(
        rows=prepare(rows, loaded),
        options={"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        peft_config=peft.LoraConfig(**{**lab.LORA, "r": 2}),
        needs=gs.Needs(base=loading.load(lab.checkpoint("base"), dtype="float32")),
        labels=labels,
        probing=ASKED,
    )
    return Course(job)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "clean", "random:as:screen", "fihs:ratio:10%+asft", "safelora", "token-mask"])
def test_every_defence_that_works_on_pairs_leaves_the_start_alone(course: Course, name: str) -> None:
    defence = parse(name)
    before = weights(course.loaded.model)
    chosen = course.chosen(defence)
    fitted = course.fit(defence, course.dataset(defence, chosen))
    assert same(weights(course.loaded.model), before)
    assert not same(weights(fitted.model), before)
    assert set(fitted.record) == {part for part in ("asft", "safelora") if part in name}
    assert (
        chosen.dropped_tokens > 0
        if name == "token-mask"
        else chosen.removed.any() == (name not in ("none", "safelora"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["fihs", "screen"])
def test_a_cut_is_searched_on_pairs(selector: str, tmp_path: Path) -> None:
    rows, _ = preferences(30, ratio=0.2)
    held = str(write(tmp_path / "held.jsonl", jsonl(preferences(12, seed=1, ratio=0)[0])))
    asked = [{**row, "split": split} for split in ("search", "report") for row in lab.requests(split)[:6]]
    exams = exams_of(str(write(tmp_path / "asked.jsonl", jsonl(asked))), None, held, "likelihood", 8, "", True)
    done = training.train(
        rows,
        model=ALIGNED,
        output=tmp_path / "run",
        defence=f"{selector}:verified:utility=0.0,asr=0.99,rounds=1",
        training={"max_steps": 1, "per_device_train_batch_size": 2},
        probing=ASKED,
        exams=exams,
    )
    assert done.verdict is not None and done.verdict.met and len(done.verdict.rounds) == 1


@pytest.mark.slow
def test_pairs_are_compared_and_trained_on_in_turn_like_other_rows(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b", "held", "asked")}
    for seed, name in enumerate(("a", "b")):
        write(files[name], jsonl(preferences(24, seed=seed, ratio=0.2)[0]))
    held = str(write(files["held"], jsonl(preferences(12, seed=2, ratio=0)[0])))
    splits = {"direction": 160, "search": 6, "report": 6}
    asked = [{**row, "split": name} for name, most in splits.items() for row in lab.requests(name)[:most]]
    write(files["asked"], jsonl(asked))
    options, lora = {"max_steps": 1, "beta": 0.3}, {**lab.LORA, "r": 2}
    config: dict[str, Any] = {
        "model": ALIGNED,
        "datasets": [{"name": "p", "train": str(files["a"]), "task": held, "metric": "likelihood"}],
        "requests": dict.fromkeys(splits, str(files["asked"])),
        "answer_tokens": 8,
        "training": options,
        "lora": lora,
        "grids": [{"tasks": ["p"], "defences": ["none", "screen", "screen+kl"]}],
    }
    none, screen, kl = compare(grid.check(config), tmp_path / "compared").cells
    assert none.failed is screen.failed is None and screen.removed > 0 == none.removed
    assert kl.failed is not None and "has kl, which works on single answers only" in kl.failed
    exams = Exams(exam("report", str(files["asked"]), ["refusal-phrases"], held, "likelihood", 8))
    found = sequence(
        [Stage(str(files[name]), exams) for name in ("a", "b")],
        model=loading.load(ALIGNED, dtype="float32"),
        output=tmp_path / "run",
        peft_config=peft.LoraConfig(**lora),
        training=options,
        defence="random:ratio:10%",
        probing=ASKED,
    )
    assert [stage.name for stage in found.stages] == ["start", "a", "b"] and found.settings.method == "dpo"
