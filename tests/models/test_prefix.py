"""A shared beginning run once gives the states of every sequence run whole, and an architecture that cannot is run whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM

from gradshield.models import logits as prefix
from gradshield.selectors import reading
from gradshield.selectors.reading import at_end, block_names, states
from tests.tiny import ARCHITECTURES, tiny_model

WITHOUT = {"lfm2"}  # its convolution has a state of its own
DRAW = np.random.default_rng(0)


def drawn(count: int) -> list[int]:
    return DRAW.integers(10, 300, count).tolist()


SYSTEM, TASK = drawn(12), drawn(20)
ROWS = [
    *([*SYSTEM, *TASK, *drawn(2 + n % 7)] for n in range(20)),
    *([*SYSTEM, *drawn(5 + n)] for n in range(9)),
    SYSTEM[:6],
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The lengths that were asked for, and whether the model gave a prefix."""
    seen: list[tuple[int, bool]] = []

    def noted(model: Any, sequence: Sequence[int], count: int, until: str | None) -> prefix.Prefix | None:
        found = prefix.prefix_of(model, sequence, count, until)
        seen.append((count, found is not None))
        return found

    monkeypatch.setattr(reading, "prefix_of", noted)
    return seen


def whole(model: Any, begun: np.ndarray | None = None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "groups", lambda sequences: [(own, 0) for own, _ in prefix.groups(sequences)])
        return states(model, ROWS, block_names(model), at_end, begun)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("to_the_end", [False, True])
def test_the_states_are_those_of_whole_sequences(arch: str, to_the_end: bool, made: list[tuple[int, bool]]) -> None:
    model = tiny_model(arch)
    first, second = (np.zeros(len(ROWS), dtype=np.int64) if to_the_end else None for _ in range(2))
    slow = whole(model, first)
    assert made == []
    fast = states(model, ROWS, block_names(model), at_end, second)
    assert made == [(len(SYSTEM) + len(TASK), arch not in WITHOUT)]  # the others' shortest is too short for a prefix
    assert np.allclose(fast, slow, rtol=1e-4, atol=1e-4)
    if first is not None and second is not None:
        assert first.tolist() == second.tolist()


def test_a_sliding_window_is_run_whole(made: list[tuple[int, bool]]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=16, **shape)).eval()
    fast = states(model, ROWS, block_names(model), at_end)
    assert [given for _, given in made] == [False]
    assert np.array_equal(fast, whole(model))


def test_a_model_whose_cache_gives_other_states_is_run_whole(made: list[tuple[int, bool]]) -> None:
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(
        lambda _m, _a, out: out - out.mean(1, keepdim=True)
    )  # looks at all tokens
    fast = states(model, ROWS, block_names(model), at_end)
    assert [given for _, given in made] == [False]
    assert np.array_equal(fast, whole(model))


def test_a_model_is_looked_at_once_for_a_class_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    real = prefix._is_exact

    def noted(model: Any, ids: Any, count: int, until: str | None) -> bool:
        seen.append((count, ids.shape[1]))
        return real(model, ids, count, until)

    monkeypatch.setattr(prefix, "_is_exact", noted)
    model = tiny_model("llama")
    lengths = [(20, 33), (31, 64), (20, 65), (32, 64)]
    for count, length in lengths:
        assert prefix.allowed(model, drawn(length), count) and prefix.prefix_of(model, drawn(length), count)
    assert seen == [lengths[0], lengths[2], lengths[3]]
    hook = model.model.layers[0].register_forward_hook(lambda _m, _a, out: out - out.mean(1, keepdim=True))
    assert not prefix.allowed(model, drawn(33), 20)
    hook.remove()
    assert prefix.allowed(model, drawn(33), 20) and len(seen) == 4


def test_groups_hold_every_sequence_once_and_what_they_share() -> None:
    groups = prefix.groups(ROWS)
    assert sorted(i for group, _ in groups for i in group) == list(range(len(ROWS)))
    (task, long), (rest, none) = groups
    assert sorted(task) == list(range(20)) and long == len(SYSTEM) + len(TASK)
    assert len(rest) == 10 and none == 0
    assert prefix.groups([]) == []
    assert prefix.common([[*SYSTEM, 1]] * 8) == len(SYSTEM) and prefix.common([[*SYSTEM, 1]] * 7) == 0
    assert prefix.common([SYSTEM] * 8) == len(SYSTEM) - 1  # something is left to run
