"""A row as the model sees it, and nothing in it that a terminal would act on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradshield.errors import DataError, UsageError
from gradshield.scanning.show import show
from tests.common import chats, command, jsonl, write

EVIL = (
    "<script>alert(1)</script> [bold]x[/bold] [/] :smile: \x1b[31mred\x1b]0;title\x07 \u202eevil\u2066 \x9b2J \r back\\"
)
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _data(tmp_path: Path, *rows: Any) -> Path:
    return write(tmp_path / "data.jsonl", jsonl(rows))


def test_the_pieces_are_the_row_and_only_answers_count(folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, *chats(3))
    view = show(str(data), 1, model=str(folder))
    assert "".join(text for text, _ in view.pieces).endswith("Question 1?<|assistant|>The answer is 7, and so on.</s>")
    counted = "".join(text for text, counts in view.pieces if counts)
    assert counted == "The answer is 7, and so on.</s>"
    assert view.shape == "messages"
    assert 0 < view.counted < view.tokens


def test_answers_are_printed_bold_and_green(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(soft_wrap=True, highlight=False, emoji=False, force_terminal=True)
    monkeypatch.setattr("gradshield.cli.scan.out", console)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    done = command("show", _data(tmp_path, *chats(3)), "--row", 2, "--model", folder)
    assert done.code == 0, done.err
    coloured = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", done.out.split("row 2", 1)[0], re.DOTALL))
    assert coloured == "The answer is 14, and so on.</s>"
    plain = re.sub(r"\x1b\[[\d;]*m", "", done.out)
    assert "Question 2?<|assistant|>The answer is 14" in plain
    assert re.search(r"row 2 · messages · \d+ tokens, \d+ in the loss", plain)


def test_both_answers_of_a_pair_are_shown(folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, {"prompt": "Say it", "chosen": " well", "rejected": " badly"})
    done = command("show", data, "--model", folder)
    assert "Say it⟦ well</s>⟧" in done.out
    assert "── rejected ──" in done.out
    assert "Say it⟦ badly</s>⟧" in done.out


def test_without_colour_the_answers_stand_between_marks_that_a_row_cannot_draw(folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, {"prompt": "Say ⟦it⟧", "completion": " well⟧"})
    done = command("show", data, "--model", folder)
    assert done.out.startswith("Say \\u27e6it\\u27e7⟦ well\\u27e7</s>⟧\n")
    assert done.out.endswith(f"in the loss (between ⟦ and ⟧) · tokenizer of {folder}\n")
    assert command("show", data).out.endswith(" · tokenizer of the bundled lab\n")


def test_what_the_template_leaves_out_is_said(folder: Path, tmp_path: Path) -> None:
    """The tiny template does not read thoughts."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "thinking": "the plan"}]
    done = command("show", _data(tmp_path, {"messages": turns}), "--model", folder)
    assert done.code == 0
    assert "neither scored nor trained on: reasoning of assistant turns in 1 rows" in done.err


def test_an_answer_to_avoid_is_marked(folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, {"q": "Say it", "a": " badly", "good": False})
    done = command("show", data, "--model", folder, "--columns", "prompt=q,completion=a,label=good")
    assert done.code == 0, done.err
    assert done.out.startswith("── rejected ──\nSay it⟦ badly") and "· kto ·" in done.out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": EVIL, "completion": EVIL},
        {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]},
    ],
    ids=["text", "chat"],
)
def test_hostile_text_is_only_text(row: Any, folder: Path, tmp_path: Path) -> None:
    done = command("show", _data(tmp_path, row), "--model", folder)
    assert done.code == 0
    assert not HIDDEN.search(done.out), repr(done.out)
    for words in (
        "<script>alert(1)</script>",
        "[bold]x[/bold] [/] :smile: ",
        "⟨U+001B⟩[31mred",
        "⟨U+202E⟩evil",
        "back\\",
    ):
        assert done.out.count(words) == 2, words
    assert "back\\\\" not in done.out


@pytest.mark.parametrize(
    "row",
    [
        {EVIL: 1, "\n": 2},
        {"messages": [{"role": EVIL, "content": "a"}]},
        {"conversations": [{"from": EVIL, "value": "a"}]},
    ],
    ids=["keys", "role", "from"],
)
def test_hostile_text_in_an_error_is_only_text(row: Any, folder: Path, tmp_path: Path) -> None:
    done = command("show", _data(tmp_path, row), "--model", folder)
    assert done.code == 3
    assert done.sentence
    assert not HIDDEN.search(done.err), repr(done.err)


def test_hostile_names_of_files_and_options(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "[red]a\x1b[31m\u202e.jsonl"
    for arguments in (
        ("show", path, "--model", folder),
        ("show", write(tmp_path / "[bold]\x1b.jsonl", "{\n"), "--model", folder),
        ("show", _data(tmp_path, *chats(1)), "--format", "\x1b[31m[bold]"),
        ("cut", path, "-t", "ratio:50%"),
        ("cut", path, "-t", "\x1b[31m[bold]x"),
        ("cut", path, "--fail-above", "\x1b[31m[bold]x"),
    ):
        done = command(*arguments)
        assert done.code in (2, 3)
        assert done.sentence
        assert not HIDDEN.search(done.err), repr(done.err)


def test_hostile_warnings_and_categories(folder: Path, tmp_path: Path) -> None:
    asked = write(tmp_path / "p.jsonl", jsonl([{"prompt": f"a {n}", "category": f"{n % 2}{EVIL}"} for n in range(4)]))
    arguments = ["scan", _data(tmp_path, *chats(6)), "--model", folder, "--output", tmp_path / "out", "--uncertified"]
    done = command(*arguments, "--probes", asked, "--lookalikes", asked, "-t", "ratio:50%")
    assert done.code == 0, done.err
    assert "[bold]x[/bold]" in done.out
    assert not HIDDEN.search(done.out), repr(done.out)


def test_rows_that_are_not_there_or_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(chats(2)) + b"{broken\n")
    with pytest.raises(UsageError, match="give a position from 0 to 2"):
        show(str(data), 3, model=str(folder))
    with pytest.raises(DataError, match=r"row 2 \(line 3\).*not valid JSON"):
        show(str(data), 2, model=str(folder))
    with pytest.raises(DataError, match="no response token is left"):
        show(str(data), 0, model=str(folder), training_args={"max_length": 4, "assistant_only_loss": None})
    assert command("show", data, "--row", 9, "--model", folder).code == 2
    assert command("show", data, "--row", -1, "--model", folder).code == 2
    assert command("show", tmp_path / "none.jsonl").code == 3


def test_the_training_config_counts(folder: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "sft.json", json.dumps({"completion_only_loss": False, "max_length": 5}))
    data = _data(tmp_path, {"prompt": "Add two", "completion": " five and six"})
    done = command("show", data, "--model", folder, "--training-config", config)
    assert "5 tokens, 4 in the loss" in done.out
    plain = command("show", data, "--model", folder)
    assert "5 tokens" not in plain.out
    write(config, json.dumps({"completion_only_los": False}))
    done = command("show", data, "--model", folder, "--training-config", config)
    assert (done.code, done.out) == (2, "")
    assert "did you mean 'completion_only_loss'?" in done.sentence


def test_without_trl_a_name_close_to_an_option_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import fields

    from trl.trainer.sft_config import SFTConfig

    from gradshield.scanning import settings

    def missing(_: object) -> None:
        raise ImportError

    monkeypatch.setattr(settings, "check_names", missing)
    for name, meant in {"max_seq_length": "max_length", "assistant_only": "assistant_only_loss"}.items():
        with pytest.raises(UsageError, match=f"unknown training option '{name}': did you mean '{meant}'"):
            settings.trl_options({name: None})
    for field in fields(SFTConfig):  # no TRL option is mistaken for another
        settings._check_names({field.name: None})
