"""`least-squares`: ΔW = −s v aᵀ, with a the best compromise between removing v for harmful prompts and leaving harmless ones.

a minimizes mean (aᵀx − vᵀWx)² over the inputs x of harmful prompts, plus μ times mean (aᵀx)² over those of harmless prompts
and, again, over those along the unedited model's answers to them, plus α‖a‖². With X and B the matrices of these inputs as
columns, each scaled by the root of its share, a = vᵀW X C with C = Xᵀ(XXᵀ + BBᵀ + αI)⁻¹. With S = [X, B] these are the first
rows of (SᵀS + αI)⁻¹Sᵀ: a solution of as many equations as there are inputs, whatever the width of the module. It is the update
of a linear memory that MEMIT makes (Meng et al. 2023, arXiv:2210.07229), with harmless inputs as what is to be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.directions.inputs import ModuleInputs
from abliterate.edits.key_conditional import KeyConditional, shared

# What harmless inputs count beside harmful ones.
KEPT = 30.0
# α as a share of all that is weighed, the mean squared lengths times their weights. Of the directions in which inputs vary, it
# keeps those that carry more than this share, because a vector that fits the captured prompts in the others leaves later words
# of answers, and prompts of other kinds, to chance (docs/decisions.md).
RIDGE = 1e-4


class LeastSquares(KeyConditional):
    """As `key-conditional`, with inputs of harmless prompts weighed instead of excluded."""

    name = "least-squares"
    constants = (KEPT, RIDGE)
    pace = 3.0
    margin = 0.4

    def solved(self, inputs: ModuleInputs) -> tuple[Tensor, Tensor]:
        """Xᵀ and C; C is zero if all harmful inputs are."""
        harmful = shared(inputs.harmful)
        kept = [KEPT**0.5 * shared(rows) for rows in (inputs.harmless, inputs.along) if rows is not None]
        rows = torch.cat([harmful, *kept])
        gram, identity = rows @ rows.T, torch.eye(len(rows)).to(rows)
        # Inputs that are all zero give a C of zeros, by any ridge.
        ridge = max(RIDGE * float(gram.diagonal().sum()), torch.finfo(torch.float64).tiny)
        solved = torch.linalg.solve(gram + ridge * identity, identity[:, : len(harmful)])
        return harmful, solved.T @ rows
