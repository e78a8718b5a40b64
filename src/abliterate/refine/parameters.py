"""The parameters that refinement learns: a coeff and a unit direction of its own for every module, θ = {λ_m, v_m}.

With several directions, v_m is a matrix of norm 1 in all: row j is a unit direction times its weight w_j, and its strength is
λ_m w_j. So one direction is the case of one row, of weight 1.

They become an edit's factors by the edit method itself, which is differentiable in both; no gradient of a weight of the model
exists (docs/design.md §5b).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.directions import Blend, unit_rows
from abliterate.edits import EditMethod, Factors, prepare


@dataclass(frozen=True)
class Module:
    """A module that is edited: its name, its layer, and a function that reads W (d_model, d_in) or (E, d_model, d_in).

    `method` is the module's own edit method, where edits are computed from its inputs. If the module `reads` the stream,
    W is (d_out, d_model), and the method edits Wᵀ.
    """

    name: str
    layer: int
    read_weight: Callable[[], Tensor]
    method: EditMethod | None = None
    reads: bool = False


@dataclass
class Parameters:
    """θ: `coeffs` (n) and `directions` (n, d_model), or of several a module (n, k, d_model), float32 leaves of the graph.

    Each module's directions have norm 1 in all.
    """

    modules: Sequence[Module]
    method: EditMethod
    coeffs: Tensor
    directions: Tensor

    def __post_init__(self) -> None:
        assert self.coeffs.shape == (len(self.modules),)
        assert self.directions.shape[0] == len(self.modules)

    def factors(self) -> dict[str, Factors]:
        """The factors of every module's edit, as leaves: a pass gives gradients of them, and `pull_back` those of θ."""
        with torch.no_grad():
            found = {module.name: self._factors(index) for index, module in enumerate(self.modules)}
        for factors in found.values():
            for tensor in factors.tensors():
                tensor.requires_grad_(True)
        return found

    def pull_back(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Set the gradients of θ from those of the factors, {module: one for each of their tensors}.

        A module's factors are computed once more, so that at most one dense copy of a quantized W is in memory at a time.
        """
        self.coeffs.grad, self.directions.grad = torch.zeros_like(self.coeffs), torch.zeros_like(self.directions)
        for index, module in enumerate(self.modules):
            coeff = self.coeffs[index].detach().requires_grad_(True)
            direction = self.directions[index].detach().requires_grad_(True)
            pairs = zip(self._factors(index, coeff, direction).tensors(), gradients[module.name], strict=True)
            used = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
            found = torch.autograd.grad(
                [tensor for tensor, _ in used],
                [coeff, direction],
                [gradient.to(tensor.device) for tensor, gradient in used],
                allow_unused=True,
            )
            for total, gradient in zip((self.coeffs.grad, self.directions.grad), found, strict=True):
                if gradient is not None:
                    total[index] = gradient

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale every module's directions to norm 1 in all again, after a step."""
        flat = self.directions.view(len(self.modules), -1)
        flat /= flat.norm(dim=1, keepdim=True)

    def _factors(self, index: int, coeff: Tensor | None = None, direction: Tensor | None = None) -> Factors:
        module = self.modules[index]
        coeff = self.coeffs[index] if coeff is None else coeff
        direction = self.directions[index] if direction is None else direction
        method, weight = module.method or self.method, module.read_weight()
        found = self._of(method, weight.T if module.reads else weight, coeff, direction)
        return found.transposed() if module.reads else found

    @staticmethod
    def _of(method: EditMethod, weight: Tensor, coeff: Tensor, direction: Tensor) -> Factors:
        whole = (direction / direction.norm()).to(weight.device)  # its gradient is tangent to the sphere
        if whole.ndim == 1:
            prepared = prepare(method, lambda: weight, whole[None].double())
            return method.factors(prepared, Blend((0,), (1.0,)), coeff.to(weight.device))  # type: ignore[arg-type]
        vectors, weights = unit_rows(whole.double())
        prepared = prepare(method, lambda: weight, vectors)
        alone = [Blend((row,), (1.0,)) for row in range(len(vectors))]
        return method.product(prepared, alone, coeff.to(weight.device) * weights)
