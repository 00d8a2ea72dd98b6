"""One process at a time has an output folder, and a dead one has none."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from gradshield import cut, runs
from gradshield.errors import DataError, GradShieldError
from gradshield.files import replacing
from gradshield.scanning import shards
from tests import killing
from tests.common import chats, files, scan


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_one_releases_the_lock(tmp_path: Path) -> None:
    scan(chats(6), output=tmp_path)
    before = files(tmp_path)
    context = killing.context()
    ready = context.Event()
    holder = context.Process(target=killing.held, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(120)
        for what in (lambda: scan(chats(6), output=tmp_path), lambda: cut(tmp_path, "ratio:20%")):
            with pytest.raises(DataError, match=rf"in use by another run.*process {holder.pid} on ") as raised:
                what()
            assert "wait until it ends, or give another --output" in str(raised.value)
        assert files(tmp_path) == before
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join(60)
    assert scan(chats(6), output=tmp_path).manifest.results.scored == 6


def test_one_run_after_another_in_one_process(tmp_path: Path) -> None:
    for _ in range(2):
        with runs.alone(tmp_path / "out"):
            (tmp_path / "out" / "file").write_text("")
            with pytest.raises(DataError, match="in use"), runs.alone(tmp_path / "out"):
                pytest.fail("had twice")


@pytest.mark.parametrize("there", [(), ("a",), ("a", "a/b"), ("a", "a/b", "a/b/.gradshield")])
def test_a_folder_in_which_nothing_was_written_is_as_before(tmp_path: Path, there: tuple[str, ...]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), runs.alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise ZeroDivisionError
    after = [path for path in sorted(tmp_path.rglob("*")) if path.name != runs.LOCK]
    assert after == before


def test_what_was_half_written_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".gradshield" / "shards").mkdir(parents=True)
    own = [
        tmp_path / f".kept.jsonl.{'0a' * 6}.part",
        tmp_path / ".gradshield" / "shards" / f".x.safetensors.{'0b' * 6}.part",
    ]
    own.append(tmp_path / "scan" / f".scores.parquet.{'0c' * 6}.part")
    own[-1].parent.mkdir()
    others = [tmp_path / "mine.part", tmp_path / ".hidden", tmp_path / ".download.0a.part"]
    for path in own:  # every writer has a folder of its own
        path.mkdir()
        (path / "part").write_text("x")
    for path in others:
        path.write_text("x")
    with runs.alone(tmp_path):
        assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


def test_where_there_are_no_locks_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with runs.alone(tmp_path), replacing(tmp_path / "kept.jsonl") as part:
        part.write_text("by the first")
        with runs.alone(tmp_path):  # takes nothing away that another is writing
            pass
    assert (tmp_path / "kept.jsonl").read_text() == "by the first"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("target", ["gradshield.scanning.outputs.write_scores", "gradshield.runs.write_json"])
def test_a_full_disk_is_a_sentence_and_a_rerun_goes_on(
    target: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        with pytest.raises(GradShieldError, match=r"cannot be written to .*free some space") as raised:
            scan(chats(12), output=tmp_path)
    assert raised.value.exit_code == 3
    assert not (tmp_path / "manifest.json").exists()
    again, fresh = scan(chats(12), output=tmp_path), scan(chats(12))
    assert again.scores.values.tolist() == fresh.scores.values.tolist()


def test_a_disk_that_is_full_of_tensors_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written.*No space left on device.*free some space"):
        scan(chats(6), output=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "output", "refused"),
    [
        ("*.jsonl", ".", True),
        ("./*.jsonl", ".", True),
        ("**/*.jsonl", "out", True),
        ("**/*.jsonl", ".", True),
        ("*/*.jsonl", "out", True),
        ("*.jsonl", "out", False),
        ("part-*.jsonl", ".", False),
    ],
)
def test_a_pattern_that_would_match_what_is_written_is_refused(
    pattern: str, output: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part-1.jsonl").touch()
    with pytest.raises(DataError, match="the next time") if refused else nullcontext():
        runs.check(output, ("kept.jsonl", "manifest.json"), "scores.parquet", data=pattern)
