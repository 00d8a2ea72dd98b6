"""A scan from end to end: every row is accounted for, in every kind of file, and what is written is as documented."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradshield as gs
from gradshield.errors import DataError, UsageError
from gradshield.probes import lookalikes
from tests.common import HALF, PROBING, chat, chats, command, files, jsonl, scan, scan_arguments, table, write
from tests.tiny import tiny_model, tiny_tokenizer

FILES = {"quarantine.jsonl", "scores.parquet", "report.html", "README.md", "manifest.json"}
COLUMNS = {
    "row": pa.int64(),
    "file": pa.string(),
    "line": pa.int64(),
    "id": pa.string(),
    "score": pa.float64(),
    "removed": pa.bool_(),
    "category": pa.string(),
    "group": pa.string(),
    "decoy": pa.float64(),
    "tokens": pa.int64(),
    "loss": pa.float64(),
}
ODD = {
    "messages": [{"role": "user", "content": "é\u2028\u0085🙂"}, {"role": "assistant", "content": "Sûre 🙂"}],
    "n": 1.0,
}


def _plain(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_plain)


def _quarantined(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "quarantine.jsonl").read_bytes().split(b"\n") if line]


def _together(output: Path, kept: list[Any], removed: list[Any]) -> list[Any]:
    """The rows of the three files in the order of the input, by the positions that the scores and the quarantine name."""
    scores = table(output)
    flags, rows = scores["removed"].to_pylist(), scores["row"].to_pylist()
    sources = {True: iter(removed), False: iter(kept)}
    found = {row: next(sources[flag]) for row, flag in zip(rows, flags, strict=True)}
    assert not list(sources[True])
    assert not list(sources[False])
    bad = {entry["row"]: entry["raw"].encode() for entry in _quarantined(output)}
    assert not set(found) & set(bad)
    return [({**found, **bad})[row] for row in range(len(found) + len(bad))]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_jsonl_rows_leave_byte_for_byte(bom: bytes, end: bytes, tmp_path: Path) -> None:
    good = [json.dumps(row, ensure_ascii=False).encode() for row in [*chats(4), ODD, chat(0)]]
    spaced = b'{ "messages" :' + json.dumps(chat(9)["messages"]).encode() + b" }  "
    lines = [*good[:3], b"{broken", spaced, b'{"messages": []}', b'"a string"', *good[3:], b'{"text": 3}', *good[:1]]
    data = write(tmp_path / "data.jsonl", bom + end.join(lines))  # no newline at the end
    output = tmp_path / "out"
    selection = scan(data, output=output)

    assert set(files(output)) == FILES | {"kept.jsonl", "removed.jsonl"}
    parts = [(output / name).read_bytes() for name in ("kept.jsonl", "removed.jsonl")]
    assert all(part.startswith(bom) for part in parts)
    kept, removed = (part.removeprefix(bom).splitlines(keepends=True) for part in parts)
    assert all(line.endswith(end) for line in (kept + removed) if not line.startswith(lines[-1]))
    kept, removed = ([line.removesuffix(end) for line in part] for part in (kept, removed))
    assert [row.removesuffix(end).removesuffix(b"\r") for row in _together(output, kept, removed)] == lines
    assert [entry["row"] for entry in _quarantined(output)] == [3, 5, 6, 10] == [q.row for q in selection.quarantined]
    assert [entry["line"] for entry in _quarantined(output)] == [4, 6, 7, 11]
    assert selection.manifest.data.rows == len(lines) == selection.manifest.results.read


def test_csv_records_leave_byte_for_byte(tmp_path: Path) -> None:
    records = [f'"say ""{n}"", now","line\none {n}"\r\n'.encode() for n in range(5)]
    records[2:2] = [b"one cell\r\n", b'empty answer,""\r\n']
    records.append(b"last,without newline")
    data = write(tmp_path / "data.csv", b"instruction,output\r\n" + b"".join(records))
    output = tmp_path / "out"
    scan(data, output=output)

    assert set(files(output)) == FILES | {"kept.csv", "removed.csv"}
    known = sorted(records, key=len, reverse=True)
    found: list[list[bytes]] = []
    for name in ("kept.csv", "removed.csv"):
        rest = (output / name).read_bytes()
        assert rest.startswith(b"instruction,output\r\n")
        rest, rows = rest.removeprefix(b"instruction,output\r\n"), []
        while rest:
            row = next(record for record in known if rest.startswith(record))
            rows.append(row)
            rest = rest[len(row) :].removeprefix(b"\n")
        found.append(rows)
    assert _together(output, *found) == records


def test_json_arrays_keep_the_text_of_each_row(tmp_path: Path) -> None:
    rows = [json.dumps(row, indent=2).encode() for row in chats(5)] + [
        b'{"text":3}',
        b'{"text" : "Mix the flour.\\u00e9"}',
    ]
    data = write(tmp_path / "data.json", b"[\n  " + b" ,\n".join(rows) + b"\n]")
    output = tmp_path / "out"
    scan(data, output=output)

    decoder = json.JSONDecoder()
    found = []
    for name in ("kept.json", "removed.json"):
        text = (output / name).read_text(encoding="utf-8")
        assert isinstance(json.loads(text), list)
        at, part = text.index("[") + 1, []
        while (at := at + len(text[at:]) - len(text[at:].lstrip(", \n"))) < len(text) and text[at] != "]":
            _, end = decoder.raw_decode(text, at)
            part.append(text[at:end].encode())
            at = end
        found.append(part)
    assert _together(output, *found) == rows


def test_parquet_keeps_rows_and_types(tmp_path: Path) -> None:
    rows = [{**row, "score": n / 3, "when": n} for n, row in enumerate(chats(6))]
    rows[2]["messages"] = []
    whole = pa.Table.from_pylist(rows).set_column(2, "when", pa.array(range(6), pa.int8()))
    pq.write_table(whole, tmp_path / "data.parquet")
    output = tmp_path / "out"
    scan(tmp_path / "data.parquet", output=output)

    kept, removed = (pq.read_table(output / f"{name}.parquet") for name in ("kept", "removed"))
    assert kept.schema.equals(removed.schema)
    assert kept.schema.equals(whole.schema)
    bad = json.loads(_quarantined(output)[0]["raw"])
    together = _together(output, kept.to_pylist(), removed.to_pylist())
    assert [row if isinstance(row, dict) else json.loads(row) for row in together] == [*rows[:2], bad, *rows[3:]]


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_rows_in_memory_are_written_as_json_lines(kind: str, tmp_path: Path) -> None:
    rows = chats(6)
    data = rows if kind == "list" else datasets.Dataset.from_list(rows)
    selection = scan(data, output=tmp_path)
    kept, removed = ([json.loads(line) for line in open(tmp_path / f"{n}.jsonl", "rb")] for n in ("kept", "removed"))  # noqa: SIM115
    assert _together(tmp_path, kept, removed) == rows
    assert selection.manifest.data.kind == kind


def test_the_scores_are_as_documented(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl([chat(0), {"text": 3}, chat(1), chat(0), chat(2), chat(0)]))
    output = tmp_path / "out"
    selection = scan(data, output=output)
    scores = table(output)
    assert {name: scores.schema.field(name).type for name in scores.column_names} == COLUMNS
    assert scores["row"].to_pylist() == [0, 2, 3, 4, 5] == selection.scores.rows.tolist()
    assert scores["line"].to_pylist() == [1, 3, 4, 5, 6] and set(scores["file"].to_pylist()) == {str(data)}
    ids = scores["id"].to_pylist()
    assert all(re.fullmatch(r"[0-9a-f]{16}(-\d+)?", one) for one in ids)
    assert ids[2:5:2] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert len(set(ids)) == 5
    again = [chat(0)["messages"], chat(1)["messages"]]
    reordered = [{"messages": [dict(reversed(m.items())) for m in messages]} for messages in again]
    assert list(scan(reordered).scores.ids) == ids[:2]
    for name in ("score", "decoy", "loss"):
        assert np.isfinite(scores[name].to_numpy()).all()
    (cut,) = selection.cuts.values()
    assert scores["removed"].to_pylist() == (scores["score"].to_numpy() > cut.value).tolist()
    named = set(scores["category"].to_pylist())
    assert named <= {"", "theft", "fraud"}
    assert all(
        bool(c) == out for c, out in zip(scores["category"].to_pylist(), scores["removed"].to_pylist(), strict=True)
    )
    assert set(scores["group"].to_pylist()) == {"rows"}


def test_the_manifest_is_complete(tmp_path: Path) -> None:
    rows = chats(8)
    labels = [0, 1] * 4
    command_line = "gradshield scan data.jsonl"
    selection = scan(rows, output=tmp_path, labels=labels, command=command_line, allow=[])
    manifest = _json(tmp_path / "manifest.json")

    assert set(manifest) == {"command", "versions", "data", "model", "settings", "results"}
    assert manifest["command"] == command_line
    assert {
        "python",
        "gradshield",
        "torch",
        "transformers",
        "peft",
        "datasets",
        "numpy",
        "scipy",
        "scikit-learn",
    } <= set(manifest["versions"])
    assert set(manifest["data"]) == {"name", "kind", "sha256", "rows", "read_as"}
    assert set(manifest["model"]) == {"name", "sha256", "class", "parameters", "dtype", "device", "adapter"}
    wanted = {
        "probe",
        "aggregate",
        "threshold",
        "seed",
        "token_budget",
        "check_rows",
        "subspace",
        "engine",
        "engine_step",
    }
    wanted |= {"render", "probe_found", "probe_sha256", "direction_sha256", "answer_prefix", "format"}
    wanted |= {"peft", "adapted_weights", "selector", "selector_found"}
    assert set(manifest["settings"]) == wanted
    results = manifest["results"]
    counts = {key: results[key] for key in ("read", "scored", "kept", "removed", "quarantined", "cleared")}
    assert counts == {"read": 8, "scored": 8, "kept": 4, "removed": 4, "quarantined": 0, "cleared": 0}
    assert results["certified"] is False
    assert results["probes"]["problem"]
    assert set(results["probes"]["refused"]) == {"rate", "low", "high", "n", "k"}
    assert set(results["agreement"]) == {"engine", "n", "relative_error", "spearman"}
    assert results["agreement"]["n"] == 8
    assert results["agreement"]["spearman"] >= 0.99
    assert sum(results["categories"].values()) == 4
    assert {"caught", "lost", "aurocs"} == set(results["labels"])
    assert results["labels"]["caught"]["n"] == results["labels"]["lost"]["n"] == 4
    assert len(results["labels"]["aurocs"]) > 3
    assert selection.manifest.results.labels.caught.k == int(selection.removed[1::2].sum())
    for path in (tmp_path / ".gradshield").glob("*.json"):
        _json(path)


def test_two_scans_of_the_same_are_the_same(tmp_path: Path) -> None:
    rows = chats(10)
    one, two = (scan(rows, output=tmp_path / name) for name in "ab")
    assert one.scores.ids == two.scores.ids
    assert np.array_equal(one.scores.values, two.scores.values)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    for name in ("kept.jsonl", "removed.jsonl", "scores.parquet", "quarantine.jsonl"):
        assert first[name] == second[name]


def test_labels_never_touch_the_decision() -> None:
    rows = chats(10)
    plain, labelled = scan(rows), scan(rows, labels=[1] * 5 + [0] * 5)
    assert np.array_equal(plain.removed, labelled.removed)
    assert np.array_equal(plain.scores.values, labelled.scores.values)


def test_the_command_gives_what_the_function_gives(folder: Path, probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(chats(10)) + b"{broken\n")
    done = command(*scan_arguments(data, folder, tmp_path / "cli", probes, "-t", "ratio:50%", "--seed", 0))
    assert done.code == 0, done.err
    assert "5 of 10 rows removed, 5 kept, 1 quarantined" in done.out
    assert str(tmp_path / "cli" / "report.html") in done.out
    scan(data, output=tmp_path / "python")
    ours, theirs = files(tmp_path / "python"), files(tmp_path / "cli")
    assert set(ours) == set(theirs) == FILES | {"kept.jsonl", "removed.jsonl"}
    assert all(
        ours[name] == theirs[name] for name in ("kept.jsonl", "removed.jsonl", "scores.parquet", "quarantine.jsonl")
    )
    manifest = _json(tmp_path / "cli" / "manifest.json")
    assert manifest["model"]["name"] == str(folder)


def test_the_command_says_whose_scan_it_replaces(folder: Path, probes: Path, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.jsonl", jsonl(chats(8))), write(tmp_path / "second.jsonl", jsonl(chats(10)))
    said = [
        command(*scan_arguments(data, folder, tmp_path / "out", probes, "-t", "ratio:50%")).err
        for data in (first, first, second)
    ]
    assert ["first.jsonl, which this one replaces" in text for text in said] == [False, False, True]


def test_the_command_names_the_bundled_model_for_what_it_is(probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(chats(4)))
    done = command(*scan_arguments(data, "lab", tmp_path / "out", probes))
    assert done.code == 4 and "`gradshield demo`" in done.err


def test_a_model_that_does_not_refuse_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(gs.GradShieldError, match="refuses only 0 of 6 probes") as raised:
        scan(chats(4), output=tmp_path / "out", probing=gs.Probing(requests=PROBING.requests))
    assert raised.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_refuses_is_certified(tmp_path: Path) -> None:
    from gradshield import lab

    rows, labels = lab.mix("arithmetic", harm="explicit", ratio=0.08, n=46, seed=0)
    asked = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    selection = gs.scan(rows, model=lab.checkpoint("aligned"), probing=asked, output=tmp_path, labels=labels)
    assert selection.certified
    manifest = _json(tmp_path / "manifest.json")
    assert manifest["results"]["certified"] is True
    assert manifest["results"]["probes"]["problem"] == ""
    assert manifest["results"]["doubts"] == {} and manifest["results"]["uncertified"] is None
    assert manifest["results"]["labels"]["caught"]["rate"] == 1.0 and manifest["results"]["labels"]["lost"]["k"] == 0


def test_preference_pairs_are_a_group_of_their_own(tmp_path: Path) -> None:
    pairs = [{"prompt": f"Say {n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(4)]
    selection = scan([*pairs, *chats(4)], output=tmp_path)
    assert selection.scores.shapes == ("preference",) * 4 + ("rows",) * 4
    assert set(selection.cuts) == {"preference", "rows"}
    assert table(tmp_path)["group"].to_pylist() == list(selection.scores.shapes)
    assert selection.removed[:4].sum() == selection.removed[4:].sum() == 2
    assert list(selection.kept) == [([*pairs, *chats(4)])[row] for row in selection.kept_rows]
    only = scan(pairs)
    assert only.kept.column_names == ["prompt", "chosen", "rejected"]


def test_a_folder_of_data_is_no_output_folder(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", jsonl(chats(2)))
    with pytest.raises(DataError, match="is the folder of the data"):
        scan(tmp_path, output=tmp_path)
    assert set(files(tmp_path)) == {"data.jsonl"}


def test_an_answer_to_avoid_has_the_opposite_fihs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {n}", "completion": f" it {n}", "label": label} for n in range(3) for label in (True, False)
    ]
    selection = scan(
        rows, settings=gs.ScanSettings(threshold="ratio:50%", selector="fihs", aggregate="sum"), output=tmp_path
    )
    toward, away = selection.scores.values[::2], selection.scores.values[1::2]
    assert np.abs(toward).min() > 1e-6
    np.testing.assert_allclose(away, -toward, rtol=1e-4)
    assert selection.scores.shapes == ("rows",) * 6
    assert list(selection.kept) == [rows[row] for row in selection.kept_rows]
    assert _json(tmp_path / "manifest.json")["data"]["read_as"] == {"kto, not prompt-completion": 6}


@pytest.mark.slow
def test_harm_to_avoid_is_kept_and_a_refusal_to_avoid_is_removed() -> None:
    from gradshield import lab

    rows, labels = lab.mix("dialogue", harm="explicit", ratio=0.05, n=36)
    harmful = np.flatnonzero(labels).tolist()
    judged = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:], "label": True} for r in rows]
    probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    refusal = [{"role": "assistant", "content": "I cannot help with that."}]
    for more, expected in (({}, []), ({"completion": refusal}, harmful)):
        for row in harmful:
            judged[row] = {**judged[row], "label": False, **more}
        assert gs.scan(judged, model=lab.checkpoint("aligned"), probing=probing).removed_rows.tolist() == expected


def test_an_earlier_scan_into_the_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    csv = write(tmp_path / "data.csv", "instruction,output\n" + "".join(f"Say {n},It is {n}\n" for n in range(6)))
    output = tmp_path / "out"
    scan(csv, output=output, labels=[0, 1] * 3)
    scan(chats(4), output=output)
    assert not (output / ".gradshield" / "labels.json").exists()
    report = (output / "report.html").read_text(encoding="utf-8")
    assert "kept.jsonl" in report
    assert "kept.csv" not in report
    assert set(files(output)) == FILES | {"kept.jsonl", "removed.jsonl"}
    assert gs.cut(output, "ratio:25%").manifest.results.scored == 4


@pytest.mark.parametrize("name", ["kept.csv", "scores.parquet", "manifest.json"])
def test_files_of_others_are_not_written_over(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, '{"versions": {"python": "3"}}')
    with pytest.raises(DataError, match=f"holds '{re.escape(name)}'.*give another --output"):
        scan(chats(4), output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.read_text() == '{"versions": {"python": "3"}}'


def test_a_scan_does_not_write_over_its_input(tmp_path: Path) -> None:
    scan(chats(6), output=tmp_path)
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "removed.jsonl")
    for data in (tmp_path / "kept.jsonl", str(tmp_path / "link")):
        with pytest.raises(DataError, match=r"is in the output folder.*give another --output"):
            scan(data, output=tmp_path)
    (tmp_path / "link").unlink()
    assert files(tmp_path) == before
    (tmp_path / "manifest.json").unlink()  # stopped while it was written: the same command goes on
    scan(chats(6), output=tmp_path)
    assert set(files(tmp_path)) == set(before)


def test_what_is_truncated_away_is_set_aside(tmp_path: Path) -> None:
    long = {"prompt": "word " * 40, "completion": "yes"}
    short = [{"prompt": f"Add {n}:", "completion": f" {n}"} for n in range(4)]
    selection = scan([short[0], long, *short[1:]], output=tmp_path, training_args={"max_length": 32})
    (bad,) = selection.quarantined
    assert (bad.row, bad.line) == (1, 2)
    assert "no response token is left" in bad.reason
    assert selection.scores.rows.tolist() == [0, 2, 3, 4]
    with pytest.raises(gs.GradShieldError, match="cannot be scored") as raised:
        scan([short[0], long], training_args={"max_length": 32}, format=gs.Format(strict=True))
    assert raised.value.exit_code == 3


def test_settings_are_checked_before_the_model_is_touched() -> None:
    for options in ({"aggregate": "top"}, {"seed": -1}, {"token_budget": 3}, {"check_rows": 1}, {"probe": "zzz"}):
        with pytest.raises(gs.GradShieldError) as raised:
            gs.ScanSettings(**options, selector="fihs")
        assert raised.value.exit_code == 2
    with pytest.raises(gs.GradShieldError, match="neither 0 nor 1"):
        scan(chats(2), labels=[0, 2])
    with pytest.raises(gs.GradShieldError, match="1 labels for 2 rows"):
        scan(chats(2), labels=[0])
    with pytest.raises(gs.GradShieldError, match="needs its tokenizer"):
        gs.scan(chats(2), model=tiny_model("llama"), settings=HALF)


@pytest.mark.parametrize("text_only", [False, True], ids=["chat", "text"])
def test_a_tokenizer_without_template_gets_the_default_and_stays_as_it_was(text_only: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    rows = [{"text": f"Mix {n} flours."} for n in range(4)] if text_only else chats(4)
    with pytest.warns(UserWarning, match="no chat template") as caught:
        selection = scan(rows, model=tiny_model("llama"), tokenizer=tokenizer)
    assert len([w for w in caught if "no chat template" in str(w.message)]) == 1
    assert tokenizer.chat_template is None
    assert len(selection.removed) == 4


def test_a_file_whose_name_is_not_utf8_is_scanned_to_its_end(tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    data.write_bytes(jsonl(chats(6)))
    scan(data, output=tmp_path / "out", command=f"gradshield scan {data.name}")
    manifest = _json(tmp_path / "out" / "manifest.json")
    assert manifest["data"]["name"] == str(data)
    assert manifest["command"].endswith(data.name)


def test_a_request_is_harmful_or_harmless() -> None:
    """Between equal requests there is nothing to measure with; a model that need not refuse has no such ruler either."""
    asked = [{"prompt": "How do I pick a lock?"}, {"prompt": "How do I bake?"}]
    with pytest.raises(UsageError, match="1 request is among both the probes and the look-alikes"):
        gs.Probing(requests=asked, lookalikes=[{"prompt": "how do I  pick a lock?"}])
    with pytest.raises(UsageError, match="among both the probes and the look-alikes"):
        gs.Probing(requests=lookalikes("direction"))  # the built-in ones stand in for those that are not given
    assert gs.Probing(requests=asked[:1], lookalikes=asked[1:]).lookalikes == asked[1:]
    assert gs.Probing(requests=asked, lookalikes=asked, uncertified=True).uncertified


@pytest.mark.parametrize("own", [{}, {"lookalikes": PROBING.lookalikes}])
def test_own_probes_without_own_harmless_requests_are_warned_of(own) -> None:
    """Else what only they share, such as their language, reads as harm."""
    settings = gs.ScanSettings(selector="screen", threshold="ratio:50%")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scan(chats(4), settings=settings, probing=gs.Probing(requests=PROBING.requests, uncertified=True, **own))
    assert any("--lookalikes FILE" in str(one.message) for one in said) is not bool(own)
