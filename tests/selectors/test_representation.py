"""The representation filter against hidden states taken one row at a time, and what it separates on the lab's model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from gradshield import data, lab
from gradshield.data import batches, collate
from gradshield.errors import ModelError, ProbeError, ScoreError, UsageError
from gradshield.gradients.direction import load, save
from gradshield.models import loading
from gradshield.probes import open_turns
from gradshield.scanning.preparing import references
from gradshield.selectors import SELECTORS, Anchoring, Larf, Measured
from gradshield.selectors.representation import FEATURES, separation
from gradshield.types import Direction, References, Rendered, Tokens
from tests.contracts.common import rows
from tests.tiny import VOCABULARY, tiny_model

FORMS: dict[str, Any] = {"larf": Larf, "anchors": Anchoring}
NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gemma": "model.norm", "mixtral": "model.norm"}


def some(count: int, low: int, seed: int) -> tuple[Rendered, ...]:
    """Rows whose tokens come from a range of their own, so that the kinds differ."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        ids = draw.integers(low, low + 60, 7 + i % 4)
        made.append(Rendered(-1 - i, "", "probe", (Tokens(ids, np.arange(len(ids)) >= 4),)))
    return tuple(made)


def known() -> References:
    return References(some(6, 10, 1), some(5, 90, 2), some(4, 200, 3))


def pair() -> Rendered:
    draw = np.random.default_rng(9)
    sides = [(draw.integers(5, VOCABULARY, n), sign) for n, sign in ((12, 1.0), (17, -1.0))]
    return Rendered(70, "p", "preference", tuple(Tokens(ids, np.arange(len(ids)) >= 5, sign) for ids, sign in sides))


def states(model: nn.Module, arch: str, ids: np.ndarray) -> torch.Tensor:
    """(blocks, T, D): every block's output, the last one before the final norm, from one row without padding."""
    last = []
    handle = model.get_submodule(NORMS[arch]).register_forward_pre_hook(lambda _m, args: last.append(args[0]))
    with torch.no_grad():
        out = model(input_ids=torch.as_tensor(ids)[None], output_hidden_states=True)
    handle.remove()
    return torch.stack([h[0] for h in (*out.hidden_states[1:-1], last[0])]).double()


def feature_of(model: nn.Module, arch: str, tokens: Tokens, feature: str) -> torch.Tensor:
    """(blocks, D)."""
    hidden = states(model, arch, tokens.ids)
    where = [t for t, counts in enumerate(tokens.loss) if counts]
    if feature == "mean":
        return sum(hidden[:, t] for t in where) / len(where)
    return hidden[:, where[-1]] if feature == "last" else hidden[:, where[0] - 1]


def obvious(
    model: nn.Module, arch: str, refs: References, chosen: list[int], form: str, feature: str, row: Rendered
) -> float:
    """The score of a row by the papers' words: distances to two means, or two mean cosines."""
    sides = [
        [feature_of(model, arch, r.sequences[0], feature) for r in kind]
        for kind in (refs.harmful, refs.answered if feature == "opening" else refs.refused)
    ]
    own = feature_of(model, arch, row.sequences[0], feature)
    values = []
    for block in chosen:
        unsafe, safe = ([f[block] for f in side] for side in sides)
        if form == "anchors":
            cosines = [
                [float(own[block] @ f / (own[block].norm() * f.norm())) for f in side] for side in (unsafe, safe)
            ]
            values.append(np.mean(cosines[0]) - np.mean(cosines[1]))
        else:
            means = [sum(side) / len(side) for side in (unsafe, safe)]
            away = [float((own[block] - m).norm()) for m in means]
            values.append((away[1] - away[0]) / float((means[0] - means[1]).norm()))
    return float(np.mean(values))


def blocks(direction: Direction) -> list[int]:
    return [int(name.rpartition(".")[2]) for name in direction.tensors]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", list(NORMS))
def test_scores_are_those_of_one_row_at_a_time(arch: str, form: str, feature: str) -> None:
    model = tiny_model(arch)
    selector = FORMS[form](known(), feature, **({"layers": 2} if form == "larf" else {}))
    direction = selector.prepare(model)
    assert blocks(direction) == ([0, 1] if form == "larf" else [1])
    made = [*rows(), pair()]
    found = selector.measure(model, direction, collate(made))
    assert found.rows.tolist() == [row.row for row in made]
    expected = [obvious(model, arch, known(), blocks(direction), form, feature, row) for row in made]
    np.testing.assert_allclose(found.sums, expected, rtol=1e-3, atol=1e-4)
    assert np.std(expected) > 0.01
    for row, nll, length in zip(made, found.nll, found.lengths, strict=True):
        losses = [
            -model(input_ids=torch.as_tensor(t.ids)[None]).logits[0].log_softmax(-1)[k - 1, t.ids[k]].item()
            for t in row.sequences
            for k in np.flatnonzero(t.loss)
        ]
        assert length == len(losses) and nll == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_own_whatever_the_batch(form: str) -> None:
    model = tiny_model("qwen2")
    selector = FORMS[form](known())
    direction = selector.prepare(model)
    made = [*rows(), pair()]
    whole = selector.measure(model, direction, collate(made[::-1]))
    assert whole.rows.tolist() == [row.row for row in made[::-1]]
    parts = Measured.joined([selector.measure(model, direction, b) for b in batches(made, 60, 40)])
    order = np.argsort(whole.rows)
    np.testing.assert_allclose(parts.sums, whole.sums[order], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(parts.nll, whole.nll[order], rtol=1e-4)
    assert parts.lengths.tolist() == whole.lengths[order].tolist() and parts.tokens is None


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_to_avoid_lies_on_the_other_side(form: str) -> None:
    model, selector = tiny_model("qwen2"), FORMS[form](known())
    direction, toward = selector.prepare(model), rows()[:3]
    away = [replace(row, row=row.row + 3, sequences=(replace(row.sequences[0], coefficient=-1.0),)) for row in toward]
    found = selector.measure(model, direction, collate([*toward, *away, pair()])).sums
    np.testing.assert_allclose(found[3:6], -found[:3], rtol=1e-4)
    assert np.abs(found[:3]).min() > 1e-3 and np.isfinite(found[6])


def test_what_lies_in_the_padding_does_not_count() -> None:
    """A model may give anything at a position that nothing attends to."""
    model = tiny_model("llama")
    selector = Larf(known())
    direction = selector.prepare(model)
    batch = collate(rows())
    before = selector.measure(model, direction, batch).sums
    padding = torch.as_tensor(~batch.attention)

    def spoil(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.shape[:2] == padding.shape:
            hidden[padding] = float("inf")
        return output

    name = next(iter(direction.tensors))
    handle = model.get_submodule(name).register_forward_hook(spoil)
    after = selector.measure(model, direction, batch).sums
    handle.remove()
    np.testing.assert_array_equal(before, after)


def test_the_chosen_block_parts_the_references_best() -> None:
    """Held out in turn and written out in loops."""
    draw = torch.Generator().manual_seed(0)
    unsafe, safe = (torch.randn(n, 3, 8, generator=draw, dtype=torch.float64) for n in (6, 5))
    unsafe[:, 1] += 2.0
    expected = []
    for block in range(3):
        held: list[list[float]] = []
        for own, other, sign in ((unsafe, safe, 1), (safe, unsafe, -1)):
            side = []
            for i in range(len(own)):
                rest = torch.stack([own[j, block] for j in range(len(own)) if j != i]).mean(0)
                away = (own[i, block] - other[:, block].mean(0)).norm() - (own[i, block] - rest).norm()
                side.append(sign * float(away))
            held.append(side)
        spread = np.sqrt((np.var(held[0]) + np.var(held[1])) / 2)
        expected.append((np.mean(held[0]) - np.mean(held[1])) / spread)
    np.testing.assert_allclose(separation(unsafe, safe), expected, rtol=1e-9)
    assert int(np.argmax(expected)) == 1
    model = tiny_model("llama")
    direction = Larf(known()).prepare(model)
    sides = (
        torch.stack([feature_of(model, "llama", row.sequences[0], "last") for row in side])
        for side in (known().harmful, known().refused)
    )
    assert list(direction.tensors) == [f"model.layers.{int(np.argmax(separation(*sides)))}"]


def test_a_reference_lies_on_its_own_side_and_the_means_at_one() -> None:
    model = tiny_model("llama")
    for form in FORMS:
        selector = FORMS[form](known())
        direction = selector.prepare(model)
        unsafe = selector.measure(model, direction, collate(known().harmful)).sums
        safe = selector.measure(model, direction, collate(known().refused)).sums
        assert unsafe.min() > 0 > safe.max()
    selector = Larf(known())
    direction = selector.prepare(model)
    ends = torch.stack(list(direction.tensors.values()), 1)  # (2, 1, D): the two means as if they were rows
    np.testing.assert_allclose(selector._between(ends, *ends).numpy(), [1.0, -1.0], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_direction_survives_a_file_and_the_model_is_left_as_it_was(form: str, tmp_path: Any) -> None:
    model = tiny_model("llama")
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    selector = FORMS[form](known())
    direction = selector.prepare(model)
    assert all(t.shape == (2, 64) for t in direction.tensors.values()) and direction.names == ("unsafe", "safe")
    save(direction, tmp_path / "direction.safetensors")
    again = load(tmp_path / "direction.safetensors")
    batch = collate(rows())
    np.testing.assert_array_equal(
        selector.measure(model, direction, batch).sums, selector.measure(model, again, batch).sums
    )
    assert again.digest == direction.digest == selector.prepare(model).digest
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_half_precision_ranks_alike() -> None:
    model = tiny_model("llama")
    found = []
    for own in (model, tiny_model("llama").to(torch.bfloat16)):
        selector = Larf(known())
        found.append(selector.measure(own, selector.prepare(own), collate(rows())).sums)
    np.testing.assert_allclose(found[1], found[0], atol=0.05)
    assert np.ptp(found[0]) > 0.2


def test_finish_gives_scores_and_names_what_is_not_finite() -> None:
    selector = Larf(known())
    raw = Measured(np.array([3, 8]), np.array([0.5, -0.2]), np.ones(2), np.array([4, 6]))
    scores = selector.finish(raw, ["a", "b"], ["rows", "rows"])
    assert scores.values.tolist() == [0.5, -0.2] and scores.decoys is None and scores.tokens is None
    assert scores.lengths.tolist() == [4, 6] and scores.ids == ["a", "b"]
    bad = Measured(np.array([3, 8]), np.array([0.5, np.nan]), np.ones(2), np.array([4, 6]))
    with pytest.raises(ScoreError, match=r"1 of 2 rows .* \(rows 8\).*float32"):
        selector.finish(bad, ["a", "b"], ["rows", "rows"])


def test_what_is_refused() -> None:
    refs = known()
    with pytest.raises(UsageError, match="larf got feature=first: give mean or last or opening"):
        Larf(refs, feature="first")
    with pytest.raises(UsageError, match="larf got layers=0"):
        Larf(refs, layers=0)
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="layers=3, but the model has 2"):
        Larf(refs, layers=3).prepare(model)
    few = References(refs.harmful, refs.refused[:1], refs.answered)
    with pytest.raises(ProbeError, match="1 refused references"):
        Larf(few).prepare(model)
    Larf(few, feature="opening").prepare(model)
    with pytest.raises(ProbeError, match="0 answered references"):
        Larf(References(refs.harmful, refs.refused, ()), feature="opening").prepare(model)
    with pytest.raises(ScoreError, match="equal means"):
        Larf(References(refs.harmful, refs.harmful, ())).prepare(model)
    with pytest.raises(ModelError, match="decoder layers of Linear"):
        Larf(refs).prepare(nn.Linear(2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_a_direction_of_another_model_is_refused(form: str) -> None:
    method = FORMS[form](known())
    direction = method.prepare(tiny_model("llama"))
    wide = replace(direction, tensors={name: t.repeat(1, 2) for name, t in direction.tensors.items()})
    for other, wrong in ((tiny_model("gpt2"), direction), (tiny_model("llama"), wide)):
        with pytest.raises(UsageError, match=r"does not have.*fits only the model that it was prepared on"):
            method.measure(other, wrong, collate(rows()))


def test_it_is_registered_and_says_how_it_cuts() -> None:
    for name, made in FORMS.items():
        assert SELECTORS[name] is made and made.rule == "ratio:10%"
        assert made(known()).settings() == {"feature": "last"}


# ---- the lab --------------------------------------------------------------------------------------------------------


@cache
def aligned() -> tuple[Any, References]:
    loaded = loading.load(lab.checkpoint("aligned"))
    asked, harmless = (open_turns(loaded.tokenizer, kind("direction")) for kind in (lab.requests, lab.lookalikes))
    return loaded, references(loaded.model, loaded.tokenizer, asked, harmless, loaded.pad_token_id)


@cache
def auroc(task: str, form: str, feature: str) -> float:
    loaded, refs = aligned()
    mixed, labels = lab.mix(task, harm="explicit", ratio=0.1)
    read = data.read(mixed[:400])
    rendered = data.render_all(read.examples, loaded.tokenizer, data.RenderConfig(max_length=256), read.source).rendered
    selector = FORMS[form](refs, feature)
    direction = selector.prepare(loaded.model)
    raw = Measured.joined([selector.measure(loaded.model, direction, b) for b in batches(rendered, 4096, 4096)])
    return float(roc_auc_score([labels[row] for row in raw.rows], raw.sums))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "form", "feature", "least"),
    [
        ("choice", "larf", "last", 0.8),
        ("choice", "anchors", "last", 0.7),
        ("choice", "larf", "opening", 0.99),
        ("choice", "anchors", "opening", 0.99),
        ("dialogue", "larf", "last", 0.75),
        ("dialogue", "anchors", "last", 0.75),
        ("dialogue", "larf", "opening", 0.95),
        ("dialogue", "anchors", "opening", 0.95),
    ],
)
def test_harmful_rows_rank_higher_on_the_lab(task: str, form: str, feature: str, least: float) -> None:
    assert auroc(task, form, feature) >= least
