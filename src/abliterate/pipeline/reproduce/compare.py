"""Compare a reproduced trial with its recipe: files by hash, scores, edits, and whether rounding explains the differences.

This module decides the verdict; of its input it measures only the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abliterate.artifacts.result import Result
from abliterate.edits import METHODS, Factors, needs_inputs
from abliterate.edits.fingerprint import Sketch, largest_difference, sketch
from abliterate.export.check_behaviour import Precision
from abliterate.export.recipe import Recipe, hashes
from abliterate.pipeline.export import Picked, stored_dtype_of

# The relative difference of one matrix's edit that another rounding of the same residuals explains. Other batch sizes caused
# 2e-7, 4e-4 and 3e-3 on the demo; other machines round more. A coeff that is 1 % off changes the edit by 1 %.
EDIT = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
# How many times more it explains of edits that are computed from the inputs of modules: the smallest components of these count
# most in an inverse. In bfloat16 another batch size changed them by 2.5 % on the demo, and in float32 by 1e-6.
_INPUTS = 4.0
_EDIT_QUANTIZED = 5e-2
_WEIGHTS = (".safetensors", ".bin")

Outcome = Literal["identical", "equivalent", "different"]


@dataclass(frozen=True)
class Comparison:
    """The values of the recipe and of its reproduction; pairs are (the recipe's value, the value here).

    `files` is {name: "equal", "other", "missing" or "new"}, or None if no export can be compared. `edits` is the largest
    relative difference of one matrix's edit, and its module; None if the recipe has no edits. `environment` has the versions
    and device that differ.
    """

    files: Mapping[str, str] | None
    same_scores: bool
    refusals: tuple[int, int]
    kl: tuple[float, float]
    baseline: tuple[int, int]
    tolerance: Mapping[str, float]
    edits: tuple[float, str] | None
    same_directions: bool
    environment: Mapping[str, tuple[str, str]]
    verified: bool | None

    @property
    def differing(self) -> list[str]:
        """The names of files that differ from the recipe's files in any byte."""
        return sorted(name for name, state in (self.files or {}).items() if state != "equal")

    @property
    def causes(self) -> list[str]:
        """The reasons why the outcome is `different`; empty if it isn't."""
        causes = []
        if abs(self.refusals[1] - self.refusals[0]) > self.tolerance["refusals"]:
            causes.append(f"{self.refusals[1]} refusals instead of {self.refusals[0]}")
        if abs(self.baseline[1] - self.baseline[0]) > self.tolerance["refusals"]:
            causes.append(f"the unedited model refuses {self.baseline[1]} instead of {self.baseline[0]}")
        if not abs(self.kl[1] - self.kl[0]) <= self.tolerance["kl"]:
            causes.append(f"KL {self.kl[1]:.6f} instead of {self.kl[0]:.6f}")
        if self.edits is not None and not self.edits[0] <= self.tolerance["edits"]:
            causes.append(f"the edit of {self.edits[1]} is {self.edits[0]:.2%} off")
        if any(name.endswith(_WEIGHTS) for name in self.differing) and not self._explained:
            causes.append(f"other bytes in {_listed(self.differing)}, though edits, versions and device are the same")
        if self.verified is False:
            causes.append("the export failed its check")
        return causes

    @property
    def _explained(self) -> bool:
        """Whether another rounding could explain other bytes."""
        return bool(self.environment) or not self.same_directions or self.edits is None or self.edits[0] > 0

    @property
    def outcome(self) -> Outcome:
        """`identical`: every byte and every score; `equivalent`: the same within rounding."""
        if self.causes:
            return "different"
        return "identical" if self.same_scores and not self.differing else "equivalent"

    def lines(self) -> Iterator[str]:
        """The compared values, as lines for a person."""
        if self.files is not None:
            yield f"{len(self.files) - len(self.differing)} of {len(self.files)} files are the recipe's, byte for byte"
        same = "equal to" if self.same_scores else "the recipe's:"
        theirs = "the recipe's" if self.same_scores else f"{self.refusals[0]}, {self.kl[0]:.6f}"
        yield f"refusals {self.refusals[1]}, KL {self.kl[1]:.6f}; {same} {theirs}"
        if self.edits is not None and self.edits[0] > 0:
            yield f"largest difference of one matrix's edit: {self.edits[0]:.1e} of it ({self.edits[1]})"
        for name, (theirs, ours) in self.environment.items():
            yield f"another {name}: {ours}, the recipe's {theirs!r}"

    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.outcome == "identical":
            return "reproduced: the same scores" + ("" if self.files is None else " and the same files, byte for byte")
        if self.outcome == "equivalent":
            differences = [f"other bytes in {_listed(self.differing)}"] if self.differing else []
            differences += [] if self.same_scores else ["scores that differ within rounding"]
            reason = f"; here are {_listed([f'another {name}' for name in self.environment])}" if self.environment else ""
            return f"Reproduced but for rounding: {' and '.join(differences)}{reason}."
        return (
            f"This isn't the recipe's model: {'; '.join(self.causes)}; the versions and the kind of device that the recipe "
            "names may give it, or the recipe was changed."
        )

    def to_record(self) -> dict[str, Any]:
        """JSON form."""
        largest = None
        if self.edits is not None:  # JSON has no infinity
            largest = {"difference": self.edits[0] if math.isfinite(self.edits[0]) else None, "module": self.edits[1]}
        pairs = {"refusals": self.refusals, "kl": self.kl, "baseline": self.baseline}
        return {
            "outcome": self.outcome,
            "causes": self.causes,
            "files": None if self.files is None else dict(self.files),
            "scores": {"equal": self.same_scores} | {name: {"recipe": a, "here": b} for name, (a, b) in pairs.items()},
            "edits": largest,
            "directions_equal": self.same_directions,
            "environment": {name: {"recipe": a, "here": b} for name, (a, b) in self.environment.items()},
            "tolerance": dict(self.tolerance),
        }


def compare(recipe: Recipe, result: Result, picked: Picked, factors: Mapping[str, Factors], final: Path) -> Comparison:
    """Compare the recipe with its reproduction: the result of a run of one trial, the edits, and the export in `final`."""
    trial, stated = picked.expected.trial, recipe.trial.scores
    kind = result.export.kind
    assert result.directions is not None
    assert result.baseline is not None
    stored = stored_dtype_of(kind, picked.job)
    precision = Precision(picked.dtype, stored, picked.quantization)
    environment = _environment(recipe, result)
    same_directions = recipe.directions == result.directions.vectors_sha256
    # Another machine may break a near-tie differently even in float32.
    refusals = max(precision.refusals(recipe.baseline.prompts), 1.0 if environment else 0.0)
    sketches: dict[str, Sketch] = {name: sketch(edit) for name, edit in factors.items()}
    # Without an export, the edits here were computed on the loaded model only.
    same_origin = recipe.export.origin == "trial" or kind != "none"
    return Comparison(
        files=_files(recipe, final) if kind == recipe.export.kind != "none" else None,
        # Only scorers that ran here are compared; custom scorers and judges of a recipe don't run.
        same_scores=all(recipe.trial.model_dump()["scores"].get(name) == score for name, score in trial.scores.items()),
        refusals=(stated.refusals, trial.refusals),
        kl=(stated.kl.mean, trial.kl),
        baseline=(recipe.baseline.refusals, result.baseline.refusals),
        tolerance={
            "refusals": refusals,
            "kl": precision.kl(stated.kl.mean, picked.expected.noise),
            "edits": _edit_tolerance(picked, _mode(recipe), same_directions=same_directions),
        },
        edits=largest_difference(recipe.export.edits, sketches) if recipe.export.edits and same_origin else None,
        same_directions=same_directions,
        environment=environment,
        verified=result.export.verified,
    )


def _mode(recipe: Recipe) -> str:
    return str(recipe.settings.get("edit", {}).get("mode", ""))


def _edit_tolerance(picked: Picked, mode: str, *, same_directions: bool) -> float:
    """The tolerance of edits; from equal directions they are computed in float64 whatever the model's dtype."""
    if same_directions:
        return EDIT["float32"]
    rounding = max(EDIT[str(picked.dtype).removeprefix("torch.")], 0.0 if picked.quantization == "none" else _EDIT_QUANTIZED)
    return rounding * (_INPUTS if mode in METHODS and needs_inputs(METHODS[mode]) else 1.0)


def _files(recipe: Recipe, final: Path) -> dict[str, str]:
    stated, made = {name: file.model_dump() for name, file in recipe.export.files.items()}, hashes(final)
    states = {name: "equal" if stated[name] == made[name] else "other" for name in stated.keys() & made.keys()}
    states |= dict.fromkeys(stated.keys() - made.keys(), "missing") | dict.fromkeys(made.keys() - stated.keys(), "new")
    return dict(sorted(states.items()))


def _environment(recipe: Recipe, result: Result) -> dict[str, tuple[str, str]]:
    """{name: (the recipe's, here)} of the differing versions and device; an export's versions may differ from the run's."""
    here, stated = result.environment, recipe.environment
    theirs = stated.versions | {"platform": stated.platform, "device": stated.device}
    ours = here.versions | {"platform": here.platform, "device": here.device}
    differing = {name: (theirs.get(name, "unknown"), value) for name, value in ours.items() if theirs.get(name) != value}
    for name, value in ours.items():
        version = recipe.export.versions.get(name, value)
        if name not in differing and version != value:
            differing[name] = (version, value)
    return differing


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
