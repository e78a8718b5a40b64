"""`arbitrary-rank`: ΔW that moves a module's outputs on harmful prompts to those on harmless ones, found by L-BFGS.

With the inputs X_g of harmless and X_b of harmful prompts, and the outputs Y = XW₀ᵀ that they have now, W minimizes

  p · mean (X_gWᵀ − Y_g)² + s · (mean K_k(X_bWᵀ → Y_g) − o · mean K_k(X_bWᵀ → Y_b)),

K_k the mean distance of a row to its k nearest rows. Arbitrary-rank ablation: github.com/p-e-w/heretic/pull/211.

It is solved exactly in bases of what was captured. A gradient method is always at some W = W₀ + U T Qᵀ, with Q (d_in, r) an
orthonormal basis of the rows of X, and U (d_out, m) one of the rows of Y, since gradients of outputs are sums of differences of
outputs; and distances are the same in the basis U. So the unknown is T (m, r), with m and r at most the number of prompts, and
a step costs the same whatever the size of W. The distance of a row to its own old output is left out of K_k(X_bWᵀ → Y_b): it
is 0 at the start, where rounding would choose the direction of its gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from abliterate.directions.base import Blend
from abliterate.directions.inputs import Keys, ModuleInputs
from abliterate.edits.base import EditMethod, Factors, Prepared, project_back, row_basis, row_norms
from abliterate.errors import TrialError
from abliterate.types import Range

STEPS, ITERATIONS = 5, 20
# Singular values of ΔW below this share of the largest are as small as the rounding of float32 factors.
NEGLIGIBLE = 1e-6
# A model whose matrices change by more times their norm doesn't answer. With an overshoot beyond 1, the objective has no
# minimum: far from all outputs, pull and push are the same distance.
LARGEST_CHANGE = 10
# Solutions that are kept for each module: those of the trials that are evaluated, selected and exported one after another.
KEPT = 8


@dataclass(frozen=True)
class Numbers:
    """The trial's numbers: weights of what is preserved, of the move, and of overshooting (p, s, o); and the neighbours k."""

    preserve: float
    steer: float
    overshoot: float
    neighbours: int


@dataclass(frozen=True)
class Problem(Prepared):
    """A module's inputs and outputs in their bases, all float64; what `Prepared` has beside `directions` is empty.

    `inputs` (n, r) = XQ and `outputs` (n, m) = YU, of which the first `n_good` rows are of harmless prompts; `q` (d_in, r); `u`
    (d_out, m). `size` is ‖W‖. `solved` has the latest solutions T (m, r).
    """

    inputs: Tensor
    outputs: Tensor
    q: Tensor
    u: Tensor
    n_good: int
    size: float
    solved: OrderedDict[Numbers, Tensor] = field(default_factory=OrderedDict)

    @property
    def nbytes(self) -> int:
        own = self.inputs.nbytes + self.outputs.nbytes + self.q.nbytes + self.u.nbytes
        return own + KEPT * self.u.shape[1] * self.q.shape[1] * self.u.element_size()

    def parked(self) -> Problem:
        return self._on("cpu")

    def fetched(self, blends: Sequence[Blend]) -> tuple[Problem, tuple[Blend, ...]]:
        return self._on(self.directions.device), tuple(blends)

    def _on(self, device: torch.device | str) -> Problem:
        parts = {name: getattr(self, name).to(device) for name in ("inputs", "outputs", "q", "u")}
        return replace(self, **parts)

    def objective(self, core: Tensor, numbers: Numbers) -> Tensor:
        """The objective at W₀ + U T Qᵀ, T = `core`."""
        moved, n_good = self.outputs + self.inputs @ core.T, self.n_good
        drift = (moved[:n_good] - self.outputs[:n_good]).square().sum() / (n_good * len(self.u))
        return _weighed(drift, moved[n_good:], self.outputs[:n_good], self.outputs[n_good:], numbers)

    def solution(self, numbers: Numbers) -> Tensor:
        """The T that L-BFGS finds from 0; deterministic, and found once for equal numbers.

        Raises:
            TrialError: the objective diverged.
        """
        core = self.solved.get(numbers)
        if core is None:
            core = self._minimized(numbers)
            self.solved[numbers] = core
            if len(self.solved) > KEPT:
                self.solved.popitem(last=False)
        return core.to(self.u.device)

    def _minimized(self, numbers: Numbers) -> Tensor:
        core = self.u.new_zeros(self.u.shape[1], self.q.shape[1], requires_grad=True)
        if not core.numel():  # W or all inputs are zero
            return core.detach()
        # Tolerances far below any step, because the size of the objective depends on the model and on the trial's numbers.
        optimizer = torch.optim.LBFGS(
            [core], max_iter=ITERATIONS, tolerance_grad=1e-14, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.objective(core, numbers)
            loss.backward()
            return loss

        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.step(closure)
        if not torch.isfinite(core).all():
            raise TrialError("the optimization of an edit diverged")
        return core.detach()


def _weighed(drift: Tensor, moved: Tensor, good: Tensor, bad: Tensor, numbers: Numbers) -> Tensor:
    """p · drift + s · (K_k(moved → good) − o · K_k(moved → bad)), of row i without its distance to row i of `bad`."""
    own = torch.eye(len(bad), dtype=torch.bool, device=bad.device)
    pull = _nearest(_distances(moved, good), numbers.neighbours)
    push = _nearest(_distances(moved, bad).masked_fill(own, inf), min(numbers.neighbours, len(bad) - 1))
    return numbers.preserve * drift + numbers.steer * (pull - numbers.overshoot * push)


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distances (n, n') by matrix products, a fifth of the time of `torch.cdist`; the gradient of a distance of 0 is 0.

    Around the mean of `others`, so that a part that all rows have in common costs no digits.
    """
    center = others.mean(dim=0)
    rows, others = rows - center, others - center
    sizes = rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    squares = sizes - 2 * rows @ others.T
    equal = squares <= 1e-12 * sizes  # as far as float64 can tell
    return torch.where(equal, 1.0, squares).sqrt().masked_fill(equal, 0.0)


def _nearest(distances: Tensor, k: int) -> Tensor:
    """The mean over rows of the mean of their k smallest distances; 0 if k is."""
    if k == 0:
        return distances.new_zeros(())
    return distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values.mean()


def problem_bytes(prompts: int, d_out: int, d_in: int) -> int:
    """The most bytes that the problem of a module with the inputs of so many prompts takes (`Problem.nbytes`)."""
    m, r = min(prompts, d_out), min(prompts, d_in)
    return torch.float64.itemsize * (prompts * (m + r) + m * d_out + r * d_in + KEPT * m * r)


class ArbitraryRank(EditMethod):
    """The coeff scales ΔW: at 1 it is the minimum, and a kernel lets it fade out towards its ends. Directions aren't used."""

    name = "arbitrary-rank"
    needs = "inputs"
    learned = True
    coeffs = (0.5, 1.5)
    parameters: ClassVar[dict[str, Range]] = {
        "preserve": Range(0.0, 1.0),
        "steer": Range(1e-4, 1.0, log=True),
        "overshoot": Range(0.0, 1.3),
        "neighbours": Range(1, 15, whole=True),
    }

    def __init__(self, inputs: ModuleInputs | None = None, numbers: Numbers | None = None) -> None:
        self._inputs, self._numbers = inputs, numbers

    def of(self, inputs: ModuleInputs | Keys) -> ArbitraryRank | None:
        return ArbitraryRank(inputs) if isinstance(inputs, ModuleInputs) else None

    def at(self, numbers: Mapping[str, float]) -> ArbitraryRank:
        given = {**numbers, "neighbours": round(numbers["neighbours"])}
        return ArbitraryRank(self._inputs, Numbers(**given))  # type: ignore[arg-type]

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Problem:
        """Outputs are computed from W: what the module gave in a coarse dtype isn't what W gives exactly."""
        assert self._inputs is not None, "`of` gives the method for a module"
        weight = read_weight()
        x = torch.cat([self._inputs.harmless, self._inputs.harmful]).to(weight.device).double()
        y = project_back(x, weight)
        q, u = row_basis(x), row_basis(y)
        unused = torch.zeros(0, dtype=torch.float64)
        own = (x @ q, y @ u, q, u, len(self._inputs.harmless), float(row_norms(weight).norm()))
        return Problem(directions.double(), unused, unused, unused, read_weight, *own)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """The factors of λ U T Qᵀ, of T's rank.

        Raises:
            TrialError: the optimization diverged, or it led so far that no prompt need be asked.
        """
        assert isinstance(prepared, Problem)
        assert self._numbers is not None, "`at` gives the method of a trial"
        core = prepared.solution(self._numbers)
        if not core.any():
            return Factors(None, torch.zeros(1, len(prepared.q)), torch.zeros(len(prepared.u), 1)).to(core.device)
        if abs(coeff) * float(core.norm()) > LARGEST_CHANGE * prepared.size:  # U and Q are orthonormal
            raise TrialError("the optimization of an edit moves a matrix by more than ten times its own size")
        left, sizes, right = torch.linalg.svd(core, full_matrices=False)
        rank = int((sizes > NEGLIGIBLE * sizes[0]).sum())
        root = sizes[:rank].sqrt()
        a, b = (root[:, None] * right[:rank]) @ prepared.q.T, coeff * prepared.u @ (left[:, :rank] * root)
        if not (torch.isfinite(a.float()).all() and torch.isfinite(b.float()).all()):
            raise TrialError("the optimization of an edit diverged")
        return Factors(None, a.float(), b.float())

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("an edit that an optimization finds has no definition by rows")

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        raise NotImplementedError("an edit that an optimization finds has no definition by rows")
