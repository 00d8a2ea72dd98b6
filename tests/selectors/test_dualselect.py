"""DualSelect against dense gradients: the direction, the compatibility of rows, the correction, and the schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from gradshield.data import collate
from gradshield.errors import UsageError
from gradshield.gradients import ENGINES
from gradshield.selectors import ONLINE, DualSelect
from gradshield.selectors.dualselect import kept, reference_weights
from gradshield.types import Batch, Rendered, Tokens
from tests.contracts.common import lora, rows
from tests.tiny import VOCABULARY, tiny_model


def references(count: int = 5) -> list[Rendered]:
    draw = np.random.default_rng(7)
    made = []
    for i in range(count):
        ids = draw.integers(5, VOCABULARY, 8 + i)
        made.append(Rendered(-1 - i, "", "probe", (Tokens(ids, np.arange(len(ids)) >= 4),)))
    return made


def student(arch: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model(arch), lora(arch))


def trained(model: nn.Module, steps: int = 4, size: float = 0.05) -> nn.Module:
    """The model some noise away from its start, so that the preservation loss has a gradient."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * steps * torch.randn(parameter.shape, generator=draw))
    return model


def task(seed: int = 0) -> Batch:
    return collate(rows((9, 20, 14, 17, 6, 12, 11, 15), seed))


def flat(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The gradient over everything trainable, as one long vector."""
    own = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, own)])


def joined(model: nn.Module, method: DualSelect) -> torch.Tensor:
    """The method's direction in the order of `flat`."""
    assert method._direction is not None
    tensors = method._direction.tensors
    return torch.cat(
        [
            (tensors[n][0] if n in tensors else torch.zeros_like(p)).flatten().double()
            for n, p in model.named_parameters()
            if p.requires_grad
        ]
    )


def answer_logs(model: nn.Module, row: Rendered) -> torch.Tensor:
    """All log-probabilities where the answer's tokens are predicted (M, V), from a plain forward pass."""
    tokens = row.sequences[0]
    logits = model(input_ids=torch.as_tensor(tokens.ids)[None]).logits[0]
    return logits[np.flatnonzero(tokens.loss) - 1].log_softmax(-1)


def coarse(logs: torch.Tensor, start: torch.Tensor, entries: int) -> torch.Tensor:
    """Log-probabilities of the start's ``entries`` most likely tokens, and of all others as one."""
    out = []
    for row, first in zip(logs, start, strict=True):
        best = sorted(range(len(row)), key=lambda v: -float(first[v]))[:entries]
        others = [v for v in range(len(row)) if v not in set(best)]
        out.append(torch.cat([row[best], row[others].logsumexp(0, keepdim=True)]) if others else row[best])
    return torch.stack(out)


def row_loss(model: nn.Module, batch: Batch, i: int) -> torch.Tensor:
    length = int(batch.attention[i].sum())
    ids = torch.as_tensor(batch.ids[i, :length])
    logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -sum(logs[t - 1, ids[t]] for t in np.flatnonzero(batch.loss[i]))


def obvious(
    model: nn.Module, start: nn.Module, method: DualSelect, batch: Batch, entries: int
) -> tuple[torch.Tensor, np.ndarray]:
    """r and the rows' compatibilities by dense gradients, one loss at a time."""
    model.eval()
    tokens = int(batch.loss.sum())
    task_gradient = flat(model, sum(row_loss(model, batch, i) for i in range(len(batch.ids))) / tokens)
    losses, gradients, scores = [], [], []
    for row in method.references:
        with torch.no_grad():
            whole = answer_logs(start, row)
        p, q = coarse(whole, whole, entries), coarse(answer_logs(model, row), whole, entries)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        losses.append(float(loss.detach()))
        gradients.append(flat(model, loss))
    for loss, gradient in zip(losses, gradients, strict=True):
        cosine = float(gradient @ task_gradient / (gradient.norm() * task_gradient.norm()))
        scores.append(method.weight * loss / max(losses) - (1 - method.weight) * cosine)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: method.top]
    total = sum(np.exp(scores[i] / method.temperature) for i in best)
    r = sum(np.exp(scores[i] / method.temperature) / total * gradients[i] for i in best)
    rowwise = [float(flat(model, row_loss(model, batch, i)) @ r) for i in range(len(batch.ids))]
    return r, np.array(rowwise)


@pytest.mark.parametrize("entries", [1024, 40])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_direction_and_compatibilities_are_those_of_dense_gradients(
    arch: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradshield.selectors.dualselect._ENTRIES", entries)
    engine = ENGINES["perturbation"]()
    method = DualSelect(references(), warmup=0, top=3, temperature=0.3, drop=1.0, engine=engine)
    model = student(arch)
    method.begin(model)
    start = student(arch).eval()
    for p, q in zip(start.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    trained(model).train()
    keep = method.choose(model, task())
    r, rowwise = obvious(model, start, method, task(), entries)
    assert float((joined(model, method) - r).norm() / r.norm()) < 1e-4
    measured = method.compatibility(model, task())
    np.testing.assert_allclose(measured, rowwise, rtol=1e-3, atol=1e-4 * np.abs(rowwise).max())
    assert keep.tolist() == [c >= 0 for c in rowwise]
    assert 0 < keep.sum() < len(keep)  # else neither side was seen


def test_the_engines_agree_on_what_is_compatible() -> None:
    model = student()
    method = DualSelect(references(), warmup=0)
    method.begin(model)
    trained(model)
    method.choose(model, task())
    found = {}
    for name in ENGINES:
        method.engine = ENGINES[name]()
        found[name] = method.compatibility(model, task())
    for name, values in found.items():
        np.testing.assert_allclose(
            values, found["loop"], rtol=1e-2, atol=1e-3 * np.abs(found["loop"]).max(), err_msg=name
        )


def test_a_step_on_an_incompatible_row_raises_the_preservation_loss() -> None:
    """What the sign means, without a derivative: take the step and measure."""
    model = student()
    method = DualSelect(references(), warmup=0, top=5, temperature=1e6, engine=ENGINES["loop"]())
    method.begin(model)
    trained(model).eval()
    batch = task()
    method.choose(model, batch)
    values = method.compatibility(model, batch)

    def preservation() -> float:
        with torch.no_grad():
            return sum(float(start(model)) for start in method._start) / len(method._start)

    own = [p for p in model.parameters() if p.requires_grad]
    before = preservation()
    for i in (int(values.argmin()), int(values.argmax())):
        gradient = torch.autograd.grad(row_loss(model, batch, i), own)
        with torch.no_grad():
            for p, g in zip(own, gradient, strict=True):
                p.sub_(g, alpha=1e-4)
            after = preservation()
            for p, g in zip(own, gradient, strict=True):
                p.add_(g, alpha=1e-4)
        assert np.sign(after - before) == -np.sign(values[i])
    assert values.min() < 0 < values.max()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_correction_leaves_no_conflict(sign: float) -> None:
    model = student()
    method = DualSelect(references(), warmup=0)
    method.begin(model)
    trained(model)
    method.choose(model, task())
    r = joined(model, method)
    draw = torch.Generator().manual_seed(0)
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, p in own:
        direction = method._direction.tensors[name][0] if name in method._direction.tensors else torch.zeros_like(p)
        p.grad = sign * direction + 0.01 * direction.norm() * torch.randn(p.shape, generator=draw)
    before = torch.cat([p.grad.flatten().double() for _, p in own])
    assert np.sign(float(before @ r)) == sign
    method.correct(model)
    after = torch.cat([p.grad.flatten().double() for _, p in own])
    if sign > 0:
        assert torch.equal(before, after)
    else:
        expected = before - (before @ r) / (r @ r) * r
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6 * float(before.norm()))
        assert abs(float(after @ r)) <= 1e-6 * float(before.norm() * r.norm())
    assert method.record()["corrections"] == int(sign < 0) and method.record()["steps"] == 1


def test_correction_can_be_turned_off_and_skips_what_has_no_gradient() -> None:
    model = student()
    for correction in (False, True):
        method = DualSelect(references(), warmup=0, correction=correction)
        method.begin(model)
        trained(model)
        method.choose(model, task())
        own = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n in method._direction.tensors]
        for _, p in own:
            p.grad = None
        method.correct(model)
        name, one = own[0]
        one.grad = -method._direction.tensors[name][0].clone()
        method.correct(model)
        assert bool(one.grad.abs().max() > 1e-6 * method._direction.tensors[name].abs().max()) is not correction
        assert all(p.grad is None for _, p in own[1:])


def test_the_schedule_is_warm_up_then_every_few_batches() -> None:
    model = student()
    method = DualSelect(references(), warmup=3, refresh=4)
    method.begin(model)
    trained(model)
    seen = []
    for i in range(13):
        keep = method.choose(model, task(i))
        assert keep.dtype == bool and keep.shape == (8,) and keep.any()
        if i < 3:
            assert keep.all()
        seen.append((method.record()["refreshes"], method._direction))
    assert [n for n, _ in seen] == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 2
    assert seen[0][1] is None and seen[3][1] is seen[6][1] and seen[6][1] is not seen[7][1]
    record = method.record()
    assert record["batches"] == 13 and record["rows"] == 13 * 8 and 0 < record["dropped"] < 10 * 8
    assert -1 <= record["conflict"] <= 1 and record["preservation"] > 0


def test_where_nothing_moved_nothing_is_dropped_or_corrected() -> None:
    model = student()
    method = DualSelect(references(), warmup=0, refresh=1)
    method.begin(model)
    assert method.choose(model, task()).all()
    assert method._direction is None and method.compatibility(model, task()).tolist() == [0.0] * 8
    own = [p for p in model.parameters() if p.requires_grad]
    for p in own:
        p.grad = torch.ones_like(p)
    method.correct(model)
    assert all(bool((p.grad == 1).all()) for p in own)
    assert method.record()["preservation"] == pytest.approx(0, abs=1e-6)
    trained(model)
    assert method.choose(model, task()).shape == (8,) and method._direction is not None


def test_the_model_is_left_as_it_was() -> None:
    model = student()
    model.train()
    method = DualSelect(references(), warmup=0)
    method.begin(model)
    trained(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    method.choose(model, task())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(m.training for m in model.modules())


def test_a_pair_counts_as_one_row() -> None:
    model = student()
    method = DualSelect(references(), warmup=0, engine=ENGINES["loop"]())
    method.begin(model)
    trained(model)
    single = task()
    method.choose(model, single)
    values = method.compatibility(model, single)
    signs = np.array([1.0, -1.0] * 4)
    paired = Batch(single.ids, single.attention, single.loss, np.repeat(np.arange(4), 2), signs)
    np.testing.assert_allclose(method.compatibility(model, paired), (values * signs).reshape(4, 2).sum(1), rtol=1e-5)
    assert method.choose(model, paired).shape == (4,)


FLOATS = st.floats(-5, 5, allow_subnormal=False)


@given(
    pairs=st.lists(st.tuples(st.floats(0, 50), st.floats(-1, 1)), min_size=1, max_size=20),
    weight=st.floats(0, 1),
    temperature=st.floats(0.01, 100),
    top=st.integers(1, 25),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_a_distribution_on_the_highest_scores(
    pairs: list[tuple[float, float]], weight: float, temperature: float, top: int
) -> None:
    losses, cosines = [a for a, _ in pairs], [b for _, b in pairs]
    w = reference_weights(losses, cosines, weight, temperature, top)
    assert w.sum() == pytest.approx(1) and (w >= 0).all() and (w > 0).sum() <= top
    unit = max(losses) or 1.0
    scores = np.array([weight * a / unit - (1 - weight) * b for a, b in pairs])
    assert scores[w.argmax()] == pytest.approx(scores.max(), abs=1e-9)
    if top < len(pairs):
        assert scores[w > 0].min() >= np.sort(scores)[::-1][top - 1] - 1e-9


@given(values=st.lists(FLOATS, min_size=1, max_size=20).map(np.array), drop=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_kept_never_drops_all_nor_a_compatible_row_nor_too_many(values: np.ndarray, drop: float) -> None:
    keep = kept(values, drop)
    assert keep.any() and keep[values >= 0].all()
    assert (~keep).sum() <= drop * len(values) + 1e-6
    if (~keep).any():
        assert values[~keep].max() <= values[keep].min()
    if drop == 1 and (values >= 0).any():
        assert keep.tolist() == (values >= 0).tolist()


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 1.0])
def test_at_most_its_share_of_a_batch_goes_the_worst_first(drop: float) -> None:
    model = student()
    method = DualSelect(references(), warmup=0, top=3, temperature=0.3, drop=drop, engine=ENGINES["loop"]())
    method.begin(model)
    trained(model)
    batch = task()
    batch = replace(batch, coefficients=-batch.coefficients)  # of these rows more pull against the references
    keep = method.choose(model, batch)
    values = method.compatibility(model, batch)
    against = np.flatnonzero(values < 0)
    assert len(against) > 4  # more than half of the eight: the bound acts below 1
    dropped = sorted(against, key=lambda i: values[i])[: int(drop * 8)]
    assert set(np.flatnonzero(~keep)) == set(dropped) and method.record()["dropped"] == len(dropped)


def test_by_default_half_of_a_batch_stays() -> None:
    assert DualSelect(references()).drop == DualSelect(references()).record()["drop"] == 0.5


@pytest.mark.parametrize("position", [1, 3, 5])
def test_where_training_goes_on_the_schedule_does_too(position: int) -> None:
    """The warm-up is over or shorter, and a direction is there as soon as one is due, between two refreshes too."""
    model = student()
    method = DualSelect(references(), warmup=3, refresh=4)
    method.begin(model)
    trained(model)
    method.position = position
    seen = [method.choose(model, task(i)) is not None and method.record()["refreshes"] for i in range(8)]
    assert seen == {1: [0, 0, 1, 1, 1, 1, 2, 2], 3: [1, 1, 1, 1, 2, 2, 2, 2], 5: [1, 1, 2, 2, 2, 2, 3, 3]}[position]
    method.begin(model)
    assert method.position == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": -1},
        {"refresh": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top": 0},
        {"weight": 1.1},
        {"drop": -0.1},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"dualselect got {next(iter(wrong))}="):
        DualSelect(references(), **wrong)


def test_what_it_cannot_begin_with() -> None:
    with pytest.raises(UsageError, match="got 0 references"):
        DualSelect([])
    silent = Rendered(-9, "", "probe", (Tokens(np.arange(5, 9), np.zeros(4, dtype=bool)),))
    with pytest.raises(UsageError, match="got 3 references, 2 of them"):
        DualSelect([*references(2), silent])
    with pytest.raises(UsageError, match="begin"):
        DualSelect(references()).choose(student(), task())
    frozen = tiny_model("llama").requires_grad_(False)
    method = DualSelect(references(), warmup=0)
    method.begin(frozen)
    with pytest.raises(UsageError, match="no trainable parameter"):
        method.choose(frozen, task())


def test_it_is_registered() -> None:
    assert ONLINE["dualselect"] is DualSelect and ONLINE.summary("dualselect").endswith(".")
