"""Cutting again equals scanning with that rule, in every kind of file, and refuses a folder that was tampered with."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradshield as gs
from gradshield import data as rows_in
from gradshield import runs
from gradshield.data import spool
from gradshield.errors import DataError, UsageError
from gradshield.manifests import FoundCut, Labelled
from gradshield.scanning import outputs
from gradshield.scanning.cut import stored_cuts
from gradshield.types import Cut
from tests.common import chats, command, files, jsonl, scan, scan_arguments, table, write
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [*chats(9), chats(1)[0]]
PARTS = ("command", "versions", "data", "model", "settings")
RULES = ("ratio:50%", "ratio:20%", "decoy", "fixed:1e9", "fixed:-1e9")


def _settings(rule: str) -> gs.ScanSettings:
    return gs.ScanSettings(threshold=rule, selector="fihs")


def _input(kind: str, folder: Path) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return write(
            path, b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n") + b'{"text": "a\xe2\x80\xa8", "messages": 3'
        )
    if kind == "json":
        return write(path, b"[" + b", ".join(json.dumps(row, indent=1).encode() for row in ROWS) + b', {"text": 3}]')
    if kind == "csv":
        body = "".join(f'"say ""{n}""","line\none {n * 17}"\r\n' for n in range(9))
        return write(path, f"prompt,completion\r\n{body}bad\r\nlast,no newline")
    pq.write_table(pa.Table.from_pylist([*ROWS, {"messages": []}]), path)
    return path


def _same_rows(one: Path, two: Path) -> None:
    ours, theirs = files(one), files(two)
    assert set(ours) == set(theirs)
    for name in set(ours) - {"manifest.json", "report.html", "README.md", "scores.parquet"}:  # these name kinds of harm
        if name.endswith(".parquet"):
            assert pq.read_table(one / name).equals(pq.read_table(two / name))
        else:
            assert ours[name] == theirs[name], name
    columns = ["row", "id", "score", "removed", "group", "decoy", "tokens", "loss"]
    assert table(one).select(columns).equals(table(two).select(columns))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_cutting_again_equals_a_scan_with_that_rule(kind: str, tmp_path: Path) -> None:
    """From a rule that removes some to one that removes none, or all: each from the folder as the one before left it."""
    data = _input(kind, tmp_path)
    again, fresh = tmp_path / "again", tmp_path / "fresh"
    first = scan(data, output=again, settings=_settings("ratio:20%"))
    assert len(first.quarantined) == 1
    for rule in RULES:
        cut = gs.cut(again, rule)
        direct = scan(data, output=fresh, settings=_settings(rule))
        _same_rows(again, fresh)
        assert np.array_equal(cut.removed, direct.removed)
        assert {name: one.value for name, one in cut.cuts.items()} == {n: one.value for n, one in direct.cuts.items()}
        old, new = (json.loads((folder / "manifest.json").read_text()) for folder in (again, fresh))
        counts = ("read", "scored", "kept", "removed", "quarantined", "cleared", "cuts", "agreement", "certified")
        assert {key: old["results"][key] for key in counts} == {key: new["results"][key] for key in counts}
        assert old["settings"] == new["settings"]


def test_parquet_of_which_nothing_goes(tmp_path: Path) -> None:
    scan(_input("parquet", tmp_path), output=tmp_path / "out", settings=_settings("fixed:1e9"))
    kept, removed = (pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("kept", "removed"))
    assert (kept.num_rows, removed.num_rows) == (10, 0)
    assert kept.schema.equals(removed.schema)


def test_two_parquet_files_are_put_together_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = np.random.default_rng(0).random(5000) < 0.3
    removed[1000:4000] = False
    kinds = pa.array([f"kind {n % 7}" for n in range(5000)]).dictionary_encode()
    whole = pa.table({"text": [f"row {n}" for n in range(5000)], "kind": kinds})
    paths = (tmp_path / "kept.parquet", tmp_path / "removed.parquet")
    for path, own in zip(paths, (~removed, removed), strict=True):
        pq.write_table(whole.filter(pa.array(own)), path, row_group_size=700)
    given, unpacked = [0], spool.Tables._unpacked

    def counted(*arguments: Any) -> Any:
        found = unpacked(*arguments)
        given[0] += len(found)
        return found

    monkeypatch.setattr(spool.Tables, "_unpacked", counted)
    monkeypatch.setattr("gradshield.data.source.GROUP", 500)
    found = rows_in.read_files(paths, rows_in.Format()).examples.moved(np.argsort(removed, kind="stable"))
    assert [e.conversations[0].completion for e in found] == whole["text"].to_pylist()
    wanted = np.arange(7, 5000, 3)
    rows_in.write_parts({tmp_path / "out.parquet": wanted}, found.source)
    assert pq.read_table(tmp_path / "out.parquet").equals(whole.take(wanted))
    assert given[0] <= 1024 * (6 + 5 * len(wanted) // 500)


def test_categories_are_kept_and_new_rows_have_none(tmp_path: Path) -> None:
    scan(ROWS, output=tmp_path, settings=_settings("ratio:20%"))
    before = table(tmp_path)["category"].to_pylist()
    cut = gs.cut(tmp_path, "ratio:50%")
    known = {c for c, out in zip(before, cut.removed, strict=True) if out and c}
    assert known
    for was, now, out in zip(before, cut.categories, cut.removed, strict=True):
        assert now == ((was or "not measured") if out else "")
    assert "not measured" in cut.manifest.results.categories
    gs.cut(tmp_path, "fixed:1e9")  # nothing is removed, and what the scan named is not forgotten
    again = gs.cut(tmp_path, "ratio:50%")
    assert list(again.categories) == list(cut.categories)
    fresh = scan(ROWS, output=tmp_path, settings=_settings("ratio:50%"))
    assert list(gs.cut(tmp_path, "ratio:50%").categories) == list(fresh.categories)


def test_an_allow_list_keeps_rows(tmp_path: Path) -> None:
    first = scan(ROWS, output=tmp_path / "out", settings=_settings("ratio:50%"))
    dropped = [i for i, out in zip(first.scores.ids, first.removed, strict=True) if out]
    allowed = write(
        tmp_path / "allow.txt", f"# cleared by me\n{dropped[0]}  # fine\n\n{dropped[2]}\nffff000011112222\n"
    )
    done = command("cut", tmp_path / "out", "-t", "ratio:50%", "--allow", allowed)
    assert done.code == 0, done.err
    assert "3 of 10 rows removed, 7 kept, 2 cleared" in done.out
    assert done.err == "warning: 1 of 3 ids on the allow and deny lists are of no row here\n"
    assert [i for i, out in zip(*_flags(tmp_path / "out"), strict=True) if out] == [dropped[1], *dropped[3:]]
    direct = scan(ROWS, output=tmp_path / "direct", settings=_settings("ratio:50%"), allow=[dropped[0], dropped[2]])
    _same_rows(tmp_path / "out", tmp_path / "direct")
    assert direct.cleared == tuple(sorted(direct.scores.ids.index(dropped[n]) for n in (0, 2)))
    gs.cut(tmp_path / "out", "ratio:50%")  # an allow list has to be given again
    assert [i for i, out in zip(*_flags(tmp_path / "out"), strict=True) if out] == dropped


@pytest.mark.parametrize("option", ["--allow", "--deny"])
def test_a_list_of_ids_is_read_or_refused(option: str, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    ids, out = _flags(output)
    own = ids[out.index(option == "--allow")]
    given = write(tmp_path / "list.txt", f"{own.upper()} # upper case\n")
    done = command("cut", output, "-t", "ratio:50%", option, given)
    assert (done.code, done.err) == (0, "")
    assert f"1 {'cleared' if option == '--allow' else 'denied'}" in done.out
    before = files(output)
    for line in (
        f"{own} ordinary",
        own[:-1],
        own + "-1",
        own + "-99999999999",
        "g" * 16,
        f"{own},{own}",
        "\x1b[2J" * 99,
    ):
        write(given, f"\n{own}\n{line}\n")
        done = command("cut", output, option, given)
        assert done.code == 3
        assert f"line 3 of the {option} file 'list.txt' is no row id" in done.sentence and len(done.sentence) < 400
    assert files(output) == before


def _flags(output: Path) -> tuple[list[str], list[bool]]:
    return table(output)["id"].to_pylist(), table(output)["removed"].to_pylist()


def test_an_id_numbered_for_a_repeat_is_one_row(tmp_path: Path) -> None:
    rows = [chats(1)[0]] * 3
    plain = scan(rows, output=tmp_path, settings=_settings("fixed:-1e9"))
    cut = gs.cut(tmp_path, "fixed:-1e9", allow=[plain.scores.ids[1]])
    assert cut.removed.tolist() == [True, False, True]
    assert cut.cleared == (1,)


def test_a_cut_applies_the_lists_in_its_folder_unless_it_is_given_others(tmp_path: Path) -> None:
    scan(ROWS, output=tmp_path, settings=_settings("ratio:50%"))
    first = gs.cut(tmp_path, "ratio:50%")
    kept, gone = (first.scores.ids[int(np.flatnonzero(own)[0])] for own in (first.removed, ~first.removed))
    confirmed = first.scores.ids[int(np.flatnonzero(first.removed)[1])]
    write(tmp_path / "allow.txt", f"{kept}  # 2026-01-01 read\n")
    write(tmp_path / "deny.txt", f"{gone}\n{confirmed}\n")
    found = gs.cut(tmp_path, "ratio:50%")
    assert [len(rows) for rows in (found.cleared, found.denied, found.confirmed)] == [1, 1, 1]
    assert found.manifest.results.confirmed == 1
    write(tmp_path / "deny.txt", f"{gone}\n{confirmed}\n{'0' * 16}\n")
    done = command("cut", tmp_path, "-t", "ratio:50%")
    assert done.code == 0 and "lists   allow.txt (1), deny.txt (3)" in done.out and "1 of 4 ids" in done.err
    assert (table(tmp_path)["removed"].to_numpy() == found.removed).all()
    other = gs.cut(tmp_path, "ratio:50%", allow=(), deny=())
    assert (other.removed == first.removed).all() and not other.confirmed
    write(tmp_path / "deny.txt", "no id\n")
    assert command("cut", tmp_path, "-t", "ratio:50%", "--deny", write(tmp_path / "other.txt", f"{gone}\n")).code == 0
    assert "line 1 of the list 'deny.txt' is no row id" in command("cut", tmp_path, "-t", "ratio:50%").sentence


def test_labels_are_measured_again(tmp_path: Path) -> None:
    labels = [1, 0] * 5
    scan(ROWS, output=tmp_path / "a", settings=_settings("ratio:20%"), labels=labels)
    cut = gs.cut(tmp_path / "a", "ratio:50%")
    direct = scan(ROWS, output=tmp_path / "b", settings=_settings("ratio:50%"), labels=labels)
    assert cut.manifest.results.labels == direct.manifest.results.labels


@pytest.mark.parametrize("stored", [None, "[1, 0]", "[2" + ", 0" * 9 + "]", '["1"' + ", 0" * 9 + "]", "[" * 100_000])
def test_without_its_labels_a_cut_has_no_figures_of_them_and_says_so(stored: str | None, tmp_path: Path) -> None:
    scan(ROWS, output=tmp_path, settings=_settings("ratio:20%"), labels=[1, 0] * 5)
    known = tmp_path / ".gradshield" / "labels.json"
    known.unlink() if stored is None else write(known, stored)
    for rule in ("ratio:50%", "ratio:40%"):  # of a cut that lost them, too
        found = gs.cut(tmp_path, rule).manifest.results
        assert found.labels == Labelled() and "missing or damaged" in found.doubts["labels"]
    assert "labels" not in json.loads((tmp_path / "manifest.json").read_text())["results"]


def test_the_gate_closes_after_everything_is_written(folder: Path, probes: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "data.jsonl", jsonl(ROWS)), tmp_path / "out"
    done = command(*scan_arguments(data, folder, output, probes, "-t", "ratio:50%", "--fail-above", "49%"))
    assert done.code == 5
    assert done.sentence.startswith("5 of 10 rows (50.0 %) were removed, and --fail-above allows 49 %")
    assert (output / "manifest.json").exists()
    assert "5 of 10 rows removed" in done.out
    for share, code in (("0.5", 0), ("50%", 0), ("0", 5), ("100%", 0), ("1", 2)):
        assert command("cut", output, "-t", "ratio:50%", "--fail-above", share).code == code
    assert command("cut", output, "-t", "fixed:1e9", "--fail-above", "0").code == 0
    assert table(output)["removed"].to_pylist() == [False] * 10


@pytest.mark.parametrize("rule", ["competition", "decoy"])
def test_a_rule_that_needs_more_rows_than_stand_out_keeps_the_result(rule: str, tmp_path: Path) -> None:
    """q = 0.1 bounds the harmless share of ten rows or more: of six it would keep all, and call that clean."""
    scan(chats(40), output=tmp_path, settings=_settings("ratio:15%"))
    scores = table(tmp_path)
    values = np.linspace(0.0, 0.5, 40)
    values[scores["removed"].to_numpy(zero_copy_only=False)] = np.arange(6) + 9.0
    decoys = np.where(values > 8, 0.1, np.linspace(0.6, 0.0, 40))
    for name, column in (("score", values), ("decoy", decoys)):
        scores = scores.set_column(scores.column_names.index(name), name, pa.array(column, scores[name].type))
    pq.write_table(scores, tmp_path / "scores.parquet")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=rf"removes 10 rows or none, and only 6 score .* the 6 rows .*{rule}:q=0.17"):
        gs.cut(tmp_path, f"{rule}:q=0.1")
    assert files(tmp_path) == before
    assert len(gs.cut(tmp_path, f"{rule}:q=0.17").removed_rows) == 6


def test_scores_without_decoys_say_which_rules_there_are(tmp_path: Path) -> None:
    settings = gs.ScanSettings(aggregate="sum", engine="loop", threshold="ratio:50%", selector="fihs")
    scan(ROWS, output=tmp_path, settings=settings)
    assert "decoy" not in table(tmp_path).column_names
    before = files(tmp_path)
    for rule in ("decoy", "competition"):
        with pytest.raises(UsageError, match="these scores have none"):
            gs.cut(tmp_path, rule)
    assert files(tmp_path) == before
    gs.cut(tmp_path, "adaptive")
    with pytest.raises(UsageError, match="these scores have none"):  # before the rows are measured
        scan(
            ROWS,
            output=tmp_path / "new",
            settings=gs.ScanSettings(aggregate="sum", engine="loop", threshold="decoy", selector="fihs"),
        )
    assert not (tmp_path / "new").exists()


def _edited(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"Question", b"Quastion", 1))


def _shortened(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def _swapped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kept.jsonl", _edited),
        ("kept.jsonl", _shortened),
        ("kept.jsonl", _swapped),
        ("kept.jsonl", _nothing),
        ("kept.jsonl", Path.unlink),
        ("removed.jsonl", _edited),
        ("removed.jsonl", Path.unlink),
        ("scores.parquet", _nothing),
        ("scores.parquet", Path.unlink),
        ("quarantine.jsonl", lambda path: path.write_text("{broken\n")),
        ("manifest.json", Path.unlink),
        ("manifest.json", _nothing),
        ("manifest.json", lambda path: path.write_text("[]")),
        ("manifest.json", lambda path: path.write_text(json.dumps({key: {} for key in PARTS}))),
    ],
)  # fmt: skip
def test_a_folder_that_was_changed_is_refused(name: str, change: Any, finished: Path, tmp_path: Path) -> None:
    for path in finished.iterdir():
        if path.is_file():
            write(tmp_path / path.name, path.read_bytes())
    change(tmp_path / name)
    before = files(tmp_path)
    done = command("cut", tmp_path, "-t", "ratio:20%")
    assert done.code == 3
    assert done.sentence
    assert files(tmp_path) == before


def _with(name: str, values: Any) -> Any:
    """Scores whose column has these values: a function of the old ones."""

    def change(scores: pa.Table) -> pa.Table:
        return scores.set_column(scores.column_names.index(name), name, pa.array(values(scores[name].to_pylist())))

    return change


FOREIGN: dict[str, Any] = {
    "score null": _with("score", lambda old: [None, *old[1:]]),
    "score NaN": _with("score", lambda old: [float("nan"), *old[1:]]),
    "score infinite": _with("score", lambda old: [float("inf"), *old[1:]]),
    "score text": _with("score", lambda old: list(map(str, old))),
    "decoy NaN": _with("decoy", lambda old: [float("nan"), *old[1:]]),
    "id null": _with("id", lambda old: [None, *old[1:]]),
    "id long": _with("id", lambda old: [old[0] + "-99999999999", *old[1:]]),
    "id number": _with("id", lambda old: list(range(len(old)))),
    "row negative": _with("row", lambda old: [-1, *old[1:]]),
    "row zero": _with("row", lambda old: [0] * len(old)),
    "row backwards": _with("row", lambda old: old[::-1]),
    "row beyond": _with("row", lambda old: [*old[:-1], 2**40]),
    "row real": _with("row", lambda old: list(map(float, old))),
    "row null": _with("row", lambda old: [None, *old[1:]]),
    "tokens text": _with("tokens", lambda old: list(map(str, old))),
    "tokens null": _with("tokens", lambda old: [None, *old[1:]]),
    "loss text": _with("loss", lambda old: list(map(str, old))),
    "removed number": _with("removed", lambda old: list(map(int, old))),
    "removed null": _with("removed", lambda old: [None, *old[1:]]),
    "category null": _with("category", lambda old: [None, *old[1:]]),
    "group number": _with("group", lambda old: [1] * len(old)),
    "group without a cut": _with("group", lambda old: ["else", *old[1:]]),
    "file null": _with("file", lambda old: [None, *old[1:]]),
    "line text": _with("line", lambda old: list(map(str, old))),
    "no line": lambda scores: scores.drop_columns(["line"]),
    "a column twice": lambda scores: scores.append_column("row", scores["row"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_scores_that_no_scan_wrote_are_refused(name: str, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    pq.write_table(FOREIGN[name](table(output)), output / "scores.parquet")
    _refused(output)


def _screened(output: Path, finished: Path, columns: tuple[str, ...], **found: Any) -> Path:
    """A scan as if by ``screen``: with these columns of its signals, and this in the manifest."""
    shutil.copytree(finished, output)
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["settings"]["selector_found"] |= {"opener_fihs": 0.5} | found
    write(output / "manifest.json", json.dumps(manifest))
    scores = table(output)
    for name in columns:
        scores = scores.append_column(name, pa.array([0.0] * 10))
    pq.write_table(scores, output / "scores.parquet")
    return output


@pytest.mark.parametrize("missing", outputs.SIGNALS)
def test_scores_without_the_signals_of_the_selector_are_refused(missing: str, finished: Path, tmp_path: Path) -> None:
    _refused(_screened(tmp_path / "out", finished, tuple(name for name in outputs.SIGNALS if name != missing)))


@pytest.mark.parametrize("opener", ["x", [], {}])
def test_a_scan_whose_settings_of_screen_were_changed_is_refused(opener: Any, finished: Path, tmp_path: Path) -> None:
    _refused(_screened(tmp_path / "out", finished, tuple(outputs.SIGNALS), opener_fihs=opener))


def test_a_scan_by_screen_can_be_cut(finished: Path, tmp_path: Path) -> None:
    gs.cut(_screened(tmp_path / "out", finished, tuple(outputs.SIGNALS)), "ratio:20%")


@pytest.mark.parametrize("cut", [{}, {"rule": "ratio"}, {"value": 1.0}, {"rule": "ratio", "value": "x"}])
def test_a_scan_whose_cut_was_changed_is_refused(cut: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    found = json.loads((output / "manifest.json").read_text())
    found["results"]["cuts"]["rows"] = cut
    write(output / "manifest.json", json.dumps(found))
    _refused(output, "manifest.json was changed (results.cuts.rows.")


def _refused(output: Path, words: str = "cannot be read (scores.parquet): run `gradshield scan` into it again") -> None:
    before = files(output)
    done = command("cut", output, "-t", "ratio:20%")
    assert done.code == 3
    assert words in done.sentence
    assert command("review", output, "--no-browser").sentence == done.sentence
    assert files(output) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    scan(ROWS, output=output)
    return output


def test_a_folder_that_is_no_scan_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file", "x")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        done = command("cut", folder, "-t", "ratio:20%")
        assert done.code == 3
        assert "run `gradshield scan` into it first" in done.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_what_the_report_needs_may_be_missing(finished: Path, tmp_path: Path) -> None:
    for path in finished.iterdir():
        if path.is_file():
            write(tmp_path / path.name, path.read_bytes())
    assert command("cut", tmp_path, "-t", "ratio:20%").code == 0
    for junk in ("{broken", "[]", '{"0": 3}'):
        write(tmp_path / ".gradshield" / "views.json", junk)
        write(tmp_path / ".gradshield" / "labels.json", junk)
        write(tmp_path / ".gradshield" / "kinds.json", junk)
        assert command("cut", tmp_path, "-t", "ratio:20%").code == 0


def test_an_unfinished_scan_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradshield.scanning.scoring import Kinds

    monkeypatch.setattr(Kinds, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scan(ROWS, output=tmp_path, model=tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == [".gradshield"]
    with pytest.raises(DataError, match="not the folder of a finished scan"):
        gs.cut(tmp_path, "ratio:20%")


@pytest.mark.parametrize("full", ["gradshield.scanning.outputs.write_scores", "gradshield.runs.write_json"])
def test_a_full_disk_leaves_the_finished_scan(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another cut nor another scan takes anything away before all that comes in its place is written."""

    write_json = runs.write_json

    def fails(*given: Any) -> None:
        if full.endswith("write_json") and given[0].name != "manifest.json":  # the last one
            return write_json(*given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = _input("jsonl", tmp_path)
    scan(data, output=tmp_path / "out", settings=_settings("ratio:20%"))
    views, before = tmp_path / "out" / ".gradshield" / "views.json", files(tmp_path / "out")
    coloured = views.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(full, fails)
        for what in (
            lambda: gs.cut(tmp_path / "out", "ratio:50%"),
            lambda: scan(ROWS[:5], output=tmp_path / "out", settings=_settings("ratio:20%")),
        ):
            with pytest.raises(DataError, match="free some space"):
                what()
            assert files(tmp_path / "out") == before and views.read_bytes() == coloured
    gs.cut(tmp_path / "out", "ratio:50%")
    assert files(tmp_path / "out") != before and not list(tmp_path.rglob("*.part"))


def test_a_scan_that_is_killed_while_the_old_one_stands_has_touched_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cut would show the words of the new scan next to the scores of the old one."""
    scan(ROWS, output=tmp_path)
    views, before, unlink = tmp_path / ".gradshield" / "views.json", files(tmp_path), Path.unlink
    coloured = views.read_bytes()

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path == tmp_path / "manifest.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        scan(ROWS[:6], output=tmp_path)
    assert files(tmp_path) == before and views.read_bytes() == coloured


@pytest.mark.parametrize(
    ("removed", "denied", "value"), [(0, 0, math.inf), (3, 0, -math.inf), (2, 2, math.inf), (3, 2, -math.inf)]
)
def test_a_cut_at_infinity_is_read_back_by_what_it_removed(removed: int, denied: int, value: float) -> None:
    """A manifest has null for either; what a person removed says nothing of it."""
    stored = {"rows": FoundCut(rule="fixed", value=None, found=1)}
    found = stored_cuts(SimpleNamespace(cuts=stored, removed=removed, denied=denied))
    assert found == {"rows": Cut(value, "fixed", {"found": 1})}
