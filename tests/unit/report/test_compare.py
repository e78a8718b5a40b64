"""`abliterate compare`: which runs can be compared, the best of all of them, and what the page and the terminal say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.files import write_json
from abliterate.report import compare as compare_module
from abliterate.report import draw
from abliterate.report.compare import compare, differences, fronts_table, runs_table, verdict
from abliterate.report.compare_page import compare_page, fronts_plot
from support.cli import Invoke, assert_sentence
from support.events import checked
from support.paths import TESTS
from support.reports import HOSTILE, PICTURES, made_run


@pytest.fixture(autouse=True)
def _pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_drawn", PICTURES.drawn)


def change(run: RunDirectory, **fields: Any) -> RunDirectory:
    record = json.loads(run.result.read_text(encoding="utf-8"))
    nested = {name: record[name] | value for name, value in fields.items() if name in ("prompts", "identity")}
    write_json(run.result, record | fields | nested)
    return run


def better(run: RunDirectory) -> RunDirectory:
    """The same run, whose selected trial has half its KL, and which has another seed."""
    record = json.loads(run.result.read_text(encoding="utf-8"))
    for trial in record["trials"]:
        if trial["number"] == record["selected"]:
            trial["scores"]["kl"]["mean"] /= 2
    text = run.settings.read_text(encoding="utf-8")
    run.settings.write_text(text.replace("seed = 7", "seed = 8"), encoding="utf-8")
    return change(run, **record)


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDirectory]:
    return [made_run(tmp_path / "one", count=24), better(made_run(tmp_path / "two", count=24))]


def test_the_best_of_all_runs_is_that_of_the_rule(runs: list[RunDirectory]) -> None:
    found = compare(runs)
    selected = found.runs[1].search.selected_trial
    assert selected is not None
    assert found.obstacles == ()
    assert ((0, selected.number) in {(run, trial.number) for run, trial in found.front}) is False  # the other run's is better
    assert (1, selected) in found.front
    least = min(trial.kl for _, trial in found.front)
    (by_kl,) = [one for one in found.front if one[1].kl == least]
    assert compare(runs, "unanswered<=100").best == by_kl
    few = min(found.front, key=lambda one: one[1].unanswered)
    assert compare(runs, "kl<=100").best == few
    assert few != by_kl
    assert compare(runs, f"refusals<={few[1].refusals}").best == few
    assert compare(runs, f"refusals<={few[1].refusals - 1}").best is None
    table = fronts_table(compare(runs, "kl<=100"))
    assert table.chosen is not None
    assert table.rows[table.chosen][:3] == ("→", found.runs[few[0]].label, few[1].number)
    costs = [row[[column.key for column in table.columns].index("kl_mean")] for row in table.rows]
    assert costs == sorted(costs)  # type: ignore[type-var]
    assert [row[0] for row in runs_table(found).rows] == ["A: one", "B: two"]
    assert differences(found) == {"seed": [7, 8]}


def test_fronts_have_no_columns_of_parameters(runs: list[RunDirectory]) -> None:
    trials = json.loads(runs[1].result.read_text(encoding="utf-8"))["trials"]
    change(runs[1], trials=[trial | {"params": trial["params"] | {"extra": {"steer": 0.5}}} for trial in trials])
    found = compare(runs)
    assert found.runs[1].search.extras == ["steer"]
    assert {column.key.split()[0] for column in fronts_table(found).columns}.isdisjoint({"extra", "kernel", "scope"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompts": {"harmful_eval": {"source": "x", "count": 100, "digest": "other"}}}, "different harmful prompts"),
        ({"prompts": {"harmless_eval": {"source": "x", "count": 100, "digest": "other"}}}, "different harmless prompts"),
        (
            {"objectives": [{"name": "kl", "goal": "minimize"}, {"name": "refusals", "goal": "minimize"}]},
            "objectives differ (A: kl (minimized), unanswered (minimized); B: kl (minimized), refusals (minimized))",
        ),
        ({"rendering": "other"}, "asked differently"),
        ({"identity": {"set of scorers or markers": "other"}}, "scorers or refusal markers differ"),
    ],
)
def test_what_cant_be_compared_is_said_and_no_best_is_named(
    runs: list[RunDirectory], fields: Mapping[str, Any], said: str
) -> None:
    change(runs[1], **fields)
    found = compare(runs)
    text = " ".join(verdict(found))
    assert len(found.obstacles) == 1
    assert said in text
    assert "no best trial is named" in text
    assert (found.best, found.front) == (None, ())
    table = fronts_table(found)
    labels = [row[1] for row in table.rows]
    assert labels == sorted(labels)  # run by run
    assert table.chosen is None
    assert fronts_plot(found).spec["data"]["values"]


def test_runs_of_other_objectives_are_shown_whatever_their_own_rule_is(runs: list[RunDirectory]) -> None:
    for run in runs:
        text = run.settings.read_text(encoding="utf-8")
        run.settings.write_text(text.replace("[search]", '[search]\nselect = "a rule of theirs"'), encoding="utf-8")
    with pytest.raises(InputError, match="'a rule of theirs' is not a rule"):
        compare(runs)
    change(runs[0], objectives=[{"name": "kl", "goal": "minimize"}, {"name": "refusals", "goal": "minimize"}])
    found = compare(runs)
    assert "objectives differ" in " ".join(verdict(found))
    assert found.best is None
    assert {row[1] for row in fronts_table(found).rows} == {"A: one", "B: two"}


def test_another_base_model_and_another_number_of_prompts(runs: list[RunDirectory]) -> None:
    record = json.loads(runs[1].result.read_text(encoding="utf-8"))
    base = record["baseline"] | {"prompts": 200}
    change(runs[1], model=record["model"] | {"fingerprint": "g"}, baseline=base)
    found = compare(runs)
    assert "base models differ" in " ".join(verdict(found))
    heights = [row["height"] for row in fronts_plot(found).spec["data"]["values"]]
    assert max(heights) == 1.0  # shares
    assert "share of harmful prompts" in json.dumps(fronts_plot(found).spec)


def test_the_command_prints_writes_and_emits(runs: list[RunDirectory], invoke: Invoke, tmp_path: Path) -> None:
    paths = [run.path for run in runs]
    outcome = invoke("compare", *paths, "-o", tmp_path / "page.html")
    assert outcome.code == 0, outcome
    for part in (
        "Best by the rule auto: trial",
        "of B: two",
        "The fronts of all runs",
        "KL, square-root scale",
        "A one   B two",
    ):
        assert part in outcome.out
    assert outcome.out.splitlines()[-1] == str(tmp_path / "page.html")
    assert "seed" in outcome.out.partition("What differs")[2]
    line = checked(invoke("compare", *paths, "--json"), "compare")[-1]
    assert line["comparable"] is True
    assert line["best"]["directory"] == str(paths[1])
    assert line["differences"] == [{"name": "seed", "values": [7, 8]}]


def test_what_it_refuses(runs: list[RunDirectory], invoke: Invoke, tmp_path: Path) -> None:
    one, two = (run.path for run in runs)
    assert_sentence(invoke("compare", one), 2, "needs 2 to 26 runs")
    assert_sentence(invoke("compare", one, tmp_path / "two" / ".." / "one"), 2, "named twice")
    assert_sentence(invoke("compare", one, tmp_path / "none"), 2, "no run")
    assert_sentence(invoke("compare", one, two, "-o", two / "result.json"), 2, "doesn't end in .html")
    assert_sentence(invoke("compare", one, two, "--select", "trial:3"), 2, "names a trial of one run")
    assert_sentence(invoke("compare", one, two, "--select", "best"), 2, "is not a rule")
    change(runs[1], trials=[], front=[], selected=None)
    with pytest.raises(InputError, match="no scored trial yet"):
        compare(runs)


def test_foreign_text_is_text_in_the_page(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name, HOSTILE, count=12) for name in ("a<b>", 'c"d')]
    page = compare_page(compare(runs))
    assert "A: a&lt;b&gt;" in page
    assert "<b>" not in page.partition("<script")[0]
    assert "<img" not in page.partition("<script")[0]
    assert "default-src 'none'" in page
    assert str(tmp_path) not in page
    assert "hunter2" not in page
    assert page.count('class="plot"') == 1
    assert "<dt>knee</dt>" in page  # the rule's sentence has the word
    assert "<dt>probe</dt>" not in page


def test_the_parts_that_are_compared_are_those_that_runs_record(runs: list[RunDirectory]) -> None:
    """A real run's record and a made-up one have each part, so that no part counts as equal because it is nowhere."""
    golden = json.loads((TESTS / "support" / "golden" / "result.json").read_text(encoding="utf-8"))
    for record in (golden, json.loads(runs[0].result.read_text(encoding="utf-8"))):
        change(runs[1], **{name: record[name] for name in ("prompts", "rendering", "identity")})
        (_, run) = compare(runs).runs
        assert all(compare_module._recorded(run, part) for part in compare_module._RECORDED)


def test_a_part_that_no_run_records_isnt_known_to_be_equal(runs: list[RunDirectory]) -> None:
    for run in runs:
        record = json.loads(run.result.read_text(encoding="utf-8"))
        del record["rendering"], record["prompts"]["harmless_eval"], record["identity"]["tokenizer"]
        write_json(run.result, record)
    found = compare(runs)
    assert found.obstacles == (
        "their result.json files, which are old or were cut, don't record whether these agree: harmless evaluation prompts, "
        "rendering of a prompt, tokenizer",
    )
    assert found.best is None
    assert {row[1] for row in fronts_table(found).rows} == {"A: one", "B: two"}  # they are shown all the same


def test_doubts_are_told(runs: list[RunDirectory], invoke: Invoke) -> None:
    record = json.loads(runs[0].result.read_text(encoding="utf-8"))
    runs[0].result.write_text(json.dumps({name: value for name, value in record.items() if name != "sha256"}))
    for run in runs:
        run.settings.unlink()
    outcome = invoke("compare", *(run.path for run in runs))
    assert outcome.code == 0
    assert re.search("warning: A: one: .*checksum", outcome.err)
    assert outcome.err.count("settings.toml isn't in the run directory") == 2
    assert "All settings are the same" not in outcome.out
    assert "checksum" in compare_page(compare(runs))


def test_no_torch_is_imported() -> None:
    code = "import sys, abliterate.cli.compare; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
