"""`recipe.json`: what one trial of a run needs to be made again, and the hashes that tell whether it was.

It is read as a stranger's file: types, ranges and names are checked, and no name in it is ever opened. Nothing in it names a
place or a secret of the machine that wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from abliterate._version import __version__
from abliterate.artifacts.refined import tensors_of
from abliterate.edits import Factors
from abliterate.edits.fingerprint import sketch
from abliterate.errors import InputError, first_line
from abliterate.export.card import FILES, PROTECTED, UNTRIED, file_digest, is_visible
from abliterate.export.folder import LOCK, MARKER
from abliterate.files import write_json
from abliterate.objectives import SETTINGS_NAMING_SCORERS, public
from abliterate.prompts.files import public_source
from abliterate.settings.schema import Settings
from abliterate.types import LARGEST, LARGEST_COUNT, LARGEST_SCORE, RefinedParams, Shape, Trial

# The weights that an export's edits were computed on: the model's as trials ran it, or the stored ones (`abliterate export`).
Origin = Literal["trial", "weight files"]


def _printable(text: str) -> str:
    if not is_visible(text):  # the text may be shown on a terminal or in a model card
        raise ValueError("characters that can't be printed")
    return text


def _commit(text: str) -> str:
    """A revision, which becomes part of paths in the Hub's cache."""
    if not re.fullmatch(r"[\w.-]*(/[\w.-]+)*", text) or ".." in text:
        raise ValueError("not a commit, branch or tag")
    return text


def _inside(name: str) -> str:
    """The name of a file in an export; ValueError for a name that could lie elsewhere."""
    steps = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if not name or "\0" in name or ".." in steps or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise ValueError("not a name inside an export")
    return name


Name = Annotated[str, AfterValidator(_printable)]
Bounded = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Figure = Annotated[float, Field(ge=-LARGEST_SCORE, le=LARGEST_SCORE)]
Whole = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModelPart(_Part):
    """The base. `fingerprint`: the commit of a Hub model, or a hash of a directory's files, whose name means nothing."""

    id: Name
    revision: Annotated[str, AfterValidator(_commit)]
    fingerprint: Name
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Name

    @property
    def on_hub(self) -> bool:
        """Whether `id` is a name on the Hub."""
        return self.fingerprint.startswith("hub:")


class PromptsPart(_Part):
    """One prompt set; `source`: a data set, or the name of a file without its folder."""

    source: Name
    count: Whole
    digest: Name


class FilePart(_Part):
    """A file of the author that the settings named."""

    name: Name
    sha256: Name


class KernelPart(_Part):
    """A kernel, as in `types.Kernel`."""

    max_coeff: Bounded
    position: Bounded
    min_coeff: Bounded
    distance: float = Field(gt=0, le=LARGEST)
    shape: Shape = "linear"


class ParamsPart(_Part):
    """The parameters of a trial, as in `types.TrialParams`."""

    scope: Literal["global", "per layer"]
    direction_index: float = Field(ge=0, le=LARGEST)
    kernels: dict[Name, KernelPart] = Field(min_length=1)
    extra: dict[Name, Bounded] = {}


class RefinedPart(_Part):
    """The parameters of a refined trial, as in `types.RefinedParams`; the recipe's `refined` has their directions."""

    kind: Literal["refined"]
    coeffs: dict[Name, Bounded] = Field(min_length=1)
    file: Name
    sha256: Name
    facts: dict[str, Any]

    def params(self) -> RefinedParams:
        """The parameters; ValueError if no run can have written them."""
        try:
            return RefinedParams.from_record(self.model_dump())
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(first_line(error)) from error


def _kind_of(params: Any) -> str:
    kind = params.get("kind") if isinstance(params, dict) else getattr(params, "kind", None)
    return _SUGGESTED if kind is None else _REFINED


# The tags of the two kinds of parameters, which no field is called.
_SUGGESTED, _REFINED = "<suggested>", "<refined>"
AnyParams = Annotated[Annotated[ParamsPart, Tag(_SUGGESTED)] | Annotated[RefinedPart, Tag(_REFINED)], Discriminator(_kind_of)]


class KlPart(BaseModel):
    """The figures of the KL, of which the mean is compared."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    mean: Figure


class ScoresPart(BaseModel):
    """The scores that every trial has; those of other scorers may stand beside them."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    refusals: Whole
    kl: KlPart


class TrialPart(_Part):
    """The trial to make again."""

    number: Whole
    params: AnyParams
    state: Literal["complete"]
    scores: ScoresPart


class BaselinePart(_Part):
    """The scores of the unedited model, as in `types.Baseline`."""

    refusals: Whole
    prompts: Whole


class HashPart(_Part):
    """The hash and the size of one exported file."""

    sha256: str
    size: int


class ExportPart(_Part):
    """The export. `files`: all files except the model card and this tool's records. `edits`: {module: fingerprint}."""

    kind: Name = "none"
    origin: Origin = "trial"
    versions: dict[Name, Name] = {}
    verified: bool | None = None
    files: dict[Annotated[Name, AfterValidator(_inside)], HashPart] = {}
    edits: dict[Name, tuple[Figure, Figure, Figure]] = {}


class BatchSizesPart(_Part):
    """The batch size of each operation, in prompts."""

    residuals: int = Field(ge=1, le=LARGEST_COUNT)
    prefill: int = Field(ge=1, le=LARGEST_COUNT)
    decode: int = Field(ge=1, le=LARGEST_COUNT)


class EnvironmentPart(_Part):
    """The environment that the trial ran in."""

    versions: dict[Name, Name]
    platform: Name
    device: Name


class Recipe(_Part):
    """The file. `settings`: nested, as resolved, without those of one machine; `rendering`: a hash of a rendered prompt.

    `refined`: of a refined trial the file of its directions in base64, which the hash in its parameters vouches for. `answers`:
    the ids of the model's own answers along which inputs of modules were captured, for edits that need them; other devices may
    choose other words.
    """

    format: Literal[1]
    environment: EnvironmentPart
    model: ModelPart
    seed: Whole
    settings: dict[str, dict[str, Any]]
    prompts: dict[Name, PromptsPart]
    files: dict[Name, FilePart]
    response_prefix: str
    rendering: str
    batch_sizes: BatchSizesPart
    startup_trials: Whole
    identity: dict[Name, str]
    directions: str
    baseline: BaselinePart
    trial: TrialPart
    export: ExportPart
    refined: str = ""
    answers: list[list[Whole]] = []

    @property
    def refined_file(self) -> bytes:
        """The content of the file of refined directions; ValueError if `refined` isn't base64."""
        return base64.b64decode(self.refined, validate=True)

    @model_validator(mode="after")
    def _has_its_directions(self) -> Recipe:
        params = self.trial.params
        try:
            if isinstance(params, RefinedPart):
                tensors_of(self.refined_file, params.params())
            elif self.refined:
                raise ValueError("its trial isn't refined")
        except ValueError as error:
            raise ValueError(f"the file in 'refined' is wrong ({first_line(error)})") from error
        return self


RECIPE = "recipe.json"

FORMAT = 1

# Files that are no part of the model, or are written after the hashes.
_UNHASHED = {"README.md", MARKER, LOCK, RECIPE}

# Settings that no recipe may have: they concern one machine, are secret, or stand elsewhere in the recipe.
LEFT_OUT = {
    *("load.revision", "load.dtypes", "load.device_map", "load.max_memory", "load.offload_folder"),
    *("efficiency.residual_cache_dir", "search.grace_seconds"),
    *("search.storage", "search.seed_from", "search.select", "search.select_max_kl"),
    *("export.kind", "export.push", "export.push_private", *FILES.values()),
}

NO_EXPORT: Mapping[str, Any] = {"kind": "none", "origin": "trial", "versions": {}, "verified": None, "files": {}, "edits": {}}

# Settings whose entries may name files, and what makes an entry public.
_LISTED: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys(SETTINGS_NAMING_SCORERS, public),
    PROTECTED: public_source,
}

_WRITERS = ("torch", "transformers", "safetensors", "peft")

_LARGEST = 64 << 20


def recipe_record(
    settings: Settings, record: Mapping[str, Any], trial: Trial, export: Mapping[str, Any], refined: bytes = b""
) -> dict[str, Any]:
    """The content of the recipe for a trial; `record`: the run's `result.json`; `export`: from `export_record`.

    `refined`: of a refined trial the file of its directions.
    """
    model, environment = record["model"], record["environment"]
    files = {}
    for name in FILES.values():
        section, option = name.split(".")
        if section != "prompts" and (path := getattr(getattr(settings, section), option)):
            files[name] = {"name": public_source(path), "sha256": file_digest(path)}
    return {
        "format": FORMAT,
        "environment": {name: environment[name] for name in ("versions", "platform", "device")},
        "model": {name: model[name] for name in ModelPart.model_fields},
        "seed": settings.seed,
        "settings": _settings(settings),
        "prompts": record["prompts"],
        "files": files,
        **{name: record[name] for name in ("response_prefix", "rendering", "batch_sizes", "startup_trials", "identity")},
        "directions": record["directions"]["vectors_sha256"],
        "baseline": {name: value for name, value in record["baseline"].items() if name in BaselinePart.model_fields},
        "trial": {name: value for name, value in trial.to_record().items() if name in TrialPart.model_fields},
        "export": dict(export),
        **({"refined": base64.b64encode(refined).decode("ascii")} if refined else {}),
        **({"answers": answers} if (answers := record["directions"].get("answers")) else {}),
    }


def export_record(kind: str, origin: Origin, folder: Path, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """The part of a recipe about an export, which is finished except for its records."""
    versions = {"abliterate": __version__} | {name: metadata.version(name) for name in _WRITERS}
    sketches = {name: sketch(edit) for name, edit in factors.items()}
    # JSON has neither NaN nor infinity.
    edits = {name: list(figures) for name, figures in sketches.items() if all(map(math.isfinite, figures))}
    return {"kind": kind, "origin": origin, "versions": versions, "verified": None, "files": hashes(folder), "edits": edits}


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: sha256 and size} of an export's files, without the model card and this tool's own records."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in _UNHASHED:
            with path.open("rb") as file:
                files[name] = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}
    return files


def mark_verified(folder: Path, verified: bool) -> None:
    """Record the verdict on an export in its recipe."""
    record = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    record["export"]["verified"] = verified
    write_json(folder / RECIPE, record)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file, a run directory or an export.

    Raises:
        InputError: there is no recipe, or it has another format version, is damaged, or isn't of the layout of `Recipe`.
    """
    path = path / RECIPE if path.is_dir() else path
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"The file {path} is too large for a recipe; give the recipe.json of a run or an export.")
        record = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise InputError(f"There is no recipe {path}; give the recipe.json of a run or an export.") from error
    except OSError as error:
        raise InputError(f"The recipe {path} can't be read: {error.strerror}; give another copy.") from error
    except (ValueError, RecursionError) as error:
        reason = first_line(error) if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"The recipe {path} is damaged or no recipe ({reason}); get another copy.") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version is None:
        raise InputError(f"The file {path} is no recipe: it has no format; give the recipe.json of a run or an export.")
    if version != FORMAT or isinstance(version, bool):
        raise InputError(
            f"The recipe {path} has format {version!r:.20}, this version reads format {FORMAT}; install the version of "
            "abliterate that its environment names."
        )
    try:
        return Recipe.model_validate_json(json.dumps(record))  # strict by the rules of JSON, where a list may be a tuple
    except (ValidationError, ValueError) as error:
        raise InputError(f"The recipe {path} can't be used: {_first(error)}; get another copy.") from error


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return repr(first_line(error))
    first = error.errors()[0]
    key = ".".join(str(step) for step in first["loc"] if step not in (_SUGGESTED, _REFINED))
    reason = first["msg"].removeprefix("Value error, ")
    return f"{key!r} is wrong ({reason})" if key else reason


def _settings(settings: Settings) -> dict[str, dict[str, Any]]:
    """{section: options} of all settings that a recipe may have."""
    dumped = settings.model_dump(mode="json")
    return {
        section: {
            name: [shareable(entry) for entry in value] if (shareable := _LISTED.get(f"{section}.{name}")) else value
            for name, value in options.items()
            if f"{section}.{name}" not in LEFT_OUT | UNTRIED
        }
        for section, options in dumped.items()
        if isinstance(options, dict)
    }
