"""`result.json`: what is written is read back, and a file that isn't whole is refused in one sentence."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.result import Environment, ExportRecord, ModelRecord, OtherVersion, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.files import DIGEST, digest_of, write_json
from abliterate.objectives import DEFAULT
from abliterate.types import Baseline, Kernel, Objective, Trial, TrialParams
from support.paths import TESTS

GOLDEN = json.loads((TESTS / "support" / "golden" / "result.json").read_text(encoding="utf-8"))
PARAMS = TrialParams("per layer", 1.5, {"attn.o_proj": Kernel(1.2, 3.0, 0.1, 2.0)})
KL = {"mean": 0.25, "median": 0.125, "max": 0.5}
SCORES = {"refusals": 3, "kl": KL, "unanswered": {"count": 4, "refused": 3, "broken": 1, "off_topic": 0, "answered": 8}}
MODEL = ModelRecord(id="m", revision="", fingerprint="sha256:0", dtype="float32")


def full() -> dict[str, Any]:
    """The content of a `result.json` with everything that a run may leave in it."""
    record = copy.deepcopy(GOLDEN)
    record.pop(DIGEST, None)
    trial = record["trials"][0]
    record["trials"] += [
        trial | {"number": 90, "state": "stopped"},
        trial | {"number": 91, "state": "failed", "scores": {}, "values": {}, "reason": "out of memory."},
    ]
    record["heldout"] = {"trial": record["selected"], "kl": {"mean": 0.1}, "judges": [], "search": None}
    record["reproduction"] = {"outcome": "identical", "files": None}
    return record


def directory_with(folder: Path, record: Mapping[str, Any] | str | bytes, *, checksum: bool = True) -> RunDirectory:
    """A run directory with this content in its `result.json`; a record gets its right checksum."""
    folder.mkdir(exist_ok=True)
    path = folder / "result.json"
    if isinstance(record, Mapping):
        write_json(path, {**record, DIGEST: digest_of(record)} if checksum else record)
    else:
        path.write_bytes(record if isinstance(record, bytes) else record.encode())
    return RunDirectory(folder)


def sentence(folder: Path, record: Any, error: type[InputError] = InputError, **options: bool) -> str:
    """The one sentence that refuses this content."""
    directory = directory_with(folder, record, **options)
    with pytest.raises(error) as caught:
        Result.read(directory)
    text = str(caught.value)
    assert type(caught.value) is error
    assert str(directory.result) in text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_full_record_is_read_and_written_unchanged(tmp_path: Path) -> None:
    record = full()
    result = Result.read(directory_with(tmp_path / "run", record))
    assert json.dumps(result.to_record()) == json.dumps(record)
    result.write(RunDirectory(tmp_path / "run"))
    first = (tmp_path / "run" / "result.json").read_bytes()
    Result.read(RunDirectory(tmp_path / "run")).write(RunDirectory(tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").read_bytes() == first
    written = json.loads(first)
    assert written.pop(DIGEST) == digest_of(record)
    assert json.dumps(written) == json.dumps(record)


def test_what_is_read_is_typed() -> None:
    record = full()
    result = Result.model_validate(record)
    assert result.model is not None
    assert (result.model.id, result.model.n_layers) == (record["model"]["id"], record["model"]["n_layers"])
    assert all(isinstance(trial, Trial) for trial in result.trials)
    assert [trial.to_record() for trial in result.trials] == record["trials"]
    assert result.objectives_or_default() == tuple(Objective(**one) for one in record["objectives"])
    assert isinstance(result.baseline, Baseline)
    assert (result.baseline.to_record(), result.n_harmful) == (record["baseline"], record["baseline"]["prompts"])
    assert result.export.verified is True


def test_a_new_result_has_every_part_and_is_read_back(tmp_path: Path) -> None:
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    new = Result()
    record = new.to_record()
    parts = ["format", "model", "prompts", "objectives", "baseline", "trials", "front", "selected", "export", "timings"]
    assert list(record) == [*parts, "memory", "caches", "environment"]
    assert (record["model"], record["baseline"], record["selected"]) == ({}, {}, None)
    assert record["export"] == {"kind": "none", "path": None, "verified": None, "pushed": None}
    new.write(RunDirectory(tmp_path))
    found = Result.read(RunDirectory(tmp_path))
    assert found.to_record() == record
    assert (found.model, found.baseline, found.n_harmful, found.objectives_or_default()) == (None, None, 0, DEFAULT)


def test_searched_names_the_front_by_number(tmp_path: Path) -> None:
    trials = [Trial(number, PARAMS, "complete", SCORES, 1.0) for number in range(3)]
    result = Result(model=MODEL)
    result.searched(trials, trials[1:2], Baseline(9, 12, {}, {"count": 10}), DEFAULT)
    result.update(selected=1, export=ExportRecord(kind="merged", trial=1, path="model", dtype="float32"))
    result.write(RunDirectory(tmp_path))
    found = Result.read(RunDirectory(tmp_path))
    assert (found.trials, found.front, found.selected) == (trials, [1], 1)
    assert (found.baseline, found.objectives) == (Baseline(9, 12, {}, {"count": 10}), list(DEFAULT))
    assert found.to_record()["export"] == {"kind": "merged", "trial": 1, "path": "model", "dtype": "float32"}


def test_unknown_fields_survive(tmp_path: Path) -> None:
    """A later version of the same format may say more, and a run that goes on must not lose it."""
    record = full() | {"later": {"a": [1, None, 2.5]}, "note": "é"}
    for name in ("model", "export", "memory", "environment", "directions"):
        record[name] = record[name] | {"later": name}
    record["prompts"]["harmful"]["later"] = True
    directory = directory_with(tmp_path / "run", record)
    Result.read(directory).write(directory)
    written = json.loads(directory.result.read_text(encoding="utf-8"))
    assert written.pop(DIGEST) == digest_of(record)
    assert written == record
    assert Result.continued(directory).to_record() | {"environment": record["environment"]} == record


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^There is no run in {re.escape(str(tmp_path))}; "):
        Result.read(RunDirectory(tmp_path))


@pytest.mark.parametrize("version", [0, 2, 99, -1])
def test_other_formats_are_refused(version: int, tmp_path: Path) -> None:
    text = sentence(tmp_path, {"format": version, "anything": True}, OtherVersion)
    assert f"has format {version}, this version reads format 1; use the version of abliterate that wrote it." in text
    with pytest.raises(OtherVersion):
        Result.continued(RunDirectory(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "nothing", b"\xff", b"\0", "[" * 100_000, '{"format": 1, "model": {"id": "m"'])
def test_no_json(content: str | bytes, tmp_path: Path) -> None:
    text = sentence(tmp_path, content)
    assert "can't be read: " in text
    assert text.endswith(f"; abliterate run --resume --out {tmp_path} rebuilds it.")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '"text"', "null", '{"format": "1"}', '{"format": null}', '{"format": [1]}']
)
def test_no_format(content: str, tmp_path: Path) -> None:
    assert f"is damaged (it has no format); abliterate run --resume --out {tmp_path} rebuilds it." in sentence(
        tmp_path, content
    )


def test_a_wrong_checksum(tmp_path: Path) -> None:
    record = full()
    changed = {**record, DIGEST: digest_of(record), "selected": None}
    assert "is damaged (its checksum is wrong); " in sentence(tmp_path, changed, checksum=False)
    # A file without a checksum was written by a person.
    assert Result.read(directory_with(tmp_path, record, checksum=False)).to_record() == record


@pytest.mark.parametrize("name", ["model", "baseline", "trials", "front", "selected", "export"])
def test_each_required_part(name: str, tmp_path: Path) -> None:
    record = full()
    del record[name]
    assert f"is damaged (it lacks {name}); abliterate run --resume --out {tmp_path} rebuilds it." in sentence(tmp_path, record)


def _change(*path: str | int, value: Any = None, drop: bool = False) -> Callable[[dict[str, Any]], None]:
    """A change of a record at a place in it."""

    def change(record: dict[str, Any]) -> None:
        *outer, last = path
        inner: Any = record
        for name in outer:
            inner = inner[name]
        if drop:
            del inner[last]
        else:
            inner[last] = value

    return change


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a trial without scores": (_change("trials", 0, "scores", drop=True), "trials.0: "),
    "a complete trial with no scores": (_change("trials", 0, "scores", value={}), "trials.0: "),
    "a complete trial without KL": (_change("trials", 0, "scores", value={"refusals": 3}), "trials.0: "),
    "a KL without its mean": (_change("trials", 0, "scores", "kl", value={}), "trials.0: "),
    "a trial without parameters": (_change("trials", 1, "params", drop=True), "trials.1: "),
    "a kernel without a field": (_change("trials", 0, "params", "kernels", "attn.o_proj", "distance", drop=True), "trials.0: "),
    "a text for a number": (_change("trials", 0, "params", "direction_index", value="x"), "trials.0: "),
    "a number that is none": (_change("trials", 0, "number", value="x"), "trials.0: "),
    "a trial that is a list": (_change("trials", 0, value=[]), "trials.0: "),
    "negative refusals": (_change("trials", 0, "scores", "refusals", value=-1), "trials.0: "),
    "negative KL": (_change("trials", 0, "scores", "kl", "mean", value=-0.1), "trials.0: "),
    "negative baseline refusals": (_change("baseline", "refusals", value=-1), "baseline: "),
    "negative baseline prompts": (_change("baseline", "prompts", value=-1), "baseline: "),
    "a baseline without prompts": (_change("baseline", "prompts", drop=True), "baseline: "),
    "a baseline that is a number": (_change("baseline", value=3), "baseline: "),
    "no baseline": (_change("baseline", value={}), "lacks the model or the baseline"),
    "no model": (_change("model", value={}), "lacks the model or the baseline"),
    "a model without fingerprint": (_change("model", "fingerprint", drop=True), "model.fingerprint: "),
    "a model that is a text": (_change("model", value="m"), "model: "),
    "a negative count of prompts": (_change("prompts", "harmful", "count", value=-1), "prompts.harmful.count: "),
    "a front of no trial": (_change("front", value=[0, 1000]), "front or selected name a trial that isn't there"),
    "a selected trial that isn't there": (_change("selected", value=1000), "front or selected name a trial that isn't there"),
    "a front of texts": (_change("front", value=["x"]), "front.0: "),
    "trials that are no list": (_change("trials", value=3), "trials: "),
    "an objective that is a number": (_change("objectives", value=[3]), "objectives.0: "),
    "an objective without a goal": (_change("objectives", 0, "goal", drop=True), "objectives.0: "),
    "a failed trial whose scores are a list": (_change("trials", 4, "scores", value=[]), "trials.4: "),
    "broken answers without off-topic ones": (
        _change("trials", 0, "scores", "unanswered", value={"count": 3, "broken": 0}),
        "trials.0: ",
    ),
    "a quantile that is no share": (
        _change("yardstick", value={"bounds": {"x": 1.0}, "answers": 1, "quantiles": {"x": {"abc": 1.0}}}),
        "yardstick: ",
    ),
    "timings of texts": (_change("timings", value={"load": "x"}), "timings.load: "),
    "an export that is a list": (_change("export", value=[]), "export: "),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_said_with_its_place(how: str, tmp_path: Path) -> None:
    """Past the checksum: what a person or another tool might write."""
    change, part = DAMAGE[how]
    record = full()
    change(record)
    text = sentence(tmp_path, record)
    assert f"The file {tmp_path / 'result.json'} is damaged (" in text
    assert part in text
    assert text.endswith(f"); abliterate run --resume --out {tmp_path} rebuilds it.")


def test_numbers_of_any_size_are_no_crash(tmp_path: Path) -> None:
    record = full()
    record["trials"][0]["number"] = float("inf")
    content = json.dumps({**record, DIGEST: digest_of(record)})
    assert "Infinity is no number" in sentence(tmp_path, content)


def test_a_trial_is_given_or_the_reason_why_not(tmp_path: Path) -> None:
    result = Result.model_validate(full())
    assert result.trial(0, "runs/x") == result.trials[0]
    for number, expected in {
        1000: "The run in runs/x has no finished trial 1000; see abliterate trials runs/x.",
        90: "Trial 90 was stopped because the unedited model or another trial is no worse in any objective; choose a trial "
        "that abliterate trials runs/x shows as complete.",
        91: "Trial 91 failed (out of memory); choose a trial that abliterate trials runs/x shows as complete.",
    }.items():
        with pytest.raises(InputError) as caught:
            result.trial(number, "runs/x")
        assert str(caught.value) == expected
    with pytest.raises(InputError, match="no finished trial 0"):
        Result().trial(0, tmp_path)


def test_a_run_goes_on_from_what_it_left(tmp_path: Path) -> None:
    record = full()
    record["environment"] = {"versions": {"torch": "0.1"}, "platform": "elsewhere", "device": "gone"}
    result = Result.continued(directory_with(tmp_path, record))
    here = Environment.here().model_dump(mode="json")
    assert result.to_record() == record | {"environment": here}, "of this session, not of the one before"


@pytest.mark.parametrize("how", ["none", "no JSON", "no format", "wrong checksum", *DAMAGE])
def test_a_damaged_file_is_built_anew(how: str, tmp_path: Path) -> None:
    """The study has the trials."""
    record = full()
    if how == "wrong checksum":
        directory_with(tmp_path, record | {DIGEST: "0"}, checksum=False)
    elif how in DAMAGE:
        DAMAGE[how][0](record)
        directory_with(tmp_path, record)
    elif how != "none":
        directory_with(tmp_path, "{" if how == "no JSON" else "{}")
    assert Result.continued(RunDirectory(tmp_path)).to_record() == Result().to_record()
