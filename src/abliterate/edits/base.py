"""What an edit is: factors of W' = diag(row_scale) W + B A, and the seam for edit methods.

Pure tensor math: W (d_out, d_in) writes to the residual stream, so a direction v has d_out = d_model entries. A stack of
matrices W (E, d_out, d_in), the experts of a layer, is edited matrix by matrix, with factors that have a leading dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from abliterate.directions.base import Blend

# Rows in float64 at a time: 15 MB of a matrix with 14,336 columns.
ROW_CHUNK = 128


@dataclass(frozen=True)
class Factors:
    """W' = diag(row_scale) W + b a; `row_scale` (d_out) or None (all ones), `a` (r, d_in), `b` (d_out, r), float32.

    Of a stack: `row_scale` (E, d_out), `a` (E, r, d_in), `b` (E, d_out, r).
    """

    row_scale: Tensor | None
    a: Tensor
    b: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW, of the shape of W, in float32, for exports and tests."""
        if self.a.ndim == 3:
            return torch.stack([part.delta(one) for part, one in zip(self.parts(), weight, strict=True)])
        delta = self.b @ self.a
        if self.row_scale is not None:
            for start in range(0, len(delta), ROW_CHUNK):  # no second float32 matrix
                part = slice(start, start + ROW_CHUNK)
                delta[part] += (self.row_scale[part] - 1)[:, None] * weight[part].float()
        return delta

    def parts(self) -> list[Factors]:
        """The factors of each matrix of a stack; of a single matrix, its own."""
        if self.a.ndim == 2:
            return [self]
        scales = [None] * len(self.a) if self.row_scale is None else list(self.row_scale)
        return [Factors(*one) for one in zip(scales, self.a, self.b, strict=True)]

    @staticmethod
    def stacked(parts: Sequence[Factors]) -> Factors:
        """The inverse of `parts`; where ranks differ, zeros fill up."""
        rank = max(len(part.a) for part in parts)
        a = [pad(part.a, (0, 0, 0, rank - len(part.a))) for part in parts]
        b = [pad(part.b, (0, rank - len(part.a))) for part in parts]
        scales = [part.row_scale for part in parts if part.row_scale is not None]
        return Factors(torch.stack(scales) if scales else None, torch.stack(a), torch.stack(b))

    def to(self, device: torch.device | str) -> Factors:
        """The same factors on another device."""
        scale = None if self.row_scale is None else self.row_scale.to(device)
        return Factors(scale, self.a.to(device), self.b.to(device))


@dataclass(frozen=True)
class Prepared:
    """What a trial needs of one module, for all layers' directions at once, so that no trial reads W.

    `directions` (n_layers, d_out) float64, one tensor for all modules; `a` (n_layers, d_in) float32 = DŴ or DW; `p`
    (n_layers, d_out) float64 = DŴŴᵀ (empty for modes that don't use it); `norms` (d_out) float64 row norms. `read_weight`
    gives W (d_out, d_in) again, for rows that the closed form can't express and for dense representations.
    Of a stack: `a` (n_layers, E, d_in), `p` (n_layers, E, d_out), `norms` (E, d_out), W (E, d_out, d_in).
    """

    directions: Tensor
    a: Tensor
    p: Tensor
    norms: Tensor
    read_weight: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that this module alone takes: without the directions."""
        return self.a.nbytes + self.p.nbytes + self.norms.nbytes

    def parts(self) -> Iterator[Prepared]:
        """What was prepared of each matrix of a stack; W is read once."""
        weight, p, norms = self.read_weight(), self.p, self.norms
        for index in range(self.a.shape[1]):
            yield Prepared(
                self.directions,
                self.a[:, index],
                p[:, index] if p.numel() else p,
                norms[index] if norms.numel() else norms,
                partial(weight.__getitem__, index),
            )

    def parked(self) -> Prepared:
        """The same in main memory, for `fetched`; the directions stay where they are."""
        return replace(self, a=self.a.cpu(), p=self.p.cpu(), norms=self.norms.cpu())

    def fetched(self, blend: Blend) -> tuple[Prepared, Blend]:
        """What a blend needs of something parked, on the directions' device, and the blend that picks it there.

        The same values are multiplied in the same place, so factors have the same bits as if nothing had been parked.
        """
        layers, device = list(blend.layers), self.directions.device
        p = self.p[layers].to(device) if self.p.numel() else self.p.to(device)
        few = replace(self, directions=self.directions[layers], a=self.a[layers].to(device), p=p, norms=self.norms.to(device))
        return few, Blend(tuple(range(len(layers))), blend.weights)


class EditMethod(Protocol):
    """One way to change W, given a direction and a coeff."""

    name: str

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """Everything that is linear in v, once per matrix; `directions` (n_layers, d_out) float64, kept as they are."""

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """Exact factors of W', or of each W' of a stack.

        `blend` is not zero and `coeff` is not 0 (the caller leaves such modules alone). Only an edit that keeps the norms of
        W's rows may have a `row_scale`: the adapter export writes it as DoRA, whose magnitudes are these norms.
        """

    def dense(self, weight: Tensor, v: Tensor, coeff: float) -> Tensor:
        """W' (d_out, d_in) by definition, in the dtype given: the slow reference the factors are tested against.

        The two below are its parts for matrices that aren't in memory as a whole, in its own words, not the factors'.
        """

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        """What `rows` (n, d_in), where the direction is `v` (n), add to a (d_in): summed over W, what is removed."""

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float) -> Tensor:
        """`dense` of some rows (n, d_in), given a (d_in) of the whole W."""


def prepare(method: EditMethod, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
    """`method.prepare` of a matrix, or of each matrix of a stack."""
    weight = read_weight()
    if weight.ndim == 2:
        return replace(method.prepare(lambda: weight, directions), read_weight=read_weight)
    parts = [method.prepare(partial(weight.__getitem__, index), directions) for index in range(len(weight))]
    p, norms = parts[0].p, parts[0].norms
    return Prepared(
        parts[0].directions,
        torch.stack([part.a for part in parts], dim=1),
        torch.stack([part.p for part in parts], dim=1) if p.numel() else p,
        torch.stack([part.norms for part in parts]) if norms.numel() else norms,
        read_weight,
    )


def row_norms(weight: Tensor) -> Tensor:
    """Norms of W's rows, (d_out) float64, without a float64 copy of W."""
    chunks = [part.double().norm(dim=1) for part in weight.split(ROW_CHUNK)]
    return torch.cat(chunks)


def safe_inverse(norms: Tensor) -> Tensor:
    """1/n, and 0 where n is 0: zero rows exist, and one NaN would spread over the whole model."""
    return torch.where(norms > 0, 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.zeros_like(norms))


def project(directions: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """D diag(scale) W: (n_layers, d_out) × (d_out, d_in) → (n_layers, d_in) float64, a chunk of rows at a time."""
    total = weight.new_zeros((directions.shape[0], weight.shape[1]), dtype=torch.float64)
    for start in range(0, weight.shape[0], ROW_CHUNK):
        part = weight[start : start + ROW_CHUNK].double()
        if scale is not None:
            part = part * scale[start : start + ROW_CHUNK, None]
        total += directions[:, start : start + ROW_CHUNK].double() @ part
    return total


def project_back(a: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """A (diag(scale) W)ᵀ: (n_layers, d_in) × (d_in, d_out) → (n_layers, d_out) float64, a chunk of rows at a time."""
    columns = []
    for start in range(0, weight.shape[0], ROW_CHUNK):
        part = weight[start : start + ROW_CHUNK].double() * scale[start : start + ROW_CHUNK, None]
        columns.append(a @ part.T)
    return torch.cat(columns, dim=1)
