"""Every registered engine against the oracle, on every tiny architecture and subspace, in float32."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gradshield.errors import UsageError
from gradshield.gradients import ENGINES, agreement, calibrated, pick
from gradshield.gradients.base import Engine
from gradshield.manifests import LEAST_SPEARMAN
from tests.contracts.common import SUBSPACES, Case, batch_of, case, one, row_sums, rows
from tests.tiny import ARCHITECTURES, LAYERS

EXACT = 1e-4
LARGEST_ERROR = {"finite-difference": 1e-2}  # every other engine is exact up to rounding
NLL_ERROR = {"finite-difference": 2e-3}  # in nats: it is the mean of both sides, with the curvature of the step in it
CASES = [(arch, subspace) for arch in ARCHITECTURES for subspace in SUBSPACES]


@pytest.fixture(scope="module", params=CASES, ids=lambda p: "-".join(p))
def known(request: Any) -> Iterator[Case]:
    with case(*request.param) as made:
        yield made


def engine_for(name: str, case: Case) -> Engine:
    """The engine as a scan makes it: the finite-difference step is calibrated, on other rows."""
    if name == "finite-difference":
        return calibrated(case.model, batch_of(rows((10, 17, 25), seed=9)), case.direction)[0]
    return ENGINES[name]()


@pytest.mark.parametrize("name", list(ENGINES))
def test_engine_agrees_with_the_oracle(name: str, known: Case) -> None:
    engine = engine_for(name, known)
    assert engine.name == name
    found = engine.directional(known.model, known.batch, known.direction)
    assert found.values.dtype == found.nll.dtype == torch.float64
    assert found.values.shape == ((2, *known.batch.ids.shape) if engine.per_token else (2, len(known.batch.rows)))
    assert found.nll.shape == known.batch.ids.shape
    sums, oracle = row_sums(found, engine.per_token), known.oracle.values.numpy()
    for k in range(2):
        assert np.linalg.norm(oracle[k]) > 1e-6  # else nothing is compared
        measured = agreement(name, sums[k], oracle[k])
        assert measured.n >= 12
        assert measured.relative_error <= LARGEST_ERROR.get(name, EXACT)
        # Rows of nearly one value may change places on another processor: one such swap among 13 rows is 0.9945.
        assert measured.spearman >= LEAST_SPEARMAN
    if engine.per_token:  # nothing outside the loss, and something on every token inside it
        outside = ~torch.as_tensor(known.batch.loss)
        assert not found.values[:, outside].any()
        assert (found.values[:, ~outside] != 0).double().mean() > 0.98
    np.testing.assert_allclose(found.nll.numpy(), known.oracle.nll.numpy(), atol=NLL_ERROR.get(name, 1e-4))


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "mixtral"])
def test_two_directions_at_once_are_each_alone(name: str, arch: str) -> None:
    with case(arch, "lora") as known:
        engine = ENGINES[name]()
        together = engine.directional(known.model, known.batch, known.direction)
        for k in range(2):
            alone = engine.directional(known.model, known.batch, one(known.direction, k))
            assert alone.values.shape[0] == 1
            gap = (alone.values[0] - together.values[k]).norm() / alone.values[0].norm()
            assert gap <= LARGEST_ERROR.get(name, 1e-5) / 10


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi", "mixtral"])
def test_nll_and_values_do_not_know_padding(name: str, arch: str) -> None:
    with case(arch, "last:1") as known:
        engine = engine_for(name, known)
        together = engine.directional(known.model, known.batch, known.direction)
        made = rows()
        for i in (4, 8):  # the short ones have the most padding
            alone = engine.directional(known.model, batch_of(made[i : i + 1]), known.direction)
            length = alone.nll.shape[1]
            values, nll = together.values[:, i], together.nll[i]
            if engine.per_token:
                assert not values[:, length:].any()
                values = values[:, :length]
            gap = (values - alone.values[:, 0]).norm() / alone.values[:, 0].norm()
            assert gap <= LARGEST_ERROR.get(name, EXACT)
            np.testing.assert_allclose(nll[:length].numpy(), alone.nll[0].numpy(), atol=NLL_ERROR.get(name, 1e-4))
            assert not nll[length:].any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nll_is_the_models_own_cross_entropy(arch: str) -> None:
    with case(arch, "last:1") as known, torch.no_grad():
        for i, row in enumerate(rows()):
            tokens = row.sequences[0]
            ids = torch.as_tensor(tokens.ids)[None]
            labels = ids.masked_fill(~torch.as_tensor(tokens.loss)[None], -100)
            mean = known.model(input_ids=ids, labels=labels).loss  # the model shifts the labels itself
            counted = int(tokens.loss.sum())
            assert float(known.oracle.nll[i].sum()) / counted == pytest.approx(float(mean), rel=1e-4)
            each = functional.cross_entropy(known.model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
            expected = np.where(tokens.loss[1:], each.numpy(), 0.0)
            np.testing.assert_allclose(known.oracle.nll[i, 1 : len(tokens.ids)].numpy(), expected, atol=1e-4)


def _agrees(name: str, known: Case) -> None:
    found = engine_for(name, known).directional(known.model, known.batch, known.direction)
    sums = row_sums(found, ENGINES[name].per_token)
    measured = agreement(name, sums.ravel(), known.oracle.values.numpy().ravel())
    assert measured.relative_error <= LARGEST_ERROR.get(name, EXACT)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2_moe"])
def test_engines_agree_on_an_adapter_of_every_linear_layer(name: str, arch: str) -> None:
    with case(arch, "lora", "all-linear") as known:
        assert len(known.direction.tensors) > 2 * LAYERS
        _agrees(name, known)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize(("arch", "saved"), [("llama", ["embed_tokens", "lm_head"]), ("gemma", ["lm_head"])])
def test_engines_agree_on_modules_that_an_adapter_trains_whole(name: str, arch: str, saved: list[str]) -> None:
    with case(arch, "lora", modules_to_save=saved) as known:
        whole = [tensor for tensor in known.direction.tensors if "lora_" not in tensor]
        assert [tensor.split(".")[-4] for tensor in whole] == saved
        _agrees(name, known)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("kind", ["fused experts", "dora"])
def test_engines_agree_on_adapters_beyond_layers_or_say_that_they_cannot(name: str, kind: str) -> None:
    arch, target, more = ("llama", None, {"use_dora": True}) if kind == "dora" else ("mixtral", "all-linear", {})
    with case(arch, "lora", target, **more) as known:
        assert pick("auto", known.model, per_token=False).name == "forward"
        try:
            _agrees(name, known)
        except UsageError as error:
            assert name in ("finite-difference", "perturbation")
            assert name in str(error) and "use the engine forward or loop" in str(error)
            assert any(
                tensor.startswith(str(error).split("adapter at ")[1].split()[0]) for tensor in known.direction.tensors
            )
