"""Read and check the records in a run directory that a report needs; a sentence replaces each missing record.

Paths of this machine, addresses of databases and tokens are removed here, so that no page can show them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from abliterate.artifacts.result import Result, damaged
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError, first_line
from abliterate.files import read_toml
from abliterate.report.tables import SearchRecord
from abliterate.search.front import progress as hypervolumes
from abliterate.search.importance import ENOUGH, importances
from abliterate.types import Baseline, Objective, Trial, number

# What stands for a part of the report that a run at work may still write.
LATER = "The run hasn't come to this yet."
# Settings whose texts may begin with a slash and are no paths.
_TEXTS = ("response.", "prompts.system", "prompts.prefix", "prompts.suffix")


@dataclass(frozen=True)
class Material:
    """The content of a run directory, as a report needs it.

    `geometry` and `answers` are None where no usable file is there, and then `missing` says why, by name.
    `importance`: {objective: {parameter: share}}. `progress`: hypervolume after each trial, and the seconds until then.
    `stage_seconds` and `stage_memory` are `Result`'s.
    """

    result: Mapping[str, Any]
    search: SearchRecord
    settings: Mapping[str, Any]
    geometry: Mapping[str, Any] | None
    answers: Mapping[str, Any] | None
    importance: Mapping[str, Mapping[str, float]]
    progress: tuple[Mapping[str, float], ...]
    missing: Mapping[str, str]
    stage_seconds: Mapping[str, float]
    stage_memory: Mapping[str, Mapping[str, int]]
    # Whether the run is at work, so that what is missing may still come.
    unfinished: bool = False
    # Why its figures may be anything; empty where a checksum vouches for them.
    doubt: str = ""

    @staticmethod
    def of_search(search: SearchRecord) -> Material:
        """What a search in memory has: its trials and its baseline; only `plots.front` and `plots.progress` show that."""
        base = search.baseline
        progress = tuple(_progress(search.trials, base, search.objectives)) if base else ()
        return Material({}, search, {}, None, None, {}, progress, {}, {}, {})

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial that has finished."""
        return self.search.trials

    @property
    def prompts(self) -> int:
        """The number of harmful prompts that were scored."""
        return self.search.prompts

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the search."""
        return self.search.objectives

    @property
    def others(self) -> list[str]:
        """The scorers beside refusals and KL, objectives first."""
        return self.search.others

    @property
    def selected(self) -> Trial | None:
        """The selected trial, if there is one yet."""
        return self.search.selected_trial

    @property
    def scored(self) -> tuple[Trial, ...]:
        """The trials that have scores, if only bounds of them."""
        return tuple(trial for trial in self.trials if trial.state != "failed")

    @property
    def n_layers(self) -> int:
        """The model's number of decoder layers."""
        return int(self.result["model"]["n_layers"])

    @property
    def edit_mode(self) -> str:
        """How matrices are edited; empty if the settings are missing."""
        return str(self.settings.get("edit.mode", ""))

    @property
    def heldout(self) -> Mapping[str, Any]:
        """The record of held-out prompts, or an empty record."""
        return self.result.get("heldout") or {}

    @property
    def coverage(self) -> Mapping[str, Any]:
        """Which matrices are edited, or an empty record."""
        return self.result.get("coverage") or {}

    @property
    def caches(self) -> Mapping[str, Mapping[str, int]]:
        """Hits and misses of each cache."""
        return self.result["caches"]

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions, platform and device."""
        return self.result.get("environment", {})

    def is_front(self, trial: Trial) -> bool:
        """Whether a trial is on the front."""
        return trial.number in self.search.front


def gather(directory: RunDirectory, run: Result | None = None, *, unfinished: bool = False) -> Material:
    """Read a run directory; `run`: its result, where it is at hand.

    `unfinished`: the run is at work, so what isn't there may come, and the importance of parameters isn't computed yet.

    Raises:
        InputError: there is no run, or its `result.json` is damaged.
    """
    run = run or Result.read(directory)
    result = run.to_record()
    missing: dict[str, str] = {}
    geometry = _read(directory.geometry, _check_geometry, "geometry", missing)
    if geometry is not None and geometry["directions"] != result.get("directions", {}).get("sha256", geometry["directions"]):
        geometry, missing["geometry"] = None, _again(directory.geometry.name, "belongs to other directions than the run's")
    answers = _read(directory.answers, _check_answers, "answers", missing)
    if answers is not None and answers["trial"] != result.get("selected"):
        answers, missing["answers"] = None, _again(directory.answers.name, "has the answers of another trial than the selected")
    search = SearchRecord.of(run)
    base, scored = search.baseline, search.baseline is not None and search.baseline.prompts > 0
    try:
        known = scored and not unfinished
        importance = importances(search.trials, search.prompts, objectives=search.objectives) if known else {}
        progress = tuple(_progress(search.trials, base, search.objectives)) if base and scored else ()
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a trial lacks a score or a parameter
        raise damaged(directory, f"{type(error).__name__}: {first_line(error)}") from error
    if not importance:
        missing["importance"] = f"Which parameters mattered can't be seen in fewer than {ENOUGH} scored trials that differ."
    settings = public_settings(directory, missing)
    if unfinished:
        absent = {"geometry": directory.geometry, "answers": directory.answers, "settings": directory.settings}
        missing |= {name: LATER for name, path in absent.items() if name in missing and not path.exists()}
        missing |= dict.fromkeys(("importance", "coverage", "heldout"), LATER)
    stages = run.stage_seconds(), run.stage_memory()
    return Material(result, search, settings, geometry, answers, importance, progress, missing, *stages, unfinished, run.doubt)


def changed_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of `answers.json`, those first that the base model refuses and the edited model answers; else in their order."""

    def changed(row: Mapping[str, Any]) -> bool:
        after = row["edited"]
        return bool(row["base"].get("refusal")) and not (after.get("refusal") or after.get("thinking_open"))

    return sorted(rows, key=lambda row: not changed(row))


def _progress(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective]) -> list[dict[str, float]]:
    """The trials' own seconds are added up, which is more than passed on the clock if there were several workers."""
    volumes = hypervolumes(trials, baseline, objectives)
    seconds = itertools.accumulate(trial.seconds for trial in trials)
    return [
        {"trial": count, "hypervolume": round(volume, 6), "seconds": round(until, 3)}
        for count, (volume, until) in enumerate(zip(volumes, seconds, strict=True), 1)
    ]


def _read(path: Path, check: Callable[[Any], None], name: str, missing: dict[str, str]) -> Mapping[str, Any] | None:
    """A record of the run directory; if it can't be used, `missing` gets the reason."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1:
            missing[name] = _again(path.name, f"has format {str(record['format'])[:20]}, and this version reads format 1")
            return None
        check(record)
    except FileNotFoundError:
        missing[name] = _again(path.name, "isn't in the run directory")
    except (OSError, AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        missing[name] = _again(path.name, "can't be read")
    else:
        return record
    return None


def _again(name: str, problem: str) -> str:
    return f"The file {name} {problem}; abliterate run --resume writes it again."


def _check_geometry(record: Any) -> None:
    """Raise KeyError, TypeError or ValueError for a record that the run can't have written."""
    numbers = [row[name] for row in record["layers"] for name in ("index", "norm_harmful", "norm_harmless", "cos_means")]
    numbers += [value for row in record["layers"] for name, value in row.items()]
    numbers += [value for layer in record["projection"] for value in layer["explained"]]
    for layer in record["projection"]:
        for name in ("harmful", "harmless"):
            if len(layer[name]) != len(record["prompts"][name]) or any(len(point) != 2 for point in layer[name]):
                raise ValueError("points without a prompt")
            numbers += [value for point in layer[name] for value in point]
    for value in numbers:
        if value is not None:
            number(value)
    if [row["index"] for row in record["layers"]] != list(range(len(record["layers"]))):
        raise ValueError("other layers")
    if not isinstance(record["sampled"], Mapping):
        raise TypeError("no numbers of prompts")
    if len(record["projection"]) not in (0, len(record["layers"])) or not isinstance(record["reason"], str):
        raise ValueError("a projection of other layers")
    if not {"directions", "sampled"} <= record.keys():
        raise ValueError("no directions")


def _check_answers(record: Any) -> None:
    """The same for `answers.json`."""
    if not {"trial", "max_new_tokens"} <= record.keys():
        raise ValueError("no trial")
    for row in (*record["harmful"], *record["harmless"]):
        texts = [row["prompt"], row["base"]["text"], row["edited"]["text"]]
        ends = [end for name in ("base", "edited") for start, stop in row[name]["markers"] for end in (start, stop)]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(end, int) for end in ends):
            raise TypeError("no text or no span")


def public_settings(directory: RunDirectory, missing: dict[str, str]) -> dict[str, Any]:
    """{dotted name: value}, without the folders and names of this machine; if there are none, `missing` says why."""
    try:
        stored = read_toml(directory.settings)
    except InputError:
        missing["settings"] = f"The file {directory.settings.name} isn't in the run directory or can't be read."
        return {}
    if not stored:
        missing["settings"] = f"The file {directory.settings.name} is empty, so it isn't as the run wrote it."
    return {name: _public(name, value) for name, value in _flat(stored) if name not in ("out", "cache_dir")}


def _flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in table.items():
        pairs += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else [(before + name, value)]
    return pairs


def _public(name: str, value: Any) -> Any:
    """A value without folders and without addresses, which may hold a password."""
    if isinstance(value, list):
        return [_public(name, entry) for entry in value]
    if not isinstance(value, str) or name.startswith(_TEXTS):
        return value
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value):
        return f"{match[1]}://…"
    if re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        return PureWindowsPath(value).name
    return PurePosixPath(value).name if value.startswith(("/", "~")) else value
