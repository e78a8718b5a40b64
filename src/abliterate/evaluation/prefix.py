"""What the base model's responses begin with: raw texts for `calibration.detect_prefix`, no longer than it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from abliterate.evaluation.engine import TrialEngine, Unsupported
from abliterate.evaluation.reference import ReferenceEngine
from abliterate.settings import EfficiencySettings
from abliterate.types import Prompt


class NoEdit:
    """The base model's `EditState`."""

    version = 0
    first_layer = None


def prefix_responses(
    reference: ReferenceEngine, layers: torch.nn.ModuleList, switches: EfficiencySettings, prompts: Sequence[Prompt]
) -> list[str]:
    """Raw responses of the base model, only as long as it takes to see what they share, if the switches say so."""
    if switches.use_trial_engine and switches.use_early_prefix_detection:
        # Plain prefills: nothing has been checked yet.
        plain = switches.model_copy(update={"use_shared_prefix": False, "use_layer_skip": False})
        with contextlib.suppress(Unsupported):
            return TrialEngine(reference, layers, NoEdit(), plain, None).raw_responses(prompts)
    return reference.raw_responses(prompts)
