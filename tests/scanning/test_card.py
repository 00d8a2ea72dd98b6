"""The dataset card: the figures and hashes of the scan, in a README that otherwise stays as it is."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml

import gradshield as gs
from gradshield.report.text import BEGIN, END, put_section
from tests.common import chats, jsonl, scan, write


def section(folder: Path) -> str:
    (found,) = re.findall(f"{BEGIN}.*?{END}", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_a_new_card_says_what_was_done_and_shows_the_kept_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl([*chats(6), {"text": 3}]))
    selection = scan(data, output=tmp_path / "out")
    card, results = section(tmp_path / "out"), selection.manifest.results
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"configs": [{"config_name": "default", "data_files": "kept.jsonl"}]}
    assert "3 of 7 rows removed, 3 kept, 1 set aside as unusable" in card and "**Not certified**" in card
    assert f"score above {selection.cuts['rows'].value:.6g}" in card
    assert "Nearest kinds of harm, a guess: " in card
    assert all(f"{name} {count}" in card for name, count in results.categories.items())
    for path in (data, tmp_path / "out" / "kept.jsonl"):
        assert f"| `{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in card
    assert str(tmp_path) not in card and selection.manifest.model.sha256 in card

    again = gs.cut(tmp_path / "out", "ratio:20%")
    new = section(tmp_path / "out")
    assert new != card and f"{again.manifest.results.removed} of 7 rows removed" in new
    assert hashlib.sha256((tmp_path / "out" / "kept.jsonl").read_bytes()).hexdigest() in new


@pytest.mark.parametrize(
    "own", [b"# My rows\n", b"---\nlicense: mit\n---\n\n# My rows, caf\xe9\n", b"---\nlicense: mit\n---"]
)
def test_a_card_that_is_there_is_kept(own: bytes, tmp_path: Path) -> None:
    write(tmp_path / "README.md", own)
    for _ in range(2):
        scan(chats(4), output=tmp_path)
        found = (tmp_path / "README.md").read_bytes()
        head, _, rest = found.partition(BEGIN.encode())
        after = rest.partition(END.encode())[2]
        assert b"".join((head + after).split()) == b"".join(own.split()) and found.count(BEGIN.encode()) == 1
        assert found.startswith(b"---") == own.startswith(b"---")


def test_what_the_user_named_is_no_markup(tmp_path: Path) -> None:
    data = write(tmp_path / "a`|<b>.jsonl", jsonl(chats(4)))
    scan(data, output=tmp_path / "out")
    (line,) = [line for line in section(tmp_path / "out").splitlines() if line.startswith("| input")]
    assert line.count("|") == 4 and line.count("`") == 4


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "README.md", "---\na: 1\n---\n# Head\n")
    put_section(path, f"{BEGIN}\none\n{END}")
    put_section(path, f"{BEGIN}\ntwo\n{END}")
    assert path.read_text() == f"---\na: 1\n---\n\n{BEGIN}\ntwo\n{END}\n\n# Head\n"
