"""Export a trial as GGUF by editing a GGUF file of the model: its own matrices are unpacked, edited, and packed again.

Every other tensor keeps its bytes, and the metadata their order and types. Memory is one matrix in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from math import prod

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from abliterate.edits import Factors
from abliterate.errors import InputError
from abliterate.export.base_weights import checkpoint_folder, stored_dtype
from abliterate.export.gguf_file import Field, GgufFile, GgufTensor, Pieces
from abliterate.export.gguf_library import block_sizes, dequantize, kept_type, largest_error, quantize, type_name
from abliterate.export.gguf_names import misfit
from abliterate.export.job import Reread, Rows
from abliterate.export.merged import edited_rows
from abliterate.export.safetensors_copy import NotStreamable, read_matrix, shard_files
from abliterate.export.tensor_index import find_places
from abliterate.model.architectures import Target
from abliterate.settings.schema import LoadSettings

# The number of entries that are in memory at a time while a matrix is edited, in several float32 copies.
CHUNK = 1 << 18
# The cosine between a random matrix and itself quantized is 0.996 in Q4_0 and 0.70 in TQ1_0, of three values; that between two
# models' matrices is near 0.
LIKE = 0.3
# The tensors whose columns converters keep in order; those of others they reorder in some families.
_SAME_COLUMNS = (".ffn_down", ".attn_output")
NAME = "general.name"
OURS = "abliterate."  # the entries of the metadata that an export adds begin with this


@dataclass(frozen=True)
class GgufMatrices:
    """W (d_out, d_in) of each target, unpacked from a GGUF file into float32 and read anew each time.

    `tensors` is {target: its tensor in the file}; fused experts have one tensor (E, d_out, d_in).
    """

    file: GgufFile
    targets: Mapping[str, Target]
    tensors: Mapping[str, GgufTensor]

    def of(self, target: Target) -> Tensor:
        """W of one target, (d_out, d_in); for fused experts all matrices, (E, d_out, d_in)."""
        tensor = self.tensors[target.name]
        weight = torch.empty(tensor.shape)
        for index, matrix in enumerate(weight if weight.ndim == 3 else weight[None]):
            matrix.copy_(self.matrix(target, index))
        return weight

    def count(self, target: Target) -> int:
        """The number of matrices of a target."""
        return prod(self.tensors[target.name].shape[:-2])

    def matrix(self, target: Target, index: int) -> Tensor:
        """One matrix (d_out, d_in) of a target."""
        shape = self.tensors[target.name].shape[-2:]
        weight = torch.empty(shape)
        for rows in _slices(*shape):
            weight[rows] = self.rows(target, index, rows)
        return weight

    def rows(self, target: Target, index: int, rows: slice) -> Tensor:
        """Some rows (n, d_in) of one matrix of a target."""
        tensor = self.tensors[target.name]
        d_out, d_in = tensor.shape[-2:]
        size = _row_bytes(tensor.type, d_in)
        data = self.file.read(tensor, (index * d_out + rows.start) * size, (rows.stop - rows.start) * size)
        return dequantize(data, tensor.type, d_in)


def check_columns(base: GgufMatrices, edited: Iterable[str], mode: str) -> None:
    """Raise InputError if edits of this mode, which is computed from the inputs of modules, may not fit the file's columns."""
    for name in edited:
        tensor = base.tensors[name].name
        if not any(part in tensor for part in _SAME_COLUMNS):
            raise InputError(
                f"The edit mode {mode} is computed from the inputs of modules, and in some families a file has those of "
                f"{tensor} in another order; export the trial with --kind merged and convert that, or make a run with "
                "--set edit.mode=full."
            )


def compare_with(base: GgufMatrices, source: str, load: LoadSettings, config: PretrainedConfig, model: PreTrainedModel) -> str:
    """Compare one matrix of the file with the model's own weights; "" if that could be done, else the reason why not.

    Names and sizes are alike in all models of a family and size. `model` is the one that `config` describes, without weights.

    Raises:
        InputError: the file is of another model.
    """
    name = next((name for part in _SAME_COLUMNS for name in base.tensors if part in base.tensors[name].name), "")
    if not name:
        return "the file has neither ffn_down nor attn_output"
    target = base.targets[name]
    try:
        files = shard_files(checkpoint_folder(source, load))
        place = find_places(files, model, [target], stored_dtype(config))[name][0]
    except NotStreamable as reason:
        return str(reason)
    stored = read_matrix(place.path, place.stored)
    cosine = _cosine(base.matrix(target, 0), stored.T if place.transposed else stored)
    if not cosine >= LIKE:  # NaN isn't alike
        raise misfit(base.file, f"the weights in {base.tensors[name].name} are others than the model's (cosine {cosine:.2f})")
    return ""


def _cosine(first: Tensor, second: Tensor) -> float:
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in _slices(*first.shape):
        a, b = first[rows].double(), second[rows].double()
        sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def planned_types(base: GgufMatrices, factors: Mapping[str, Factors], wanted: int | None) -> dict[str, int]:
    """{target that is edited: the type that its tensor is written in}; `wanted`: a type for all of them.

    Raises:
        InputError: the rows of a matrix don't fit the blocks of `wanted`.
    """
    kinds = {}
    for name in factors:
        tensor = base.tensors[name]
        row = tensor.shape[-1]
        if wanted is not None and row % block_sizes()[wanted][0]:
            raise InputError(
                f"The rows of {tensor.name} have {row} entries, which {type_name(wanted)} can't pack in blocks of "
                f"{block_sizes()[wanted][0]}; choose another --gguf-type, such as F16."
            )
        kinds[name] = kept_type(tensor.type, row) if wanted is None else wanted
    return kinds


def retyped(base: GgufMatrices, kinds: Mapping[str, int]) -> dict[str, GgufTensor]:
    """The file's tensors, {tensor: …}, with the types and sizes that edited matrices are written in."""
    changed = {base.tensors[name].name: kind for name, kind in kinds.items()}
    return {
        name: replace(tensor, type=changed[name], nbytes=prod(tensor.shape[:-1]) * _row_bytes(changed[name], tensor.shape[-1]))
        if name in changed
        else tensor
        for name, tensor in base.file.tensors.items()
    }


def edited_pieces(
    base: GgufMatrices, factors: Mapping[str, Factors], kinds: Mapping[str, int], progress: Callable[[int], None]
) -> dict[str, Pieces]:
    """{tensor: the bytes of the edited matrix, or of all experts' matrices}; `progress` is given how many are written."""
    done = iter(range(1, len(factors) + 1))

    def pieces(name: str) -> Iterator[bytes]:
        target = base.targets[name]
        for index, part in enumerate(factors[name].parts()):
            for rows in _slices(*base.tensors[name].shape[-2:]):
                yield quantize(edited_rows(base.rows(target, index, rows), part, rows), kinds[name])
        progress(next(done))

    return {base.tensors[name].name: partial(pieces, name) for name in factors}


class RereadGguf(Reread):
    """The `Reread` of an exported GGUF file; what isn't edited is compared with the base's file byte by byte."""

    dtype = torch.float32

    def __init__(self, base: GgufMatrices, out: GgufFile, edited: Mapping[str, int]) -> None:
        self._base, self._edited = base, {base.tensors[name].name for name in edited}
        # Tensors that are missing are reported by `differing`.
        tensors = {name: out.tensors.get(tensor.name, tensor) for name, tensor in base.tensors.items()}
        self._out = GgufMatrices(out, base.targets, tensors)

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        return lambda rows: self._out.rows(target, index, rows).double()

    def largest_error(self, target: Target) -> Callable[[Tensor], Tensor]:
        # By the type that the target's tensor has.
        return partial(largest_error, kind=self._out.tensors[target.name].type)

    def untouched(self) -> bool:
        return not self.differing

    @cached_property
    def differing(self) -> list[str]:
        old, new = self._base.file, self._out.file
        if list(old.tensors) != list(new.tensors):
            return ["the list of tensors"]
        return [*self._fields(), *(name for name in old.tensors if name not in self._edited and not self._same(name))]

    def _fields(self) -> list[str]:
        """Entries of the metadata that aren't the base's: an export changes the name, and adds its own behind the last one."""
        old, new = self._base.file.fields, self._out.file.fields
        kept = [key for key in old if key in new]
        changed = [key for key in old if not _may_change(key) and (key not in new or old[key].raw != new[key].raw)]
        added = [key for key in new if key not in old and not _may_change(key)]
        return [*changed, *added, *([] if list(new)[: len(kept)] == kept else ["the order of the metadata"])]

    def _same(self, name: str) -> bool:
        old, new = self._base.file, self._out.file
        first, second = old.tensors[name], new.tensors[name]
        if (first.shape, first.type) != (second.shape, second.type):
            return False
        return all(mine == theirs for mine, theirs in zip_longest(old.pieces(first), new.pieces(second)))


def marked(fields: Mapping[str, Field], additions: Mapping[str, Field]) -> dict[str, Field]:
    """The base's entries in their order, with new values for those in `additions`, and then the others of `additions`."""
    assert all(map(_may_change, additions))
    return {**fields, **additions}


def _may_change(key: str) -> bool:
    return key == NAME or key.startswith(OURS)


def _row_bytes(kind: int, row: int) -> int:
    entries, nbytes = block_sizes()[kind]
    return row // entries * nbytes


def _slices(d_out: int, d_in: int) -> Iterator[slice]:
    """Slices over a matrix's rows, of about `CHUNK` entries each."""
    step = max(1, CHUNK // d_in)
    return (slice(start, min(start + step, d_out)) for start in range(0, d_out, step))
