"""`result.json`: the record of a run as a typed and versioned value, and the only code that reads and writes the file.

Tables elsewhere render `Result.to_record()`, which is the file's content. docs/design.md §6 describes the layout.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.artifacts.runs import no_run
from abliterate.errors import InputError, as_command
from abliterate.files import DIGEST, digest_of, write_json
from abliterate.objectives import BY_MARKERS, DEFAULT, KL, UNANSWERED
from abliterate.plugins import installed
from abliterate.prompts.files import digest, public_source
from abliterate.types import LARGEST_COUNT, Baseline, ModelInfo, Objective, Prompt, Trial

FORMAT = 1
# The stage that writes the report, under the name that timings and memory have for it.
REPORT_STAGE = "report"
# More layers than any model has; pages and plots have a row for each.
_MOST_LAYERS = 10_000
_PACKAGES = ("torch", "transformers", "peft", "optuna", "safetensors")

# The errors that a malformed record raises; they become ValueErrors, which pydantic reports as validation errors.
_MALFORMED = (KeyError, TypeError, AttributeError, OverflowError)


class OtherVersion(InputError):
    """The file has a format that this version doesn't read; it is refused, whereas a damaged file is rebuilt."""


def _trial(value: Any) -> Trial:
    if isinstance(value, Trial):
        return value
    try:
        trial = Trial.from_record(value)
        sound = not trial.scores or trial.kl >= 0
        if trial.scores and not {"median", "max"} <= trial.scores[KL].keys():
            raise KeyError("median or max of the KL")
    except _MALFORMED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not sound:
        raise ValueError("its KL is negative")
    return trial


def _baseline(value: Any) -> Baseline | None:
    if value is None or isinstance(value, Baseline):
        return value
    try:
        baseline = Baseline.from_record(value) if value else None
    except _MALFORMED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if baseline is not None:
        if baseline.refusals > baseline.prompts:
            raise ValueError("more refusals than prompts")
        if baseline.unanswered is not None and not baseline.refusals <= baseline.unanswered["count"] <= baseline.prompts:
            raise ValueError("more unanswered prompts than prompts, or fewer than refusals")
    return baseline


def _objective(value: Any) -> Objective:
    try:
        objective = value if isinstance(value, Objective) else Objective(**value)
    except _MALFORMED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(objective.name, str) or objective.goal not in ("minimize", "maximize"):
        raise ValueError("no name, or no goal")
    return objective


TrialField = Annotated[Trial, BeforeValidator(_trial), PlainSerializer(Trial.to_record)]
BaselineField = Annotated[
    Baseline | None, BeforeValidator(_baseline), PlainSerializer(lambda value: value.to_record() if value else {})
]
ObjectiveField = Annotated[
    Objective, BeforeValidator(_objective), PlainSerializer(lambda value: {"name": value.name, "goal": value.goal})
]


Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(
        extra="allow",
        arbitrary_types_allowed=True,
        ser_json_inf_nan="constants",  # so that writing them fails: null would hide them
    )


class ModelRecord(_Record):
    """The model of the run. No path of this machine is recorded, because results are shared."""

    id: str
    revision: str
    fingerprint: str
    family: str = ""
    n_layers: int = Field(0, ge=0, le=_MOST_LAYERS)
    d_model: Count = 0
    n_parameters: Count = 0
    dtype: str
    quantization: str = "none"

    @staticmethod
    def of(info: ModelInfo) -> ModelRecord:
        """The recorded facts of a loaded model."""
        return ModelRecord(**{name: getattr(info, name) for name in ModelRecord.model_fields})


class PromptSetRecord(_Record):
    """One prompt set. A file is recorded by its name without its folder."""

    source: str
    count: int = Field(ge=0)
    digest: str

    @staticmethod
    def of(source: str, prompts: Sequence[Prompt]) -> PromptSetRecord:
        """The record of `prompts`, which were read from `source`."""
        return PromptSetRecord(source=public_source(source), count=len(prompts), digest=digest(prompts))


class DirectionsRecord(_Record):
    """Hashes of the file `directions.safetensors`, and of the vectors alone, by which two runs can be compared.

    `answers`: the ids of the model's own answers along which inputs of modules were captured, for edits that need them.
    """

    sha256: str
    vectors_sha256: str
    answers: list[list[Count]] = Field([], exclude_if=lambda answers: not answers)


class ExportRecord(_Record):
    """The export, with further fields from its exporter and its verification. `verified` is None if it wasn't checked."""

    kind: str = "none"
    trial: int | None = None
    path: str | None = None
    verified: bool | None = None
    pushed: str | None = None


class Memory(_Record):
    """Peaks of memory over all sessions, in bytes."""

    peak_rss_bytes: Count = 0
    peak_device_bytes: Count = 0
    stages: dict[str, dict[str, Count]] = Field(default_factory=dict)


class Environment(_Record):
    """The versions, platform and device that a result depends on beside its inputs."""

    versions: dict[str, str] = Field(default_factory=dict)
    platform: str = ""
    device: str = ""

    @staticmethod
    def here(device: str = "") -> Environment:
        """The environment of this process, with the packages of installed plugins."""
        versions = {name: metadata.version(name) for name in ("abliterate", *_PACKAGES)}
        versions = {"abliterate": versions.pop("abliterate"), "python": platform.python_version(), **versions}
        versions |= {plugin.package: plugin.version for plugin in installed()}
        return Environment(versions=versions, platform=f"{platform.system()} {platform.machine()}", device=device)


class _Group(_Record):
    """A row of the table of coverage."""

    component: str
    path: str
    layers: Count
    matrices: Count
    shape: list[Count] | None
    parameters: Count
    edited: bool
    left_out: str | None = None


class _Coverage(_Record):
    share: float = Field(ge=0, le=1)
    untold: str | None = None
    groups: list[_Group]


def _coverage(value: Any) -> Any:
    """The record of coverage as it is, if a table can be made of it."""
    if value is not None:
        _Coverage.model_validate(value)
    return value


class _Yardstick(_Record):
    """The part of the yardstick's record that tables show (`scorers/yardstick.py`)."""

    bounds: dict[str, float]
    answers: Count
    quantiles: dict[str, dict[str, float]]


def _yardstick(value: Any) -> Any:
    """The record of the yardstick as it is, if a table can be made of it."""
    if value is not None and not _Yardstick.model_validate(value).bounds.keys() <= value["quantiles"].keys():
        raise ValueError("a bound without quantiles")
    for shares in value["quantiles"].values() if value is not None else ():
        if not all(0 <= float(share) <= 1 for share in shares):
            raise ValueError("a quantile whose name is no share")
    return value


def _caches(value: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    if not all({"hits", "misses"} <= counts.keys() for counts in value.values()):
        raise ValueError("no hits or no misses")
    return value


# Fields that every file has, even if the run hasn't reached them.
_ALWAYS = (
    *("format", "model", "prompts", "objectives", "baseline", "trials", "front", "selected", "export", "timings", "memory"),
    *("caches", "environment"),
)


class Result(_Record):
    """The content of `result.json`. Fields that a run hasn't reached are None or empty.

    `trials` are numbered by logical index; `front` and `selected` name trials by number. Timings add up over all sessions of
    a run, and memory is the peak over all. The fields `coverage`, `yardstick`, `heldout` and `reproduction` are plain JSON
    records that their own modules define.
    """

    format: Literal[1] = 1
    model: ModelRecord | None = None
    prompts: dict[str, PromptSetRecord] = Field(default_factory=dict)
    objectives: list[ObjectiveField] = Field(default_factory=list)
    baseline: BaselineField = None
    trials: list[TrialField] = Field(default_factory=list)
    front: list[int] = Field(default_factory=list)
    selected: int | None = None
    export: ExportRecord = Field(default_factory=lambda: ExportRecord(kind="none", path=None, verified=None, pushed=None))
    timings: dict[str, Seconds] = Field(default_factory=dict)
    memory: Memory = Field(default_factory=lambda: Memory(peak_rss_bytes=0, peak_device_bytes=0, stages={}))
    caches: Annotated[dict[str, dict[str, Count]], AfterValidator(_caches)] = Field(default_factory=dict)
    environment: Environment = Field(default_factory=Environment.here)
    coverage: Annotated[dict[str, JsonValue] | None, BeforeValidator(_coverage)] = None
    batch_sizes: dict[str, Count] | None = None
    response_prefix: str | None = None
    rendering: str | None = None
    identity: dict[str, str] | None = None
    startup_trials: Count | None = None
    directions: DirectionsRecord | None = None
    yardstick: Annotated[dict[str, JsonValue] | None, BeforeValidator(_yardstick)] = None
    heldout: dict[str, Any] | None = None
    reproduction: dict[str, Any] | None = None
    # Whether the file that this was read from had a checksum.
    _checked: bool = PrivateAttr(True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        """A file that was written before the model was loaded has an empty record of the model."""
        return {**value, "model": value["model"] or None} if isinstance(value, dict) and "model" in value else value

    @model_validator(mode="after")
    def _is_sound(self) -> Result:
        if self.trials and (self.model is None or self.baseline is None):
            raise ValueError("it has trials and lacks the model or the baseline")
        scored = {trial.number for trial in self.trials if trial.scores}
        if not {*self.front, *([] if self.selected is None else [self.selected])} <= scored:
            raise ValueError("front or selected name a trial that isn't there or has no scores")
        if len({trial.number for trial in self.trials}) < len(self.trials):
            raise ValueError("two trials have one number")
        for trial in self.trials:
            self._check_trial(trial)
        return self

    def _check_trial(self, trial: Trial) -> None:
        """Raise ValueError for a trial that doesn't fit the run's model, prompts and objectives."""
        if fault := trial.params.fault((self.model.n_layers or _MOST_LAYERS) if self.model else 1):
            raise ValueError(f"trial {trial.number} {fault}")
        if not trial.scores or self.baseline is None:
            return
        if trial.refusals > self.baseline.prompts:
            raise ValueError(f"trial {trial.number} has more refusals than prompts")
        if UNANSWERED in trial.scores and not trial.refusals <= trial.unanswered <= self.baseline.prompts:
            raise ValueError(f"trial {trial.number} has more unanswered prompts than prompts, or fewer than refusals")
        for objective in self.objectives:
            try:
                trial.value(objective.name)
                self.baseline.value(objective.name)
            except KeyError as error:
                raise ValueError(f"trial {trial.number} or the baseline has no score {objective.name}") from error

    @property
    def doubt(self) -> str:
        """A sentence that says that nothing vouches for the figures; "" where the file had a checksum, or there is no file."""
        if self._checked:
            return ""
        return "The file result.json has no checksum: it is old, or somebody changed it, so its figures may be anything."

    @staticmethod
    def read(directory: RunDirectory) -> Result:
        """The result in a run directory.

        Raises:
            InputError: the file is missing or damaged. OtherVersion: another version of abliterate wrote it.
        """
        try:
            record = json.loads(directory.result.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
        except FileNotFoundError as error:
            if not directory.holds_run:
                raise no_run(directory.path) from error
            raise InputError(
                f"The run in {directory.path} has no result.json: no trial of it has finished yet, or the file is gone; wait "
                f"for a trial, or {directory.resuming('writes it')}."
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            fault = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            remedy = directory.resuming("rebuilds it")
            raise InputError(f"The file {directory.result} can't be read: {fault}; {remedy}.") from error
        version = record.get("format") if isinstance(record, dict) else None
        if isinstance(version, int) and version != FORMAT:
            raise OtherVersion(
                f"The file {directory.result} has format {version}, this version reads format {FORMAT}; use the version of "
                "abliterate that wrote it."
            )
        if version != FORMAT:
            raise damaged(directory, "it has no format")
        checked = DIGEST in record
        if checked and record.pop(DIGEST) != digest_of(record):
            raise damaged(directory, "its checksum is wrong")
        missing = [name for name in ("model", "baseline", "trials", "front", "selected", "export") if name not in record]
        if missing:
            raise damaged(directory, f"it lacks {', '.join(missing)}")
        try:
            result = Result.model_validate(record)
        except (ValidationError, RecursionError) as error:
            raise damaged(directory, _first_fault(error)) from error
        result._checked = checked
        return result

    @staticmethod
    def so_far(directory: RunDirectory) -> Result:
        """As `read`, and an empty result of a run that hasn't come to its first trial."""
        return Result() if directory.holds_run and not directory.result.exists() else Result.read(directory)

    @staticmethod
    def continued(directory: RunDirectory) -> Result:
        """The result of a run's earlier sessions, so that a continued run remembers, for example, its export.

        A file that can't be read is rebuilt, since the study has the trials.

        Raises:
            OtherVersion: another version of abliterate wrote the file.
        """
        try:
            return Result.read(directory).model_copy(update={"environment": Environment.here()})
        except OtherVersion:
            raise
        except InputError:
            return Result()

    def write(self, directory: RunDirectory) -> None:
        """Write `result.json` atomically, with a checksum of everything else in it."""
        write_json(directory.result, self.with_checksum())

    def with_checksum(self) -> dict[str, Any]:
        """The content of the file, including the checksum of everything else in it."""
        record = self.to_record()
        return {**record, DIGEST: digest_of(record)}

    def to_record(self) -> dict[str, Any]:
        """The content of the file without its checksum, as JSON values. Fields that the run hasn't reached are left out."""
        record = self.model_dump(mode="json", exclude_unset=False)
        record |= {name: model.model_dump(mode="json", exclude_unset=True) for name, model in self._nested().items()}
        record["model"] = record["model"] or {}
        return {name: value for name, value in record.items() if name in _ALWAYS or value is not None}

    def _nested(self) -> dict[str, _Record]:
        return {"export": self.export, "memory": self.memory}

    def update(self, **fields: Any) -> None:
        """Set several fields; KeyError for a name that the format doesn't have."""
        for name, value in fields.items():
            if name not in type(self).model_fields:
                raise KeyError(name)
            setattr(self, name, value)

    def searched(
        self, trials: Sequence[Trial], front: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective]
    ) -> None:
        """Record all finished trials and the front among them."""
        self.objectives, self.baseline = list(objectives), baseline
        self.trials, self.front = list(trials), [trial.number for trial in front]

    def objectives_or_default(self) -> tuple[Objective, ...]:
        """The objectives of the search; if the file names none, those of the version that wrote it."""
        scored = any(trial.scores for trial in self.trials)
        return tuple(self.objectives) or (BY_MARKERS if scored else DEFAULT)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of each stage whose time a report can show.

        The report's own stage isn't among them: it ends after the report is written, and a report that is made again must be
        the same.
        """
        return {name: seconds for name, seconds in self.timings.items() if name != REPORT_STAGE}

    def stage_memory(self) -> dict[str, dict[str, int]]:
        """Peaks of memory of the stages in `stage_seconds`."""
        return {name: peaks for name, peaks in self.memory.stages.items() if name != REPORT_STAGE}

    @property
    def n_harmful(self) -> int:
        """The number of harmful evaluation prompts; 0 before the baseline is known."""
        return self.baseline.prompts if self.baseline else 0

    def trial(self, number: int, run: object) -> Trial:
        """The complete trial of that number; `run` is the directory that error sentences name.

        Raises:
            InputError: the trial is missing, failed, or was stopped.
        """
        trial = next((trial for trial in self.trials if trial.number == number), None)
        if trial is None:
            raise InputError(f"The run in {run} has no finished trial {number}; see {as_command('trials', run)}.")
        if trial.state == "stopped":
            raise InputError(
                f"Trial {number} was stopped because the unedited model or another trial is no worse in any objective; choose "
                f"a trial that {as_command('trials', run)} shows as complete."
            )
        if trial.state == "failed":
            reason = trial.reason.rstrip(".") or "no reason is recorded"
            raise InputError(
                f"Trial {number} failed ({reason}); choose a trial that {as_command('trials', run)} shows as complete."
            )
        return trial


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def damaged(directory: RunDirectory, fault: str) -> InputError:
    """The error for a `result.json` whose content is wrong or incomplete."""
    return InputError(f"The file {directory.result} is damaged ({fault}); {directory.resuming('rebuilds it')}.")


def no_complete_trial(result: Result, run: Path, budget: int = 0) -> str:
    """The reason why a run has no complete trial, and the remedy, as parts of a sentence; `budget` is its number of trials."""
    total, resume = len(result.trials), ("run", "--resume", "--out", run)
    if total and total >= budget:
        more = as_command(*resume, "--trials", 2 * total)
        return f"all {total} of its trials were stopped or failed; give it more trials with {more}"
    which = f"none of its {total} finished trials is complete yet" if total else "no trial of it has finished yet"
    return f"{which}; wait for one, or continue the run with {as_command(*resume)}"


def _first_fault(error: Exception) -> str:
    """The first fault that validation found, in a few words."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(key) for key in first["loc"])
    return f"{location}: {first['msg']}".removeprefix(": ")
