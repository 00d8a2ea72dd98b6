"""The command line on bad input: one sentence, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationMixin

import gradshield
from gradshield.gradients import ENGINES
from gradshield.probes import PROBES
from gradshield.selectors import AGGREGATES, SELECTORS
from gradshield.thresholds import THRESHOLDS
from tests.common import chat, chats, command, files, jsonl, scan_arguments, table, write
from tests.tiny import tiny_tokenizer

COMMANDS = ("scan", "cut", "show", "methods", "demo")
GOOD = jsonl(chats(6))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return shutil.copytree(folder, tmp_path / "model")


# ---- data -----------------------------------------------------------------------------------------------------------

BAD_DATA: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("a.jsonl", b"", "has no rows"),
    "blank lines": ("a.jsonl", b"\n\r\n  \n", "has no rows"),
    "all broken": ("a.jsonl", b"{\n[1\n", "0 of 2 rows"),
    "no rows in an array": ("a.json", b"[]", "has no rows"),
    "broken array": ("a.json", b'[{"text": "a"}, ', "not valid JSON"),
    "not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "UTF-16": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
    "NUL bytes": ("a.jsonl", b'{"text": "a\0"}\n', "NUL bytes"),
    "NUL characters": ("a.jsonl", b'{"text": "a\\u0000"}\n', "NUL characters"),
    "wrong types": ("a.jsonl", b'{"messages": 3}\n{"text": []}\n"text"\n7\nnull\n', "0 of 5 rows"),
    "empty answers": ("a.jsonl", b'{"prompt": "a", "completion": " "}\n', "completion is empty"),
    "unknown keys": ("a.jsonl", b'{"question": "a", "reply": "b"}\n', "known formats and their keys"),
    "nested": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "header only": ("a.csv", b"instruction,output\n", "has no rows"),
    "column twice": ("a.csv", b"text,text\na,b\n", "names a column twice"),
    "no parquet": ("a.parquet", b"PAR1 or so", "not a readable Parquet file"),
    "unknown kind": ("a.xlsx", b"PK\x03\x04", "of an unknown kind"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used(case: str, folder: Path, probes: Path, tmp_path: Path) -> None:
    name, content, words = BAD_DATA[case]
    output = tmp_path / "out"
    done = command(*scan_arguments(write(tmp_path / name, content), folder, output, probes))
    assert done.code == 3
    assert words in done.sentence
    assert done.out == ""
    assert not output.exists()


LABELLED = jsonl([{"prompt": "a", "completion": "b", "label": False}])
PAIRS = jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}])
BEFORE_LOADING: dict[str, tuple[str, bytes, list[str], str]] = {
    "unknown keys": ("scan", b'{"ask": "a", "reply": "b"}\n', [], "fit no known format"),
    "an unknown column": ("scan", GOOD, ["--columns", "prompt=ask"], "has the column 'ask'"),
    "an unreadable file": ("scan", b'{"text": "caf\xe9"}\n', [], "not UTF-8"),
    "too few labels": ("scan", GOOD, ["--labels"], "2 labels for 6 rows"),
    "answers with a label": ("train", LABELLED, [], "KTOTrainer"),
    "pairs among rows": ("train", PAIRS + GOOD, [], "mixes preference pairs"),
    "pairs for single answers": ("train", PAIRS, ["--defence", "safeinstruct"], "holds preference pairs"),
    "the second dataset": ("train", PAIRS + GOOD, ["first"], "mixes preference pairs"),
    "a length": ("scan", GOOD, ["--max-length", "0"], "max_length is 0"),
    "an estimate": ("estimate", b'{"text": 3}\n', [], "0 of 1 rows"),
}


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_what_is_wrong_with_the_rows_is_said_before_a_model_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, content, more, words = BEFORE_LOADING[case]
    monkeypatch.setattr("gradshield.models.loading.load", lambda *_, **__: pytest.fail("a model is loaded"))
    arguments: list[Any] = [write(tmp_path / "data.jsonl", content), "--model", "model", *more]
    if more == ["--labels"]:
        arguments.append(write(tmp_path / "labels.json", b"[0, 1]"))
    if more == ["first"]:
        held = write(tmp_path / "held.jsonl", GOOD)
        arguments[3:] = ["--utility", held, "--utility", held]
        arguments.insert(0, write(tmp_path / "first.jsonl", GOOD))
    if name != "estimate":
        arguments += ["--output", tmp_path / "out"]
    done = command(name, *arguments)
    assert done.code in (2, 3)
    assert words in done.sentence
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(folder: Path, probes: Path, tmp_path: Path) -> None:
    cases = {str(tmp_path / "missing.jsonl"): 3, "no/missing.jsonl": 3, str(tmp_path): 3, "owner/dataset": 3}
    for data, code in cases.items():
        began = time.monotonic()
        done = command(*scan_arguments(data, folder, tmp_path / "out", probes))
        assert done.code == code, done.err
        assert done.sentence
        assert time.monotonic() - began < 5
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b'{"text": 3}',
        b'{"prompt": "a", "completion": ""}',
        b'{"text": "caf\xe9"}',
        b'{"text": "\0"}',
        b"[]",
    ],
)
def test_strict_stops_at_the_first_bad_row(line: bytes, folder: Path, probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD + line + b"\n")
    done = command(*scan_arguments(data, folder, tmp_path / "out", probes, "--strict"))
    assert done.code == 3
    assert done.sentence.startswith(f"line 7 of {data} cannot be used, ")
    assert not (tmp_path / "out").exists()


def test_a_line_of_fifty_megabytes_is_set_aside_in_bounded_time(folder: Path, probes: Path, tmp_path: Path) -> None:
    big = b'{"text": "' + b"a" * 50_000_000 + b'"}\n'
    data, output = write(tmp_path / "data.jsonl", GOOD[: GOOD.index(b"\n") + 1] + big + GOOD), tmp_path / "out"
    began = time.monotonic()
    done = command(*scan_arguments(data, folder, output, probes, "-t", "ratio:50%"))
    assert done.code == 0, done.err
    assert time.monotonic() - began < 20
    (bad,) = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["row"], bad["line"], bad["bytes"]) == (1, 2, len(big))
    assert "50,000,013 bytes" in bad["reason"]
    assert (output / "quarantine.jsonl").stat().st_size < 2_000_000
    assert (output / "report.html").stat().st_size < 8_000_000
    assert table(output)["row"].to_pylist() == [0, 2, 3, 4, 5, 6, 7]
    assert command("cut", output, "-t", "ratio:20%").code == 0


# ---- options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    **{f"unknown {name}": ([f"--{name}", "zzz"], "zzz") for name in ("format", "probe", "aggregate", "engine")},
    **{f"unknown {name}": ([f"--{name}", "zzz"], "zzz") for name in ("threshold", "subspace", "device", "dtype")},
    "aggregate of none": (["--aggregate", "top:0"], "unknown aggregate"),
    "subspace of none": (["--subspace", "last:0"], "unknown subspace"),
    "subspace too deep": (["--subspace", "last:9"], "the model has 2"),
    "subspace without adapter": (["--subspace", "targets"], "--lora-config"),
    "ratio beyond one": (["-t", "ratio:2"], "between 0 and 1"),
    "ratio of no number": (["-t", "ratio:some"], "takes a number"),
    "ratio of nan": (["-t", "ratio:nan"], "takes a"),
    "unknown option of a rule": (["-t", "decoy:k=1"], "takes q"),
    "fixed at nothing": (["-t", "fixed"], "needs value"),
    "too many options": (["-t", "ratio:0.1,0.2"], "takes share"),
    "rule without decoys": (["--aggregate", "sum", "--engine", "loop"], "have none"),
    "no values per token": (["--engine", "loop"], "row sums only"),
    "half precision": (["--dtype", "bfloat16", "--engine", "finite-difference"], "rounded away"),
    "negative seed": (["--seed", "-1"], "at least 0"),
    "tiny budget": (["--token-budget", "1"], "at least 16"),
    "no length": (["--max-length", "0"], "at least 2"),
    "template is no JSON": (["--template-kwargs", "{nope"], "not JSON"),
    "template is a list": (["--template-kwargs", "[1]"], "a JSON object"),
    "gate beyond one": (["--fail-above", "2"], "give a percentage such as 1%"),
    "gate is a word": (["--fail-above", "some"], "give a percentage such as 1%"),
    "gate is nan": (["--fail-above", "nan"], "give a percentage such as 1%"),
    "gate is a sign": (["--fail-above", "%"], "give a percentage such as 1%"),
    "gate may be either": (["--fail-above", "1"], "write 1% or 100%"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_are_not_allowed(case: str, folder: Path, probes: Path, tmp_path: Path) -> None:
    more, words = BAD_OPTIONS[case]
    output = tmp_path / "out"
    done = command(*scan_arguments(write(tmp_path / "data.jsonl", GOOD), folder, output, probes, *more))
    assert done.code in (2, 4) if case == "subspace without adapter" else done.code == 2
    assert words in done.sentence
    assert not output.exists()


def _many(*contents: tuple[str, str, int, str]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]} {number}") for number, case in enumerate(contents)]


@pytest.mark.parametrize(
    ("option", "content", "code", "words"),
    _many(
        ("--labels", "[0, 1]", 2, "2 labels for 6 rows"),
        ("--labels", "[0, 1, 2, 0, 1, 0]", 3, "not a list of 0 and 1"),
        ("--labels", '["a", "b", 0, 0, 0, 0]', 3, "not a list of 0 and 1"),
        ("--labels", '{"0": 1}', 3, "not a list of 0 and 1"),
        ("--labels", "nope", 3, "not JSON"),
        ("--lora-config", "{nope", 3, "not JSON"),
        ("--lora-config", "[]", 2, "holds a list"),
        ("--lora-config", '{"peft_type": "WHAT"}', 2, "not a PEFT config"),
        ("--lora-config", '{"target_modules": ["nope"]}', 2, "cannot be added to the model"),
        ("--lora-config", '{"r": 0, "target_modules": ["q_proj"]}', 2, "cannot be added to the model"),
        ("--lora-config", '{"r": "x", "target_modules": ["q_proj"]}', 2, "cannot be added to the model"),
        ("--training-config", "\x00", 3, "not JSON"),
        ("--training-config", "3", 2, "holds a int"),
        ("--training-config", '{"max_length": "long"}', 2, "takes int or null"),
        ("--training-config", '{"max_length": 128}', 2, "differ: give one of them"),
        ("--training-config", '{"assistant_only_loss": "false"}', 2, "takes true or false"),
        ("--training-config", '{"truncation_mode": "middle"}', 2, "keep_start, keep_end"),
        ("--training-config", '{"chat_template_path": "x"}', 2, "chat_template_path"),
        ("--training-config", '{"lerning_rate": 1}', 2, "unknown training option 'lerning_rate'"),
        ("--training-config", '{"assistant_only_los": true}', 2, "did you mean 'assistant_only_loss'?"),
        ("--probes", '{"x": 1}\n', 3, "no text under 'prompt'"),
        ("--probes", '{"prompt', 3, "not valid JSON"),
        ("--probes", "[1]\n", 3, "no text under 'prompt'"),
        ("--probes", "", 3, "has no prompt"),
    ),
)
def test_files_given_to_options(
    option: str, content: str, code: int, words: str, folder: Path, probes: Path, tmp_path: Path
) -> None:
    data, given, output = (
        write(tmp_path / "data.jsonl", GOOD),
        write(tmp_path / "given.json", content),
        tmp_path / "out",
    )
    if option == "--probes":
        given = given.rename(tmp_path / "given.jsonl")
    more = ["--max-length", 64] if option == "--training-config" else []
    done = command(*scan_arguments(data, folder, output, probes, *more, option, given))
    assert done.code == code, done.err
    assert words in done.sentence
    assert not output.exists()


@pytest.mark.parametrize(
    "option", ["--labels", "--lora-config", "--training-config", "--probes", "--lookalikes", "--allow"]
)
def test_files_that_are_not_there(option: str, folder: Path, probes: Path, tmp_path: Path) -> None:
    data, binary = write(tmp_path / "data.jsonl", GOOD), write(tmp_path / "binary", b"\xff\xfe\x00")
    for given in (tmp_path / "missing", tmp_path, binary):
        done = command(*scan_arguments(data, folder, tmp_path / "out", probes, option, given))
        assert done.code == 3, done.err
        assert done.sentence
        assert not (tmp_path / "out").exists()


def test_what_the_parser_refuses(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD)
    for arguments in (
        ["scan", data],
        ["scan", data, "--model", folder],
        ["scan", data, "--model", folder, "--output", tmp_path / "out", "--max-length", "long"],
        ["scan", data, "--model", folder, "--output", tmp_path / "out", "--nope"],
        ["nope"],
        ["show", data, "--row", "x"],
    ):
        done = command(*arguments)
        assert done.code == 2
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()


# ---- models and folders ---------------------------------------------------------------------------------------------


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _remote(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    more = {"model_type": "homemade", "auto_map": {"AutoConfig": "custom.C"}}
    write(model / "config.json", json.dumps({**config, **more}))


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles": (_pickled, "only as pickles"),
    "own code": (_remote, "--trust-remote-code"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors"),
    "no config": (lambda model: (model / "config.json").unlink(), "no config.json"),
    "broken config": (lambda model: write(model / "config.json", "{"), "cannot be read"),
    "broken weights": (lambda model: write(model / "model.safetensors", b"junk"), "cannot be loaded"),
    "missing": (shutil.rmtree, "there is no folder"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_used(case: str, copy: Path, probes: Path, tmp_path: Path) -> None:
    change, words = BAD_MODELS[case]
    change(copy)
    done = command(*scan_arguments(write(tmp_path / "data.jsonl", GOOD), copy, tmp_path / "out", probes))
    assert done.code == 4
    assert words in done.sentence
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_reported_fast(probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD)
    began = time.monotonic()
    done = command(*scan_arguments(data, Path("owner/model"), tmp_path / "out", probes))
    assert time.monotonic() - began < 5
    assert done.code == 4
    assert "the hub cannot be reached" in done.sentence


def test_a_warning_of_a_training_is_labelled(folder: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "training.json", b'{"num_train_epochs": 1}')
    data = write(tmp_path / "data.jsonl", jsonl([chat(0)]))
    done = command("train", data, "--model", folder, "--output", tmp_path / "out", "--training-config", config)
    assert done.code == 4  # a random model refuses nothing
    assert "warning: the training config does not set assistant_only_loss" in done.err


def test_scoring_a_model_that_does_not_refuse_needs_the_option(folder: Path, probes: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "data.jsonl", GOOD), tmp_path / "out"
    arguments = [a for a in scan_arguments(data, folder, output, probes, "-t", "ratio:50%") if a != "--uncertified"]
    done = command(*arguments)
    assert done.code == 2
    assert "6 requests are among both the probes and the look-alikes" in done.sentence
    arguments += ["--lookalikes", write(tmp_path / "harmless.jsonl", jsonl([{"prompt": "How do I bake?"}]))]
    done = command(*arguments)
    assert done.code == 4
    assert "refuses only 0 of 6 probes" in done.sentence
    assert "--uncertified" in done.sentence
    assert not output.exists()
    assert command(*arguments, "--uncertified").code == 0
    assert "Not certified" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "engine finite-difference, batches of at most 4,096 tokens"),
        (["--dtype", "bfloat16", "--token-budget", 512], "engine forward, batches of at most 512 tokens"),
        (["--selector", "loss"], "batches of at most 4,096 tokens"),
    ],
)
def test_a_scan_begins_with_what_it_measures_with(
    more: list[Any], said: str, folder: Path, probes: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", GOOD)
    done = command(*scan_arguments(data, folder, tmp_path / "out", probes, "-t", "ratio:50%", *more))
    assert done.code == 0
    kind = r"bfloat16 \(as asked for\)" if "--dtype" in more else r"float32 \((this CPU has|as on every CPU).*\)"
    assert re.fullmatch(rf"{re.escape(str(folder))} on cpu in {kind}\n{said}\n", done.opening), done.opening


def test_folders_that_cannot_be_written(
    folder: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, file = write(tmp_path / "data.jsonl", GOOD), write(tmp_path / "file", "x")
    monkeypatch.setattr(GenerationMixin, "generate", lambda *_, **__: pytest.fail("the model was asked"))
    for output in (file, file / "under"):
        done = command(*scan_arguments(data, folder, output, probes))
        assert done.code == 3
        assert "give another --output" in done.sentence
    with monkeypatch.context() as locked:  # the suite may run as root, for whom no file mode applies
        locked.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
        done = command(*scan_arguments(data, folder, tmp_path / "locked", probes))
        assert done.code == 3
        assert "cannot be written to" in done.sentence
    assert file.read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "file"]


def test_a_failed_scan_leaves_a_finished_one_alone(folder: Path, probes: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "data.jsonl", GOOD), tmp_path / "out"
    assert command(*scan_arguments(data, folder, output, probes, "-t", "ratio:50%")).code == 0
    before = files(output)
    bad = write(tmp_path / "bad.jsonl", b"{\n")
    for arguments in (
        scan_arguments(bad, folder, output, probes),
        scan_arguments(data, folder, output, probes, "-t", "zzz"),
        scan_arguments(data, tmp_path / "none", output, probes),
        [a for a in scan_arguments(data, folder, output, probes) if a != "--uncertified"],
    ):
        assert command(*arguments).code in (2, 3, 4)
        assert files(output) == before


def test_tokenizers_without_template_or_padding(copy: Path, probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    arguments = scan_arguments(data, copy, tmp_path / "out", probes, "-t", "ratio:50%")
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    (copy / "chat_template.jinja").unlink()
    done = command(*arguments)
    assert done.code == 0
    assert done.err.startswith("warning: the tokenizer has no chat template")
    assert len(done.err.splitlines()) == 1


# ---- help and listings -----------------------------------------------------------------------------------------


def test_methods_lists_every_registered_name() -> None:
    done = command("methods")
    assert done.code == 0
    for registry in (PROBES, ENGINES, THRESHOLDS, SELECTORS, AGGREGATES, ("likelihood", "regex:PATTERN")):
        for name in registry:
            assert re.search(rf"^{re.escape(name)}\s+\S", done.out, re.MULTILINE), name


def test_the_help_of_methods_names_every_kind_that_it_lists() -> None:
    from gradshield.cli.app import catalogue

    said = " ".join(command("methods", "--help").out.split())
    assert [kind for kind in catalogue() if kind not in said] == []


def test_the_version() -> None:
    done = command("--version")
    assert (done.code, done.out, done.err) == (0, f"gradshield {gradshield.__version__}\n", "")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    done = command(*filter(None, [name]), "--help")
    assert done.code == 0
    assert done.err == ""
    assert max(map(len, done.out.splitlines())) <= 100
    if name == "scan":  # what most need comes first, and the rest by subject
        first, *others = re.split(r"╭─ (?:Options|[A-Z][a-z ]+) ─+╮", done.out)[2:]
        assert re.findall(r" (--[a-z-]+) ", first) == [
            "--model",
            "--output",
            "--columns",
            "--threshold",
            "--fail-above",
            "--help",
        ]
        assert len(others) == 6
    for other in COMMANDS if not name else ():
        assert re.search(rf"\b{other}\b", done.out)
    if name == "scan":
        for option in ("--output", "--fail-above", "--uncertified", "--lora-config", "--training-config", "--strict"):
            assert option in done.out


def test_the_defaults_are_those_of_the_function() -> None:
    import inspect

    from gradshield.cli.scan import scan

    given = {name: p.default for name, p in inspect.signature(scan).parameters.items()}
    settings = gradshield.ScanSettings()
    assert settings.selector == "screen"
    for name in ("selector", "probe", "aggregate", "subspace", "engine", "threshold", "seed", "token_budget"):
        assert given[name] == getattr(settings, name)


def test_importing_stays_cheap() -> None:
    heavy = "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    for arguments in (["--help"], ["scan", "--help"]):
        code = f"import sys, gradshield.cli\ntry: gradshield.cli.main({arguments})\nexcept SystemExit: {heavy}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "Usage" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "no.jsonl", "--model", "lab/model", "--output", "out"],
        ["scan", "no/file.jsonl", "--model", "lab/model", "--output", "out"],
        ["scan", "no/file.txt", "--model", "lab/model", "--output", "out"],
        ["scan", __file__, "--model", "./no-model", "--output", "out"],
        ["train", "no.jsonl", "--model", "lab/model", "--output", "out"],
        ["train", __file__, "--model", "/no/model", "--output", "out"],
        ["train", __file__, "--model", "lab/model", "--base", "~/no-base", "--output", "out"],
        ["evaluate", "some/where/else"],
        ["show", "no.jsonl"],
        ["compare", "no.yaml", "--output", "out"],
        ["cut", "no-folder"],
    ],
)
def test_missing_inputs_are_reported_before_the_libraries_are_loaded(arguments: list[str], tmp_path: Path) -> None:
    heavy = "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    code = f"import sys, gradshield.cli\ntry: gradshield.cli.main({arguments})\nexcept SystemExit as e: print(e.code); {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] in (["3", "[]"], ["4", "[]"])
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_installed_command() -> None:
    script = Path(sys.executable).with_name("gradshield")
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "cut", "out", "--fail-above", "some"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --fail-above got 'some'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("gate", "removed", "closes"), [("0.7%", 7, False), ("0.7%", 8, True), ("0.29", 290, False)])
def test_the_gate_counts_rows_without_rounding(gate: str, removed: int, closes: bool) -> None:
    from types import SimpleNamespace

    from gradshield.cli.options import share
    from gradshield.cli.scan import closed_gate

    results: Any = SimpleNamespace(removed=removed, scored=1000)
    assert (closed_gate(results, share("--fail-above", gate)) is not None) == closes


def test_a_device_map_works_with_every_form_of_a_probed_selector() -> None:
    from gradshield.cli.scan import _check_map

    for selector in ("screen", "screen:all", "fihs"):
        _check_map("auto", selector, alone=True)


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--selector", "gradnorm"], "gradnorm"), (["--workers", "2"], "--workers"), (["--ray", "auto"], "--ray")],
    ids=["selector", "workers", "ray"],
)
def test_a_device_map_works_with_fihs_in_one_process_only(more: list[str], named: str, tmp_path: Path) -> None:
    arguments = scan_arguments(
        "d.jsonl", tmp_path / "m", tmp_path / "out", tmp_path / "p", "--device-map", "auto", *more
    )
    done = command(*arguments)
    assert done.code == 2
    assert named in done.sentence


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize"])
def test_an_argument_of_rendering_is_no_variable_of_a_template(name: str, tmp_path: Path) -> None:
    arguments = scan_arguments("d.jsonl", tmp_path / "m", tmp_path / "out", tmp_path / "p")
    done = command(*arguments, "--template-kwargs", json.dumps({name: False}))
    assert done.code == 2
    assert name in done.sentence
