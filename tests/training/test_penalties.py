"""Penalties in a trainer of one's own: once per optimiser step, in ``Trainer`` and ``SFTTrainer``, never in an evaluation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from gradshield.gradients import target_names
from gradshield.gradients.alignment import Alignment, alignment
from gradshield.training.asft import AsFT
from gradshield.training.inside import Penalised, penalised
from gradshield.training.kl import FrozenReferenceKL
from tests.tiny import tiny_model, tiny_tokenizer

LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "bf16": False,
}


class Pull:
    """Half the squared norm of the trainable weights: its gradient is the weights themselves."""

    name = "pull"

    def __init__(self) -> None:
        self.prepared: list[nn.Module] = []
        self.seen: list[Mapping[str, Any]] = []

    def prepare(self, model: nn.Module) -> None:
        self.prepared.append(model)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self.seen.append(dict(inputs))
        return 0.5 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    def record(self) -> Mapping[str, Any]:
        return {}


class Catch(TrainerCallback):
    """Keeps each optimiser step's gradients, as the optimiser gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_more: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class NoLoss:
    """A task without a gradient, to put between the penalties and a trainer."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return (0 * found[0], found[1]) if return_outputs else 0 * found


def rows(n: int = 8, length: int = 12) -> Dataset:
    ids = torch.randint(10, 300, (n, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    return Dataset.from_list(
        [
            {"input_ids": i.tolist(), "labels": y.tolist(), "attention_mask": [1] * length}
            for i, y in zip(ids, labels, strict=True)
        ]
    )


def carrying() -> Any:
    """A model with an adapter whose parts are all away from zero."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return wrapped


def trainer_of(base: type, kind: type, model: Any, folder: Path, accumulate: int = 1, **options: Any) -> Any:
    options = {
        **QUIET,
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        **options,
    }
    if issubclass(base, SFTTrainer):
        more = {"activation_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return kind(
            model,
            args=SFTConfig(output_dir=str(folder), **more, **options),
            train_dataset=rows(),
            eval_dataset=rows(4),
            processing_class=tiny_tokenizer(),
        )
    return kind(
        model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=default_data_collator,
    )


def direction_for(base: nn.Module) -> Alignment:
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for p in aligned.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return alignment(aligned, base, target_names(base, LORA))


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
@pytest.mark.parametrize("how", ["counted items", "mean of the batch", "its own word"])
def test_once_per_step_whatever_the_accumulation(base: type, how: str, tmp_path: Path) -> None:
    """The gradient of the penalty alone, in the three ways in which a trainer settles who divides."""
    found = {}
    for accumulate in (1, 2, 4):
        pull, catch, model = Pull(), Catch(), carrying()
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        kind = penalised(type("Still", (NoLoss, base), {}), [pull])
        trainer = trainer_of(base, kind, model, tmp_path, accumulate)
        assert trainer.model_accepts_loss_kwargs
        if how == "mean of the batch":
            trainer.model_accepts_loss_kwargs = False
        elif how == "its own word":
            trainer.loss_is_scaled_for_ga = False
        trainer.add_callback(catch)
        trainer.train()
        assert len(pull.seen) == accumulate and len(catch.steps) == 1
        found[accumulate] = catch.steps[0]
        assert found[accumulate].keys() == start.keys()
        for name, g in found[accumulate].items():
            assert torch.allclose(g, start[name], rtol=1e-5, atol=1e-7), (accumulate, name)
    for accumulate in (2, 4):
        assert all(torch.allclose(found[1][n], found[accumulate][n], rtol=1e-5, atol=1e-7) for n in found[1])


def test_a_last_step_of_fewer_batches_counts_as_one(tmp_path: Path) -> None:
    """8 rows by 3 batches of 2 a step: the second step has one batch."""
    pull, catch, model = Pull(), Catch(), carrying()
    kind = penalised(type("Still", (NoLoss, SFTTrainer), {}), [pull])
    trainer = trainer_of(
        SFTTrainer, kind, model, tmp_path, 1, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        max_steps=-1, num_train_epochs=1, learning_rate=0.0, weight_decay=0.0,
    )  # fmt: skip
    trainer.add_callback(catch)
    trainer.train()
    start = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert len(pull.seen) == 4 and len(catch.steps) == 2
    for step in catch.steps:
        assert all(torch.allclose(step[n], start[n], rtol=1e-5, atol=1e-7) for n in start)


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_task_keeps_its_gradient(base: type, accumulate: int, tmp_path: Path) -> None:
    """Gradient with the penalty = gradient of the plain trainer + gradient of the penalty."""
    plain, with_it = Catch(), Catch()
    trainer = trainer_of(base, base, carrying(), tmp_path, accumulate)
    trainer.add_callback(plain)
    trainer.train()
    model = carrying()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(base, penalised(base, [Pull(), Pull()]), model, tmp_path, accumulate)
    trainer.add_callback(with_it)
    trainer.train()
    for name, g in with_it.steps[0].items():
        assert torch.allclose(g, plain.steps[0][name] + 2 * start[name], rtol=1e-4, atol=1e-6), name
    assert any(g.abs().max() > 1e-4 for g in plain.steps[0].values())


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_an_evaluation_knows_nothing_of_it(base: type, tmp_path: Path) -> None:
    model = carrying()
    plain = trainer_of(base, base, copy.deepcopy(model), tmp_path)
    pull = Pull()
    trainer = trainer_of(base, penalised(base, [pull]), model, tmp_path, eval_strategy="steps", eval_steps=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert not pull.seen and not pull.prepared
    trainer.train()
    assert len(pull.seen) == 1 and len(pull.prepared) == 1
    batch = default_data_collator(list(rows(4)))
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    paired, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    model.eval()
    without, _ = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert float(paired) == pytest.approx(float(loss), rel=1e-5)
    assert float(loss - without) == pytest.approx(float(pull(model, batch)), rel=1e-4)
    assert outputs.logits.shape == (4, 12, 300)


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_it_is_prepared_once_on_the_plain_model_and_sees_the_labels(base: type, tmp_path: Path) -> None:
    pull, model = Pull(), carrying()
    trainer = trainer_of(base, penalised(base, [pull]), model, tmp_path, max_steps=3, label_smoothing_factor=0.1)
    trainer.train()
    trainer.train()
    assert len(pull.prepared) == 1 and pull.prepared[0] is model
    assert len(pull.seen) == 6
    assert all({"input_ids", "attention_mask", "labels"} <= batch.keys() for batch in pull.seen)
    assert all("use_cache" not in batch for batch in pull.seen)


def test_a_new_model_is_prepared_anew(tmp_path: Path) -> None:
    pull = Pull()
    trainer = trainer_of(Trainer, penalised(Trainer, [pull]), carrying(), tmp_path)
    trainer.train()
    trainer.model = trainer.model_wrapped = carrying()
    trainer.train()
    assert [m is trainer.model for m in pull.prepared] == [False, True]


def test_as_a_base_class_and_without_a_penalty(tmp_path: Path) -> None:
    class Mine(Penalised, SFTTrainer):
        pass

    plain, mine = carrying(), carrying()
    trainer_of(SFTTrainer, SFTTrainer, plain, tmp_path, max_steps=2).train()
    trainer_of(SFTTrainer, Mine, mine, tmp_path, max_steps=2).train()
    other = dict(mine.named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in plain.named_parameters())
    assert penalised(Trainer, [Pull()]).__name__ == "PenalisedTrainer"
    lines = inspect.getsource(Penalised).splitlines()
    assert len(lines) <= 30


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_both_defences_in_training(base: type, tmp_path: Path) -> None:
    """The penalties of the package, with an adapter: they end lower than without them, and say what they were."""
    start = tiny_model("llama")

    def run(weight: float) -> tuple[float, float, Any]:
        model = peft.get_peft_model(copy.deepcopy(start), copy.deepcopy(LORA))
        held = AsFT(direction_for(start), weight=weight, projector="top", energy=0.3)
        leash = FrozenReferenceKL(weight)
        probe, kl = AsFT(direction_for(start), projector="top", energy=0.3), FrozenReferenceKL(1.0)
        probe.prepare(model)  # both count from here
        kl.prepare(model)
        kind = penalised(base, [held, leash])
        trainer_of(base, kind, model, tmp_path, 2, max_steps=6, learning_rate=2e-2).train()
        model.eval()
        return float(probe(model, {})), float(kl(model, default_data_collator(list(rows())))), leash.record()

    (loose, far, _), (near, close, record) = run(0.0), run(3.0)
    assert near < 0.8 * loose and close < 0.8 * far
    assert record["reference"] == "adapter switched off" and record["value"] > 0


@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_the_copy_of_a_full_training_answers_as_the_start(base: type, tmp_path: Path) -> None:
    """TRL binds a forward to the live model before the copy is made."""
    start = tiny_model("llama")
    model, leash = copy.deepcopy(start), FrozenReferenceKL(1.0)
    held = AsFT(direction_for(start))
    trainer = trainer_of(base, penalised(base, [leash, held]), model, tmp_path, max_steps=3)
    trainer.train()
    batch = default_data_collator(list(rows()))
    model.eval()
    one = start(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    two = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    kept = batch["labels"][:, 1:] != -100
    slow = (one.exp() * (one - two)).sum(-1)[:, :-1][kept].mean()
    assert float(slow) > 1e-3
    assert float(leash(model, batch)) == pytest.approx(float(slow), rel=1e-4)
    assert leash.record()["reference"] == "frozen copy"
    assert held.record()["changed"] == "weights" and float(held(model, batch)) > 0


class Values(FrozenReferenceKL):
    """Notes the penalty of every batch, and whether its gradient reaches every weight that trains."""

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.values: list[float] = []
        self.reached: list[bool] = []

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        value = super().__call__(model, inputs)
        own = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
        self.values.append(float(value.detach()))
        self.reached.append(all(g is not None and bool(g.isfinite().all()) for g in found))
        return value


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("base", [Trainer, SFTTrainer])
def test_under_mixed_precision_the_reference_answers_in_it_too(base: type, adapter: Any, tmp_path: Path) -> None:
    """A float32 reference of a bfloat16 model would differ from it before the first step."""
    model = tiny_model("llama")
    if adapter is not None:
        model = peft.get_peft_model(model, copy.deepcopy(adapter))
    leash = Values(1.0)
    trainer_of(base, penalised(base, [leash]), model, tmp_path, max_steps=3, bf16=True, learning_rate=1e-2).train()
    assert leash.values[0] == pytest.approx(0, abs=1e-7)
    assert all(value > 1e-4 for value in leash.values[1:]) and all(leash.reached)
    assert leash.record()["reference"] == ("frozen copy" if adapter is None else "adapter switched off")


def test_going_on_from_a_checkpoint_the_reference_is_still_the_start(tmp_path: Path) -> None:
    start = tiny_model("llama")
    trainer_of(
        Trainer, Trainer, copy.deepcopy(start), tmp_path, max_steps=2, save_strategy="steps", save_steps=2
    ).train()
    model, leash = copy.deepcopy(start), FrozenReferenceKL(1.0)
    trainer = trainer_of(Trainer, penalised(Trainer, [leash]), model, tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert leash._copy is not None
    kept = dict(leash._copy.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in start.named_parameters())
    assert not all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
