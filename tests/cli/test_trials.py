"""`abliterate trials`: filters, tables on a terminal and in a pipe, CSV."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from abliterate.cli.trials import TrialFilter
from abliterate.files import digest_of, write_json
from abliterate.terminal import tables
from abliterate.types import Kernel, Trial, TrialParams
from support.cli import Finished, Invoke, assert_sentence
from support.runs import copy_run

PARAMS = TrialParams(
    "global", 3.14159, {"attn.o_proj": Kernel(1.25, 8.5, 0.5, 3.0), "mlp.down_proj": Kernel(0.0, 7.0, 0.0, 2.0)}
)
LAYERS = TrialParams("per layer", 2.5, PARAMS.kernels)


def scored(
    number: int, state: Any, refusals: int, kl: float, seconds: float, broken: int = 0, params: TrialParams = PARAMS
) -> Trial:
    count, kinds = (
        refusals + broken,
        {"refused": refusals, "broken": broken, "off_topic": 0, "answered": 12 - refusals - broken},
    )
    unanswered = {"count": count, **(kinds if state == "complete" else {})}
    scores = {"refusals": refusals, "kl": {"mean": kl, "median": kl / 3, "max": kl * 7}, "unanswered": unanswered}
    return Trial(number, params, state, scores, seconds, values={"refusals": refusals / 12, "kl": kl, "unanswered": count / 12})


TRIALS = (
    scored(0, "stopped", 9, 0.3, 0.1),
    scored(1, "complete", 9, 0.1, 2.0),
    Trial(2, PARAMS, "failed", {}, 9.5, '=HYPERLINK("x"), one\nline'),
    scored(3, "complete", 2, 0.5, 1.5, 4, LAYERS),
    scored(4, "complete", 5, 0.6, 1.0),
)
FRONT = (1, 3)


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    """A run directory with `TRIALS`."""
    path = copy_run(finished[0], tmp_path / "run")
    record = {"trials": [trial.to_record() for trial in TRIALS], "front": list(FRONT), "selected": 3}
    changed = {**finished[1], **record, "baseline": {"refusals": 10, "prompts": 12, "values": {}, "unanswered": {"count": 11}}}
    write_json(path / "result.json", changed | {"sha256": digest_of(changed)})
    return path


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (TrialFilter(), [0, 1, 2, 3, 4]),
        (TrialFilter(front=True), [1, 3]),
        (TrialFilter(front=True, state="complete", sort="refusals"), [3, 1]),
        (TrialFilter(state="stopped"), [0]),
        (TrialFilter(state="failed"), [2]),
        (TrialFilter(max_kl=0.3), [0, 1]),
        (TrialFilter(max_refusals=9), [1, 3, 4]),  # what a stopped one would have refused isn't known
        (TrialFilter(max_refusals=5, max_kl=0.5), [3]),
        (TrialFilter(max_refusals=0), []),
        (TrialFilter(sort="refusals"), [3, 4, 1, 0, 2]),  # a bound after the same number, no score last
        (TrialFilter(sort="unanswered"), [4, 3, 1, 0, 2]),
        (TrialFilter(where=("unanswered<=6",)), [3, 4]),
        (TrialFilter(where=("unanswered >= 9",)), [1]),
        (TrialFilter(sort="kl"), [1, 0, 3, 4, 2]),
        (TrialFilter(sort="seconds", limit=2), [0, 4]),
        (TrialFilter(limit=99), [0, 1, 2, 3, 4]),
    ],
)
def test_filters(wanted: TrialFilter, numbers: list[int], run: Path, invoke: Invoke) -> None:
    assert [trial.number for trial in wanted.of(TRIALS, FRONT)] == numbers
    options = [f"--{name.replace('_', '-')}" for name in ("front",) if getattr(wanted, name)]
    for name in ("state", "max_kl", "max_refusals", "sort", "limit"):
        if getattr(wanted, name) not in ("", None):
            options += [f"--{name.replace('_', '-')}", getattr(wanted, name)]
    options += [option for text in wanted.where for option in ("--where", text)]
    record = json.loads(invoke("trials", run, *options, "--json").out)
    assert [trial["number"] for trial in record["trials"]] == numbers
    assert (record["front"], record["selected"], record["finished"]) == ([1, 3], 3, 5)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--json", "--csv"], ["--json", "--csv"]),
        (["--front", "--state", "failed"], ["--front", "--state failed"]),
        (["--front", "--state", "stopped"], ["--front", "--state stopped"]),
        (["--state", "failed", "--max-kl", "1"], ["--max-kl"]),
        (["--state", "failed", "--max-refusals", "1"], ["--max-refusals"]),
        (["--state", "stopped", "--max-refusals", "1"], ["bound"]),
        (["--state", "completed"], ["did you mean complete?"]),
        (["--sort", "size"], ["number, kl, refusals, unanswered, seconds"]),
        (["--max-kl", "-0.1"], ["--max-kl"]),
        (["--max-kl", "nan"], ["--max-kl"]),
        (["--max-refusals", "-1"], ["--max-refusals"]),
        (["--limit", "0"], ["--limit"]),
    ],
)
def test_options_that_contradict(options: list[str], parts: list[str], run: Path, invoke: Invoke) -> None:
    assert_sentence(invoke("trials", run, *options), 2, *parts)


def test_csv_is_exact_and_safe(run: Path, invoke: Invoke) -> None:
    text = invoke("trials", run, "--csv").out
    assert text.count("\r\n") == text.count("\n") - 1 == 1 + len(TRIALS)  # the reason's own line break is quoted
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert len(set(header)) == len(header)
    assert {len(row) for row in rows} == {len(header)}
    found = [dict(zip(header, row, strict=True)) for row in rows]
    for trial, row in zip(TRIALS, found, strict=True):
        assert int(row["number"]) == trial.number
        assert row["state"] == trial.state
        assert row["front"] == ("true" if trial.number in FRONT else "false")
        assert row["refusals_exact"] == ("true" if trial.state == "complete" else "false")
        assert float(row["direction_index"]) == trial.params.direction_index
        for component, kernel in trial.params.kernels.items():
            for name in ("max_coeff", "position", "min_coeff", "distance"):
                assert float(row[f"{component}.{name}"]) == getattr(kernel, name)
        if trial.scores:
            assert [float(row[f"kl_{name}"]) for name in ("mean", "median", "max")] == list(trial.scores["kl"].values())
            kinds = trial.scores["unanswered"]
            assert [row["unanswered"], row["broken"]] == [str(kinds["count"]), str(kinds.get("broken", ""))]
        else:
            assert row["refusals"] == row["kl_mean"] == ""
    assert found[2]["reason"] == "'" + TRIALS[2].reason  # no formula to a spreadsheet
    assert [row["selected"] for row in found] == ["false", "false", "false", "true", "false"]
    few = invoke("trials", run, "--csv", "--state", "failed").out
    assert next(csv.reader(few.splitlines())) == header  # the columns don't depend on the filter


def test_plain_lines_in_a_pipe(run: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    lines = invoke("trials", run).out.splitlines()
    assert len(lines) == 2 + 1 + len(FRONT) + 1 + 2 + len(TRIALS)  # title, header, base, front; blank; title, header, all
    assert lines[2].split()[:3] == ["base", "11/12", "10/12"]
    assert "≥9/12" in lines[-5]
    assert lines[-3].endswith('=HYPERLINK("x"), one line')
    assert "1.25 @ 8.5 → 0.50 ± 3.0" in lines[-1]
    assert "off" in lines[-1]
    assert [line[:1] for line in lines[-5:]] == [" ", "★", " ", "→", " "]
    chosen = invoke("trials", run, "--state", "failed").out.splitlines()
    assert len(chosen) == 3
    assert chosen[0].startswith("1 of 5 trials: failed")
    assert "0 of 5" in invoke("trials", run, "--max-kl", "0").out


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [(240, ["attn.o_proj", "scope", "KL max"], []), (120, ["KL max"], ["attn.o_proj"]), (72, ["KL mean"], ["scope"])],
)
def test_a_terminal_shows_what_fits(
    run: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    there: list[str],
    gone: list[str],
) -> None:
    monkeypatch.setattr(tables, "make_console", lambda: Console(force_terminal=True, width=width, color_system=None))
    for options in ([], ["--front"]):
        out = invoke("trials", run, *options).out
        lines = [line for line in out.splitlines() if line.startswith(("┃", "│"))]
        assert {len(line) <= width for line in lines} == {True}
        for name in there:
            assert name in out
        for name in gone:
            assert name not in out
        assert ("--csv" in out) == bool(gone)


def test_a_run_that_has_just_begun_has_no_trials(finished: Finished, tmp_path: Path, invoke: Invoke) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    (run / "result.json").unlink()
    assert invoke("trials", run).out == "no trial has finished yet\n"
    assert json.loads(invoke("trials", run, "--json").out)["trials"] == []
    assert invoke("trials", run, "--csv").out.count("\r\n") == 1
    shutil.rmtree(run)
    assert_sentence(invoke("trials", run), 2, "no run")


def test_a_damaged_result_is_one_sentence(run: Path, invoke: Invoke) -> None:
    record = json.loads((run / "result.json").read_text(encoding="utf-8"))
    del record["trials"][1]["params"]
    write_json(run / "result.json", record | {"sha256": digest_of(record)})
    assert_sentence(invoke("trials", run), 2, "damaged", "--resume")
