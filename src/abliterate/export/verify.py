"""Does the export do what the trial did? Reloaded from disk, and compared on the evaluation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.evaluation.base import Observation, Scorer
from abliterate.evaluation.kl import kl_divergence

# Mean KL(trial‖export) on the first token. In float32 only the order of operations differs; half-precision storage
# rounds every edited weight to 8 (bf16) or 11 bits, which a trial on the unrounded weights doesn't see.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Refusals may differ by this share of the prompts where weights were rounded.
REFUSAL_TOLERANCE = {torch.float32: 0.0, torch.float16: 0.02, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Verification:
    """The verdict and the figures behind it; `record` goes into `result.json`."""

    ok: bool
    record: dict[str, Any]


def compare(
    expected_logprobs: Tensor,
    expected_refusals: int,
    observed: Observation,
    scorers: Sequence[Scorer],
    dtype: torch.dtype,
) -> Verification:
    """Compare an export's observation with its trial; `dtype` is the coarser of storage and computation."""
    divergence = kl_divergence(expected_logprobs, observed.first_logprobs.to(expected_logprobs.device))
    scores = {score.name: score.record for score in (scorer.score(observed) for scorer in scorers)}
    allowed = REFUSAL_TOLERANCE[dtype] * len(observed.responses)
    close = float(divergence.mean()) <= TOLERANCE[dtype]
    ok = close and abs(scores["refusals"] - expected_refusals) <= allowed
    record = {
        "ok": ok,
        "kl_from_trial": {"mean": float(divergence.mean()), "max": float(divergence.max())},
        "scores": scores,
        "tolerance": {"kl_from_trial": TOLERANCE[dtype], "refusals": allowed},
    }
    return Verification(ok, record)
