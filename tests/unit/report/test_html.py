"""The report: made again it is the same, it says what is missing, and nothing foreign becomes markup, a request or a secret."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.files import write_json
from abliterate.objectives import DEFAULT
from abliterate.report import draw
from abliterate.report.data import changed_first, gather
from abliterate.report.html import condensed, table
from abliterate.report.page import render, write_report
from abliterate.report.plots import all_plots, front
from abliterate.report.refined import LayerRow, layer_rows, refined_text
from abliterate.report.tables import kernel_table
from abliterate.report.terminal import show
from abliterate.search.front import hypervolume, pareto_front
from abliterate.types import Baseline, Column, RefinedParams, Table, Trial, TrialParams, weight_name
from support.cli import Finished, Invoke, assert_sentence
from support.paths import TESTS
from support.reports import DRAWN, HOSTILE, PICTURES, PLOTS, made_run, made_trials
from support.runs import copy_run, quick_settings, run_in


@pytest.fixture(autouse=True, scope="module")
def _pictures() -> Iterator[None]:
    """Pages have pictures here, but of equal plots the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_drawn", PICTURES.drawn)
        yield


class Page(HTMLParser):
    """The elements of a page, with what its scripts of data hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.words: list[str] = []
        self._within: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = (tag, dict(attrs))
        self.tags.append(self._within)

    def handle_endtag(self, tag: str) -> None:
        self._within = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._within
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[str(attributes["id"])] = json.loads(data)
        elif tag not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """What is to be read."""
        return " ".join(self.words)


def checked_run(folder: Path, *words: str) -> RunDirectory:
    """A made run whose result has a checksum, without which there would be a warning."""
    run = made_run(folder, *words)
    Result.read(run).write(run)
    return run


def test_made_again_it_is_the_same(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(copy_run(finished[0], tmp_path / "run"))
    before = run.report.read_bytes()
    monkeypatch.setattr(draw, "_drawn", DRAWN)
    write_report(run)
    assert run.report.read_bytes() == before
    assert set(Page(before.decode()).data["plots"]) == PLOTS - {"importance"}  # of four trials it can't be told
    assert "fewer than 20" in before.decode()


def test_a_run_leaves_what_the_report_needs(finished: Finished) -> None:
    path, result, _ = finished
    geometry, answers = (json.loads((path / name).read_text(encoding="utf-8")) for name in ("geometry.json", "answers.json"))
    assert len(geometry["layers"]) == result["model"]["n_layers"] + 1
    assert geometry["sampled"] == {"harmful": 30, "harmless": 30}
    top = geometry["layers"][-1]
    assert top["probe"] > 0.9  # the demo's sets differ
    assert -1 <= top["silhouette"] <= 1
    assert geometry["layers"][0]["probe"] is None  # the prompts end alike
    assert answers["trial"] == result["selected"]
    assert (len(answers["harmful"]), len(answers["harmless"])) == (8, 8)
    for row in answers["harmful"]:
        said = row["base"]
        assert said["refusal"] == bool(said["markers"])
    before, after = (sum(row[who]["refusal"] for row in answers["harmful"]) for who in ("base", "edited"))
    assert before > after


def test_every_section_is_there(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    page = Page(render(gather(run)))
    assert set(page.data["plots"]) == PLOTS
    figures = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class") == "plot"]
    assert {str(one["id"]) for one in figures} == {f"plot-{name}" for name in PLOTS}
    assert all(one["role"] == "img" and len(str(one["aria-label"])) > 20 for one in figures)
    sections = [str(attributes["id"]) for tag, attributes in page.tags if tag == "section"]
    ids = "front progress kernels importance geometry heldout answers cost coverage facts further words"
    assert sections == ids.split()
    assert {"later", "refusals.count", "7"} <= {word.strip() for word in page.words}  # a result this version knows nothing of
    points = page.data["plots"]["front"]["layer"][1]["data"]["values"]
    assert len(points) == 41
    assert {point["kind"] for point in points} >= {"selected", "stopped: at least so many", "base model"}
    assert any(point["count"].startswith("≥") for point in points)


def test_columns_that_say_the_same_in_every_row_become_one_line() -> None:
    columns = (Column("mark", ""), Column("number", "trial"), Column("state", "state"), Column("kl", "KL mean", digits=".2f"))
    rows = (("", "base", None, 0.0), ("", 1, "complete", 0.5), ("", 2, "complete", 0.25))
    shown, line = condensed(Table("Front", columns, rows))
    assert [column.key for column in shown.columns] == ["mark", "number", "kl"]
    assert line == "The same in every row: state: complete."
    text = table(Table("Front", columns, rows))
    assert "complete" in text.partition("</table>")[2]
    assert "Kullback-Leibler" in text.partition("<abbr")[2].partition("KL mean</abbr>")[0]
    mixed = (rows[0], rows[1], ("", 2, "stopped", 0.25))
    assert condensed(Table("Front", columns, mixed)) == (Table("Front", columns, mixed), "")
    assert condensed(Table("Front", columns, rows[1:]))[1] == ""  # of two rows


def test_answers_that_changed_come_first() -> None:
    def row(name: str, before: bool, after: bool, thinking: bool = False) -> dict[str, Any]:
        edited = {"refusal": after, "thinking_open": thinking}
        return {"prompt": name, "base": {"refusal": before}, "edited": edited}

    rows = [row("both", True, True), row("neither", False, False), row("open", True, False, True), row("changed", True, False)]
    assert [one["prompt"] for one in changed_first(rows)] == ["changed", "both", "neither", "open"]


def test_axes_say_their_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    material = gather(made_run(tmp_path / "run"))
    specs = {plot.name: json.dumps(plot.spec) for plot in all_plots(material)}
    for name, spec in specs.items():
        assert ("log" in spec.partition('"scale": {"type"')[2][:12]) == (name in ("front", "norms")), name
    assert "log. scale above 0.001" in specs["front"]
    assert "norm (logarithmic scale)" in specs["norms"]
    show(material)
    assert "KL, square-root scale" in capsys.readouterr().out


def test_what_was_measured_on_held_out_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    text = Page(render(gather(run))).text
    for part in ("97/100 [91.5–99.4 %]", "3/100 [0.6–8.5 %]", "1.5000 1.7500", "first changed token, mean 21.5"):
        assert part in text
    for part in (
        "100 harmful. 4 more were left out",
        "+2.0 points of refusals, -0.5000 nats",
        "100 % in the search and 97 % held out",
        "markers differ from plain 1",
        "Sorry plain",
        "gives no verdicts: unreachable plain",
        "1.25 1e+06",
        "broken gives no score: no score plain",
    ):
        assert part in text
    show(gather(run))
    assert "97/100 [91.5–99.4 %]" in capsys.readouterr().out


def test_a_refined_trial_is_shown_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    material = gather(made_run(tmp_path / "run", refined=True))
    page = Page(render(material))
    assert set(page.data["plots"]) == PLOTS - {"kernels"} | {"strengths", "turns"}
    expected = {(part, layer): 0.1 * layer for layer in range(4) for part in ("mlp.down_proj plain", "self_attn.o_proj plain")}
    for name, values in (("strengths", expected), ("turns", {place: 1 - coeff for place, coeff in expected.items()})):
        rows = page.data["plots"][name]["data"]["values"]
        assert {(row["component"], row["layer"]): row["value"] for row in rows} == pytest.approx(values)
    words = (
        "learned by gradient",
        "β 10, 40 steps, 6 modules",
        "30, sha256 plain",
        "loss 0.123457, plain plain",
        "each module",
    )
    assert all(part in page.text for part in words)
    points = page.data["plots"]["front"]["layer"][1]["data"]["values"]
    assert [point["scope"] for point in points if point["kind"] == "selected"] == [
        "refined by gradient: β 10, 40 steps, 6 modules"
    ]
    show(material)
    out = capsys.readouterr().out
    assert "Trial 41, refined by gradient: β 10, 40 steps, 6 modules" in out
    assert "│·▃▅█······│" in out  # λ of 0, 0.1, 0.2 and 0.3 in the first four of ten layers
    assert material.importance == gather(made_run(tmp_path / "other")).importance


def test_the_page_says_that_there_are_several_directions(tmp_path: Path) -> None:
    material = gather(made_run(tmp_path / "run"))
    assert isinstance(material.selected, Trial)
    assert isinstance(material.selected.params, TrialParams)
    assert "for each of them λ is multiplied by its weight" not in Page(render(material)).text
    params = replace(material.selected.params, extra={weight_name(0): 0.25, weight_name(1): 0.75})
    trials = [replace(trial, params=params) if trial == material.selected else trial for trial in material.search.trials]
    text = Page(render(replace(material, search=replace(material.search, trials=trials)))).text
    assert "There are 2 directions, and for each of them λ is multiplied by its weight" in text


@pytest.mark.parametrize(
    ("mode", "said", "shown", "title"),
    [
        ("full", "0 is none and 1 all of it", "1 removes all of the direction", ": "),
        ("key-conditional", "of inputs like those of harmful prompts alone", "times what inputs of harmful prompts", ": "),
        ("least-squares", "that weighs its inputs of harmful prompts against others", "as far as others allow it", ": "),
        ("arbitrary-rank", "The edit uses no direction", "1 is the whole change that was found", ""),
    ],
)
def test_the_page_says_what_coeffs_of_the_edit_mode_mean(mode: str, said: str, shown: str, title: str, tmp_path: Path) -> None:
    material = gather(made_run(tmp_path / "run"))
    material = replace(material, settings={**material.settings, "edit.mode": mode})
    assert material.selected is not None
    assert said in Page(render(material)).text
    (drawn,) = (plot for plot in all_plots(material) if plot.name == "kernels")
    assert shown in json.dumps(drawn.spec)
    assert ("dashed line" in json.dumps(drawn.spec)) == (title != "" and material.selected.params.scope == "global")
    assert kernel_table(material.selected, mode).title.startswith(f"Kernels of trial {material.selected.number}{title}")
    assert ("direction" in kernel_table(material.selected, mode).title) == bool(title)


def test_points_tell_a_trials_further_numbers(tmp_path: Path) -> None:
    material = gather(made_run(tmp_path / "run"))
    trials = tuple(
        replace(trial, params=replace(trial.params, extra={"steer": 0.125}))
        for trial in material.trials
        if isinstance(trial.params, TrialParams)
    )
    plot = front(replace(material, search=replace(material.search, trials=trials)))
    assert plot is not None
    points = plot.spec["layer"][1]
    assert {"field": "extra0", "title": "number 1"} in points["encoding"]["tooltip"]
    assert {row.get("extra0") for row in points["data"]["values"]} == {"steer: 0.125", None}  # none of the base model


def test_components_of_refined_trials_are_those_of_the_coverage() -> None:
    facts = {"cosine": {"h.3.attn.o": 0.5}}
    coeffs = {"h.3.attn.o": 1.0, "h.2.experts.0.down": 0.5, "h.2.experts.1.down": 0.0, "odd": 2.0}
    rows = layer_rows(
        RefinedParams(coeffs, "", "", facts),
        {"groups": [{"path": "attn.o", "component": "attn.o_proj"}, {"path": "x", "component": "y"}]},
    )
    assert rows == [
        LayerRow(3, "attn.o_proj", 1, 1.0, 0.5),
        LayerRow(2, "experts.*.down", 2, 0.25, None),
        LayerRow(0, "odd", 1, 2.0, None),
    ]


def test_a_refined_trial_tells_what_a_weaker_edit_leaves_refused() -> None:
    validation = {"refused": 0.0, "weaker": 0.075, "margin": 0.15, "prompts": 40}
    params = RefinedParams({"one": 0.5}, "", "", {"beta": 4.0, "steps": 20, "validation": validation})
    assert refined_text(params) == "β 4, 20 steps, 1 modules, 15 % weaker: 3 of 40 refused"
    for odd in (None, [1], {}, validation | {"weaker": "many"}):
        assert refined_text(RefinedParams({"one": 0.5}, "", "", {"validation": odd})) == "1 modules"


@pytest.mark.parametrize("facts", [{}, {"prompts": None}, {"prompts": [1]}, {"prompts": {"harmful": 3}}, {"start": [{}]}])
def test_facts_of_another_form_are_shown_as_they_are(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run", refined=True)
    record = json.loads(run.result.read_text(encoding="utf-8"))
    record["trials"][-1]["params"]["facts"] = facts
    write_json(run.result, record)
    page = Page(render(gather(run)))
    assert set(page.data["plots"]) == PLOTS - {"kernels"} | {"strengths"}
    assert "6 modules" in page.text
    show(gather(run))
    assert "refined by gradient: 6 modules" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said", "printed"),
    [
        ({"trial": 999}, "are of another trial than the selected", "are of another trial than the selected"),
        ({"kl": 7}, "can't read all that was measured", "can't read the figures on held-out prompts"),
        (None, "Nothing was measured on held-out prompts", "Nothing was measured on held-out prompts"),
    ],
)
def test_held_out_scores_that_are_not_there(
    change: dict[str, Any] | None, said: str, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(tmp_path / "run")
    record = json.loads(run.result.read_text(encoding="utf-8"))
    write_json(run.result, record | {"heldout": None if change is None else record["heldout"] | change})
    text = Page(render(gather(run))).text
    assert said in text
    assert ("it answers 97/100 [91.5–99.4 %] and refuses 3/100" in text) == (change == {"kl": 7})
    show(gather(run))
    assert printed in capsys.readouterr().out


def test_a_share_that_is_unknown_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    record = json.loads(run.result.read_text(encoding="utf-8"))
    coverage = json.loads((TESTS / "support" / "golden" / "result.json").read_text(encoding="utf-8"))["coverage"]
    write_json(run.result, record | {"coverage": coverage | {"untold": "load.path names the modules", "share": 1.0}})
    text = Page(render(gather(run))).text
    show(gather(run))
    for told in (text, capsys.readouterr().out):
        assert re.search(r"can be edited is unknown.*load.path names the modules", told)
        assert "100.0%" not in told


def test_the_progress_is_the_hypervolume_of_the_front_so_far() -> None:
    from abliterate.report.data import _progress

    trials, base = made_trials(40), Baseline(100, 100, {}, {"count": 100})
    rows = _progress(trials, base, DEFAULT)
    expected = [hypervolume(pareto_front(trials[:count], base), base) for count in range(1, 41)]
    assert [row["hypervolume"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert rows[-1]["seconds"] == 40.0


@pytest.mark.parametrize("refined", [False, True])
def test_foreign_text_is_text(refined: bool, tmp_path: Path) -> None:
    plain, hostile = (
        Page(render(gather(made_run(tmp_path / name, name, refined=refined)))) for name in ("plain", HOSTILE.replace("/", "|"))
    )
    assert HOSTILE.replace("/", "|") in hostile.text
    page = Page(render(gather(made_run(tmp_path / "run", HOSTILE, refined=refined))))
    assert HOSTILE in page.text
    assert HOSTILE in json.dumps(page.data["layers"], ensure_ascii=False).replace('\\"', '"')
    elements = [tag for tag, _ in page.tags]
    # In plots the hostile word takes another width, so their paths may differ; no element is new.
    assert set(elements) == {tag for tag, _ in plain.tags}
    assert elements.count("script") == 4
    assert not {"img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(elements)


def test_nothing_is_fetched_and_nothing_runs_from_outside(tmp_path: Path) -> None:
    text = render(gather(made_run(tmp_path / "run", HOSTILE)))
    page = Page(text)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")], tag
        address = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert address.startswith("#") or address == "data:,", (tag, address)
    style = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"url\((?!#)", style)
    assert "@import" not in style
    policies = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])


def test_no_path_and_no_password_gets_in(tmp_path: Path) -> None:
    material = gather(made_run(tmp_path / "run"))
    text = render(material)
    for word in ("hunter2", "/home/me", "secret-models", "Users", str(tmp_path)):
        assert word not in text
    assert material.settings["prompts.harmful"] == "prompts.txt"
    assert material.settings["search.storage"] == "postgresql://…"
    assert material.settings["evaluation.markers"] == "markers.txt"
    assert material.settings["prompts.system"] == "/think"


def test_the_page_says_which_records_are_missing(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", count=4)
    for path in (run.geometry, run.answers, run.settings):
        path.unlink()
    page = Page(render(gather(run)))
    for part in (
        "geometry.json isn't",
        "answers.json isn't",
        "settings.toml isn't",
        "fewer than 20",
        "which matrices are edited",
    ):
        assert part in page.text
    assert set(page.data["plots"]) == {"front", "progress", "progress-in-time", "kernels", "times", "memory"}


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda record: record | {"format": 2},
    "no object": lambda record: [],
    "nothing in it": lambda record: {"format": 1},
    "no numbers": lambda record: {**record, "layers": [{"index": "<b>"}], "harmful": 1},
    "a point too few": lambda record: {**record, "prompts": {"harmful": [], "harmless": []}, "harmless": [{}]},
    "of something else": lambda record: {**record, "directions": "other", "trial": 999},
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_damaged_artifacts_are_said_and_left_out(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    run = made_run(tmp_path / "run", count=4)
    for path in (run.geometry, run.answers):
        path.write_text(json.dumps(damage(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    material = gather(run)
    assert (material.geometry, material.answers) == (None, None)
    assert {"geometry", "answers"} <= set(material.missing)
    assert "--resume" in Page(render(material)).text


def test_a_run_without_trials_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run")
    record = json.loads(run.result.read_text(encoding="utf-8"))
    write_json(run.result, record | {"trials": [], "front": [], "selected": None})
    material = gather(run)
    assert "No trial has finished yet" in Page(render(material)).text
    show(material)
    assert "No trial has finished yet" in capsys.readouterr().out


def test_residuals_that_were_only_added_up(prompt_files: dict[str, str], tmp_path: Path) -> None:
    few = {"search": {"trials": 1, "startup_trials": 1}, "response": {"max_new_tokens": 4}}
    over = {"efficiency": {"max_residuals_mb": 0}, "export": {"kind": "none"}, **few}
    settings = quick_settings(prompt_files, tmp_path / "cache", **over)
    run_in(tmp_path / "run", settings)
    run = RunDirectory(tmp_path / "run")
    geometry = json.loads(run.geometry.read_text(encoding="utf-8"))
    assert geometry["projection"] == []
    assert "max_residuals_mb" in geometry["reason"]
    page = Page(run.report.read_text(encoding="utf-8"))
    assert {"norms", "cosines"} <= set(page.data["plots"])
    assert not {"separation", "projection"} & set(page.data["plots"])
    assert "max_residuals_mb" in page.text


def test_without_the_library_there_are_tables(
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = checked_run(tmp_path / "run")
    monkeypatch.setattr(draw, "_drawn", DRAWN)
    monkeypatch.setattr(draw, "unavailable", lambda: "There are no plots, because of this test: repeat.")
    page = Page(render(gather(run)))
    assert "no plots, because of this test" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 0
    assert [tag for tag, _ in page.tags].count("table") > 8
    assert_sentence(invoke("report", run.path, "--png", tmp_path / "png"), 1, "no plots")


def test_plots_as_images(invoke: Invoke, tmp_path: Path) -> None:
    run = checked_run(tmp_path / "run", HOSTILE)
    outcome = invoke("report", run.path, "--png", tmp_path / "png")
    assert outcome.code == 0, outcome
    assert outcome.out.splitlines()[0] == str(run.report)  # in a pipe nothing else is shown
    images = {path.stem: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert set(images) == PLOTS
    assert all(image.startswith(b"\x89PNG") and len(image) > 3000 for image in images.values())
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert_sentence(invoke("report", run.path, "--png", tmp_path / "file"), 2, "--png")
    run.result.write_text('{"format": 1, "trials": [{}], "baseline": {}}', encoding="utf-8")
    assert_sentence(invoke("report", run.path), 2, "damaged", "--resume")


def test_the_terminal_shows_the_same(invoke: Invoke, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "\x1b[2Jred\u202e")
    out = invoke("report", run.path, "--terminal").out
    for part in ("◆ selected", "Hypervolume", "Parameter importance", "silhouette", "harmful: ask", "GiB", "seed 7"):
        assert part in out
    assert "[Sorry]" in out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_plots_are_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material = gather(made_run(tmp_path / "run"))
    assert all_plots(material) == all_plots(material)
    before = render(material)
    monkeypatch.setattr(draw, "_drawn", DRAWN)
    assert render(material) == before


def test_what_a_drawing_cant_hold_is_no_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vl-convert ends its whole process at a control character; and half a surrogate pair is no text."""
    run = made_run(tmp_path / "run", "\x1b\x00\ufffe")
    record = json.loads(run.result.read_text(encoding="utf-8"))
    run.result.write_text(json.dumps(record | {"late": "\ud800"}), encoding="utf-8")
    write_report(run)
    assert set(Page(run.report.read_text(encoding="utf-8")).data["plots"]) == PLOTS
    monkeypatch.setattr(draw, "_drawn", DRAWN)
    monkeypatch.setattr(draw, "_PROGRAM", "import os; os.abort()")
    write_report(run)
    page = Page(run.report.read_text(encoding="utf-8"))
    assert "no plots, because vl-convert failed" in page.text
    assert "plots" not in page.data


def test_a_page_that_says_less_is_warned_of(invoke: Invoke, tmp_path: Path) -> None:
    run = checked_run(tmp_path / "run")
    assert invoke("report", run.path).err == ""
    run.geometry.write_text("{", encoding="utf-8")
    found = invoke("report", run.path)
    assert "warning: The file geometry.json can't be read" in found.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("names", "said"),
    [("refusals", "the plot shows it by trial"), ("refusals own", "the plot shows both"), ("kl refusals own", "first two")],
)
def test_the_front_of_other_objectives_says_what_it_shows(names: str, said: str, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    record = json.loads(run.result.read_text(encoding="utf-8"))
    values = {"own": 2.5, "kl": 0.0, "refusals": 100.0}
    for trial in record["trials"]:
        trial["values"] = values if trial["scores"] else {}
    record["objectives"] = [{"name": name, "goal": "minimize"} for name in names.split()]
    record["baseline"]["values"] = values
    write_json(run.result, record)
    page = Page(render(gather(run)))
    assert said in page.text
    assert "The base model has" in page.text
    assert ("own 2.5." in page.text) == ("own" in names)
    assert "front" in page.data["plots"]


def test_plots_that_cant_be_drawn_are_a_warning(
    finished: Finished, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where address space is limited, where the engine isn't installed, and where it dies: told, and the page is there."""
    resource = pytest.importorskip("resource")
    run = copy_run(finished[0], tmp_path / "run")
    python = tmp_path / "python"
    for program, words in (
        (f'#!/bin/sh\nulimit -v 10485760\nexec {sys.executable} "$@"\n', "vl-convert failed"),
        ("#!/bin/sh\nkill -9 $$\n", "vl-convert failed"),
        ("", "pip install vl-convert-python"),
    ):
        (run / "report.html").unlink()
        python.write_text(program, encoding="utf-8")
        python.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(draw, "_drawn", DRAWN)
            patch.setattr(draw.sys, "executable", str(python))
            if not program:
                patch.setattr(draw.importlib.util, "find_spec", lambda name: None)
            outcome = invoke("report", run, "--no-terminal")
        assert outcome.code == 0
        (warning,) = outcome.err.splitlines()
        assert warning.startswith("warning: There are no plots, because ")
        assert words in warning
        assert words in (run / "report.html").read_text(encoding="utf-8")
    assert "There are no plots" not in invoke("report", run, "--no-terminal").err
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10 * 2**30, -1))
    assert draw._remedy() == "a larger limit on address space (ulimit -v; it is 10 GiB)"


def test_a_run_warns_of_plots_that_cant_be_drawn(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def undrawable(specs: object) -> None:
        raise draw.Undrawable("There are no plots, because of this test.")

    monkeypatch.setattr(draw, "svg", undrawable)
    run = copy_run(finished[0], tmp_path / "run")
    result, recorder = run_in(run, finished[2], resume=True)
    assert recorder.warnings.count("There are no plots, because of this test.") == 1
    assert "because of this test" in (run / "report.html").read_text(encoding="utf-8")
    assert result["selected"] == finished[1]["selected"]


def test_a_selected_trial_beside_the_front_is_not_on_its_line(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", count=12)
    record = json.loads(run.result.read_text(encoding="utf-8"))
    beside = next(t["number"] for t in record["trials"] if t["state"] == "complete" and t["number"] not in record["front"])
    write_json(run.result, {name: value for name, value in record.items() if name != "sha256"} | {"selected": beside})
    plot = front(gather(run))
    assert plot is not None
    line, points = (layer["data"]["values"] for layer in plot.spec["layer"])
    assert str(beside) in {row.get("number") for row in points}
    assert {row.get("number") for row in line} == {None, *map(str, record["front"])}


@pytest.mark.parametrize(
    "change", [{"index": 999}, {"norm_harmful": 10**400}, {"norm_harmful": float("nan")}, {"silhouette": None}]
)
def test_geometry_that_no_run_wrote_is_left_out_or_shown(change: dict[str, Any], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", count=4)
    record = json.loads(run.geometry.read_text(encoding="utf-8"))
    record["layers"][-1] |= change
    run.geometry.write_text(json.dumps(record), encoding="utf-8")
    material = gather(run)
    assert (material.geometry is None) == ("silhouette" not in change)
    render(material)


def test_nothing_foreign_reaches_the_terminals_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run", count=4)
    for path in (run.geometry, run.answers):
        path.write_text(json.dumps({"format": "\x1b[2J\x1b[31mx"}), encoding="utf-8")
    show(gather(run))
    assert "\x1b" not in capsys.readouterr().out
