"""What every registered method owes whatever room it is in: a name, a first line, its source, and an error that lists it."""

import inspect
from typing import Any

import pytest

from gradshield.errors import UnknownNameError, UsageError
from gradshield.gradients import ENGINES
from gradshield.judges import JUDGES, GuardJudge
from gradshield.probes import PROBES
from gradshield.registry import Registry
from gradshield.selectors import SELECTORS
from gradshield.thresholds import THRESHOLDS, parse

REGISTRIES: list[Registry[Any]] = [ENGINES, PROBES, SELECTORS, THRESHOLDS, JUDGES]
ENTRIES = [(registry, name) for registry in REGISTRIES for name in registry]
IDS = [f"{registry.kind}-{name}" for registry, name in ENTRIES]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_an_unknown_name_lists_the_live_names(registry: Registry[Any]) -> None:
    for wrong in ("", "no-such-thing", next(iter(registry)).upper()):
        with pytest.raises(UnknownNameError) as caught:
            registry[wrong]
        assert str(caught.value) == f"unknown {registry.kind} {wrong!r}: choose one of {', '.join(registry)}"
        assert caught.value.exit_code == 2 and isinstance(caught.value, UsageError)


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=IDS)
def test_an_entry_says_what_it_is_and_where_it_comes_from(registry: Registry[Any], name: str) -> None:
    entry = registry[name]
    assert entry is GuardJudge or entry.name == name  # a guard is named after its model
    summary = registry.summary(name)
    assert 20 < len(summary) <= 130 and summary.endswith((".", ";")) and "\n" not in summary


@pytest.mark.parametrize(
    ("registry", "name"),
    [e for e in ENTRIES if e[0] in (PROBES, SELECTORS, THRESHOLDS)],
    ids=[i for i in IDS if not i.startswith(("engine", "judge"))],
)
def test_a_method_names_its_paper_and_its_departures(registry: Registry[Any], name: str) -> None:
    text = inspect.getdoc(registry[name]) or ""
    assert "Paper:" in text and "Departures:" in text


def test_a_registry_is_live_and_refuses_a_name_twice() -> None:
    things: Registry[object] = Registry("thing")

    @things.register("one")
    class One:
        """First line.

        Second.
        """

    with pytest.raises(UnknownNameError, match=r"unknown thing 'two': choose one of one$"):
        things["two"]
    things.register("two")(object)
    with pytest.raises(UnknownNameError, match=r"choose one of one, two$"):
        things["three"]
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        things.register("one")
        things.register("one")(object)
    assert things["one"] is One and things.summary("one") == "First line." and list(things) == ["one", "two"]


def test_a_threshold_typed_wrong_lists_the_live_names() -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse("adaptiv:alpha=3")
    assert all(name in str(caught.value) for name in THRESHOLDS)
