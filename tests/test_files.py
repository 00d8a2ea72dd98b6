"""Files appear whole or not at all, under their own name and with the modes of any other file, whoever writes them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gradshield import files

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from gradshield import files

with files.replacing(Path(sys.argv[1])) as part:
    save_file({"a": torch.zeros(3)}, part.with_name(".tmpAb12Cd"))  # as safetensors leaves it when it is killed
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond N bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize(
    "fill", [lambda part: save_file({"a": torch.ones(3)}, part), lambda part: part.write_bytes(b"words")]
)
def test_a_file_has_the_modes_of_any_other(fill: Callable[[Path], None], umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with files.replacing(tmp_path / "file") as part:
            fill(part)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_leaves_is_swept(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.rglob("*") if path.is_file()]
    files.sweep(tmp_path)
    assert not os.listdir(tmp_path)


def test_what_safetensors_cannot_write_is_an_error_of_the_system(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model")
    with pytest.raises(OSError) as raised, files_up_to(10_000), files.replacing(tmp_path / "model") as part:
        save_file({"a": torch.zeros(10_000)}, part)
    assert raised.value.errno == errno.EFBIG and raised.value.strerror == os.strerror(errno.EFBIG)
    assert os.listdir(tmp_path) == ["model"]
    assert load_file(tmp_path / "model")["a"].tolist() == [1, 1, 1]


def test_an_error_of_safetensors_that_is_none_of_the_system_stays_one(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="no such tensor"), files.replacing(tmp_path / "model"):
        raise SafetensorError("no such tensor")
