"""What modules that read the residual stream see of a direction: a norm in between scales its entries by γ.

The module's input is γ∘h/rms(h), so of a direction v in h it sees γ∘v, which is what an edit takes out of its inputs. γ is
measured, because some families store γ − 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from abliterate.directions import Directions
from abliterate.errors import InputError
from abliterate.model.architectures import Target


def with_gains(directions: Directions, model: nn.Module, targets: Iterable[Target]) -> Directions:
    """The directions with γ of each norm that modules to edit read through.

    Raises:
        InputError: as in `gains_of`.
    """
    return replace(directions, gains=gains_of(model, targets, directions.d_model))


def gains_of(model: nn.Module, targets: Iterable[Target], d_model: int) -> Mapping[str, Tensor]:
    """{norm: γ (d_model) float32} of the norms that modules to edit read through.

    Raises:
        InputError: a norm is offloaded, or doesn't only scale its input.
    """
    norms = dict.fromkeys(target.norm for target in targets if target.norm)
    return {name: gain_of(model.get_submodule(name), d_model, name) for name in norms}


@torch.no_grad()
def gain_of(norm: nn.Module, d_model: int, name: str) -> Tensor:
    """γ (d_model) float32 of a norm that computes γ∘h/rms(h), measured with two inputs of rms 1."""
    signs = 1.0 - 2.0 * (torch.arange(d_model) % 2)
    exact = copy.deepcopy(norm).float()  # in half precision its outputs would be rounded
    device = next(exact.parameters()).device
    if device.type == "meta":
        raise InputError(f"The norm {name} is offloaded, so the modules behind it can't be edited; leave load.readers out.")
    inputs = torch.stack([torch.ones(d_model), signs, -signs]).to(device)
    plain, alternating, opposite = exact(inputs).float().cpu()
    gain = alternating * signs
    if not torch.allclose(plain, gain, rtol=1e-4, atol=1e-5) or not torch.allclose(
        opposite, -alternating, rtol=1e-4, atol=1e-5
    ):
        raise InputError(f"The norm {name} doesn't only scale its input; leave load.readers out.")
    return gain
