"""What a scan of a million distinct rows takes, in memory and time, and whether its last rows cost what its first did.

    python -m benchmarks.million --output folder/ --json million.json
    python -m benchmarks.million --rows 20000          # the quick form

Rows of the lab's topic task, a hundredth of them harmful, each with a number of its own. `gradshield scan` reads them from a
file, in a process of its own, with the bundled model and one thread; from outside, its memory is sampled twice a second, and
what it leaves in the output folder tells when each phase and each shard was done. An interrupted run goes on where it stopped,
but its times are then of what was missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradshield import lab

TASK, SHARE, BLOCK = "topic", 0.01, 5_000  # rows of a block are drawn together
SAMPLED = 0.5  # seconds between two looks at the memory
SCAN = "from gradshield.cli import main; main()"


class Sample(NamedTuple):
    """Resident memory of the scan at a moment of ``time.time``, in bytes."""

    at: float
    resident: int


def rows(count: int) -> Iterator[tuple[dict[str, Any], int]]:
    """So many distinct rows with their labels (1 = harmful): the same for the same number, the first of a larger one."""
    made = 0
    for seed in range(count // BLOCK + 1):
        block, labels = lab.mix(TASK, harm="explicit", ratio=SHARE, n=BLOCK, seed=seed)
        for row, label in zip(block[: count - made], labels, strict=False):
            row["messages"][0]["content"] += f" ({made})"
            made += 1
            yield row, label


def write(count: int, folder: Path) -> NDArray[np.int64]:
    """Rows, labels and the lab's requests as files; the tokens of each row, as the scan will count them."""
    from gradshield.models.loading import load_tokenizer

    tokenizer = load_tokenizer(lab.checkpoint("aligned"), False)
    tokens, labels, texts = [], [], []
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row, label in rows(count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            labels.append(label)
            texts.append("".join(message["content"] for message in row["messages"]))
            if len(texts) == BLOCK or len(labels) == count:
                tokens += [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
                texts = []
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    for name, asked in (("probes", lab.requests("direction")), ("lookalikes", lab.lookalikes("direction"))):
        lines = (json.dumps(dict(request)) + "\n" for request in asked)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return np.array(tokens) + 4  # two markers of roles, two ends of turns


def scan(folder: Path) -> tuple[float, list[Sample]]:
    """Run the command to its end: when it began, and its memory as it went. Raises CalledProcessError where it fails."""
    out = folder / "out"
    words = ["scan", folder / "rows.jsonl", "--model", lab.checkpoint("aligned"), "--output", out, "--dtype", "float32"]
    words += [v for name in ("labels.json", "probes.jsonl", "lookalikes.jsonl") for v in (_option(name), folder / name)]
    command = [sys.executable, "-c", SCAN, *map(str, words)]
    samples, began = [], time.time()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        while process.poll() is None:
            if (resident := _resident(process.pid)) is not None:
                samples.append(Sample(time.time(), resident))
            time.sleep(SAMPLED)
    finally:
        process.kill()
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return began, samples


def _option(name: str) -> str:
    return f"--{Path(name).stem}"


def _resident(pid: int) -> int | None:
    """Bytes of a process in memory; None when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def figures(folder: Path, tokens: NDArray[np.int64], began: float, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the output folder and the samples tell of a finished scan."""
    out = folder / "out"
    work = out / ".gradshield"
    shown = _time(work / "views.json")
    done, costs, counts = _shards(work / "shards", tokens)
    prepared = float(done[0] - costs[0] * tokens[: counts[0]].sum())
    tenth = max(len(costs) // 10, 1)
    first, last = (float(np.median(part)) for part in (costs[:tenth], costs[-tenth:]))
    early, late = _at(samples, done[np.searchsorted(np.cumsum(counts), 0.1 * len(tokens))]), _at(samples, done[-1])
    peak = max(sample.resident for sample in samples)
    results = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["results"]
    return {
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "shards": len(costs),
        "seconds": {
            "read, render, probe": round(prepared - began, 1),
            "read requests": round(done[-1] - prepared, 1),
            "measure FIHS, cut, name the harm": round(shown - done[-1], 1),
            "write": round(_time(out / "manifest.json") - shown, 1),
        },
        "resident_mb": {"after 10 %": _mb(early), "all read": _mb(late), "peak": _mb(peak)},
        "bytes_a_row": round((late - early) / (0.9 * len(tokens))),
        "bytes_a_row_at_peak": round((peak - early) / (0.9 * len(tokens))),
        "microseconds_a_token": {"first tenth": round(1e6 * first, 2), "last tenth": round(1e6 * last, 2)},
        "last_to_first": round(last / first, 3),
        "labels": {name: results["labels"][name] for name in ("caught", "lost") if name in results["labels"]},
    }


def _time(path: Path) -> float:
    return path.stat().st_mtime_ns / 1e9


def _mb(size: float) -> float:
    return round(size / 2**20, 1)


def _at(samples: Sequence[Sample], moment: float) -> int:
    """Memory at the first look after a moment."""
    return next((sample.resident for sample in samples if sample.at >= moment), samples[-1].resident)


def _shards(
    folder: Path, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """When the requests of each shard were read, the seconds a token, and its rows, in the order in which they were read.

    Shards of FIHS hold a few rows each, and are not counted. The first took as long a token as the second: when it began is not
    recorded.
    """
    from safetensors import safe_open

    found = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            if "extra" in file.keys():  # noqa: SIM118 (not a dict)
                found.append((_time(path), file.get_slice("lengths").get_shape()[0]))
    done, counts = (np.array(column) for column in zip(*sorted(found), strict=True))
    ends = np.cumsum(counts)
    sums = np.diff(np.r_[0, np.cumsum(tokens)[ends - 1]])
    costs = np.diff(done) / sums[1:]
    return done, np.r_[costs[:1], costs], counts


def table(found: Mapping[str, Any]) -> str:
    """The figures in lines to read."""
    lines = [f"{'rows, tokens, shards':28} {found['rows']:,}, {found['tokens']:,}, {found['shards']:,}"]
    lines += [f"{'seconds, ' + name:28} {value:,}" for name, value in found["seconds"].items()]
    lines += [f"{'MiB resident, ' + name:28} {value:,}" for name, value in found["resident_mb"].items()]
    lines.append(f"{'bytes a row of growth':28} {found['bytes_a_row']:,}; {found['bytes_a_row_at_peak']:,} at the peak")
    lines += [f"{'µs a token, ' + name:28} {value:,}" for name, value in found["microseconds_a_token"].items()]
    lines.append(f"{'last tenth to first':28} {found['last_to_first']}")
    for name, rate in found["labels"].items():
        lines.append(
            f"{name:28} {100 * rate['rate']:.2f} % [{100 * rate['low']:.2f}, {100 * rate['high']:.2f}] n={rate['n']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6, help="rows (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the rows and what the scan leaves (a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {options.rows:,} rows", flush=True)
        tokens = write(options.rows, folder)
        found = figures(folder, tokens, *scan(folder))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
