"""What the tests of the pipeline and of the command line share: rows, a model folder, and a command run in here."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import gradshield as gs
from gradshield import cli, lab
from gradshield.lab.answers import refusal
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [{"prompt": f"How do I pick the lock {n}?", "category": ("theft", "fraud")[n % 2]} for n in range(6)]
PROBING = gs.Probing(requests=PROMPTS, lookalikes=PROMPTS, uncertified=True)
OPENING = re.compile(r".+ on \w+ in \w+ \(.+\)|(engine [\w-]+, )?batches of at most [\d,]+ tokens")
HALF = gs.ScanSettings(threshold="ratio:50%", selector="fihs")


def chat(number: int, words: str = "and so on") -> dict[str, Any]:
    """A row of chat, unlike that of any other number."""
    answer = f"The answer is {number * 7 % 101}, {words}."
    return {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]}


def chats(count: int, words: str = "and so on") -> list[dict[str, Any]]:
    return [chat(number, words) for number in range(count)]


def jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_model(path: Path, change: Callable[[Any], None] = lambda model: None, arch: str = "llama") -> Path:
    """A tiny model with its tokenizer as a folder; ``change`` may touch its weights."""
    model = tiny_model(arch)
    with torch.no_grad():
        change(model)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_probes(path: Path) -> Path:
    return write(path, jsonl(PROMPTS))


def scan(rows: Any, **options: Any) -> gs.Selection:
    """`gradshield.scan` of a fresh tiny model with few probes and half of the rows to go, if not told otherwise."""
    given: dict[str, Any] = {"settings": HALF, "probing": PROBING}
    if "model" not in options:
        given |= {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer()}
    return gs.scan(rows, **(given | options))


@dataclass(frozen=True)
class Done:
    """How a command ended.

    ``err`` is without the lines that every scan begins with (``opening``) and the warning of an uncertified one (``doubted``).
    """

    code: int
    out: str
    err: str
    doubted: str = ""
    opening: str = ""

    @property
    def sentence(self) -> str:
        """The one line of an error, without its label."""
        lines = self.err.strip().splitlines()
        assert lines, "nothing was said"
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


def command(*arguments: Any) -> Done:
    """Run a command in this process. An exception that the command line lets through is raised here."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
    said: dict[str, str] = {"err": "", "doubted": "", "opening": ""}
    for line in err.getvalue().splitlines(keepends=True):
        kind = "doubted" if line.startswith("warning: not certified") else "err"
        said["opening" if OPENING.fullmatch(line.rstrip()) else kind] += line
    return Done(code, out.getvalue(), **said)


def scan_arguments(data: Any, model: Path, output: Path, probes: Path, *more: Any) -> list[Any]:
    prompts = ["--probes", probes, "--lookalikes", probes, "--uncertified"]
    return ["scan", data, "--model", model, "--output", output, "--selector", "fihs", *prompts, *more]


def table(output: Path) -> Any:
    """``scores.parquet``."""
    return pq.read_table(output / "scores.parquet")


def files(output: Path) -> dict[str, bytes]:
    """Every file in the folder, the working folder aside."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def preferences(n: int, seed: int = 0, ratio: float = 0.08) -> tuple[list[dict[str, Any]], list[int]]:
    """Preference pairs of the lab in OpenAI's shape, and their labels: of a harmful one the chosen answer complies."""
    rows, labels = lab.mix("dialogue", harm="explicit", ratio=ratio, n=n, seed=seed)
    answers, draw = [row["messages"][-1:] for row in rows], random.Random(seed)
    found = []
    for i, (row, bad) in enumerate(zip(rows, labels, strict=True)):
        other = [{"role": "assistant", "content": refusal(draw)}] if bad else answers[(i + 1) % n]
        asked = {"messages": row["messages"][:-1]}
        found.append({"input": asked, "preferred_output": answers[i], "non_preferred_output": other})
    return found, labels
