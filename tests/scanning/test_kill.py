"""A scan that is killed again and again, at any moment, ends as one that nothing disturbed."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import killing

KILLS = 21
PATIENCE = 120  # seconds for one scan of a second or two, on a machine that does other things too


class Undisturbed(NamedTuple):
    data: Path
    result: dict[str, Any]
    seconds: float
    touches: int


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in killing.rows()))
    context = killing.context()
    touched = context.Queue()
    for name in ("first", "second"):  # the first one pays for starting the server
        began = time.monotonic()
        _ended(_started(killing.counting, data, folder / name, touched))
        seconds, touches = time.monotonic() - began, touched.get(timeout=10)
    assert killing.result(folder / "first") == killing.result(folder / "second")  # else nothing below means anything
    return Undisturbed(data, killing.result(folder / "second"), seconds, touches)


def _started(what: Any, *arguments: Any) -> Any:
    process = killing.context().Process(target=what, args=arguments)
    process.start()
    return process


def _ended(process: Any, code: int = 0) -> None:
    process.join(PATIENCE)
    assert process.exitcode == code


def _state(output: Path) -> str:
    """How far a scan had come."""
    if (output / "manifest.json").exists():
        return "finished"
    if list(output.glob(".new.*.part")):
        return "writing"
    shards = len(list((output / ".gradshield" / "shards").glob("[!.]*")))
    return "scoring" if shards else "before"


@pytest.mark.slow
def test_killed_at_random_points(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Two kills of three at any time, one just before a file is touched; a scan that gets to its end makes room for a new one."""
    draw = random.Random(20)
    lives, kills, output = 0, 0, tmp_path / "0"
    states: Counter[str] = Counter()
    while kills < KILLS:
        if kills % 3 == 2:
            process = _started(killing.killed_at, undisturbed.data, output, draw.randrange(1, undisturbed.touches + 1))
            process.join(PATIENCE)
        else:
            process = _started(killing.scan, undisturbed.data, output)
            process.join(draw.uniform(0.05, 1) * undisturbed.seconds)
            process.kill()
            process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:
            kills += 1
            states[_state(output)] += 1
            continue
        assert killing.result(output) == undisturbed.result
        lives += 1
        output = tmp_path / str(lives)
    _ended(_started(killing.scan, undisturbed.data, output))
    assert killing.result(output) == undisturbed.result
    assert not list(output.rglob("*.part"))  # what was half written is taken away
    assert len(states) >= 2, states  # the kills did not all fall into one stage


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_two_at_once_where_there_are_no_locks(undisturbed: Undisturbed, tmp_path: Path, share: float) -> None:
    """Both write into one folder, in step or one behind the other, and each file is that of an undisturbed scan."""
    first = _started(killing.without_lock, undisturbed.data, tmp_path)
    time.sleep(share * undisturbed.seconds)
    second = _started(killing.without_lock, undisturbed.data, tmp_path)
    _ended(first)
    _ended(second)
    assert killing.result(tmp_path) == undisturbed.result
