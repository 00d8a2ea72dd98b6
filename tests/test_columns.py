"""Columns say what the strings they were made of say, in a few bytes each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.columns import Coded, Ids

NAMES = st.lists(st.text(max_size=3), max_size=30)


def numbered(digests: list[int]) -> list[str]:
    """Row ids with a dictionary of what was seen: the slow twin of `Ids.counted`."""
    seen: dict[int, int] = {}
    ids = []
    for digest in digests:
        seen[digest] = count = seen.get(digest, 0) + 1
        ids.append(f"{digest:016x}" if count == 1 else f"{digest:016x}-{count}")
    return ids


@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=40), st.data())
def test_ids_are_numbered_where_content_comes_again(digests: list[int], data: st.DataObject) -> None:
    ids, expected = Ids.counted(np.array(digests, dtype=np.uint64)), numbered(digests)
    assert ids == expected and list(ids) == expected and len(ids) == len(expected)
    assert Ids.of(expected) == ids and Ids.of(ids) is ids
    assert ids.digests.itemsize + ids.repeats.itemsize == 12
    part = data.draw(st.slices(len(expected)))
    assert ids[part] == expected[part] and [ids[i] for i in range(-len(ids), 0)] == expected


@pytest.mark.parametrize("text", ["", "x", "0" * 15, "0" * 17, "0" * 16 + "-1", "0" * 16 + "-02", "A" * 16])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a row id"):
        Ids.of([text])


@given(NAMES, st.data())
def test_coded_strings_are_the_strings(names: list[str], data: st.DataObject) -> None:
    column = Coded.of(names)
    assert column == names and column == tuple(names) and list(column) == names and Coded.of(column) is column
    assert column.counts() == {name: names.count(name) for name in names}
    for name in [*names, "none of them"]:
        assert column.where(name).tolist() == [own == name for own in names]
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names))), dtype=np.bool_)
    assert column.only(mask) == [name if on else "" for name, on in zip(names, mask, strict=True)]
    assert column.take(mask) == [name for name, on in zip(names, mask, strict=True) if on]
    shorter = column.renamed([name[:1] for name in column.names])
    assert shorter == [name[:1] for name in names] and len(set(shorter.names)) == len(shorter.names)
    part = data.draw(st.slices(len(names)))
    assert column[part] == names[part]


def test_few_names_are_a_byte_each_and_many_are_still_told_apart() -> None:
    many = [str(n) for n in range(300)]
    assert Coded.of(many[:256]).codes.itemsize == 1 and Coded.of(many).codes.itemsize == 2
    assert Coded.of(many) == many and Coded.of(["a"]) != ["b"] and Coded.of(["a"]) != 3
