"""The frozen values that stages pass to each other, and the `Reporter` protocol through which they report.

It must not import torch. Decoder layers are numbered from 0 to `n_layers` − 1. It is longer than other modules because each
value also reads and checks its JSON form, and because units of any rank may import these values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

Shape = Literal["linear", "gaussian", "cosine"]
Scope = Literal["global", "per layer"]
SCOPES: tuple[Scope, ...] = ("global", "per layer")
TrialState = Literal["complete", "stopped", "failed"]
STATES: tuple[TrialState, ...] = ("complete", "stopped", "failed")
Sense = Literal["minimize", "maximize"]
Goal = Literal[Sense, "none"]
Operation = Literal["residuals", "prefill", "decode"]
# Options of a chat template by name, such as `enable_thinking`.
TemplateOptions = Mapping[str, str | bool | int | float]
OPERATIONS: tuple[Operation, ...] = ("residuals", "prefill", "decode")
# Coeffs and layer positions beyond this mean nothing (a coeff of 1 removes a direction) and overflow when they are squared.
LARGEST = 1e6
# The same for scores, of which hypervolumes are products, and for counts.
LARGEST_SCORE, LARGEST_COUNT = 1e100, 2**53
# The most directions of a layer: an edit's cost grows with their square.
MOST_DIRECTIONS = 64
# The `kind` in the record of refined parameters, their file's name in a run directory, and the most characters of their facts.
REFINED = "refined"
_REFINED_FILE, _SHA256, _MOST_FACTS = re.compile(r"refined/[0-9]{1,9}\.safetensors"), re.compile("[0-9a-f]{64}"), 1 << 20


def number(value: Any, low: float = -LARGEST_SCORE, high: float = LARGEST_SCORE) -> Any:
    """A number of a record, as it is. TypeError: it is no number. ValueError: it is outside [low, high], infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} is no number")
    if not low <= value <= high:
        raise ValueError(f"{value} is outside {low:g} to {high:g}")
    return value


def kl_text(value: float) -> str:
    """A KL, in nats, as people read it: four digits behind the point, and of less than 0.001 two that aren't 0, to 0.000001."""
    if not math.isfinite(value):
        return str(value)
    for digits in (4, 5, 6):
        if abs(value) >= 10.0 ** (1 - digits):
            return f"{value:.{digits}f}"
    return f"{value:.6f}" if abs(value) >= 5e-7 else "0.0000"


def count(value: Any, high: int = LARGEST_COUNT) -> int:
    """A whole number of a record, from 0. TypeError: it is none. ValueError: it is outside [0, high]."""
    if isinstance(value, float):
        raise TypeError(f"{value} is no whole number")
    return int(number(value, 0, high))


def _values(record: Any) -> Mapping[str, float]:
    """The numbers of scorers. AttributeError, TypeError or ValueError if one of them is none."""
    for value in record.values():
        number(value)
    return record


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__} instead of a table")
    return value


def _kinds(record: Any) -> Mapping[str, int]:
    """The record of the scorer `unanswered`. AttributeError, KeyError, TypeError or ValueError if it is none."""
    for value in record.values():
        count(value)
    count(record["count"])
    if "broken" in record:
        count(record["off_topic"])
    return dict(record)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message and its system prompt (empty: none)."""

    text: str
    system: str = ""


def _gaussian_fall(t: float) -> float:
    """(1 − exp(−2t²)) / (1 − exp(−2)): a bell with σ = ½, cut and scaled so that it ends at 1."""
    return math.expm1(-2 * t * t) / math.expm1(-2)


def _cosine_fall(t: float) -> float:
    """(1 − cos πt) / 2: half a period, flat at both ends."""
    return (1 - math.cos(math.pi * t)) / 2


# How a kernel falls from its largest coeff to its edge: a rising function from 0 at t = 0 to 1 at t = 1.
FALLS: Mapping[str, Callable[[float], float]] = {"linear": float, "gaussian": _gaussian_fall, "cosine": _cosine_fall}


@dataclass(frozen=True, slots=True)
class Kernel:
    """The coeff of one component as a function of the layer (docs/design.md §4).

    It is `max_coeff` at `position`, falls to `min_coeff` at `distance` layers from there, and is 0 beyond. In between it is
    max_coeff + fall(t)·(min_coeff − max_coeff), where t is the share of the distance and `shape` names the fall in `FALLS`.
    """

    max_coeff: float
    position: float
    min_coeff: float
    distance: float
    shape: Shape = "linear"

    def coeff(self, layer: int) -> float:
        """The coeff λ of the module in `layer`."""
        away = abs(layer - self.position)
        if away > self.distance:
            return 0.0
        return self.max_coeff + FALLS[self.shape](away / self.distance) * (self.min_coeff - self.max_coeff)

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`. It names no linear shape, as records from before there were others."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("shape", "linear")}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Kernel:
        """The inverse of `to_record`; TypeError or ValueError if it isn't what `to_record` gives."""
        kernel = Kernel(**record)
        for value in (kernel.max_coeff, kernel.min_coeff, kernel.position):
            number(value, -LARGEST, LARGEST)
        if number(kernel.distance, 0, LARGEST) == 0:
            raise ValueError("a kernel has no distance")
        if kernel.shape not in FALLS:
            raise ValueError(f"there is no kernel {str(kernel.shape)[:40]!r}")
        return kernel


@dataclass(frozen=True, slots=True)
class Range:
    """The range of a number that is searched: [low, high], on a logarithmic scale or in whole numbers if so."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def middle(self) -> float:
        """The number in the middle of the range, on its own scale."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.whole else middle


def weight_name(place: int) -> str:
    """The name of the weight of a layer's direction number `place`, from 0, in `TrialParams.extra`."""
    return f"weight.{place + 1}"


@dataclass(frozen=True, slots=True)
class TrialParams:
    """One parameter set. `direction_index` is a layer position, used only if `scope` is "global".

    `extra` has the numbers that a direction or an edit method asks the search for, by name: the weight of each direction, say.
    """

    scope: Scope
    direction_index: float
    kernels: Mapping[str, Kernel]
    extra: Mapping[str, float] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`. Without further numbers it has no entry for them."""
        return {
            "scope": self.scope,
            "direction_index": self.direction_index,
            "kernels": {name: kernel.to_record() for name, kernel in self.kernels.items()},
            **({"extra": dict(self.extra)} if self.extra else {}),
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> TrialParams:
        """The inverse of `to_record`; AttributeError, KeyError, TypeError or ValueError if it isn't what `to_record` gives."""
        kernels = {name: Kernel.from_record(kernel) for name, kernel in record["kernels"].items()}
        if record["scope"] not in SCOPES:
            raise ValueError(f"there is no scope {str(record['scope'])[:40]!r}")
        extra = {name: number(value, -LARGEST, LARGEST) for name, value in record.get("extra", {}).items()}
        return TrialParams(record["scope"], float(number(record["direction_index"], 0, LARGEST)), kernels, extra)

    @property
    def directions(self) -> int:
        """The number of directions of a layer, each of which has a weight if there are several."""
        return max(1, sum(weight_name(place) in self.extra for place in range(MOST_DIRECTIONS)))

    def fault(self, n_layers: int, components: Collection[str] = (), modules: Collection[str] | None = None) -> str:
        """Why they can't be of a model with so many layers, these components and, where known, these modules; "" if they can.

        The reason continues a sentence that begins with the trial.
        """
        if self.direction_index > n_layers - 1:
            return f"has a direction of layer {self.direction_index:g}, beyond {n_layers - 1}"
        return "lacks a kernel" if set(components) - set(self.kernels) else ""


@dataclass(frozen=True, slots=True)
class RefinedParams:
    """A coeff and a unit direction of its own for each edited module, found by gradient (docs/design.md §5b).

    `coeffs` maps module names to λ; modules that aren't named are off. The directions are tensors in `file` of the run
    directory, one (d_model) float32 tensor per module name; of several directions (k, d_model), of norm 1 in all, where a row's
    norm is the weight of its direction, by which λ is multiplied. `sha256` is the file's hash. `facts` say how they were found,
    as plain JSON: `beta`, `steps`, `learn`, `seed`, `prompts` ({set: count and digest} of the training prompts), `start` (a
    trial's number, or "teachers"), `cosine` ({module: cosine of its direction to the one it started from; of several, of
    all rows as one vector}), and `directions` (their number a module; left out if it is 1).
    """

    coeffs: Mapping[str, float]
    file: str
    sha256: str
    facts: Mapping[str, Any]

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        own = {"coeffs": dict(self.coeffs), "file": self.file, "sha256": self.sha256, "facts": dict(self.facts)}
        return {"kind": REFINED, **own}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> RefinedParams:
        """The inverse of `to_record`; AttributeError, KeyError, TypeError or ValueError if it isn't what `to_record` gives."""
        coeffs, facts = dict(record["coeffs"].items()), dict(record["facts"].items())
        for value in coeffs.values():
            number(value, -LARGEST, LARGEST)
        if not coeffs or not all(coeffs):
            raise ValueError("it names no module")
        # Never another path: the file of a stranger's record is opened.
        if not _REFINED_FILE.fullmatch(record["file"]) or not _SHA256.fullmatch(record["sha256"]):
            raise ValueError("its file or the file's hash isn't one of a run")
        if len(json.dumps(facts, allow_nan=False)) > _MOST_FACTS:
            raise ValueError("its facts are too long")
        number(facts.get("beta", 0))
        count(facts.get("steps", 0))
        count(facts.get("directions", 1), MOST_DIRECTIONS)
        for cosine in facts.get("cosine", {}).values():
            number(cosine, -1.01, 1.01)
        return RefinedParams(coeffs, record["file"], record["sha256"], facts)

    @property
    def directions(self) -> int:
        """The number of directions of a module."""
        return max(1, int(self.facts.get("directions", 1)))

    @property
    def edited(self) -> int:
        """The number of modules that they edit."""
        return sum(coeff != 0 for coeff in self.coeffs.values())

    def fault(self, n_layers: int, components: Collection[str] = (), modules: Collection[str] | None = None) -> str:
        """As `TrialParams.fault`."""
        unknown = set() if modules is None else set(self.coeffs) - set(modules)
        return f"edits {min(unknown)}, which isn't a module to edit of the model" if unknown else ""


# The parameters of a trial: suggested by the sampler, or refined by gradient.
Params = TrialParams | RefinedParams


def params_from_record(record: Mapping[str, Any]) -> Params:
    """The parameters in a trial's record, which says the kind of refined ones; raises as the kinds' `from_record` do."""
    kind = record.get("kind")
    if kind == REFINED:
        return RefinedParams.from_record(record)
    if kind is not None:
        raise ValueError(f"there are no parameters of the kind {str(kind)[:40]!r}")
    return TrialParams.from_record(record)


@dataclass(frozen=True, slots=True)
class Score:
    """One scorer's result for one model: the number that the search sees, and its JSON record for `result.json`."""

    name: str
    value: float
    goal: Goal
    record: Any


@dataclass(frozen=True, slots=True)
class Objective:
    """A scorer, by its name, that a search minimizes or maximizes."""

    name: str
    goal: Sense

    def cost(self, value: float) -> float:
        """`value` as a cost, of which less is better."""
        return -value if self.goal == "maximize" else value


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished trial. `number` is its logical index: the number of trials before it, without interrupted ones.

    `scores`: each scorer's record; `values`: each scorer's number, for refusals and unanswered prompts the share.
    """

    number: int
    params: Params
    state: TrialState
    scores: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def refusals(self) -> int:
        """The number of refused harmful prompts; a lower bound if the trial was pruned."""
        return int(self.scores["refusals"])

    @property
    def unanswered(self) -> int:
        """The number of harmful prompts without a real answer; a lower bound if the trial was pruned. KeyError: unknown."""
        return int(self.scores["unanswered"]["count"])

    @property
    def kl(self) -> float:
        """Mean KL(base‖edited) of the first response token over the harmless prompts, in nats."""
        return float(self.scores["kl"]["mean"])

    def value(self, name: str) -> float:
        """A scorer's value, for refusals and unanswered prompts their number. KeyError if the scorer has no value."""
        if name == "refusals":
            return float(self.refusals)
        if name == "unanswered":
            return float(self.unanswered)
        return self.kl if name == "kl" else float(self.values[name])

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        return {
            "number": self.number,
            "params": self.params.to_record(),
            "state": self.state,
            "reason": self.reason,
            "scores": dict(self.scores),
            "values": dict(self.values),
            "seconds": self.seconds,
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Trial:
        """The inverse of `to_record`; AttributeError, KeyError, TypeError or ValueError if it isn't what `to_record` gives."""
        trial = Trial(
            number=count(record["number"]),
            params=params_from_record(record["params"]),
            state=record["state"],
            scores=_mapping(record["scores"]),
            seconds=float(number(record["seconds"], 0)),
            reason=record["reason"],
            values=_values(record["values"]),
        )
        if trial.state not in STATES or not isinstance(trial.reason, str):
            raise ValueError("its state or its reason can't be read")
        if trial.state != "failed" or trial.scores:
            count(trial.scores["refusals"])
            if "unanswered" in trial.scores:
                _kinds(trial.scores["unanswered"])
            for value in (trial.scores["kl"]["mean"], *trial.scores["kl"].values()):
                number(value)
        return trial


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A description of the loaded model. `fingerprint` changes whenever a weight or the config may have changed."""

    id: str
    source: str
    revision: str
    fingerprint: str
    family: str
    n_layers: int
    d_model: int
    n_parameters: int
    dtype: str
    device: str
    quantization: str


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The number of prompts in a batch, by operation.

    `residuals`: a pass that keeps only last positions. `prefill`: the logits of the first response token. `decode`: whole
    responses. `row_bytes`: the memory that a prompt of `row_tokens` tokens takes in each operation; 0 if unknown.
    """

    residuals: int
    prefill: int
    decode: int
    row_bytes: tuple[int, int, int] = (0, 0, 0)
    row_tokens: tuple[int, int, int] = (0, 0, 0)

    @staticmethod
    def same(size: int) -> BatchSizes:
        """The same size for all operations."""
        return BatchSizes(size, size, size)

    @property
    def by_name(self) -> dict[str, int]:
        """{operation: size}."""
        return dict(zip(OPERATIONS, (self.residuals, self.prefill, self.decode), strict=True))

    def halved(self) -> BatchSizes:
        """Half of each size, at least 1."""
        residuals, prefill, decode = (max(1, size // 2) for size in self.by_name.values())
        return BatchSizes(residuals, prefill, decode, self.row_bytes, self.row_tokens)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The unedited model's scores: `refusals` of `prompts` harmful evaluation prompts, and the `values` of other scorers.

    `unanswered` is the record of the scorer of that name, None in a run without it.
    """

    refusals: int
    prompts: int
    values: Mapping[str, float] = field(default_factory=dict)
    unanswered: Mapping[str, int] | None = None

    def value(self, name: str) -> float:
        """A scorer's value, for refusals and unanswered prompts their number; KL is 0 by definition.

        KeyError as in `Trial.value`.
        """
        if name == "refusals":
            return float(self.refusals)
        if name == "unanswered" and self.unanswered is not None:
            return float(self.unanswered["count"])
        return 0.0 if name == "kl" else float(self.values[name])

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        record: dict[str, Any] = {"refusals": self.refusals, "prompts": self.prompts, "values": dict(self.values)}
        return record if self.unanswered is None else record | {"unanswered": dict(self.unanswered)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Baseline:
        """The inverse of `to_record`; AttributeError, KeyError, TypeError or ValueError if it isn't what `to_record` gives."""
        unanswered = _kinds(record["unanswered"]) if "unanswered" in record else None
        return Baseline(count(record["refusals"]), count(record["prompts"]), _values(record["values"]), unanswered)


class Reporter(Protocol):
    """How a run reports. There are implementations for a terminal, a pipe and `--json`."""

    def header(self, fields: Mapping[str, str]) -> None:
        """The run begins; `fields` name its model, device and memory."""

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        """A stage begins; the one before it has ended.

        `at_once`: it has no safe points and nothing in it would be lost, so an interruption need not wait for one.
        """

    def stage_ended(self) -> None:
        """The stage has ended, perhaps by an error. Until the next stage begins, an interruption waits for a safe point."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` units of the current stage (or of the current trial) are finished."""

    def note(self, text: str, **fields: Any) -> None:
        """A fact worth a line; `fields` are its machine-readable form."""

    def warn(self, text: str) -> None:
        """A problem that the user should look at; the run continues."""

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        """A trial has ended; `best` is the trial that the selection rule would pick now."""

    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None:
        """The run in directory `where` has ended; `result` is the content of `result.json`, and `summary` says it to people."""

    def close(self) -> None:
        """Restore the terminal; repeated calls are safe."""


Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a `Table`: programs know it by its `key`, people by its `heading`.

    Numbers stand at the right and words at the left; texts are words that wrap. `digits` is the format of its floats, or "KL"
    for that of `kl_text`. A narrow terminal leaves out the columns of the highest `optional` first, and never those of 0.
    `legend` explains signs in its cells.
    """

    key: str
    heading: str
    kind: Literal["number", "word", "text"] = "number"
    digits: str = ""
    optional: int = 0
    legend: str = ""

    def text(self, cell: Cell) -> str:
        """A cell as a person reads it; None is an empty cell."""
        if cell is None:
            return ""
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if self.digits == "KL" and isinstance(cell, float):
            return kl_text(cell)
        return format(cell, self.digits) if isinstance(cell, float) else str(cell)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, columns, and rows of one cell a column: what the terminal, the page, CSV and the model card render.

    `chosen` is the index of the row that stands out, if there is one. `notes` are sentences that belong below the table.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    chosen: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[list[str]]:
        """The rows as a person reads them."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    @property
    def legends(self) -> tuple[str, ...]:
        """The legends of its columns, each once."""
        return tuple(dict.fromkeys(column.legend for column in self.columns if column.legend))

    def without(self, keys: Container[str]) -> Table:
        """The same table, lacking the columns that have these keys."""
        kept = [index for index, column in enumerate(self.columns) if column.key not in keys]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)

    def with_column(self, column: Column, cells: Sequence[Cell]) -> Table:
        """The same table with one more column at the right."""
        rows = tuple((*row, cell) for row, cell in zip(self.rows, cells, strict=True))
        return replace(self, columns=(*self.columns, column), rows=rows)
