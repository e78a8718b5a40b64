"""The layout of `recipe.json`, checked as a stranger's file: types, ranges, and names that may be shown.

Knows no settings: what those in a recipe mean is `reproduce.py`'s to judge. No name in it is ever opened.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# How an export's edits were computed: on the model as trials ran it, or on the stored weights (`abliterate export`).
Origin = Literal["trial", "weight files"]


def _printable(text: str) -> str:
    if not text.isprintable():  # it may be shown on a terminal, or stand in a model card
        raise ValueError("characters that can't be printed")
    return text


def _commit(text: str) -> str:
    """A revision becomes part of paths in the Hub's cache."""
    if not re.fullmatch(r"[\w.-]*(/[\w.-]+)*", text) or ".." in text:
        raise ValueError("not a commit, branch or tag")
    return text


def _inside(name: str) -> str:
    """A file's name in an export; ValueError for whatever could lie elsewhere."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if not name or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise ValueError("not a name inside an export")
    return name


Name = Annotated[str, AfterValidator(_printable)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModelPart(_Part):
    """The base. `fingerprint`: of a Hub model its commit, of a directory a hash of its files: its name means nothing."""

    id: Name
    revision: Annotated[str, AfterValidator(_commit)]
    fingerprint: Name
    dtype: Literal["float32", "bfloat16", "float16"]
    quantization: Name

    @property
    def on_hub(self) -> bool:
        """Whether `id` is a name there."""
        return self.fingerprint.startswith("hub:")


class PromptsPart(_Part):
    """One set; `source`: a data set, or a file's name without where it lay."""

    source: Name
    count: int
    digest: Name


class FilePart(_Part):
    """A file of the author's that settings named."""

    name: Name
    sha256: Name


class KernelPart(_Part):
    """`types.Kernel`."""

    max_coeff: float
    position: float
    min_coeff: float
    distance: float = Field(gt=0)


class ParamsPart(_Part):
    """`types.TrialParams`."""

    scope: Literal["global", "per layer"]
    direction_index: float = Field(ge=0)
    kernels: dict[Name, KernelPart] = Field(min_length=1)


class KlPart(BaseModel):
    """What is compared of the KL."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    mean: float


class ScoresPart(BaseModel):
    """What every trial has; other scorers may stand beside it."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)
    refusals: int
    kl: KlPart


class TrialPart(_Part):
    """The trial that is made again."""

    number: int = Field(ge=0)
    params: ParamsPart
    state: Literal["complete"]
    scores: ScoresPart


class BaselinePart(_Part):
    """`types.Baseline`."""

    refusals: int
    prompts: int


class HashPart(_Part):
    """One exported file."""

    sha256: str
    size: int


class ExportPart(_Part):
    """The export: `files` are all but the model card and this tool's own records. `edits`: {module: sketch}."""

    kind: Literal["merged", "adapter", "none"] = "none"
    origin: Origin = "trial"
    versions: dict[Name, Name] = {}
    verified: bool | None = None
    files: dict[Annotated[Name, AfterValidator(_inside)], HashPart] = {}
    edits: dict[Name, tuple[float, float, float]] = {}


class BatchSizesPart(_Part):
    """Prompts at a time, by operation."""

    residuals: int = Field(ge=1)
    prefill: int = Field(ge=1)
    decode: int = Field(ge=1)


class EnvironmentPart(_Part):
    """Where the trial ran."""

    versions: dict[Name, Name]
    platform: Name
    device: Name


class Recipe(_Part):
    """The file. `settings`: nested, as resolved, without what is this machine's; `rendering`: a hash of a rendered prompt."""

    format: Literal[1]
    environment: EnvironmentPart
    model: ModelPart
    seed: int
    settings: dict[str, dict[str, Any]]
    prompts: dict[Name, PromptsPart]
    files: dict[Name, FilePart]
    response_prefix: str | None
    rendering: str | None
    batch_sizes: BatchSizesPart | None
    startup_trials: int
    identity: dict[Name, str]
    directions: str
    baseline: BaselinePart
    trial: TrialPart
    export: ExportPart
