"""The TRL wrapper: same seed, same weights; and what it leaves on the model, the tokenizer and the disk."""

import copy
import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import set_seed

from gradshield.errors import EmptyDataError, UsageError
from gradshield.training import sft
from tests.tiny import tiny_model, tiny_tokenizer

LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
OPTIONS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def _tokenised(n: int = 10, length: int = 12) -> list[dict[str, list[int]]]:
    generator = random.Random(0)
    ids = [[generator.randrange(10, 300) for _ in range(length + i % 3)] for i in range(n)]
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids]


CHATS = [
    {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(8)
]


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(adapter: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(random.randrange(10**6))  # what came before must not matter
        runs.append(_weights(sft(model, tokenizer, _tokenised(), OPTIONS, adapter, seed=seed, merge=bool(adapter))))
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])
    assert not _same(runs[0], _weights(model))


def test_the_adapter_starts_where_its_seed_puts_it() -> None:
    """The subspace that a scan measures in is the adapter that is trained, at its seeded start."""
    model = tiny_model("llama")
    trained = sft(model, tiny_tokenizer(), _tokenised(), {**OPTIONS, "learning_rate": 0.0}, LORA, seed=7)
    set_seed(7)
    expected = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(LORA))
    assert any("lora_A" in name for name in expected.state_dict())
    assert _same(_weights(trained), _weights(expected))


def test_a_copy_is_trained_and_the_model_stays_as_it_was() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = None
    before, config = _weights(model), model.config.to_dict()
    targets = copy.deepcopy(LORA.to_dict())
    trained = sft(model, tokenizer, _tokenised(), OPTIONS, LORA, merge=True)
    assert _same(before, _weights(model))
    assert model.config.to_dict() == config
    assert tokenizer.pad_token is None
    assert LORA.to_dict() == targets
    assert type(trained) is type(model)
    assert not trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_without_a_copy_the_very_object_is_trained() -> None:
    model = tiny_model("llama")
    before = _weights(model)
    assert sft(model, tiny_tokenizer(), _tokenised(), OPTIONS, copy=False) is model
    assert not _same(before, _weights(model))


def test_a_trained_model_can_be_copied_and_trained_again() -> None:
    """TRL binds a forward whose closure holds the model it was made for: a copy would answer with the old weights."""
    first = sft(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS)
    second = sft(first, tiny_tokenizer(), _tokenised(), {**OPTIONS, "gradient_checkpointing": True})
    fresh = tiny_model("llama")
    fresh.load_state_dict(second.state_dict())
    ids = torch.arange(10, 30).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(second(ids).logits, fresh(ids).logits)
        assert not torch.equal(second(ids).logits, first(ids).logits)
    assert "forward" not in second.__dict__
    assert not second.is_activation_checkpointing
    assert second.config.use_cache == fresh.config.use_cache


def test_merging_changes_no_answer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    kept, merged = (sft(model, tokenizer, _tokenised(), OPTIONS, LORA, merge=merge) for merge in (False, True))
    assert isinstance(kept, peft.PeftModel)
    assert {name.split(".")[-2] for name, p in kept.named_parameters() if p.requires_grad} == {"default"}
    ids = torch.arange(10, 30).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-3)


def test_a_step_is_the_step_of_a_bare_loop() -> None:
    """Plain SGD on one batch of all rows: the weights move by the learning rate times the mean loss's gradient."""
    model, rows = tiny_model("llama"), _tokenised(4)
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    trained = sft(model, tiny_tokenizer(), rows, options)
    by_hand = copy.deepcopy(model)
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logp = by_hand(ids[None]).logits[0, 3:-1].log_softmax(-1)  # the first four tokens carry no loss
        total = total - logp.gather(1, ids[4:, None]).sum()
    (total / sum(len(row["input_ids"]) - 4 for row in rows)).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_prepared_rows_skip_preparation_and_train_the_same() -> None:
    rows = datasets.Dataset.from_list(_tokenised())
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    skipped = sft(model, tokenizer, rows, OPTIONS)
    padded = datasets.Dataset.from_list([*rows, {"input_ids": [9, 9], "labels": [-100, -100]}])  # TRL drops the last
    assert _same(_weights(skipped), _weights(sft(model, tokenizer, padded, OPTIONS)))


@pytest.mark.parametrize("template", [True, False])
def test_chats_are_trained_on_their_answers(template: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    seen: list[tuple[int, int]] = []
    options = {**OPTIONS, "assistant_only_loss": True}
    model = tiny_model("llama")
    datasets.enable_progress_bars()  # a command that ran in this process may have turned them off
    trained = sft(model, tokenizer, CHATS, options, progress=lambda step, total: seen.append((step, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert not _same(_weights(trained), _weights(model))
    assert capsys.readouterr().out == ""
    assert not datasets.are_progress_bars_disabled()


def test_nothing_is_written_unless_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sft(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS)
    assert list(tmp_path.iterdir()) == []
    sft(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS, LORA, output_dir=str(tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "checkpoint-3"} <= written


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"lerning_rate": 1.0}, {}, "unknown training option 'lerning_rate'.*did you mean 'learning_rate'"),
        ({"zzz": 1}, {}, "unknown training option 'zzz'.*see the fields"),
        ({"seed": 1}, {}, "'seed' is not a training option here.*argument seed="),
        ({"lr_scheduler_type": "zigzag"}, {}, "TRL refuses.*zigzag"),
        ({"assistant_only_loss": True}, {}, "TRL refuses.*not conversational"),
        ({}, {"merge": True}, "merge folds an adapter"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sft(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, **options}, **more)


def test_rows_that_cannot_be_trained_on() -> None:
    with pytest.raises(EmptyDataError, match="no row to train on"):
        sft(tiny_model("llama"), tiny_tokenizer(), [], OPTIONS)
    with pytest.raises(EmptyDataError, match="max_length=3"):
        sft(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, "max_length": 3})
