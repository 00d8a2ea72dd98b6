"""`selection.kept` goes into a trainer as it is, and the caller's model is bit for bit what it was."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

import gradshield as gs
from gradshield import data as rows_in
from gradshield.errors import UsageError
from gradshield.models import loading
from gradshield.models.loading import parameters_digest
from gradshield.scanning.review import Review
from gradshield.selectors import Fihs
from tests.common import HALF, PROBING, chats, command, jsonl, scan, scan_arguments, write
from tests.tiny import tiny_model, tiny_tokenizer

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "One.", "weight": 0}]
WEIGHTED = [
    {"messages": [*TURNS, {"role": "user", "content": "R"}, {"role": "assistant", "content": f"Two {n}.", "weight": 1}]}
    for n in range(4)
]


def _config(folder: Path, **more: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=1, **more)


def _state(model: Any) -> Any:
    """Everything about a model that a scan could change."""
    return (
        parameters_digest(model),
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        {name: b.clone().tolist() for name, b in model.named_buffers()},
        sorted(vars(model)),
        model.config.to_json_string(),
    )


def _marked_model() -> Any:
    """A model in a state that no scan would leave by accident."""
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (chats(4), False),
        ([{"prompt": f"Q {n}", "completion": "A"} for n in range(4)], True),
        ([{"instruction": f"Q {n}", "output": "A"} for n in range(4)], True),
    ],
)
def test_an_option_that_trl_refuses_for_the_kept_rows_is_said(
    rows: list[Any], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = _config(tmp_path, assistant_only_loss=True)
    found = gs.scan(
        datasets.Dataset.from_list(rows), model=tiny_model("llama"), tokenizer=tiny_tokenizer(), training_args=args,
        settings=HALF, probing=PROBING,
    )  # fmt: skip
    assert ("TRL refuses assistant_only_loss" in caplog.text) is told
    with pytest.raises(ValueError, match="assistant_only_loss") if told else nullcontext():
        SFTTrainer(tiny_model("llama"), args=args, train_dataset=found.kept, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_three_lines_in_a_trl_script(peft: bool, tmp_path: Path) -> None:
    dataset, model, tokenizer = datasets.Dataset.from_list(chats(8)), _marked_model(), tiny_tokenizer()
    config = LoraConfig(**LORA) if peft else None
    template, before = tokenizer.chat_template, _state(model)
    selection = gs.scan(dataset, model=model, tokenizer=tokenizer, peft_config=config, settings=HALF, probing=PROBING)
    assert _state(model) == before
    assert (tokenizer.chat_template, tokenizer.padding_side) == (template, tiny_tokenizer().padding_side)
    assert selection.manifest.settings.adapted_weights == (4 if peft else 0)
    assert (selection.manifest.settings.peft or {}).get("r") == (2 if peft else None)
    assert isinstance(selection.kept, datasets.Dataset)
    assert selection.kept.features == dataset.features
    assert list(selection.kept) == [dataset[int(row)] for row in selection.kept_rows]
    assert len(selection.kept) == 4
    args = _config(tmp_path, assistant_only_loss=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer = SFTTrainer(model, args, train_dataset=selection.kept, processing_class=tokenizer, peft_config=config)
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("subspace", ["all", "lora"])
def test_the_model_is_as_it_was_wherever_it_is_interrupted(subspace: str) -> None:
    model = _marked_model()
    calls, stop = 0, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    model.model.layers[1].mlp.down_proj.register_forward_hook(count)
    before = _state(model)
    settings = gs.ScanSettings(threshold="ratio:50%", subspace=subspace, selector="fihs")
    options = {"model": model, "tokenizer": tiny_tokenizer(), "peft_config": LoraConfig(**LORA), "settings": settings}
    scan(chats(6), **options)
    assert _state(model) == before
    total = calls
    assert total > 40
    for stop in (1, total // 5, total // 2, total - 20, total):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            scan(chats(6), **options)
        assert _state(model) == before, f"forward pass {stop} of {total}"


def test_an_adapter_that_does_not_fit_leaves_the_model_alone() -> None:
    model = _marked_model()
    before = _state(model)
    for wrong in ({"target_modules": ["nope"]}, {"r": 0}, {"r": "many"}):
        with pytest.raises(gs.GradShieldError, match="cannot be added to the model") as raised:
            scan(chats(4), model=model, tokenizer=tiny_tokenizer(), peft_config=LoraConfig(**(LORA | wrong)))
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)
        assert _state(model) == before


def test_a_model_with_an_adapter_keeps_it() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(**LORA, init_lora_weights=False))
    before = parameters_digest(model)
    for subspace in ("all", "targets", "lora"):
        settings = gs.ScanSettings(threshold="ratio:50%", subspace=subspace, selector="fihs")
        selection = scan(chats(4), model=model, tokenizer=tiny_tokenizer(), settings=settings)
        assert selection.manifest.settings.subspace == subspace
        assert selection.manifest.settings.adapted_weights == 4
        assert parameters_digest(model) == before
        assert hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": "Add", "input": f"2 {n}", "output": f"It is {n}."} for n in range(4)],
        [
            {"conversations": [{"from": "human", "value": f"Q {n}"}, {"from": "gpt", "value": f"A {n}"}]}
            for n in range(4)
        ],
        WEIGHTED,
    ],
    ids=["alpaca", "sharegpt", "weights"],
)
def test_rows_that_trl_does_not_know_come_as_tokens(rows: list[Any], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    selection = scan(datasets.Dataset.from_list(rows), model=tiny_model("llama"), tokenizer=tokenizer)
    assert selection.kept.column_names == ["input_ids", "labels"]
    assert len(selection.kept) == 2
    for row, count in zip(selection.kept, selection.scores.lengths[~selection.removed], strict=True):
        assert sum(label != -100 for label in row["labels"]) == count
        text = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert "One" not in text
        assert text.endswith("</s>")
    trainer = SFTTrainer(
        tiny_model("llama"), _config(tmp_path), train_dataset=selection.kept, processing_class=tokenizer
    )
    prepared = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    assert prepared == [(row["input_ids"], row["labels"]) for row in selection.kept]


def test_rows_that_are_tokens_already_are_scored_as_their_text_is(tmp_path: Path) -> None:
    """Whatever they came from, rows of the same tokens have the same scores; the baselines and the report read their text."""
    tokenizer = tiny_tokenizer()
    first = scan(chats(8), labels=[0, 1] * 4)
    rendered = rows_in.render_all(rows_in.read(chats(8)).examples, tokenizer).rendered
    dataset = datasets.Dataset.from_list([rows_in.labelled(row) for row in rendered])
    again = scan(dataset, labels=[0, 1] * 4, output=tmp_path / "out")

    assert again.scores.values.tolist() == first.scores.values.tolist()
    assert again.kept.column_names == ["input_ids", "labels"] and len(again.kept) == 4
    assert again.manifest.data.read_as == {"tokens": 8}
    assert again.manifest.results.labels.aurocs == first.manifest.results.labels.aurocs
    removed = int(again.removed_rows[0])
    assert f"Question {removed}?" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    best = again.scores.rows[np.argsort(-again.scores.values)[:2]]
    assert sorted(gs.cut(tmp_path / "out", "ratio:25%").removed_rows) == sorted(best)
    (tmp_path / "out" / ".gradshield" / "views.json").unlink()
    ids = dataset[0]["input_ids"]
    seen = [word for text, *_ in Review(tmp_path / "out").row(0).pieces for word in text.split()]
    assert seen == [str(one) for one in ids]  # without a tokenizer
    shown = gs.show(tmp_path / "out" / "kept.jsonl", model=loading.wrap(tiny_model("llama"), tokenizer))
    assert shown.shape == "tokens" and "The answer is" in "".join(text for text, counts in shown.pieces if counts)


def test_the_rows_of_a_trainer_are_scored_and_go_back_into_it(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    args = _config(tmp_path, assistant_only_loss=True)
    trainer = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(chats(8)), processing_class=tokenizer)
    rows = trainer.train_dataset.to_list()
    selection = scan(trainer.train_dataset, model=model, tokenizer=tokenizer)
    assert selection.scores.values.tolist() == scan(chats(8)).scores.values.tolist()
    trainer.train_dataset = selection.kept
    assert trainer.train_dataset.to_list() == [rows[row] for row in selection.kept_rows]
    trainer.train()


@pytest.mark.parametrize("processes", [None, 2])
def test_marks_are_columns_of_a_dataset(processes: int | None) -> None:
    dataset = datasets.Dataset.from_list([*chats(4), {"messages": []}, *chats(3, "again")])
    selection = scan(dataset)
    marked = dataset.map(selection.marks, batched=True, batch_size=2, with_indices=True, num_proc=processes)
    assert marked.column_names == ["messages", "gradshield_score", "gradshield_removed", "gradshield_category"]
    scored = selection.scores.rows.tolist()
    assert [row for row, score in enumerate(marked["gradshield_score"]) if score is None] == [4]
    assert marked.select(scored)["gradshield_score"][:] == selection.scores.values.tolist()
    assert marked.select(scored)["gradshield_removed"][:] == selection.removed.tolist()
    assert marked.select(scored)["gradshield_category"][:] == [str(name) for name in selection.categories]
    again = dataset.map(selection.marks, batched=True, batch_size=2, with_indices=True, num_proc=processes)
    assert again._fingerprint == marked._fingerprint  # known by its content: nothing is computed twice


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def test_lists_of_text_parts_come_as_the_text_that_was_scored() -> None:
    """The tiny template joins strings: given the row itself, TRL fails, and others train on Python's list."""
    rows = [
        {"messages": [{"role": "user", "content": _parts("Q")}, {"role": "assistant", "content": _parts(f"One {n}.")}]}
        for n in range(4)
    ]
    tokenizer = tiny_tokenizer()
    with pytest.warns(UserWarning, match="4 rows hold lists of text parts"):
        selection = scan(datasets.Dataset.from_list(rows), model=tiny_model("llama"), tokenizer=tokenizer)
    assert selection.kept.column_names == ["input_ids", "labels"]
    assert tokenizer.decode(selection.kept[0]["input_ids"]).startswith("<s><|user|>Q<|assistant|>One ")


def test_pairs_with_lists_of_text_parts_come_as_text() -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": _parts("Q")}],
            "chosen": [{"role": "assistant", "content": _parts(f"One {n}.")}],
            "rejected": [{"role": "assistant", "content": _parts("Two.")}],
        }
        for n in range(4)
    ]
    with pytest.warns(UserWarning, match="4 rows hold lists of text parts"):
        selection = scan(datasets.Dataset.from_list(rows), model=tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert selection.kept[0]["rejected"] == [{"role": "assistant", "content": "Two."}]


def test_a_weight_that_trl_does_not_read_is_said() -> None:
    with pytest.warns(UserWarning, match="4 rows have answers of weight 0.*given the kept file it trains on them"):
        scan(WEIGHTED, model=tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "options", [{}, {"assistant_only_loss": True}, {"max_length": 24, "truncation_mode": "keep_end"}]
)
def test_what_is_scored_is_what_the_training_arguments_say(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[list[int], list[int]]] = {}
    measure = Fihs.measure

    def noted(self: Fihs, model: Any, direction: Any, batch: Any) -> Any:
        for row, ids, mask, loss in zip(batch.rows, batch.ids, batch.attention, batch.loss, strict=True):
            seen[int(row)] = (ids[mask].tolist(), np.where(loss, ids, -100)[mask].tolist()[1:])
        return measure(self, model, direction, batch)

    monkeypatch.setattr(Fihs, "measure", noted)
    dataset, args = datasets.Dataset.from_list(chats(4)), _config(tmp_path, **options)
    selection = scan(dataset, training_args=args, settings=gs.ScanSettings(threshold="fixed:1e9", selector="fihs"))
    trainer = SFTTrainer(tiny_model("llama"), args, train_dataset=selection.kept, processing_class=tiny_tokenizer())
    trained = [(row["input_ids"], row["labels"][1:]) for row in trainer.train_dataset]
    assert [seen[row] for row in range(4)] == trained


def test_answers_to_avoid_are_no_rows_for_a_supervised_trainer(tmp_path: Path) -> None:
    rows = [{"prompt": "Say it", "completion": " well", "label": label} for label in (True, False)]
    with pytest.raises(UsageError, match="would train toward them"):
        scan(rows, training_args=_config(tmp_path))
    dataset = datasets.Dataset.from_list(rows)
    kept = scan(dataset, settings=gs.ScanSettings(threshold="fixed:1e9", selector="fihs")).kept
    assert kept.column_names == ["prompt", "completion", "label"] and kept[:] == dataset[:]


def test_the_command_reads_columns_by_name_and_cuts_again(folder: Path, probes: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"q": f"Say {n}", "a": f" It is {n}", "text": "x"}) for n in range(4)]
    (tmp_path / "data").mkdir()
    for n in (0, 1):
        write(tmp_path / "data" / f"{n}.jsonl", "\n".join(lines[2 * n : 2 * n + 2]) + "\n")
    output, columns = tmp_path / "out", "prompt=q, completion=a"
    done = command(*scan_arguments(tmp_path / "data", folder, output, probes, "--columns", columns, "-t", "ratio:50%"))
    assert done.code == 0, done.err
    assert "read as prompt-completion (q as prompt, a as completion), not text: 4" in done.out
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["settings"]["format"] == {"name": None, "columns": {"prompt": "q", "completion": "a"}}
    assert manifest["data"]["name"].endswith("data (2 files)")
    again = command("cut", output, "-t", "fixed:1e9")
    assert again.code == 0, again.err
    assert (output / "kept.jsonl").read_text().splitlines() == lines
    for wrong in ("prompt", "prompt=q,prompt=a", "=q", "pormpt=q"):
        done = command(*scan_arguments(tmp_path / "data", folder, tmp_path / "no", probes, "--columns", wrong))
        assert done.code == 2 and done.sentence and "prompt" in done.sentence


def test_the_training_config_of_the_command_counts(folder: Path, probes: Path, tmp_path: Path) -> None:
    rows = [{"words": f"The answer {n} is that.", "text": 3} for n in range(4)]
    data = write(tmp_path / "data.jsonl", jsonl(rows))
    config = write(tmp_path / "sft.json", json.dumps({"dataset_text_field": "words", "max_length": 8}))
    output = tmp_path / "out"
    more = ("--training-config", config, "-t", "ratio:50%")
    done = command(*scan_arguments(data, folder, output, probes, *more))
    assert done.code == 0, done.err
    assert json.loads((output / "manifest.json").read_text())["settings"]["render"]["max_length"] == 8
    again = command("cut", output, "-t", "ratio:25%")
    assert again.code == 0, again.err
    assert "1 of 4 rows removed" in again.out
