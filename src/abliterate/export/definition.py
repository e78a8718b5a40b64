"""Is an export the edit, by the edit's definition? Needs no prompts and runs no model: matrices are read back and compared.

The definition is `EditMethod.dense`, in float64 on the base's own matrix, in other words than the factors that were written.
Memory is two stored matrices and some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.edits import EditMethod, Factors
from abliterate.export.reread import Reread, Rows
from abliterate.export.source import Matrices
from abliterate.export.verify import Verification

# Rows compared at a time, by their entries: several copies of them are in memory in float64.
CHUNK = 1 << 16
# What float32 factors and sums explain in an entry, of its row's norm: twice the largest seen, 5e-7 in rows that lie nearly
# along the direction (their closed form divides by little); elsewhere it is 3e-8 (tests/test_definition.py).
_ROUNDING = 1e-6

# W (d_out, d_in) → W' as a function of the rows wanted.
Definition = Callable[[Tensor], Rows]


def by_definition(method: EditMethod, v: Tensor, coeff: float) -> Definition:
    """W' as the edit method says, for the unit direction `v` (d_out) float64: rows along v are sensitive to its last bits."""

    def define(weight: Tensor) -> Rows:
        a = torch.zeros(weight.shape[1], dtype=torch.float64)
        for rows in chunks(weight):
            a += method.along(weight[rows].double(), v[rows])
        return lambda rows: method.dense_rows(weight[rows].double(), v[rows], a, coeff)

    return define


def by_factors(factors: Factors) -> Definition:
    """W' as factors say that aren't the edit itself but near it: the svd representation."""

    def define(weight: Tensor) -> Rows:
        scale = torch.ones(len(weight)) if factors.row_scale is None else factors.row_scale
        a, b = factors.a.double(), factors.b.double()
        return lambda rows: scale[rows, None].double() * weight[rows].double() + b[rows] @ a

    return define


def check_weights(
    base: Matrices, reread: Reread, definitions: Mapping[str, Definition], progress: Callable[[int, int], None]
) -> Verification:
    """Compare every target's matrix with its definition; targets without one must be the base's, like all other tensors."""
    found: dict[str, _Compared] = {}
    for index, (name, target) in enumerate(base.targets.items()):
        count = base.count(target) if name in definitions else 0
        for one in range(count):
            weight = base.matrix(target, one)
            rows = reread.rows(target, one, weight)
            label = name if count == 1 else f"{name}[{one}]"  # experts
            found[label] = _compare(weight, definitions[name](weight), rows, reread.dtype)
        progress(index + 1, len(base.targets))
    off = sorted(name for name, one in found.items() if not one.ok)
    checks = {"weights": not off, "untouched": reread.untouched()}
    worst = max(found, key=lambda name: found[name].relative_error, default="")
    error = found[worst].relative_error if worst else 0.0
    record = {
        "ok": all(checks.values()),
        "checks": checks,
        # JSON knows no infinity.
        "weight_error": {"max": error if math.isfinite(error) else None, "module": worst, "off": off},
        "lost_to_storage": max((one.lost for one in found.values()), default=0.0) + 0.0,  # no −0.0
    }
    return Verification(all(checks.values()), record)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of some rows each."""
    step = max(1, CHUNK // weight.shape[1])
    return (slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step))


@dataclass
class _Compared:
    """Sums over the rows of one matrix: squares of the error, of W', of W' − W; and the error along W' − W."""

    ok: bool = True
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("error", "whole", "change", "along"), 0.0))

    @property
    def relative_error(self) -> float:
        """‖export − W'‖ / ‖W'‖; not a number is infinitely wrong."""
        error, whole = self.sums["error"], self.sums["whole"]
        if not math.isfinite(error):
            return math.inf
        return math.sqrt(error / whole) if whole > 0 else float(error > 0)

    @property
    def lost(self) -> float:
        """The share of the change that isn't there: rounding W' to a coarse dtype loses some of a weak edit."""
        change = self.sums["change"]
        return -self.sums["along"] / change if change > 0 and math.isfinite(self.sums["along"]) else 0.0


def _compare(weight: Tensor, wanted: Rows, exported: Rows, dtype: torch.dtype) -> _Compared:
    """Each entry may be off by half a step of the storage, and each row by what float32 rounding of its factors explains."""
    found, info = _Compared(), torch.finfo(dtype)
    for rows in chunks(weight):
        old, new = weight[rows].double(), wanted(rows)
        error = exported(rows) - new
        norms = torch.maximum(old.norm(dim=1), new.norm(dim=1))[:, None]
        bound = info.eps / 2 * new.abs() + info.smallest_normal * info.eps + _ROUNDING * norms
        found.ok &= bool((error.abs() <= bound).all())  # false where it is not a number
        parts = {"error": error.square(), "whole": new.square(), "change": (new - old).square(), "along": error * (new - old)}
        for name, part in parts.items():
            found.sums[name] += float(part.sum())
    return found
