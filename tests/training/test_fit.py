"""The TRL wrapper: same seed, same weights; and what it leaves on the model, the tokenizer and the disk."""

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import TrainerCallback, set_seed
from trl import SFTConfig

from gradshield.errors import EmptyDataError, UsageError
from gradshield.training import fit
from gradshield.training.course import Followed
from gradshield.training.fit import _config
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
        runs.append(_weights(fit(model, tokenizer, _tokenised(), OPTIONS, adapter, seed=seed, merge=bool(adapter))))
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])
    assert not _same(runs[0], _weights(model))


def test_the_adapter_starts_where_its_seed_puts_it() -> None:
    """The subspace that a scan measures in is the adapter that is trained, at its seeded start."""
    model = tiny_model("llama")
    trained = fit(model, tiny_tokenizer(), _tokenised(), {**OPTIONS, "learning_rate": 0.0}, LORA, seed=7)
    set_seed(7)
    expected = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(LORA))
    assert any("lora_A" in name for name in expected.state_dict())
    assert _same(_weights(trained), _weights(expected))


def test_a_copy_is_trained_and_the_model_stays_as_it_was() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = None
    before, config = _weights(model), model.config.to_dict()
    targets = copy.deepcopy(LORA.to_dict())
    trained = fit(model, tokenizer, _tokenised(), OPTIONS, LORA, merge=True)
    assert _same(before, _weights(model))
    assert model.config.to_dict() == config
    assert tokenizer.pad_token is None
    assert LORA.to_dict() == targets
    assert type(trained) is type(model)
    assert not trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_a_trained_model_can_be_copied_and_trained_again() -> None:
    """TRL binds a forward whose closure holds the model it was made for: a copy would answer with the old weights."""
    first = fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS)
    second = fit(first, tiny_tokenizer(), _tokenised(), {**OPTIONS, "gradient_checkpointing": True})
    fresh = tiny_model("llama")
    fresh.load_state_dict(second.state_dict())
    ids = torch.arange(10, 30).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(second(ids).logits, fresh(ids).logits)
        assert not torch.equal(second(ids).logits, first(ids).logits)
    assert "forward" not in second.__dict__
    assert not second.is_activation_checkpointing
    assert second.config.use_cache == fresh.config.use_cache


def test_a_trained_model_is_trained_again_in_the_precision_asked_for() -> None:
    """Accelerate marks what it prepared, and leaves mixed precision off what is marked."""
    mixed = {**OPTIONS, "bf16": True}
    first = fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), mixed)
    fresh = tiny_model("llama")
    fresh.load_state_dict(first.state_dict())
    expected = _weights(fit(fresh, tiny_tokenizer(), _tokenised(), mixed))
    single = _weights(fit(fresh, tiny_tokenizer(), _tokenised(), OPTIONS))
    again = _weights(fit(first, tiny_tokenizer(), _tokenised(), mixed))
    assert _same(again, expected) and not _same(again, single)


def test_what_another_trainer_left_on_a_model() -> None:
    """A mark of accelerate's does not turn mixed precision off."""
    mixed = {**OPTIONS, "bf16": True}
    expected = _weights(fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), mixed))
    marked: Any = tiny_model("llama")
    marked._is_accelerate_prepared = True
    assert _same(expected, _weights(fit(marked, tiny_tokenizer(), _tokenised(), mixed)))


def test_an_adapter_that_is_kept_can_be_copied_and_trained_again() -> None:
    first = fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, "bf16": True}, LORA)
    second = fit(first, tiny_tokenizer(), _tokenised(), {**OPTIONS, "bf16": True})
    fresh = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA))
    fresh.load_state_dict(second.state_dict())
    ids = torch.arange(10, 30).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(second(ids).logits, fresh.eval()(ids).logits)
        assert not torch.equal(second(ids).logits, first(ids).logits)
    assert not any("forward" in vars(module) for model in (first, second) for module in model.modules())


def test_merging_changes_no_answer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    kept, merged = (fit(model, tokenizer, _tokenised(), OPTIONS, LORA, merge=merge) for merge in (False, True))
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
    trained = fit(model, tiny_tokenizer(), rows, options)
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
    skipped = fit(model, tokenizer, rows, OPTIONS)
    padded = datasets.Dataset.from_list([*rows, {"input_ids": [9, 9], "labels": [-100, -100]}])  # TRL drops the last
    assert _same(_weights(skipped), _weights(fit(model, tokenizer, padded, OPTIONS)))


@pytest.mark.parametrize("template", [True, False])
def test_chats_are_trained_on_their_answers(template: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    seen: list[tuple[int, int]] = []
    options = {**OPTIONS, "assistant_only_loss": True}
    model = tiny_model("llama")
    datasets.enable_progress_bars()  # a command that ran in this process may have disabled them
    trained = fit(
        model, tokenizer, CHATS, options, callbacks=[Followed(lambda step, total: seen.append((step, total)))]
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert not _same(_weights(trained), _weights(model))
    assert capsys.readouterr().out == ""
    assert not datasets.are_progress_bars_disabled()


def test_nothing_is_written_unless_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS)
    assert list(tmp_path.iterdir()) == []
    fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), OPTIONS, LORA, output_dir=str(tmp_path / "out"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "checkpoint-3" in written and "adapter_model.safetensors" not in written


class Saves(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.args: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.args = args

    def on_save(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.steps.append(state.global_step)


def test_without_a_folder_nothing_is_saved_whatever_the_options_say(tmp_path: Path) -> None:
    for folder, steps in ((None, []), (str(tmp_path), [1, 2, 3])):
        saves, options = Saves(), {**OPTIONS, "save_strategy": "steps", "save_steps": 1}
        fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), options, output_dir=folder, callbacks=[saves])
        assert saves.steps == steps


# ---- going on from a checkpoint ------------------------------------------------------------------------------------


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "no state": _without("trainer_state.json"),
    "no optimiser": _without("optimizer.pt"),
    "no schedule": _without("scheduler.pt"),
    "no weights": lambda folder: [path.unlink() for path in folder.glob("*.safetensors")],
    "state cut": _cut("trainer_state.json"),
    "state empty": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "optimiser cut": _cut("optimizer.pt"),
    "random state cut": _cut("rng_state.pth"),
    "weights cut": lambda folder: _cut(next(folder.glob("*.safetensors")).name)(folder),
    "shard missing": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    ),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("stopped")
    options = {**OPTIONS, "max_steps": 4, "save_steps": 1, "save_total_limit": None}
    fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), options, LORA, output_dir=str(out))
    return out


def _resumed(out: Path, **options: Any) -> tuple[int, dict[str, torch.Tensor]]:
    seen: list[int] = []
    result = fit(
        tiny_model("llama"),
        tiny_tokenizer(),
        _tokenised(),
        {**OPTIONS, "max_steps": 4, "save_strategy": "no", **options},
        LORA,
        output_dir=str(out),
        resume=True,
        callbacks=[Followed(lambda step, _total: seen.append(step))],
    )
    return seen[0], _weights(result)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_passed_over(how: str, stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-notes").mkdir()
    BROKEN[how](out / "checkpoint-3")
    start, weights = _resumed(out)
    assert start == 2
    left = {path.name for path in out.iterdir() if path.is_dir()}
    assert left == {"checkpoint-1", "checkpoint-2", "checkpoint-notes"}
    shutil.rmtree(out)
    shutil.copytree(stopped, out)
    whole, expected = _resumed(out)
    assert whole == 4 and _same(weights, expected)


def test_where_no_checkpoint_is_whole_training_starts_anew(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    for path in out.glob("checkpoint-*"):
        (path / "trainer_state.json").unlink()
    start, weights = _resumed(out)
    assert start == 0 and not list(out.glob("checkpoint-*"))
    assert _same(weights, _resumed(stopped)[1])


def test_checkpoints_that_were_to_hold_weights_alone_are_taken_as_they_are(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 2, "save_steps": 1, "save_only_model": True}
    fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), options, LORA, output_dir=str(tmp_path))
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert _resumed(tmp_path, save_only_model=True)[0] == 2


# ---- where and in what precision ------------------------------------------------------------------------------------


def test_training_is_where_the_model_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            fake.undo()  # an optimiser of a CUDA build would ask the driver that is not there

    saves, fake = Saves(), pytest.MonkeyPatch()
    fake.setattr(torch.accelerator, "is_available", lambda: True)
    fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, "max_steps": 1}, callbacks=[saves, Steps()])
    assert saves.args.use_cpu and not saves.args.bf16 and saves.args.device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    single = {"bf16": False}
    assert not _config(SFTConfig, single, 0, str(tmp_path), True, on_cpu=False).use_cpu
    assert not _config(SFTConfig, {**single, "use_cpu": False}, 0, str(tmp_path), True, on_cpu=True).use_cpu
    assert _config(SFTConfig, {**single, "use_cpu": True}, 0, str(tmp_path), True, on_cpu=False).use_cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert _config(SFTConfig, single, 0, str(tmp_path), True, on_cpu=False).use_cpu


def test_weights_that_train_in_half_precision_are_warned_of_once() -> None:
    rows, tokenizer = _tokenised(), tiny_tokenizer()
    with pytest.warns(UserWarning, match="stored in bfloat16, where small learning rates round") as caught:
        fit(tiny_model("llama").to(torch.bfloat16), tokenizer, rows, OPTIONS)
    assert sum("round to nothing" in str(one.message) for one in caught) == 1
    assert next(one.filename for one in caught if "round to nothing" in str(one.message)) == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*round to nothing.*")
        fit(tiny_model("llama").to(torch.bfloat16), tokenizer, rows, OPTIONS, LORA)
        fit(tiny_model("llama"), tokenizer, rows, {**OPTIONS, "bf16": True})


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"lerning_rate": 1.0}, {}, "unknown training option 'lerning_rate'.*did you mean 'learning_rate'"),
        ({"zzz": 1}, {}, "unknown training option 'zzz'.*see the fields"),
        ({"seed": 1}, {}, "'seed' is not a training option here.*argument seed="),
        ({"lr_scheduler_type": "zigzag"}, {}, "TRL refuses.*zigzag"),
        ({"assistant_only_loss": True}, {}, "TRL refuses.*not conversational"),
        ({}, {"merge": True}, "merge needs an adapter"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, **options}, **more)


def test_rows_that_cannot_be_trained_on() -> None:
    with pytest.raises(EmptyDataError, match="no row to train on"):
        fit(tiny_model("llama"), tiny_tokenizer(), [], OPTIONS)
    with pytest.raises(EmptyDataError, match="max_length=3"):
        fit(tiny_model("llama"), tiny_tokenizer(), _tokenised(), {**OPTIONS, "max_length": 3})
