"""The check without prompts: every correct export passes, one that lacks, distorts or adds something doesn't."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate.directions import Directions
from abliterate.export.safetensors_copy import INDEX, SINGLE, read_header, shard_files
from support.exports import Case, make_case, odd_checkpoint


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("mode", ["full", "pre", "none"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_correct_exports_pass(family: str, stored: str, mode: str, kind: str, tmp_path: Path) -> None:
    chunk = 300  # several chunks a matrix
    ok, record = make_case(tmp_path, family, stored, mode=mode).check(kind, tmp_path / "out", chunk=chunk)
    assert ok, record
    assert record["checks"] == {"weights": True, "untouched": True}
    step = torch.finfo(torch.float32 if kind == "adapter" else getattr(torch, stored)).eps
    assert record["weight_error"]["max"] < step
    case, folder = make_case(tmp_path / "again", family, stored, mode=mode), tmp_path / "again" / "out"
    # As little is enough, where no row lies along the direction.
    assert case.check(kind, folder, chunk=chunk, rounding=1e-7)[0]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("mode", ["full", "pre", "none"])
def test_exports_of_several_directions_pass(mode: str, kind: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, stored="float32", mode=mode, count=3)
    assert {factors.a.shape[0] for factors in case.job.factors.values()} == {3}
    ok, record = case.check(kind, tmp_path / "out", chunk=300)
    assert ok, record
    without = case.with_factors(lambda factors: {name: replace(each, b=0.9 * each.b) for name, each in factors.items()})
    assert not case.check(kind, tmp_path / "other", without)[0]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_exports_of_the_svd_representation_pass(kind: str, tmp_path: Path) -> None:
    ok, record = make_case(tmp_path, representation="svd", rank=2).check(kind, tmp_path / "out")
    assert ok, record


def test_exports_of_models_loaded_as_a_whole_pass(tmp_path: Path) -> None:
    case = make_case(tmp_path, stored="float32")
    odd_checkpoint(Path(case.job.source))
    for kind in ("merged", "adapter"):
        ok, record = case.check(kind, tmp_path / kind)
        assert ok, record
    path = tmp_path / "merged" / SINGLE
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 0.1
    save_file(tensors, path, {"format": "pt"})
    assert case.check("merged", tmp_path / "merged")[1]["checks"] == {"weights": True, "untouched": False}


def nearly_one_hot(case: Case, row: int, noise: float) -> Case:
    """With directions that are all but a unit vector: one row's closed form can't be used."""
    vectors = noise * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    vectors[:, row] = 1
    case.editor._prepared.clear()
    case.editor._tables.clear()
    case.editor.directions = Directions(torch.nn.functional.normalize(vectors, dim=1))
    return replace(case, job=replace(case.job, factors=case.editor.factors(case.params)))


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.02])
def test_rows_along_the_direction_pass(noise: float, tmp_path: Path) -> None:
    case = nearly_one_hot(make_case(tmp_path, stored="float32"), 3, noise)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record


def off(record: dict[str, Any]) -> list[str]:
    assert record["checks"] == {"weights": False, "untouched": True}
    return record["weight_error"]["off"]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_an_edit_left_out_does_not_pass(stored: str, kind: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, stored=stored)
    dropped = sorted(case.job.factors)[1]
    ok, record = case.check(kind, tmp_path / "out", case.with_factors(lambda f: {n: f[n] for n in f if n != dropped}))
    assert not ok
    if kind == "adapter":  # its own files are whole
        record["checks"]["untouched"] = True
    assert off(record) == [dropped]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.99, 1.01])
def test_an_edit_one_percent_off_does_not_pass(scale: float, stored: str, kind: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, stored=stored)
    name = sorted(case.job.factors)[0]
    wrong = replace(case.job.factors[name], b=scale * case.job.factors[name].b)
    ok, record = case.check(kind, tmp_path / "out", case.with_factors(lambda f: f | {name: wrong}))
    assert not ok
    assert off(record) == [name]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_edit_of_no_numbers_does_not_pass(kind: str, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    name = sorted(case.job.factors)[0]
    nan = replace(case.job.factors[name], b=torch.full_like(case.job.factors[name].b, torch.nan))
    ok, record = case.check(kind, tmp_path / "out", case.with_factors(lambda f: f | {name: nan}))
    assert not ok
    assert off(record) == [name]
    json.dumps(record, allow_nan=False)


def flip(path: Path, place: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["first byte of a tensor", "last byte", "header", "config", "index", "cut short"])
def test_what_else_changed_does_not_pass(what: str, tmp_path: Path) -> None:
    case = make_case(tmp_path)
    base = Path(case.job.source)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / SINGLE).unlink()
    model.save_pretrained(base, max_shard_size="30KB")
    out = tmp_path / "out"
    assert case.check("merged", out)[0]
    path = shard_files(out)[-1]
    edited = {f"{name}.weight" for name in case.job.factors}
    if what == "first byte of a tensor":
        flip(path, next(stored.start for name, stored in read_header(path).items() if name not in edited))
    elif what == "last byte":
        assert list(read_header(path))[-1] not in edited
        flip(path, -1)
    elif what == "header":
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"format":"pt"', b'"format":"pT"'))
    elif what == "cut short":
        config = out / "config.json"
        config.write_bytes(config.read_bytes()[:-1])
    else:
        file = out / ("config.json" if what == "config" else INDEX)
        file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    ok, record = case.check("merged", out)
    assert not ok
    assert record["checks"] == {"weights": True, "untouched": False}


@pytest.mark.parametrize("change", [{"lora_alpha": 2}, {"use_dora": False}, {"target_modules": []}])
def test_an_adapter_with_another_config_does_not_pass(change: dict[str, Any], tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert case.check("adapter", tmp_path / "out")[0]
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert not case.check("adapter", tmp_path / "out")[0]
