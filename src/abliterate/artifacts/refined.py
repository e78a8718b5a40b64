"""The directions of refined trials: one safetensors file a trial in the run directory, or in memory where there is none.

A run may come from anybody, so a file counts only if it has the hash in the trial's record and the form that `put` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from abliterate import ranks
from abliterate.errors import AbliterateError, InputError, disk_remedy
from abliterate.files import write_atomically
from abliterate.types import MOST_DIRECTIONS, REFINED, Params, RefinedParams

FORMAT = "1"
# Bytes of a file, so that a recipe can carry it: 2,000 modules of a model with a d_model of 4,096 need as many.
LARGEST = 32 << 20
# Bytes of a module in a file beside its numbers: its name, shape and place.
_HEADER = 256
# How far the norm of a module's directions may be from 1 in float32.
_NORM = 1e-3


class RefinedStore:
    """Keeps the directions of refined trials in `folder`, which is made when it is needed; None keeps them in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._contents: dict[str, bytes] = {}  # {sha256: a file's content} of what isn't in the folder
        self._last: tuple[str, dict[str, Tensor]] = ("", {})  # the tensors that were asked for last

    def put(
        self, number: int, coeffs: Mapping[str, float], directions: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> RefinedParams:
        """Store the directions {module: v (d_model) or (k, d_model)} of trial `number`; returns its parameters.

        A module's directions have norm 1 in all; the norms of several are their weights. The file is written atomically, and
        equal directions give an equal file.

        Raises:
            ValueError: a module has only a coeff or only a direction, its directions aren't of norm 1, or the facts aren't
                JSON. AbliterateError: the disk refuses, or the directions are larger than a run may hold.
        """
        # Clones, because safetensors refuses tensors that share a storage, as the rows of one table do.
        tensors = {name: directions[name].detach().to("cpu", torch.float32).clone() for name in sorted(directions)}
        content = save(tensors, metadata={"format": FORMAT})
        name, digest = f"{REFINED}/{number}.safetensors", hashlib.sha256(content).hexdigest()
        plain = {module: float(coeff) for module, coeff in coeffs.items()}
        record = {"coeffs": plain, "file": name, "sha256": digest, "facts": json.loads(json.dumps(dict(facts)))}
        params = RefinedParams.from_record(record)
        if len(content) > LARGEST:
            raise AbliterateError(
                f"The directions of trial {number} take {len(content) >> 20} MiB, and a run holds at most {LARGEST >> 20}; "
                "leave modules out with --set load.components."
            )
        self._last = (digest, tensors_of(content, params))
        if self._folder is None:
            self._contents[digest] = content
        else:
            _write(self._folder, Path(name).name, content)
        return params

    def add(self, params: RefinedParams, content: bytes) -> None:
        """Keep the content of a file in memory; ValueError if it isn't the file of these parameters."""
        self._last = (params.sha256, tensors_of(content, params))
        self._contents[params.sha256] = content

    def content(self, params: RefinedParams) -> bytes:
        """The content of the parameters' file. InputError: it is missing, or isn't the file that the run left."""
        content = self._contents.get(params.sha256)
        if content is None:
            content = ranks.agree(lambda: self._read(params))  # a run's directory is rank 0's
        return content

    def directions(self, params: RefinedParams) -> dict[str, Tensor]:
        """{module: v (d_model) or (k, d_model) float32} of the parameters. InputError: as in `content`."""
        if self._last[0] != params.sha256 or self._last[1].keys() != params.coeffs.keys():
            self._last = (params.sha256, self._checked(params, self.content(params)))
        return self._last[1]

    def check(self, params: Params) -> None:
        """InputError, as in `content`, if these are refined parameters without their directions."""
        if isinstance(params, RefinedParams):
            self.directions(params)

    def _read(self, params: RefinedParams) -> bytes:
        if self._folder is None:
            raise _unusable(params.file, "there is no run directory with it")
        path = self._folder / Path(params.file).name
        try:
            # A link may lead out of the directory, and a pipe would be waited for.
            if self._folder.is_symlink() or path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError("it is a link or no file, which no run makes")
            if path.stat().st_size > LARGEST:
                raise ValueError("it is too large")
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = str(error.strerror) if isinstance(error, OSError) else str(error)
            raise _unusable(str(path), reason) from error
        self._checked(params, content)
        return content

    def _checked(self, params: RefinedParams, content: bytes) -> dict[str, Tensor]:
        try:
            return tensors_of(content, params)
        except ValueError as error:
            raise _unusable(
                params.file if self._folder is None else str(self._folder.parent / params.file), str(error)
            ) from error


def file_bytes(modules: int, count: int, d_model: int) -> int:
    """Bytes, or a few more, of the file of a trial in which each of the modules has `count` directions."""
    return modules * (4 * count * d_model + _HEADER)


def tensors_of(content: bytes, params: RefinedParams) -> dict[str, Tensor]:
    """{module: v (d_model) or (k, d_model) float32} in the content of the parameters' file.

    ValueError, with the reason, if it is none.
    """
    if len(content) > LARGEST:
        raise ValueError("it is too large")
    if hashlib.sha256(content).hexdigest() != params.sha256:
        raise ValueError("it isn't the file of the trial, by its hash")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError("it is no safetensors file") from error
    if tensors.keys() != params.coeffs.keys():
        raise ValueError("it has directions of other modules than the trial edits")
    if not all(tensor.dtype == torch.float32 and tensor.ndim in (1, 2) for tensor in tensors.values()):
        raise ValueError("a direction in it isn't a vector in float32")
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(shapes) > 1:
        raise ValueError("its directions have different lengths, or modules different numbers of them")
    if any(len(shape) == 2 and shape[0] > MOST_DIRECTIONS for shape in shapes):
        raise ValueError(f"a module in it has more than {MOST_DIRECTIONS} directions")
    # False for NaN.
    if not all(abs(float(tensor.double().norm()) - 1) < _NORM for tensor in tensors.values()):
        raise ValueError("a module's directions in it don't have norm 1")
    return tensors


def _write(folder: Path, name: str, content: bytes) -> None:
    try:
        if folder.is_symlink():
            raise InputError(f"The folder {folder} is a link, which no run makes; put the folder itself in its place.")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise AbliterateError(
            f"The folder {folder} can't be made: {error.strerror}; {disk_remedy(error)}, then continue with --resume."
        ) from error
    write_atomically(folder / name, content)


def _unusable(file: str, reason: str) -> InputError:
    return InputError(
        f"The directions of a refined trial can't be used, {file}: {reason}; put the run's own file back, or "
        "choose another trial."
    )
