"""What a report is made of: the records in a run directory, read and checked; what is missing becomes a sentence.

Knows no HTML and no plots. Paths of this machine, databases' addresses and tokens don't get past here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError, first_line
from abliterate.files import read_toml
from abliterate.objectives import objectives_from_result, other_names
from abliterate.search.front import progress
from abliterate.search.importance import ENOUGH, importances
from abliterate.types import Baseline, Objective, Trial

# Written after the report is: it must be the same when it is made again.
_LATER = ("report",)
# Texts that may begin with a slash and are no paths.
_TEXTS = ("response.", "prompts.system", "prompts.prefix", "prompts.suffix")


@dataclass(frozen=True)
class Material:
    """The content of a run directory, as a report needs it.

    `geometry`, `answers`: None where there is none that can be used, and then `missing` says why, by name.
    `importance`: {objective: {parameter: share}}. `progress`: hypervolume after each trial, and the seconds until then.
    """

    result: Mapping[str, Any]
    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]
    geometry: Mapping[str, Any] | None
    answers: Mapping[str, Any] | None
    importance: Mapping[str, Mapping[str, float]]
    progress: tuple[Mapping[str, float], ...]
    missing: Mapping[str, str]

    @property
    def prompts(self) -> int:
        """Harmful prompts that were scored."""
        return int(self.result["baseline"].get("prompts", 0))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the search was for."""
        return objectives_from_result(self.result)

    @property
    def others(self) -> list[str]:
        """Scorers beside refusals and KL, objectives first."""
        return other_names({name for trial in self.trials for name in (*trial.scores, *trial.values)}, self.objectives)

    @property
    def selected(self) -> Trial | None:
        """The selected trial, if there is one yet."""
        return next((trial for trial in self.trials if trial.number == self.result["selected"]), None)

    @property
    def scored(self) -> tuple[Trial, ...]:
        """Trials that have scores, if only bounds."""
        return tuple(trial for trial in self.trials if trial.state != "failed")

    def stages(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of something by stage, the stages that were done before the report."""
        return {name: value for name, value in values.items() if name not in _LATER}

    def is_front(self, trial: Trial) -> bool:
        """Whether it is on the front."""
        return trial.number in self.result["front"]


def gather(directory: RunDirectory, run: Result | None = None) -> Material:
    """Read a run directory; `run`: its result, where it is at hand.

    Raises:
        InputError: there is no run, or its `result.json` is damaged.
    """
    result = (run or Result.read(directory)).to_record()
    missing: dict[str, str] = {}
    geometry = _read(directory.geometry, _check_geometry, "geometry", missing)
    if geometry is not None and geometry["directions"] != result.get("directions", {}).get("sha256", geometry["directions"]):
        geometry, missing["geometry"] = None, _again(directory.geometry.name, "belongs to other directions than the run's")
    answers = _read(directory.answers, _check_answers, "answers", missing)
    if answers is not None and answers["trial"] != result.get("selected"):
        answers, missing["answers"] = None, _again(directory.answers.name, "has the answers of another trial than the selected")
    try:
        trials = tuple(Trial.from_record(record) for record in result["trials"])
        prompts = int(result["baseline"].get("prompts", 0))
        objectives = objectives_from_result(result)
        importance = importances(trials, prompts, objectives=objectives) if prompts else {}
        if not importance:
            missing["importance"] = (
                f"Which parameters mattered can't be told from fewer than {ENOUGH} scored trials that differ."
            )
        return Material(
            {"front": [], "selected": None, **result},
            _settings(directory, missing),
            trials,
            geometry,
            answers,
            importance,
            tuple(_progress(trials, Baseline.from_record(result["baseline"]), objectives)) if prompts else (),
            missing,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"The file {directory.result} is damaged ({what}); abliterate run --resume rebuilds it.") from error


def _progress(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective]) -> list[dict[str, float]]:
    """Trials' own seconds are added up: with several workers that is more than passed on the clock."""
    volumes = progress(trials, baseline, objectives)
    seconds = itertools.accumulate(trial.seconds for trial in trials)
    return [
        {"trial": count, "hypervolume": round(volume, 6), "seconds": round(until, 3)}
        for count, (volume, until) in enumerate(zip(volumes, seconds, strict=True), 1)
    ]


def _read(path: Path, check: Callable[[Any], None], name: str, missing: dict[str, str]) -> Mapping[str, Any] | None:
    """A record of the run directory; where it can't be used, `missing` gets the reason."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1:
            missing[name] = _again(path.name, f"has format {str(record['format'])[:20]}, and this version reads format 1")
            return None
        check(record)
    except FileNotFoundError:
        missing[name] = _again(path.name, "isn't in the run directory")
    except (OSError, AttributeError, KeyError, IndexError, TypeError, ValueError):
        missing[name] = _again(path.name, "can't be read")
    else:
        return record
    return None


def _again(name: str, what: str) -> str:
    return f"The file {name} {what}; abliterate run --resume writes it again."


def _check_geometry(record: Any) -> None:
    """KeyError, TypeError or ValueError where it isn't what `report_data.geometry` writes."""
    numbers = [row[name] for row in record["layers"] for name in ("index", "norm_harmful", "norm_harmless", "cos_means")]
    numbers += [value for row in record["layers"] for name, value in row.items()]
    numbers += [value for one in record["projection"] for value in one["explained"]]
    for one in record["projection"]:
        for name in ("harmful", "harmless"):
            if len(one[name]) != len(record["prompts"][name]) or any(len(point) != 2 for point in one[name]):
                raise ValueError("points without a prompt")
            numbers += [value for point in one[name] for value in point]
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise TypeError("no number")
    if len(record["projection"]) not in (0, len(record["layers"])) or not isinstance(record["reason"], str):
        raise ValueError("a projection of other layers")
    if not {"directions", "sampled"} <= record.keys():
        raise ValueError("no directions")


def _check_answers(record: Any) -> None:
    """As `_check_geometry`, of what `report_data.answers` writes."""
    if not {"trial", "max_new_tokens"} <= record.keys():
        raise ValueError("no trial")
    for row in (*record["harmful"], *record["harmless"]):
        texts = [row["prompt"], row["base"]["text"], row["edited"]["text"]]
        places = [place for name in ("base", "edited") for start, end in row[name]["markers"] for place in (start, end)]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(place, int) for place in places):
            raise TypeError("no text or no place")


def _settings(directory: RunDirectory, missing: dict[str, str]) -> dict[str, Any]:
    """{dotted name: value}, without what is this machine's."""
    try:
        stored = read_toml(directory.settings)
    except InputError:
        missing["settings"] = f"The file {directory.settings.name} isn't in the run directory or can't be read."
        return {}
    return {name: _public(name, value) for name, value in _flat(stored) if name not in ("out", "cache_dir")}


def _flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else [(before + name, value)]
    return found


def _public(name: str, value: Any) -> Any:
    """A value without folders and without addresses, which may hold a password."""
    if isinstance(value, list):
        return [_public(name, one) for one in value]
    if not isinstance(value, str) or name.startswith(_TEXTS):
        return value
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value):
        return f"{match[1]}://…"
    if re.match(r"[A-Za-z]:[\\/]|\\\\", value):
        return PureWindowsPath(value).name
    return PurePosixPath(value).name if value.startswith(("/", "~")) else value
