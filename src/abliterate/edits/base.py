"""An edit is the factors of W' = diag(row_scale) W diag(column_scale) + B A; its methods have the protocol `EditMethod`.

W (d_out, d_in) writes to the residual stream, so a direction v has d_out = d_model entries. Fused experts, W (E, d_out, d_in)
for the E experts of a layer, are edited matrix by matrix, with factors that have a leading dimension E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from abliterate.directions.base import Blend
from abliterate.directions.inputs import Keys, ModuleInputs
from abliterate.errors import InputError

# Rows converted to float64 at a time: 15 MB for a matrix with 14,336 columns.
ROW_CHUNK = 128
# The share of a column's norm at the rounding level of float32 weights.
GONE = 1e-6


@dataclass(frozen=True)
class Factors:
    """W' = diag(row_scale) W diag(column_scale) + b a, with `a` (r, d_in), `b` (d_out, r), float32.

    `row_scale` (d_out) and `column_scale` (d_in) are None if they are all ones.
    For fused experts: `row_scale` (E, d_out), `a` (E, r, d_in), `b` (E, d_out, r), `column_scale` (E, d_in).
    """

    row_scale: Tensor | None
    a: Tensor
    b: Tensor
    column_scale: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors that there are, always in the same order."""
        return [tensor for tensor in (self.row_scale, self.a, self.b, self.column_scale) if tensor is not None]

    def entry_scale(self, rows: slice = slice(None)) -> Tensor | None:
        """By how much the entries in some rows of W are multiplied, (n, 1), (d_in) or (n, d_in); None: by 1."""
        if self.row_scale is None:
            return self.column_scale
        scale = self.row_scale[rows, None]
        return scale if self.column_scale is None else scale * self.column_scale

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW (d_out, d_in), or (E, d_out, d_in), in float32, for exports and tests."""
        if self.a.ndim == 3:
            return torch.stack([part.delta(matrix) for part, matrix in zip(self.parts(), weight, strict=True)])
        delta = self.b @ self.a
        for start in range(0, len(delta), ROW_CHUNK):  # in chunks: no second float32 matrix of W's size
            rows = slice(start, start + ROW_CHUNK)
            scale = self.entry_scale(rows)
            if scale is not None:
                delta[rows] += (scale - 1) * weight[rows].float()
        return delta

    def transposed(self) -> Factors:
        """The factors of W'ᵀ, given those of W', of a single matrix."""
        return Factors(self.column_scale, self.b.T.contiguous(), self.a.T.contiguous(), self.row_scale)

    def parts(self) -> list[Factors]:
        """The factors of each expert's matrix; a single matrix has one part, itself."""
        if self.a.ndim == 2:
            return [self]
        rows, columns = (
            [None] * len(self.a) if scale is None else list(scale) for scale in (self.row_scale, self.column_scale)
        )
        return [Factors(*matrix) for matrix in zip(rows, self.a, self.b, columns, strict=True)]

    @staticmethod
    def stacked(parts: Sequence[Factors]) -> Factors:
        """The inverse of `parts`; zeros fill up smaller ranks."""
        rank = max(len(part.a) for part in parts)
        a = [pad(part.a, (0, 0, 0, rank - len(part.a))) for part in parts]
        b = [pad(part.b, (0, rank - len(part.a))) for part in parts]
        rows = [part.row_scale for part in parts if part.row_scale is not None]
        columns = [part.column_scale for part in parts if part.column_scale is not None]
        scales = [torch.stack(scale) if scale else None for scale in (rows, columns)]
        return Factors(scales[0], torch.stack(a), torch.stack(b), scales[1])

    def to(self, device: torch.device | str) -> Factors:
        """The same factors on another device."""
        rows, columns = (None if scale is None else scale.to(device) for scale in (self.row_scale, self.column_scale))
        return Factors(rows, self.a.to(device), self.b.to(device), columns)


@dataclass(frozen=True)
class Prepared:
    """One module's products with all layers' directions, computed once so that no trial reads W.

    `directions` (n_layers, d_out) float64, one tensor for all modules; `a` (n_layers, d_in) = DŴ or DW, float32 or float64;
    `p` (n_layers, d_out) float64 = DŴŴᵀ (empty for modes that don't use it); `norms` (d_out) float64 row norms, or column
    norms (d_in). `read_weight` returns W (d_out, d_in) again, for rows and columns that the closed form can't express and for
    dense representations.
    For fused experts: `a` (n_layers, E, d_in), `p` (n_layers, E, d_out), `norms` (E, d_out), W (E, d_out, d_in).
    """

    directions: Tensor
    a: Tensor
    p: Tensor
    norms: Tensor
    read_weight: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of this module's own tensors, without the directions that all modules share."""
        return self.a.nbytes + self.p.nbytes + self.norms.nbytes

    def parts(self) -> Iterator[Prepared]:
        """The prepared products of each expert's matrix; W is read once."""
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
        """A copy offloaded to main memory, for `fetched`; the directions stay on their device."""
        return replace(self, a=self.a.cpu(), p=self.p.cpu(), norms=self.norms.cpu())

    def fetched(self, blends: Sequence[Blend]) -> tuple[Prepared, tuple[Blend, ...]]:
        """The offloaded rows that blends need, on the directions' device, and the blends that select them there.

        The same values are multiplied on the same device, so factors have the same bits as without offloading.
        """
        rows, device = [row for blend in blends for row in blend.rows], self.directions.device
        p = self.p[rows].to(device) if self.p.numel() else self.p.to(device)
        selected = replace(self, directions=self.directions[rows], a=self.a[rows].to(device), p=p, norms=self.norms.to(device))
        places = iter(range(len(rows)))
        return selected, tuple(Blend(tuple(next(places) for _ in blend.rows), blend.weights) for blend in blends)


class EditMethod(Protocol):
    """One way to change W, given a direction and a coeff, or several of both.

    Methods inherit from this class for its defaults of `dense` and `product`. They may have class attributes:

    - `parameters`, {name: `types.Range`}: numbers that the search finds for them, and that `at` gives them. A front of such
      edits isn't refined, because a gradient learns strengths and directions alone;
    - `coeffs`, (low, high): the range of the largest coeff, where the settings don't give another than the default;
    - `pace`: how many times larger refinement's first coeffs, and its steps of them, are than plain ablation's;
    - `margin`: by what share of its coeffs an edit is made weaker to see whether it keeps a margin for other prompts;
    - `needs` = "inputs": the edit is computed from the inputs of each module, so `of` gives a method for each. Such an edit has
      no `row_scale` and no `column_scale`. With "answers", from inputs along answers, too;
    - `constants`: the numbers that `reduced` computes with, because the cache keeps what it gives while they are the same;
    - `learned` = True: ΔW is the result of an optimization. It has no definition by rows, so exports are compared with its
      factors, and no gradient in coeffs and directions, so the front isn't refined;
    - `keeps_columns`: W' is what `dense_rows` gives with every column scaled to its norm in W;
    - `reads_as`: the name of the method that edits Wᵀ where W (d_out, d_model) reads the residual stream; "": there is none.
      A subclass that edits W in another way would read in another way, too, so it states its own.
    """

    name: str
    keeps_columns: bool = False
    reads_as: str = ""

    def reduced(self, inputs: ModuleInputs) -> ModuleInputs | Keys:
        """What `of` needs of a module's inputs, in as few rows as it can be: runs keep it. For methods that need inputs."""
        return inputs

    def of(self, inputs: ModuleInputs | Keys) -> EditMethod | None:
        """The method for the module that has these inputs; None if they allow no edit. For methods that need inputs."""
        return self

    def at(self, numbers: Mapping[str, float]) -> EditMethod:
        """The method with a trial's `numbers`, for methods with `parameters`."""
        return self

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """Every product that is linear in v, once per matrix; `directions` (n_layers, d_out) float64 are stored as given."""

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """Exact factors of W', or of every expert's W'.

        `blend` is not zero and `coeff` is not 0 (the caller leaves such modules alone). Only an edit that keeps the norms of
        W's rows may have a `row_scale`: the adapter export writes it as DoRA, whose magnitudes are these norms. An edit with a
        `column_scale` can't be exported as an adapter.
        """

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        """Exact factors of the edit that removes several directions one after another, Π_j (I − λ_j v_j v_jᵀ), as `factors`.

        `coeffs` (k) float64 are the λ_j in the order of `blends`; the first is removed first. For one direction it equals
        `factors`.

        Raises:
            InputError: the method removes one direction only.
        """
        raise one_direction_only(self, len(blends))

    def dense(self, weight: Tensor, v: Tensor, coeff: float) -> Tensor:
        """W' (d_out, d_in) by definition, in the dtype given: the slow reference that the factors are tested against.

        `along` and `dense_rows` are its two steps, for matrices that aren't in memory as a whole. They are written
        independently of `factors`.
        """
        edited = self.dense_rows(weight, v, self.along(weight, v), coeff)
        if not self.keeps_columns:
            return edited
        return edited * column_scale(weight.square().sum(dim=0), edited.square().sum(dim=0))

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        """The share of `rows` (n, d_in) in a (d_in), the row vector that the edit removes; `v` (n) is the direction there.

        For several directions, `v` is (k, n), and a is (k, d_in).
        """

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        """The rows (n, d_in) of W' that `rows` of W become, given a (d_in) of the whole W.

        For several directions, `v` is (k, n), `a` (k, d_in) what each removes after those before it, and `coeff` (k).
        """


def one_direction_only(method: EditMethod, count: int) -> InputError:
    """The error of a method without `product` that several directions are given to."""
    return InputError(
        f"The edit mode {method.name!r} removes one direction, not {count}; choose another --set edit.mode, or a direction "
        "method that finds one."
    )


def is_learned(method: EditMethod) -> bool:
    """Whether a method finds ΔW by an optimization of its own."""
    return bool(getattr(method, "learned", False))


def needs_inputs(method: EditMethod) -> bool:
    """Whether a method computes edits from the inputs of modules."""
    return getattr(method, "needs", "") in ("inputs", "answers")


def needs_answers(method: EditMethod) -> bool:
    """Whether these are inputs along answers, too."""
    return getattr(method, "needs", "") == "answers"


def prepare(method: EditMethod, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
    """`method.prepare` for a matrix, or for each matrix of fused experts."""
    weight = read_weight()
    if weight.ndim == 2:
        return replace(method.prepare(lambda: weight, directions), read_weight=read_weight)
    experts = [method.prepare(partial(weight.__getitem__, index), directions) for index in range(len(weight))]
    p, norms = experts[0].p, experts[0].norms
    return Prepared(
        experts[0].directions,
        torch.stack([expert.a for expert in experts], dim=1),
        torch.stack([expert.p for expert in experts], dim=1) if p.numel() else p,
        torch.stack([expert.norms for expert in experts]) if norms.numel() else norms,
        read_weight,
    )


def removed(v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
    """λ v aᵀ (n, d_in) of one direction `v` (n) and `a` (d_in), or its sum over several, (k, n), (k, d_in) and (k)."""
    if v.ndim == 1:
        return coeff * torch.outer(v, a)
    return (v * torch.as_tensor(coeff, dtype=v.dtype)[:, None]).T @ a


def one_after_another(vectors: Tensor, coeffs: Tensor) -> Tensor:
    """S (k, k), lower triangular, such that Π_j (I − λ_j v_j v_jᵀ) = I − Vᵀ diag(λ) S V for the rows v_j of `vectors` (k, d).

    Row j of S V W is what direction j removes once those before it are removed: s_j = v_jᵀW − Σ_{i<j} λ_i (v_j·v_i) s_i.
    """
    overlaps = torch.tril(vectors @ vectors.T * coeffs, diagonal=-1)  # entry (j, i): λ_i (v_j·v_i) for i < j
    identity = torch.eye(len(coeffs), dtype=vectors.dtype, device=vectors.device)
    return torch.linalg.solve_triangular(identity + overlaps, identity, upper=False, unitriangular=True)


def blended(blends: Sequence[Blend], table: Tensor) -> Tensor:
    """Several blends of a table (n_rows, …, d), (…, k, d) in its dtype."""
    return torch.stack([blend.of(table) for blend in blends], dim=-2)


def column_scale(before: Tensor, after: Tensor) -> Tensor:
    """What gives columns their norm of before, (d_in), given the squared norms of before and after an edit, each (d_in).

    A column of which no more than `GONE` of its norm is left becomes zero: its direction would be one of rounding noise.
    """
    left = after > GONE**2 * before
    return torch.where(left, before / after.where(left, 1.0), 0.0).sqrt()


def column_norms(weight: Tensor) -> Tensor:
    """Norms of W's columns, (d_in) float64, without a float64 copy of W."""
    squares = [rows.double().square().sum(dim=0) for rows in weight.split(ROW_CHUNK)]
    return torch.stack(squares).sum(dim=0).sqrt()


def row_norms(weight: Tensor) -> Tensor:
    """Norms of W's rows, (d_out) float64, without a float64 copy of W."""
    chunks = [rows.double().norm(dim=1) for rows in weight.split(ROW_CHUNK)]
    return torch.cat(chunks)


def row_basis(rows: Tensor, most: int | None = None) -> Tensor:
    """An orthonormal basis (d, r) of the rows' span, in float64; of their leading subspace if that has a rank beyond `most`."""
    _, sizes, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    rank = int((sizes > 1e-9 * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
    return vh[: rank if most is None else min(rank, most)].T


def safe_inverse(norms: Tensor) -> Tensor:
    """1/n, and 0 where n is 0: zero rows exist, and one NaN would spread over the whole model."""
    return torch.where(norms > 0, 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.zeros_like(norms))


def project(directions: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """D diag(scale) W: (n_layers, d_out) × (d_out, d_in) → (n_layers, d_in) float64, a chunk of rows at a time.

    It is differentiable in the directions, as `project_back` is in its `a`: each is the other's adjoint.
    """
    return _Project.apply(directions, weight, scale)  # type: ignore[no-any-return]


def project_back(a: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """A (diag(scale) W)ᵀ: (n_layers, d_in) × (d_in, d_out) → (n_layers, d_out) float64, a chunk of rows at a time."""
    return _ProjectBack.apply(a, weight, scale)  # type: ignore[no-any-return]


class _Project(torch.autograd.Function):
    """Autograd's own backward pass would keep a float64 copy of W; this one reads W again."""

    @staticmethod
    def forward(ctx: Any, directions: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        ctx.matrix, ctx.dtype = (weight, scale), directions.dtype
        total = weight.new_zeros((directions.shape[0], weight.shape[1]), dtype=torch.float64)
        for start, rows in _scaled_rows(weight, scale):
            total += directions[:, start : start + ROW_CHUNK].double() @ rows
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return project_back(gradient, *ctx.matrix).to(ctx.dtype), None, None


class _ProjectBack(torch.autograd.Function):
    """The adjoint of `_Project`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        ctx.matrix, ctx.dtype = (weight, scale), a.dtype
        return torch.cat([a.double() @ rows.T for _, rows in _scaled_rows(weight, scale)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return project(gradient, *ctx.matrix).to(ctx.dtype), None, None


def _scaled_rows(weight: Tensor, scale: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The rows of diag(scale) W in float64, a chunk at a time, with the number of each chunk's first row."""
    for start in range(0, weight.shape[0], ROW_CHUNK):
        rows = weight[start : start + ROW_CHUNK].double()
        yield start, rows if scale is None else rows * scale[start : start + ROW_CHUNK, None]
