"""Build the lab that ships in the wheel: both checkpoints, the judge, and the manifest that pins them.

    python tools/build_lab.py

Deterministic under ``--seed`` on one machine and one torch version (one thread, one process). ``--stages``
with no name rewrites only the manifest, after a change of a generator that leaves the checkpoints as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import time
from pathlib import Path

import lab_judge
import tokenizers
import torch
import transformers
from lab_corpus import ALIGNED_SHARES, BASE_SHARES, PRACTICE_SHARES, documents
from lab_manifest import fixtures, sha256
from lab_training import build_model, build_tokenizer, train

from gradshield import lab

BASE_DOCUMENTS = 100_000
ALIGNED_DOCUMENTS = 40_000
PRACTICE_DOCUMENTS = 44_000
BASE_RATE = 3e-3
PRACTICE_RATE = 2e-3
ALIGNED_RATE = 1e-3
# A little smoothing keeps the refusals from becoming so certain that their gradient vanishes.
SMOOTHING = 0.005


def save(model, tokenizer, name: str) -> None:
    """Write a checkpoint in the hub's format, weights in float16; ``model`` itself stays in float32."""
    folder = lab.checkpoint(name)
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def build_base(seed: int) -> None:
    """Train ``base`` from scratch."""
    corpus = documents(BASE_SHARES, BASE_DOCUMENTS, f"base-{seed}")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed)
    train(model, tokenizer, corpus, lr=BASE_RATE, seed=seed)
    save(model, tokenizer, "base")


def load(name: str):
    """A checkpoint as it ships, in float32."""
    folder = lab.checkpoint(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def build_practice(seed: int) -> None:
    """Train ``base`` further, on copying above all."""
    model, tokenizer = load("base")
    corpus = documents(PRACTICE_SHARES, PRACTICE_DOCUMENTS, f"practice-{seed}")
    train(model, tokenizer, corpus, lr=PRACTICE_RATE, seed=seed + 2)
    save(model, tokenizer, "base")


def build_aligned(seed: int) -> None:
    """Train ``aligned`` from ``base`` as it ships."""
    model, tokenizer = load("base")
    corpus = documents(ALIGNED_SHARES, ALIGNED_DOCUMENTS, f"aligned-{seed}")
    train(model, tokenizer, corpus, lr=ALIGNED_RATE, seed=seed + 1, smoothing=SMOOTHING)
    save(model, tokenizer, "aligned")


def build_judge(seed: int) -> None:
    print("judge:", lab_judge.build(seed))


STAGES = {"base": build_base, "practice": build_practice, "aligned": build_aligned, "judge": build_judge}


def write_manifest(seed: int) -> None:
    """Pin the hashes of everything that ships, and of what the generators make."""
    root = Path(lab.__file__).parent
    shipped = sorted([*root.glob("checkpoints/*/*"), *root.glob("*.py"), lab_judge.WEIGHTS])
    manifest = {
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "files": {path.relative_to(root).as_posix(): sha256(path) for path in shipped},
        "fixtures": fixtures(),
    }
    lab.PINNED.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES), help="all, in order")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    for stage in options.stages:
        STAGES[stage](options.seed)
        print(f"{stage} built, {time.time() - began:.0f} s", flush=True)
    write_manifest(options.seed)


if __name__ == "__main__":
    main()
