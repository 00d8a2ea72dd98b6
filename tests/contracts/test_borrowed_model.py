"""The caller's model, and torch's own state, are bit for bit what they were: after success, an exception and Ctrl-C."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gradshield.gradients import ENGINES, adapted, gradient_direction, parameter_names
from gradshield.gradients.base import followed
from gradshield.models.logits import output_head
from gradshield.types import Direction
from tests.contracts.common import batch_of, differences, gap, lora, one, rows, state, two_directions
from tests.tiny import ARCHITECTURES, tiny_model

BATCH = batch_of(rows((7, 11, 5)))


class Stop(RuntimeError):
    """What only the test raises."""


class Interrupt:
    """A forward hook that counts its calls and raises on one of them."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1
        if self.error is not None and self.calls == self.at:
            raise self.error


def caller_model(arch: str) -> nn.Module:
    """A model in the odd state of a caller's: half frozen, partly in training mode, one gradient already there."""
    model = tiny_model(arch)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.25)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def borrowed(request: Any) -> tuple[nn.Module, Direction]:
    direction = two_directions(tiny_model(request.param), "all")
    return caller_model(request.param), one(direction, 0)


@pytest.mark.parametrize("name", list(ENGINES))
def test_engine_leaves_the_model_bit_identical(name: str, borrowed: tuple[nn.Module, Direction]) -> None:
    model, direction = borrowed
    engine = ENGINES[name]()
    before = state(model)
    expected = engine.directional(model, BATCH, direction)
    assert differences(before, state(model)) == []

    # A hook of the caller's raises inside the forward of a layer that holds parameters of the direction: the first
    # such layer, whose stand-in is then in its slot, and one near the end, from the first call to the last.
    places = [m for m, _ in followed(model, direction.tensors) if m is not output_head(model)]
    for module, error in ((places[0], Stop("first")), (places[-2], KeyboardInterrupt())):
        counter = Interrupt()
        with module.register_forward_hook(counter):
            assert torch.equal(engine.directional(model, BATCH, direction).values, expected.values)
        assert counter.calls > 0
        for at in sorted({1, counter.calls}):
            handle = module.register_forward_hook(Interrupt(at, error))
            hooked = state(model)
            with pytest.raises(type(error)) as caught:
                engine.directional(model, BATCH, direction)
            assert caught.value is error
            assert differences(hooked, state(model)) == []
            handle.remove()
    assert differences(before, state(model)) == []
    assert torch.equal(engine.directional(model, BATCH, direction).values, expected.values)


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_error_after_the_head_leaves_nothing_behind(name: str) -> None:
    model = caller_model("llama")
    direction = two_directions(tiny_model("llama"), "last:1")
    handle = output_head(model).register_forward_hook(Interrupt(1, KeyboardInterrupt()))
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        ENGINES[name]().directional(model, BATCH, direction)
    assert differences(before, state(model)) == []
    handle.remove()


def test_a_shifted_weight_exists_only_while_its_own_layer_runs() -> None:
    """Else a second copy of the whole model would pile up by the end of a pass."""
    model = caller_model("llama")
    direction = one(two_directions(tiny_model("llama"), "all"), 0)
    mine = {id(p) for p in model.parameters()}
    strangers: list[list[str]] = []

    def look(*_: Any) -> None:
        strangers.append([name for name, p in model.named_parameters() if id(p) not in mine])

    with (
        output_head(model).register_forward_pre_hook(look),
        model.model.layers[0].mlp.up_proj.register_forward_hook(look),
    ):
        ENGINES["finite-difference"]().directional(model, BATCH, direction)
    assert strangers == [["model.layers.0.mlp.up_proj.weight"], []] * 2  # nothing when the head begins, which is last


def test_the_comparison_sees_what_it_must() -> None:
    """Each kind of damage by itself: a comparison that sees nothing would make every test above pass."""

    def bit(model: nn.Module) -> None:
        with torch.no_grad():
            first = next(model.parameters()).view(-1)
            first[0] = torch.nextafter(first[0], torch.tensor(1e9))

    def stand_in(model: nn.Module) -> None:
        head = output_head(model)
        head._parameters["weight"] = nn.Parameter(head.weight.detach(), requires_grad=head.weight.requires_grad)

    def experts(model: nn.Module) -> None:
        model.config._experts_implementation = "eager"

    damages: list[Callable[[nn.Module], object]] = [
        bit,
        stand_in,
        experts,
        lambda m: next(m.parameters()).requires_grad_(False),
        lambda m: setattr(next(m.parameters()), "grad", None),
        lambda m: m.train(),
        lambda m: output_head(m).register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(m, "peft_config", {}),
        lambda m: get_peft_model(m, lora("mixtral")),
        lambda m: torch.rand(1),
        lambda m: [b.add_(1) for b in m.buffers()],
    ]
    for damage in damages:
        model = caller_model("mixtral")
        before = state(model)
        assert differences(before, state(model)) == []
        damage(model)
        assert differences(before, state(model)) != []


def _targets(arch: str) -> list[LoraConfig]:
    more = LoraConfig(
        r=2,
        target_modules="all-linear",
        modules_to_save=["lm_head"],
        fan_in_fan_out=arch == "gpt2",
        task_type="CAUSAL_LM",
    )
    moving = lora(arch, None)  # takes out of the caller's weights what it puts into the adapter
    moving.init_lora_weights = "pissa"
    return [lora(arch), lora(arch, "all-linear"), more, moving]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_adapter_comes_and_goes(arch: str) -> None:
    model = caller_model(arch)
    before = state(model)
    for config in _targets(arch):
        given = config.to_dict()
        with adapted(model, config, seed=3) as wrapped:
            assert isinstance(wrapped, PeftModel)
            direction = two_directions(wrapped, "lora")
            ENGINES["forward"]().directional(wrapped, BATCH, direction)
        assert differences(before, state(model)) == []
        if config.init_lora_weights is True:  # B = 0 at the start, so ∂/∂A = 0
            assert all("lora_B" in name or "modules_to_save" in name for name in direction.tensors)
        assert config.to_dict() == given

        for error in (Stop("in the body"), KeyboardInterrupt()):
            with pytest.raises(type(error)), adapted(model, config, seed=3) as wrapped:
                raise error
            assert differences(before, state(model)) == []

            def broken(wrapped: nn.Module, error: BaseException = error) -> torch.Tensor:
                with wrapped.get_input_embeddings().register_forward_hook(Interrupt(1, error)):
                    return gap(wrapped)

            with pytest.raises(type(error)), adapted(model, config, seed=3) as wrapped:
                gradient_direction(wrapped, {"all": [broken]}, parameter_names(wrapped, "lora"))
            assert differences(before, state(model)) == []


def test_an_adapter_that_does_not_fit_leaves_nothing_behind() -> None:
    model = caller_model("llama")
    before = state(model)
    for target in (["no_such_layer"], ["q_proj", "act_fn"]):  # the second fails half-way through
        with pytest.raises(ValueError), adapted(model, lora("llama", target), seed=0):
            pass
        assert differences(before, state(model)) == []


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_2", "olora", "gaussian", "orthogonal"])
def test_an_adapter_that_starts_from_the_weights_gives_them_back(initialisation: str) -> None:
    model = caller_model("llama")
    before = state(model)
    config = lora("llama")
    config.init_lora_weights = initialisation
    with adapted(model, config, seed=0) as wrapped:
        direction = two_directions(wrapped, "lora")
    assert differences(before, state(model)) == []
    with adapted(model, config, seed=0) as wrapped:
        assert two_directions(wrapped, "lora").digest == direction.digest


def test_gradient_checkpointing_leaves_no_hook_behind() -> None:
    model = caller_model("qwen2")
    model.gradient_checkpointing_enable()
    before = state(model)
    with adapted(model, lora("qwen2"), seed=0) as wrapped:
        two_directions(wrapped, "lora")
    assert differences(before, state(model)) == []


def test_gradient_direction_leaves_the_model_bit_identical() -> None:
    model = caller_model("mixtral")
    before = state(model)
    two_directions(model, "all")
    assert differences(before, state(model)) == []
    hook = Interrupt(2, KeyboardInterrupt())
    handle = model.model.layers[1].register_forward_hook(hook)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        two_directions(model, "last:1")
    assert hook.calls == 2
    assert differences(before, state(model)) == []
    handle.remove()


def test_the_adapter_is_seeded_and_a_model_that_has_one_is_used_as_it_is() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        with adapted(tiny_model("qwen2"), lora("qwen2"), seed) as wrapped:
            return {name: p.detach().clone() for name, p in wrapped.named_parameters() if "lora_A" in name}

    torch.manual_seed(11)
    first = drawn(1)
    torch.manual_seed(12)  # the caller's random state has no part in it
    again, other = drawn(1), drawn(2)
    assert len(first) == 4
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)

    model = tiny_model("qwen2")
    with adapted(model, None, seed=0) as same:
        assert same is model
    peft = get_peft_model(model, lora("qwen2"))
    with adapted(peft, lora("qwen2"), seed=0) as same:
        assert same is peft
    assert isinstance(peft, PeftModel) and any("lora_A" in name for name, _ in peft.named_parameters())
