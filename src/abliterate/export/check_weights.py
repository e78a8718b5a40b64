"""Check an export by the definition of its edit: every matrix is read back and compared; no prompt and no model is needed.

The definition is `EditMethod.dense`, in float64 on the base's own matrix, in other words than the factors that were written.
Memory is two stored matrices and some rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from abliterate.edits import EditMethod, Factors
from abliterate.edits.base import column_scale
from abliterate.export.base_weights import Matrices, config_file, digests
from abliterate.export.check_behaviour import Verification
from abliterate.export.companions import changed_companions
from abliterate.export.job import ExportJob, Reread, Rows
from abliterate.export.safetensors_copy import INDEX, SINGLE, read_header
from abliterate.export.unloaded import dense_config, find_unloaded, lost
from abliterate.model.architectures import Target
from abliterate.model.checkpoint import load_weights

_PIECE = 1 << 20  # bytes compared at a time


class RereadMerged(Reread):
    """The `Reread` of a model directory, whose files are compared with the base's byte by byte if they were streamed."""

    def __init__(self, folder: Path, job: ExportJob, base: Matrices) -> None:
        self._folder, self._job, self._base, self._edited = folder, job, base, base.tensors(job.factors)
        whole = base.whole is not None
        if whole:  # never two models in memory
            base.let_go()
        self._out = Matrices(str(folder), job.load.model_copy(update={"revision": ""}), job.architecture)
        self.dtype = self._out.dtype
        self.loaded_in = str(self.dtype).removeprefix("torch.") if whole else ""

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        matrix = self._out.matrix(self._out.targets[target.name], index)
        return lambda rows: matrix[rows].double()

    def untouched(self) -> bool:
        return not self.differing

    @cached_property
    def differing(self) -> list[str]:
        found = self._of_a_whole_model() if self._base.digests else self._of_files()
        return [*found, *changed_companions(self._job, self._folder)]

    def _of_a_whole_model(self) -> list[str]:
        base, folder = self._base.digests, self._folder
        exported = digests(self._out.whole or load_weights(str(folder), self._out.load, self._out.config, self.dtype, None))
        changed = [name for name in base if name not in self._edited and exported.get(name) != base[name]]
        config = config_file(self._job.source, self._base.load).read_bytes()
        plain = (folder / "config.json").read_bytes() == dense_config(config)
        unloaded = find_unloaded(self._job.source, self._base.load, self._base.config)
        return [*changed, *sorted(exported.keys() - base.keys()), *lost(folder, unloaded), *([] if plain else ["config.json"])]

    def _of_files(self) -> list[str]:
        files = self._base.files
        plain = ["config.json"] if files[0].name == SINGLE else ["config.json", INDEX]
        changed = [path.name for path in files if not _same_bytes(path, self._folder / path.name, self._edited)]
        return changed + [name for name in plain if (files[0].parent / name).read_bytes() != (self._folder / name).read_bytes()]


class RereadAdapter(Reread):
    """The `Reread` of an adapter directory, as PEFT applies it: DoRA is m ∘ rownormalize(W + BA), plain LoRA W + BA."""

    dtype = torch.float32

    def __init__(self, folder: Path, job: ExportJob) -> None:
        self._folder, self._job = folder, job
        self._tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self._scaling, self._dora = config["lora_alpha"] / config["r"], bool(config["use_dora"])
        self._modules = set(config["target_modules"])

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        # PEFT puts adapters only on modules with one matrix, so `index` is 0.
        if target.name not in self._modules:
            return lambda rows: weight[rows].double()
        a, b, *magnitude = (self._tensors[key].double() for key in self._keys(target.name))

        def edited(rows: slice) -> Tensor:
            direction = weight[rows].double() + self._scaling * b[rows] @ a
            if not self._dora:
                return direction
            return magnitude[0][rows, None] * direction / direction.norm(dim=1, keepdim=True)

        return edited

    def untouched(self) -> bool:
        return not self.differing

    @cached_property
    def differing(self) -> list[str]:
        # The files hold tensors for the modules that the config names, and no others.
        wrong = set(self._tensors) ^ {key for name in self._modules for key in self._keys(name)}
        return [*sorted(wrong), *changed_companions(self._job, self._folder)]

    def _keys(self, module: str) -> list[str]:
        """The names of a module's tensors in PEFT's file."""
        suffixes = ("lora_A.weight", "lora_B.weight") + (("lora_magnitude_vector",) if self._dora else ())
        return [f"base_model.model.{module}.{suffix}" for suffix in suffixes]


def _same_bytes(base: Path, export: Path, edited: set[str]) -> bool:
    """Whether two safetensors files are equal except for the bytes of the `edited` tensors."""
    if export.stat().st_size != base.stat().st_size:
        return False
    with base.open("rb") as old, export.open("rb") as new:
        for name, stored in read_header(base).items():
            if name in edited:
                if not _equal(old, new, stored.start - old.tell()):
                    return False
                old.seek(stored.end)
                new.seek(stored.end)
        return _equal(old, new, base.stat().st_size - old.tell())


def _equal(old: BinaryIO, new: BinaryIO, count: int) -> bool:
    while count > 0:
        piece = old.read(min(count, _PIECE))
        if not piece or piece != new.read(len(piece)):
            return False
        count -= len(piece)
    return True


# The number of entries in the rows that are compared at a time: several float64 copies of them are in memory.
CHUNK = 1 << 16

# The error of an entry, relative to its row's norm, that float32 factors and sums explain: twice the largest error seen. That
# was 5e-7, in rows that lie nearly along the direction (their closed form divides by little); in other rows the error is 3e-8
# (tests/unit/export/test_check_weights.py).
ROUNDING = 1e-6

# W (d_out, d_in) → the function that gives rows of W'.
Definition = Callable[[Tensor], Rows]


def by_definition(method: EditMethod, vectors: Tensor, coeffs: Sequence[float], *, chunk: int = CHUNK) -> Definition:
    """W' by the edit method, for the unit directions `vectors` (k, d_out) in float64 and their coeffs (k).

    Rows along a direction are sensitive to its last bits. Several directions are removed one after another.
    """
    v, coeff = (vectors[0], coeffs[0]) if len(coeffs) == 1 else (vectors, torch.tensor(coeffs, dtype=torch.float64))

    def define(weight: Tensor) -> Rows:
        a = torch.zeros(*v.shape[:-1], weight.shape[1], dtype=torch.float64)
        for rows in chunks(weight, chunk):
            a += method.along(weight[rows].double(), v[..., rows])
        for place in range(1, len(coeffs)):  # what is left of a direction's share after those before it
            for before in range(place):
                a[place] -= coeffs[before] * float(vectors[place] @ vectors[before]) * a[before]

        def edited(rows: slice) -> Tensor:
            return method.dense_rows(weight[rows].double(), v[..., rows], a, coeff)

        if not getattr(method, "keeps_columns", False):
            return edited
        before, after = torch.zeros(2, weight.shape[1], dtype=torch.float64)
        for rows in chunks(weight, chunk):
            before += weight[rows].double().square().sum(dim=0)
            after += edited(rows).square().sum(dim=0)
        scale = column_scale(before, after)
        return lambda rows: edited(rows) * scale

    return define


def by_definition_of_reading(vectors: Tensor, coeffs: Sequence[float], *, keeps_rows: bool) -> Definition:
    """W' (d_out, d_model) of a module that reads: each row loses its parts along `vectors` (k, d_model), one after another.

    `keeps_rows`: every row is then scaled to its norm in W.
    """

    def define(weight: Tensor) -> Rows:
        def edited(rows: slice) -> Tensor:
            old = weight[rows].double()
            new = old
            for v, coeff in zip(vectors, coeffs, strict=True):
                new = new - coeff * torch.outer(new @ v, v)
            scale = column_scale(old.square().sum(dim=1), new.square().sum(dim=1))
            return new * scale[:, None] if keeps_rows else new

        return edited

    return define


def by_factors(factors: Factors) -> Definition:
    """W' by factors that approximate the edit, as those of the svd representation do."""

    def define(weight: Tensor) -> Rows:
        a, b = factors.a.double(), factors.b.double()

        def edited(rows: slice) -> Tensor:
            scale, old = factors.entry_scale(rows), weight[rows].double()
            return (old if scale is None else scale.double() * old) + b[rows] @ a

        return edited

    return define


class BaseMatrices(Protocol):
    """The base's matrices by target, from whatever files."""

    @property
    def targets(self) -> Mapping[str, Target]: ...
    def count(self, target: Target) -> int: ...
    def matrix(self, target: Target, index: int) -> Tensor: ...


def check_weights(
    base: BaseMatrices,
    reread: Reread,
    definitions: Mapping[str, Definition],
    progress: Callable[[int, int], None],
    *,
    chunk: int = CHUNK,
    rounding: float = ROUNDING,
) -> Verification:
    """Compare every edited matrix with its definition; all other tensors must be the base's.

    `chunk` and `rounding` are explained at `CHUNK` and `ROUNDING`.
    """
    comparisons: dict[str, _Comparison] = {}
    for done, (name, target) in enumerate(base.targets.items(), start=1):
        count = base.count(target) if name in definitions else 0
        for index in range(count):
            weight = base.matrix(target, index)
            rows = reread.rows(target, index, weight)
            label = name if count == 1 else f"{name}[{index}]"  # experts
            expected, largest = definitions[name](weight), reread.largest_error(target)
            comparisons[label] = _compare(weight, expected, rows, largest, chunk, rounding)
        progress(done, len(base.targets))
    off = sorted(name for name, comparison in comparisons.items() if not comparison.ok)
    checks = {"weights": not off, "untouched": reread.untouched()}
    worst = max(comparisons, key=lambda name: comparisons[name].relative_error, default="")
    error = comparisons[worst].relative_error if worst else 0.0
    further = {"differs": list(getattr(reread, "differing", ())), "loaded_in": getattr(reread, "loaded_in", "")}
    record = {
        "ok": all(checks.values()),
        "checks": checks,
        # JSON has no infinity.
        "weight_error": {"max": error if math.isfinite(error) else None, "module": worst, "off": off},
        "lost_to_storage": max((comparison.lost for comparison in comparisons.values()), default=0.0) + 0.0,  # no −0.0
    }
    return Verification(all(checks.values()), record | {name: value for name, value in further.items() if value})


def chunks(weight: Tensor, chunk: int) -> Iterator[slice]:
    """Slices over the rows of a matrix, of about `chunk` entries each."""
    step = max(1, chunk // weight.shape[1])
    return (slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step))


@dataclass
class _Comparison:
    """Sums over the rows of one matrix: the squares of the error, of W' and of W' − W, and the error along W' − W."""

    ok: bool = True
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("error", "whole", "change", "along"), 0.0))

    @property
    def relative_error(self) -> float:
        """‖export − W'‖ / ‖W'‖; NaN counts as infinitely wrong."""
        error, whole = self.sums["error"], self.sums["whole"]
        if not math.isfinite(error):
            return math.inf
        return math.sqrt(error / whole) if whole > 0 else float(error > 0)

    @property
    def lost(self) -> float:
        """The share of the change that is missing: rounding W' to a coarse dtype loses a part of a weak edit."""
        change = self.sums["change"]
        return -self.sums["along"] / change if change > 0 and math.isfinite(self.sums["along"]) else 0.0


def _compare(
    weight: Tensor, expected: Rows, exported: Rows, largest: Callable[[Tensor], Tensor], chunk: int, rounding: float
) -> _Comparison:
    """An entry may be off by the rounding of its storage, plus the share of its row's norm that `rounding` allows."""
    comparison = _Comparison()
    for rows in chunks(weight, chunk):
        old, new = weight[rows].double(), expected(rows)
        error = exported(rows) - new
        norms = torch.maximum(old.norm(dim=1), new.norm(dim=1))[:, None]
        bound = largest(new) + rounding * norms
        comparison.ok &= bool((error.abs() <= bound).all())  # false for NaN
        terms = {"error": error.square(), "whole": new.square(), "change": (new - old).square(), "along": error * (new - old)}
        for name, term in terms.items():
            comparison.sums[name] += float(term.sum())
    return comparison
