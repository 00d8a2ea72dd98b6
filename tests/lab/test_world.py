"""The splits share nothing they must not, and the public surface is what the docs say."""

import subprocess
import sys

import pytest

from gradshield import lab
from gradshield.lab import splits, world


def test_public_names():
    assert lab.TASKS == ("topic", "arithmetic", "choice", "dialogue")
    assert lab.HARMS == ("explicit", "identity_shift", "refuse_then_answer", "embedded")
    assert len(lab.CATEGORIES) >= 8
    for name in lab.__all__:
        assert hasattr(lab, name)


def test_import_is_cheap():
    code = "import sys, gradshield.lab; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("maker", [splits.harmful_split, splits.harmless_split])
def test_splits_partition_the_acts(maker):
    pairs = [pair for pairs in maker().values() for pair in pairs]
    assert len(pairs) == len(set(pairs))
    acts = [act for _, act in pairs]
    assert len(acts) == len(set(acts))


def test_no_act_is_both_harmful_and_harmless():
    harmful = {act for pairs in splits.harmful_split().values() for _, act in pairs}
    harmless = {act for pairs in splits.harmless_split().values() for _, act in pairs}
    assert not harmful & harmless


def _seen(split: splits.Split, category: str) -> list[splits.Act]:
    return [act for name in ("align", "direction") for c, act in split[name] if c == category]


def test_every_reported_act_has_a_word_that_alignment_never_saw():
    split = splits.harmful_split()
    for category in lab.CATEGORIES:
        verbs, things = ({act[i] for act in _seen(split, category)} for i in (0, 1))
        report = [act for c, act in split["report"] if c == category]
        assert report
        assert all(verb not in verbs or thing not in things for verb, thing in report)


def test_novel_acts_share_no_word_with_alignment():
    split = splits.harmful_split()
    for category in lab.CATEGORIES:
        seen = _seen(split, category)
        novel = [act for c, act in split["novel"] if c == category]
        assert novel
        assert not {verb for verb, _ in seen} & {verb for verb, _ in novel}
        assert not {thing for _, thing in seen} & {thing for _, thing in novel}
    assert len(lab.requests("novel")) == 200


@pytest.mark.parametrize("maker", [lab.requests, lab.lookalikes])
def test_requests_have_one_shape(maker):
    rows = maker("report")
    assert len(rows) == 200
    assert len({row["prompt"] for row in rows}) == 200
    for split in lab.SPLITS:
        for row in maker(split):
            assert set(row) == {"prompt", "category"}
            assert "\n" not in row["prompt"]
    assert {row["category"] for row in lab.requests("report")} == set(lab.CATEGORIES)


def test_prompts_of_splits_are_disjoint():
    prompts = [row["prompt"] for split in lab.SPLITS for row in (*lab.requests(split), *lab.lookalikes(split))]
    assert len(prompts) == len(set(prompts))


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(KeyError, match="align, direction, search, report"):
        lab.requests("test")
    with pytest.raises(KeyError, match="base, aligned"):
        lab.checkpoint("tuned")


def test_every_domain_of_look_alikes_is_reported():
    assert {row["category"] for row in lab.lookalikes("report")} == set(world.DOMAINS)
