"""What is scored is what is trained: ids and labels equal those that a real SFTTrainer prepares."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pytest
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from gradshield.data import RenderConfig, read, render_all, to_trl
from gradshield.errors import FormatError
from gradshield.scanning.rows import prepare
from tests.tiny import tiny_model, tiny_tokenizer

LONG = "The capital of France is Paris, and here is what else there is to say about it. " * 3
TURNS = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris é."},
    {"role": "user", "content": "And of Spain?"},
    {"role": "assistant", "content": "Madrid. " + LONG},
]
MESSAGES = [{"messages": TURNS}, {"messages": TURNS[1:3]}]
STRINGS = [
    {"prompt": "Add two and three:", "completion": " five"},
    {"prompt": "How do", "completion": " I bake? " + LONG},
    {"prompt": "Say it", "completion": "self</s>"},
]
ANSWERED = [{"prompt": TURNS[:-1], "completion": TURNS[-1:]}, {"prompt": TURNS[1:2], "completion": TURNS[2:3]}]
TEXT = [{"text": "Mix the flour with water. " + LONG}, {"text": "Short.</s>"}]
TOKENS = [
    {"input_ids": [5, 6, 7] * 20, "labels": [-100, 6, 7] * 20},
    {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
]
CASES = {
    "messages, all": (MESSAGES, {}),
    "messages, assistant only": (MESSAGES, {"assistant_only_loss": True}),
    "messages, keep end": (MESSAGES, {"assistant_only_loss": True, "truncation_mode": "keep_end"}),
    "strings": (STRINGS, {}),
    "strings, all": (STRINGS, {"completion_only_loss": False}),
    "strings, completion only": (STRINGS, {"completion_only_loss": True}),
    "answered": (ANSWERED, {}),
    "answered, all": (ANSWERED, {"completion_only_loss": False}),
    "answered, assistant only": (ANSWERED, {"assistant_only_loss": True}),
    "answered, assistants of the prompt too": (
        ANSWERED,
        {"assistant_only_loss": True, "completion_only_loss": False},
    ),
    "text": (TEXT, {}),
    "tokens": (TOKENS, {}),
    "tokens, completion only": (
        [{"input_ids": [5, 6, 7] * 20, "completion_mask": [0, 1, 1] * 20}],
        {"completion_only_loss": True},
    ),
    "tokens, answers": ([{"input_ids": [5, 6, 7] * 20, "assistant_masks": [0, 1, 0] * 20}], {}),
    "text, keep end": (TEXT, {"truncation_mode": "keep_end"}),
}


@pytest.fixture(scope="module")
def model() -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return tiny_model("llama")


def _config(folder: Any, **settings: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings)


def _trained(rows: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels, the first label aside: labels are shifted, so nothing predicts the first token."""
    return [(list(row["input_ids"]), list(row["labels"])[1:]) for row in rows]


def _scored(rendered: Any) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in rendered:
        (tokens,) = row.sequences
        assert not tokens.loss[0]
        found.append((tokens.ids.tolist(), np.where(tokens.loss, tokens.ids, -100).tolist()[1:]))
    return found


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("case", CASES)
def test_equals_what_the_trainer_prepares(case: str, max_length: int | None, model: Any, tmp_path: Any) -> None:
    rows, settings = CASES[case]
    args = _config(tmp_path, max_length=max_length, **settings)
    tokenizer = tiny_tokenizer()
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    result = render_all(read(rows).examples, tiny_tokenizer(), RenderConfig.from_trl(args))

    expected = _trained(trainer.train_dataset)
    assert _scored(result.rendered) == expected
    assert len(expected) + len(result.quarantined) == len(rows)
    assert max_length is None or result.quarantined or any(len(ids) == max_length for ids, _ in expected)


def test_rows_with_nothing_left_to_train_are_those_that_the_trainer_drops(model: Any, tmp_path: Any) -> None:
    rows = [{"prompt": LONG, "completion": " five"}, {"prompt": "Add:", "completion": " five"}]
    args = _config(tmp_path, max_length=20)
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer())
    result = render_all(read(rows).examples, tiny_tokenizer(), RenderConfig.from_trl(args))

    assert _scored(result.rendered) == _trained(trainer.train_dataset)
    assert [bad.row for bad in result.quarantined] == [0]
    assert "no response token is left" in result.quarantined[0].reason


def test_the_template_that_trl_swaps_in_is_swapped_in_here(model: Any, tmp_path: Any) -> None:
    from trl.chat_template_utils import qwen3_chat_template

    args = _config(tmp_path, assistant_only_loss=True, max_length=None)
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    ours.chat_template = theirs.chat_template = qwen3_chat_template
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(MESSAGES), processing_class=theirs)
    result = render_all(read(MESSAGES).examples, ours, RenderConfig.from_trl(args))

    assert _scored(result.rendered) == _trained(trainer.train_dataset)
    assert ours.chat_template == qwen3_chat_template


def test_rows_that_trl_does_not_know_are_trained_as_they_were_scored(model: Any, tmp_path: Any) -> None:
    silenced = [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    rows = [
        {"instruction": "Add", "input": "2 3", "output": "5"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": silenced},
    ]
    result = read(rows)
    rendered = render_all(result.examples, tiny_tokenizer()).rendered
    dataset = to_trl(result.examples, rendered)
    args = _config(tmp_path, max_length=1024)
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tiny_tokenizer())

    assert _scored(rendered) == _trained(trainer.train_dataset)
    assert [example.shape for example in result.examples] == ["alpaca", "sharegpt", "messages"]


@pytest.mark.parametrize("kind", ["strings", "strings without prompt", "messages", "messages without prompt"])
def test_preference_pairs_equal_what_dpo_prepares(kind: str, model: Any, tmp_path: Any) -> None:
    ask, good, bad = TURNS[1:2], TURNS[2:3], [{"role": "assistant", "content": "Lyon"}]
    rows: list[dict[str, Any]] = {
        "strings": [{"prompt": "Add two:", "chosen": " five", "rejected": " six"}],
        "strings without prompt": [{"chosen": "It is five", "rejected": "It is not"}],
        "messages": [{"prompt": ask, "chosen": good, "rejected": bad}],
        "messages without prompt": [{"chosen": ask + good, "rejected": ask + bad}],
    }[kind]
    read_rows = read(rows)
    (row,) = render_all(read_rows.examples, tiny_tokenizer()).rendered
    args = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    ref_model = tiny_model("llama", seed=1)
    given = {"rows": datasets.Dataset.from_list(rows), "to_trl": to_trl(read_rows.examples, [row])}
    for dataset in given.values():
        trainer = DPOTrainer(model, ref_model, args=args, train_dataset=dataset, processing_class=tiny_tokenizer())
        (prepared,) = trainer.train_dataset
        for tokens, name, sign in zip(row.sequences, ("chosen_ids", "rejected_ids"), (1.0, -1.0), strict=True):
            assert tokens.ids.tolist() == prepared["prompt_ids"] + prepared[name]
            assert tokens.ids[tokens.loss].tolist() == prepared[name]
            assert tokens.coefficient == sign


@pytest.mark.parametrize("kind", ["strings", "messages"])
def test_answers_with_a_label_equal_what_kto_prepares(kind: str, model: Any, tmp_path: Any) -> None:
    ask, good, bad = TURNS[1:2], TURNS[2:3], [{"role": "assistant", "content": "Lyon"}]
    given: tuple[Any, ...] = ("Add two:", " five", " six") if kind == "strings" else (ask, good, bad)
    rows = [{"prompt": given[0], "completion": given[n], "label": n == 1} for n in (1, 2)]
    args = KTOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=2)
    prepared = prepare(rows, model, tiny_tokenizer(), args)
    again = to_trl(prepared.read.examples, prepared.rendered)
    ref_model = tiny_model("llama", seed=1)
    for dataset in (datasets.Dataset.from_list(rows), again):
        trainer = KTOTrainer(model, ref_model, args, train_dataset=dataset, processing_class=tiny_tokenizer())
        for row, found in zip(prepared.rendered, trainer.train_dataset, strict=True):
            (tokens,) = row.sequences
            assert tokens.ids.tolist() == found["prompt_ids"] + found["completion_ids"]
            assert tokens.ids[tokens.loss].tolist() == found["completion_ids"]
            assert tokens.coefficient == (1.0 if found["label"] else -1.0)


def _tool(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def test_pairs_keep_tools_that_not_every_row_has(model: Any, tmp_path: Any) -> None:
    pair: dict[str, Any] = {
        "prompt": TURNS[1:2],
        "chosen": TURNS[2:3],
        "rejected": [{"role": "assistant", "content": "Lyon"}],
    }
    rows = [pair, {**pair, "tools": [_tool("add", "a", "b")]}, {**pair, "tools": [_tool("ask", "who")]}]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    read_rows = read(rows)
    rendered = render_all(read_rows.examples, tokenizer).rendered
    args = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    dataset = to_trl(read_rows.examples, rendered)
    trainer = DPOTrainer(
        model, tiny_model("llama", seed=1), args=args, train_dataset=dataset, processing_class=tokenizer
    )
    assert len({len(row.sequences[0].ids) for row in rendered}) == 3
    for row, prepared in zip(rendered, trainer.train_dataset, strict=True):
        assert row.sequences[0].ids.tolist() == prepared["prompt_ids"] + prepared["chosen_ids"]


def test_pairs_of_different_template_options_are_reported() -> None:
    pair = {"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": TURNS[2:3]}
    rows: list[dict[str, Any]] = [{**pair, "chat_template_kwargs": {"short": short}} for short in (True, False)]
    read_rows = read(rows)
    dataset = to_trl(read_rows.examples, render_all(read_rows.examples, tiny_tokenizer()).rendered)
    assert dataset["chat_template_kwargs"][:] == [{"short": True}, {"short": False}]
    mixed = read([pair, *rows])
    with pytest.raises(FormatError, match=r"different chat_template_kwargs \(none; short\)"):
        to_trl(mixed.examples, render_all(mixed.examples, tiny_tokenizer()).rendered)


def test_packing_is_noted_and_rows_stay_unpacked(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = RenderConfig.from_trl(_config(tmp_path, packing=True, max_length=48))
    assert config.max_length == 48
    assert "packing=True" in caplog.text
