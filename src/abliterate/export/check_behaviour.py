"""Check that an export behaves as its trial did: reload it from disk and compare it with the edited model in memory.

Two tests. *Behaviour*: first-token distributions of both evaluation sets, the trial's KL, its refusals. *Modules*: each
edited matrix is fed the input that its edit changes most, and must change it as in the trial. The second test is the sharp
one: a single weak edit that is left out moves KL(trial‖export) by 1e-6, less than half precision or quantization do, but for
its module it is a whole edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from abliterate.edits import Factors
from abliterate.model.experts import down_outputs, is_fused
from abliterate.model.quantized import DEQUANTIZED, checkpoint_quantization
from abliterate.model.weights import device_and_dtype
from abliterate.scorers.base import Observation, Scorer, asks_base
from abliterate.scorers.kl import kl_divergence
from abliterate.types import Trial

# Bounds of the mean KL(trial‖export) per prompt set: for forward passes in the run's dtype, for storing the edited weights in
# the export's dtype, and for the difference between the export's full-precision weights and the quantized weights of the trial.
# Measured on the demo model with correct exports of every kind: 4e-8, 3e-6, 2e-4; 1e-8, 5e-8, 4e-7; 6e-4, 2e-2.
_PASSES = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
_STORAGE = {torch.float32: 0.0, torch.float16: 1e-6, torch.bfloat16: 1e-5}
_QUANTIZED = {"none": 0.0, "bnb_8bit": 5e-3, "bnb_4bit": 1e-1, "dequantized": 1e-5, "checkpoint": 1e-2}
# Deep models round more than the demo, so the run's own noise (KL between two batch sizes) times this factor is allowed, too.
_NOISE = 10.0
# |KL of the export − KL of the trial| may be this share of the trial's KL beyond the bound above (measured: 1.5, 1, 18 %).
_KL_SHARE = {"none": 0.02, "bnb_8bit": 0.05, "bnb_4bit": 0.5, "dequantized": 0.02, "checkpoint": 0.2}
# The edit of a module may be off by this share, beyond the noise of single outputs: a coeff that is 5 % off gives 5 %, an edit
# left out 100 %. Measured: 0.001 % in float32, in whatever dtype the export is stored; 0.5 % in bfloat16; 1.6 and 4 %.
_MODULE = {torch.float32: 0.01, torch.float16: 0.01, torch.bfloat16: 0.03}
_MODULE_QUANTIZED = {"none": 0.0, "bnb_8bit": 0.03, "bnb_4bit": 0.1, "dequantized": 0.0, "checkpoint": 0.1}
# The change of one output entry by quantization, relative to the outputs' size.
_ENTRY_QUANTIZED = {"none": 0.0, "bnb_8bit": 0.01, "bnb_4bit": 0.1, "dequantized": 0.0, "checkpoint": 0.05}
# Refusals may differ by this share of the prompts.
_REFUSALS = {torch.float32: 0.0, torch.float16: 0.02, torch.bfloat16: 0.05}
_REFUSALS_QUANTIZED = {"none": 0.0, "bnb_8bit": 0.05, "bnb_4bit": 0.1, "dequantized": 0.02, "checkpoint": 0.1}


@dataclass(frozen=True)
class Precision:
    """The sources of rounding: the dtype that the trial ran in, the export's stored dtype, and the trial's quantization."""

    run: torch.dtype
    stored: torch.dtype
    quantization: str = "none"

    @property
    def row(self) -> str:
        """The row of the tables above. The export keeps a checkpoint's quantization, but kernels round activations, too."""
        if not checkpoint_quantization(self.quantization):
            return self.quantization
        return "dequantized" if self.quantization.endswith(DEQUANTIZED) else "checkpoint"

    @property
    def entry(self) -> float:
        """Noise of one entry of a module's output, relative to the outputs' size."""
        return max(torch.finfo(self.run).eps, _ENTRY_QUANTIZED[self.row])

    def divergence(self, noise: float) -> float:
        """Bound of the mean KL between two passes of the same model; `noise`: the KL seen between two batch sizes."""
        return _PASSES[self.run] + _STORAGE[self.stored] + _QUANTIZED[self.row] + _NOISE * noise

    def kl(self, kl: float, noise: float) -> float:
        """Bound of the difference between a trial's mean KL of `kl` and that of its export."""
        return self.divergence(noise) + _KL_SHARE[self.row] * kl

    def refusals(self, prompts: int) -> float:
        """The number of responses that may tip over at a near-tie: at least one, if anything was rounded."""
        coarser = max(self.stored, self.run, key=lambda dtype: torch.finfo(dtype).eps)
        share = max(_REFUSALS[coarser], _REFUSALS_QUANTIZED[self.row])
        return max(1.0, share * prompts) if share > 0 else 0.0


@dataclass(frozen=True)
class ModuleProbe:
    """One edited module's outputs (1, d_model) for `x` (1, d_in) in float32: without the trial's edit and with it.

    Fused experts have a row for each expert. `rounding` (1, d_model): the change that storing W' in the export's dtype adds. It
    is not noise: W lies on that dtype's grid, so a ΔW below half a step is lost altogether (an edit of 2 % of the demo's loses
    a seventh in bfloat16).
    """

    x: Tensor
    base: Tensor
    edited: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class Expected:
    """The values that an export must reproduce, taken while the edited model was in memory; float32 tensors on the CPU.

    `harmless` and `harmful` (n_prompts, vocabulary): first-token log-probabilities; `noise`: their mean KL between two
    batch sizes.
    """

    trial: Trial
    harmless: Tensor
    harmful: Tensor
    noise: float
    probes: Mapping[str, ModuleProbe]


@dataclass(frozen=True)
class Verification:
    """The verdict and the figures behind it; `record` goes into `result.json`."""

    ok: bool
    record: dict[str, Any]


def probe_inputs(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """{module: x (1, d_in)}: along the edit's leading `a`, as long as a random input; a random x would show λ/√d of the edit.

    For fused experts, x is (E, d_in).
    """
    leading = {name: f.a[..., 0, :].reshape(-1, f.a.shape[-1]) for name, f in factors.items()}
    # The `a` of an unused expert may be all zeros, which `normalize` leaves as they are.
    return {name: normalize(a, dim=1) * a.shape[1] ** 0.5 for name, a in leading.items()}


def storage_rounding(weight: Tensor, factors: Factors, x: Tensor, stored: torch.dtype, *, is_base: bool = False) -> Tensor:
    """(round(W') − W') x, (1, d_model), which is `ModuleProbe.rounding`.

    `is_base`: the export starts from this W, rounded. Otherwise W was quantized when it was loaded, and is treated as if it
    were the W in the files.
    """
    outputs = []
    matrices = weight if weight.ndim == 3 else [weight]
    for matrix, matrix_factors, row in zip(matrices, factors.parts(), x, strict=True):
        on_grid = matrix.to(stored).float()
        delta = matrix_factors.to(weight.device).delta
        exported, base = on_grid + delta(on_grid), matrix.float() if is_base else on_grid
        outputs.append((row[None].to(weight.device) @ (exported.to(stored).float() - (base + delta(base))).T).cpu())
    return torch.cat(outputs)


@torch.inference_mode()
def module_outputs(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """{module: its output (1, d_model)} in float32 on the CPU, with hooks and adapters; `dtype`: of quantized inputs."""
    return {name: _output(_find(model, name), x, dtype) for name, x in inputs.items()}


def compare(
    expected: Expected,
    observed: Observation,
    harmful: Tensor,
    outputs: Mapping[str, Tensor],
    scorers: Sequence[Scorer],
    precision: Precision,
) -> Verification:
    """Compare a reloaded export with its trial.

    `observed`: the export on both evaluation sets; `harmful` (n_harmful, vocabulary): its first-token log-probabilities;
    `outputs`: its modules' outputs for the probes' inputs.
    """
    trial = expected.trial
    divergences = {
        "harmless": kl_divergence(expected.harmless, observed.first_logprobs.cpu()),
        "harmful": kl_divergence(expected.harmful, harmful.cpu()),
    }
    # The base is gone by now, so nobody can ask it.
    scores = {score.name: score.record for score in (scorer.score(observed) for scorer in scorers if not asks_base(scorer))}
    bound, kl_bound = precision.divergence(expected.noise), precision.kl(trial.kl, expected.noise)
    refusals = precision.refusals(len(observed.responses))
    share = max(_MODULE[precision.run], _MODULE_QUANTIZED[precision.row])
    errors = {name: _largest_error(probe, outputs[name], precision.entry) for name, probe in expected.probes.items()}
    off = sorted(name for name, error in errors.items() if error > share)
    # Only a lower bound is known of a pruned trial's refusals.
    extra = scores["refusals"] - trial.refusals
    checks = {
        "kl_from_trial": all(float(values.mean()) <= bound for values in divergences.values()),
        "kl": abs(scores["kl"]["mean"] - trial.kl) <= kl_bound,
        "refusals": -extra <= refusals if trial.state == "stopped" else abs(extra) <= refusals,
        "modules": not off,
    }
    record = {
        "ok": all(checks.values()),
        "checks": checks,
        "kl_from_trial": {name: {"mean": float(v.mean()), "max": float(v.max())} for name, v in divergences.items()},
        "module_error": {"max": max(errors.values(), default=0.0), "off": off},
        "lost_to_storage": max((_lost(probe) for probe in expected.probes.values()), default=0.0) + 0.0,  # no −0.0
        "scores": scores,
        "tolerance": {"kl_from_trial": bound, "kl": kl_bound, "refusals": refusals, "modules": share},
    }
    return Verification(all(checks.values()), record)


def _largest_error(probe: ModuleProbe, output: Tensor, entry_noise: float) -> float:
    """The `_module_error` of the worst matrix of a module."""
    rows = zip(probe.x, probe.base, probe.edited, probe.rounding, output, strict=True)
    return max(
        _module_error(ModuleProbe(x, base, edited, rounding), row, entry_noise) for x, base, edited, rounding, row in rows
    )


def _module_error(probe: ModuleProbe, output: Tensor, entry_noise: float) -> float:
    """The share of the edit that is missing or in excess, along the change that the edit makes: 0 is right, 1 is left out.

    Only that one direction is measured: rounding and quantization differ in all d_model directions, the edit in one. Their
    expected noise in it is subtracted, because the output's last bits are a large share of a weak edit.
    """
    change = probe.edited - probe.base
    size = float(change.norm())
    if size == 0:
        return 0.0
    error = abs(float(((output - probe.edited - probe.rounding) * change).sum())) / size**2
    noise = 4 * entry_noise * float(probe.edited.norm()) / change.shape[-1] ** 0.5  # four standard deviations at least
    # NaN must not pass as a small error.
    return max(0.0, error - noise / size) if math.isfinite(error) else math.inf


def _lost(probe: ModuleProbe) -> float:
    """The share of an edit that the export's dtype can't hold; negative if rounding made the edit larger."""
    change = probe.edited - probe.base
    square = float(change.square().sum())
    return -float((probe.rounding * change).sum()) / square if square > 0 else 0.0


def _find(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, before which PEFT puts its own prefix."""
    return next(module for path, module in model.named_modules() if path == name or path.endswith(f".{name}"))


def _output(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    device, own = device_and_dtype(module)
    # Offloaded weights are on no device, and their own hook moves the input. Some modules of a half-precision model are kept
    # in float32.
    x = x.to(torch.device("cpu") if device.type == "meta" else device, own or dtype)
    return (down_outputs(module, x) if is_fused(module) else module(x)).float().cpu()
