"""Random inputs of a model's modules, and parameters of trials whose edits are computed from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from abliterate.directions import ModuleInputs
from abliterate.edits import METHODS
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import in_features
from abliterate.types import TrialParams
from support.models import make_params

MIDDLE = {name: wanted.middle for name, wanted in METHODS["arbitrary-rank"].parameters.items()}  # type: ignore[attr-defined]


def random_inputs(loaded: LoadedModel, n: int = 5, along: int = 0) -> dict[str, ModuleInputs]:
    """Inputs of every module to edit, of so many prompts of each set, and at so many tokens of answers."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, width: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    widths = {target.name: in_features(target.module) for target in loaded.targets}
    sets = (n, n, along) if along else (n, n)
    return {name: ModuleInputs(*(rows(count, width) for count in sets)) for name, width in widths.items()}


def params_of(mode: str) -> TrialParams:
    """Parameters of a trial with the numbers that an edit mode asks for."""
    return replace(make_params(0), extra=MIDDLE if mode == "arbitrary-rank" else {})
