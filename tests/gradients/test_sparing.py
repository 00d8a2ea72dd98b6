"""What passes leave out, against passes that leave nothing out."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradshield.gradients import ENGINES, FiniteDifference, Loop, agreement, gradient_direction, parameter_names
from gradshield.gradients.direction import decoder_layers
from gradshield.gradients.finite_difference import Prefix
from gradshield.models.logits import output_head
from gradshield.types import Direction
from tests.contracts.common import batch_of, differences, gap, rows, state, two_directions
from tests.tiny import ARCHITECTURES, tiny_model

BATCH = batch_of(rows())


class Seen:
    """A forward hook that keeps the shape of each input."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        module.register_forward_hook(self)

    def __call__(self, _module: nn.Module, args: Any, _output: Any) -> None:
        self.shapes.append(tuple(args[0].shape))


@contextmanager
def whole_pass(_self: Prefix, _reached: Any = None) -> Iterator[bool]:
    yield False


def routed(arch: str) -> int:
    """Passes over a batch in addition to the two of each direction: one that records the experts' choice."""
    return int(arch in ("mixtral", "qwen2_moe"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_below_run_once_and_change_nothing(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(arch)
    direction = two_directions(model, "last:1")
    layers = decoder_layers(model)[1]
    layers[0].register_forward_hook(lambda _m, _args, output: output * 1.1)  # a caller's hook acts once in every pass
    below, above = (Seen(layer.feed_forward if arch == "lfm2" else layer.mlp) for layer in layers)
    found = FiniteDifference().directional(model, BATCH, direction)
    assert (len(below.shapes), len(above.shapes)) == (1, 4 + routed(arch))
    monkeypatch.setattr(Prefix, "passing", whole_pass)
    whole = FiniteDifference().directional(model, BATCH, direction)
    assert len(below.shapes) == 1 + 4 + routed(arch)
    assert torch.equal(found.values, whole.values) and torch.equal(found.nll, whole.nll)


def test_several_layers_below_run_once() -> None:
    model = tiny_model("llama")
    first, last = model.model.layers
    model.model.layers = nn.ModuleList([first, deepcopy(first), last])
    model.config.num_hidden_layers = 3
    seen = [Seen(layer.mlp) for layer in model.model.layers]
    direction = two_directions(model, "last:1")
    for one in seen:
        one.shapes.clear()
    found = FiniteDifference().directional(model, BATCH, direction).values.sum(-1).numpy().ravel()
    assert [len(one.shapes) for one in seen] == [1, 1, 4]
    oracle = Loop().directional(model, BATCH, direction).values.numpy().ravel()
    assert agreement("", found, oracle).relative_error <= 1e-2


def _passes_below(model: nn.Module, direction: Direction) -> int:
    """How often the first layer's MLP runs; the values are held against the oracle's."""
    below = Seen(decoder_layers(model)[1][0].mlp)
    found = FiniteDifference().directional(model, BATCH, direction).values.sum(-1).numpy().ravel()
    passes = len(below.shapes)
    oracle = Loop().directional(model, BATCH, direction).values.numpy().ravel()
    assert agreement("", found, oracle).relative_error <= 1e-2
    return passes


@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2"])
def test_all_of_it_runs_where_an_embedding_moves(arch: str) -> None:
    model = tiny_model(arch)
    table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    names = [table, *parameter_names(model, "last:1")]
    assert _passes_below(model, gradient_direction(model, {"gap": [gap]}, names)) == 2


def test_all_of_it_runs_where_a_layer_runs_twice() -> None:
    model = tiny_model("llama")
    first, last = model.model.layers
    model.model.layers = nn.ModuleList([first, first, last])
    model.config.num_hidden_layers = 3
    assert _passes_below(model, two_directions(model, "last:1")) == 2 * 4


def test_all_of_it_runs_where_layers_share_a_place_to_write_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers do that read the keys and values of earlier ones from a dict: without those, a later layer cannot run."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])
    plain = kind.forward
    shared: dict[str, Tensor] = {}

    def forward(self: Any, hidden: Tensor, *args: Any, shared: dict[str, Tensor], **kwargs: Any) -> Tensor:
        hidden = hidden + 0.1 * shared.pop("before", torch.zeros(()))
        out: Tensor = plain(self, hidden, *args, **kwargs)
        if self is model.model.layers[0]:
            shared["before"] = out
        return out

    monkeypatch.setattr(kind, "forward", forward)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _m, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True)
    assert _passes_below(model, two_directions(model, "last:1")) == 4


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "loop"])
def test_one_loss_token_and_none_to_leave_out(name: str) -> None:
    """The ends: a batch with a single position that counts, and one where all but the first do."""
    model = tiny_model("qwen2_moe")
    direction = two_directions(model, "all")
    for made in (rows((9, 30, 14, 22, 6))[4:], rows((2,))):
        batch = batch_of(made)
        batch.loss[0, 1:] |= len(made[0].sequences[0].ids) == 2
        found = ENGINES[name]().directional(model, batch, direction).values
        sums = found.sum(-1) if found.dim() == 3 else found
        oracle = Loop().directional(model, batch, direction).values
        assert agreement(name, sums.numpy().ravel(), oracle.numpy().ravel()).relative_error <= 1e-2


def test_an_error_while_layers_are_skipped_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    direction = two_directions(model, "last:1")
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert "forward" in vars(model.model.layers[0])
            raise KeyboardInterrupt

    output_head(model).register_forward_hook(interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        FiniteDifference().directional(model, BATCH, direction)
    assert calls == 2 and differences(before, state(model)) == []
