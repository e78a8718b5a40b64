"""Refined parameters and the files of their directions: they come back as they were, and nothing else is taken for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from abliterate.artifacts import refined
from abliterate.artifacts.refined import RefinedStore
from abliterate.errors import AbliterateError, InputError
from abliterate.types import RefinedParams, Trial, TrialParams, params_from_record
from support.refined import FACTS, refined_trial

COEFFS = {"layers.0.o": 0.5, "layers.1.o": 0.0, "layers.1.down": -1.25}


def directions(d_model: int = 8, seed: int = 0) -> dict[str, Tensor]:
    rows = torch.randn(len(COEFFS), d_model, generator=torch.Generator().manual_seed(seed))
    return dict(zip(COEFFS, torch.nn.functional.normalize(rows, dim=1), strict=True))  # views of one tensor


def test_a_record_is_read_back() -> None:
    trial = refined_trial(200)
    record = json.loads(json.dumps(trial.to_record(), allow_nan=False))
    assert record["params"]["kind"] == "refined"
    assert Trial.from_record(record) == trial
    assert trial.params.edited == 6  # two of eight have no coeff
    assert "kind" not in TrialParams("global", 1.0, {}).to_record()


WRONG: list[tuple[str, Any]] = [
    ("kind", "other"),
    ("kind", 1),
    ("coeffs", {}),
    ("coeffs", {"": 1.0}),
    ("coeffs", {"m": "strong"}),
    ("coeffs", {"m": 1e7}),
    ("coeffs", {"m": float("nan")}),
    ("coeffs", {"m": True}),
    ("coeffs", ["m"]),
    ("file", "refined/../../x.safetensors"),
    ("file", "refined/1.safetensors/../x"),
    ("file", "/etc/passwd"),
    ("file", "refined/x.safetensors"),
    ("file", "refined/1.safetensors\n"),
    ("file", "refined/٣.safetensors"),
    ("file", None),
    ("sha256", "0" * 63),
    ("sha256", "G" * 64),
    ("sha256", 0),
    ("facts", None),
    ("facts", ["x"]),
    ("facts", {"x": float("inf")}),
    ("facts", {"x": "y" * (1 << 21)}),
    ("facts", {"beta": "high"}),
    ("facts", {"steps": 1.5}),
    ("facts", {"cosine": {"m": 2.0}}),
    ("facts", {"directions": 65}),
    ("facts", {"directions": "many"}),
    ("facts", {"cosine": [1]}),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={str(value)[:30]!r}" for name, value in WRONG])
def test_a_record_that_no_run_wrote(name: str, value: Any) -> None:
    record = refined_trial(3).params.to_record()
    assert params_from_record(record) == refined_trial(3).params
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        params_from_record(record | {name: value})
    for lacking in ("coeffs", "file", "sha256", "facts"):
        with pytest.raises(KeyError):
            params_from_record({key: value for key, value in record.items() if key != lacking})


@pytest.mark.parametrize("in_memory", [False, True])
def test_directions_come_back(in_memory: bool, tmp_path: Path) -> None:
    folder = None if in_memory else tmp_path / "refined"
    store, given = RefinedStore(folder), directions()
    params = store.put(7, COEFFS, given, FACTS)
    assert params == RefinedParams(COEFFS, "refined/7.safetensors", hashlib.sha256(store.content(params)).hexdigest(), FACTS)
    again = store if in_memory else RefinedStore(folder)
    assert again.directions(params).keys() == given.keys()
    assert all(torch.equal(again.directions(params)[name], v) for name, v in given.items())
    other = store.put(8, COEFFS, directions(seed=1), FACTS)
    assert other.sha256 != params.sha256
    for one, expected in ((params, given), (other, directions(seed=1)), (params, given)):
        assert all(torch.equal(again.directions(one)[name], v) for name, v in expected.items())
    assert store.put(7, COEFFS, given, FACTS) == params  # a repetition writes the same bytes
    if folder is not None:
        assert sorted(path.name for path in folder.iterdir()) == ["7.safetensors", "8.safetensors"]


def test_several_directions_come_back_with_their_weights(tmp_path: Path) -> None:
    rows = torch.randn(len(COEFFS), 3, 8, generator=torch.Generator().manual_seed(0))
    given = {name: own / own.norm() for name, own in zip(COEFFS, rows, strict=True)}
    store = RefinedStore(tmp_path / "refined")
    params = store.put(7, COEFFS, given, FACTS)
    assert all(torch.equal(RefinedStore(tmp_path / "refined").directions(params)[name], v) for name, v in given.items())
    with pytest.raises(ValueError, match="norm"):
        store.put(7, COEFFS, {name: torch.nn.functional.normalize(v, dim=1) for name, v in given.items()}, FACTS)


def test_what_is_given_must_fit_together() -> None:
    store, given = RefinedStore(), directions()
    for coeffs, vectors, facts in (
        ({"layers.0.o": 1.0}, given, {}),
        ({**COEFFS, "more": 1.0}, given, {}),
        (COEFFS, {name: 2 * v for name, v in given.items()}, {}),
        (COEFFS, {name: v * float("nan") for name, v in given.items()}, {}),
        (COEFFS, given | {"layers.0.o": torch.ones(1)}, {}),
        (COEFFS, given, {"x": float("nan")}),
        ({**COEFFS, "layers.0.o": float("nan")}, given, {}),
    ):
        with pytest.raises(ValueError):
            store.put(0, coeffs, vectors, facts)


def _without_file(path: Path) -> None:
    path.unlink()


def _linked_file(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def _linked_folder(path: Path) -> None:
    path.parent.rename(path.parents[2] / "elsewhere")
    path.parent.symlink_to(path.parents[2] / "elsewhere", target_is_directory=True)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(refined.LARGEST + 1)  # sparse


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_without_file, "No such file"),
    "a link": (_linked_file, "link"),
    "a linked folder": (_linked_folder, "link"),
    "a pipe": (_pipe, "no file"),
    "a folder": (_folder, "no file"),
    "huge": (_huge, "too large"),
    "a flipped bit": (_flipped, "by its hash"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_file_that_isnt_the_runs_is_a_sentence(name: str, tmp_path: Path) -> None:
    change, words = PLACES[name]
    folder = tmp_path / "run" / "refined"
    folder.parent.mkdir()
    params = RefinedStore(folder).put(7, COEFFS, directions(), {})
    change(folder / "7.safetensors")
    for use in (RefinedStore(folder).directions, RefinedStore(folder).content, RefinedStore(folder).check):
        with pytest.raises(InputError, match=words) as caught:
            use(params)
        assert str(caught.value).count("\n") == 0
        assert "put the run's own file back" in str(caught.value)


CONTENTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no safetensors": (lambda given: b"\x08" + b"\0" * 7 + b"{}  []  ", "no safetensors file"),
    "nothing": (lambda given: b"", "no safetensors file"),
    "another module": (lambda given: {f"{name}x": v for name, v in given.items()}, "other modules"),
    "a module too many": (lambda given: given | {"more": given["layers.0.o"].clone()}, "other modules"),
    "half precision": (lambda given: {name: v.half() for name, v in given.items()}, "float32"),
    "double precision": (lambda given: {name: v.double() for name, v in given.items()}, "float32"),
    "three dimensions": (lambda given: {name: v[None, None] for name, v in given.items()}, "float32"),
    "another number": (lambda given: given | {"layers.0.o": given["layers.0.o"][None]}, "different numbers"),
    "too many": (lambda given: {name: v.expand(65, -1) / 65**0.5 for name, v in given.items()}, "more than 64 directions"),
    "numbers": (lambda given: {name: v[0].clone() for name, v in given.items()}, "float32"),
    "another length": (lambda given: given | {"layers.0.o": torch.tensor([1.0])}, "lengths"),
    "no unit vectors": (lambda given: {name: 3 * v for name, v in given.items()}, "norm 1"),
    "NaN": (lambda given: {name: v * float("nan") for name, v in given.items()}, "norm 1"),
    "infinity": (lambda given: {name: v * float("inf") for name, v in given.items()}, "norm 1"),
    "zeros": (lambda given: {name: 0 * v for name, v in given.items()}, "norm 1"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_with_the_right_hash_and_other_tensors_is_a_sentence(name: str, tmp_path: Path) -> None:
    """A stranger's record has the hash of a stranger's file."""
    make, words = CONTENTS[name]
    store = RefinedStore(tmp_path / "refined")
    params = store.put(7, COEFFS, directions(), {})
    made = make({name: v.clone() for name, v in directions().items()})
    content = made if isinstance(made, bytes) else save({name: v.contiguous() for name, v in made.items()})
    (tmp_path / "refined" / "7.safetensors").write_bytes(content)
    foreign = dataclasses.replace(params, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(InputError, match=words):
        store.directions(foreign)
    with pytest.raises(ValueError, match=words):
        RefinedStore().add(foreign, content)


def test_a_store_without_a_directory_doesnt_know_others_directions(tmp_path: Path) -> None:
    params = RefinedStore(tmp_path / "refined").put(7, COEFFS, directions(), {})
    with pytest.raises(InputError, match="no run directory"):
        RefinedStore().directions(params)
    there = RefinedStore()
    there.add(params, RefinedStore(tmp_path / "refined").content(params))
    assert torch.equal(there.directions(params)["layers.0.o"], directions()["layers.0.o"])


def test_a_disk_that_refuses_and_a_model_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "refined").write_text("a file")
    with pytest.raises(AbliterateError, match=r"can't be made.*--resume"):
        RefinedStore(tmp_path / "refined").put(7, COEFFS, directions(), {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(InputError, match="is a link"):
        RefinedStore(tmp_path / "linked").put(7, COEFFS, directions(), {})
    assert list((tmp_path / "elsewhere").iterdir()) == []
    monkeypatch.setattr(refined, "LARGEST", 100)
    with pytest.raises(AbliterateError, match=r"load\.components"):
        RefinedStore().put(7, COEFFS, directions(), {})
