"""Biprojected directions: orthogonal to the harmless mean of the edited layer, by hand, in edits and in a run's file."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from abliterate.directions import Directions, compute_directions, direction_method
from abliterate.directions.protected import protect
from abliterate.edits import SvdMemo
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.pipeline.stages import directions_file, directions_of, directions_record
from abliterate.settings.schema import EditSettings
from support.models import dense_edit, make_directions, make_loaded, make_model, make_params


def means(n_layers: int = 4, d_model: int = 12) -> tuple[Tensor, Tensor]:
    """Harmful and harmless means (n_layers+1, d_model) float64 with much in common."""
    generator = torch.Generator().manual_seed(0)
    harmless = torch.randn(n_layers + 1, d_model, generator=generator, dtype=torch.float64) + 1
    return harmless + torch.randn(n_layers + 1, d_model, generator=generator, dtype=torch.float64), harmless


def found() -> Directions:
    return compute_directions(direction_method("biprojected"), *means())


@pytest.mark.parametrize("x", [0.0, 1.37, 2.9, 3.0])
@pytest.mark.parametrize("layer", range(4))
def test_by_hand(x: float, layer: int) -> None:
    """Two steps of Gram-Schmidt in float64, with an interpolation between them."""
    harmful, harmless = means()
    h = harmless / harmless.norm(dim=1, keepdim=True)
    d = harmful - harmless
    d = d / d.norm(dim=1, keepdim=True)
    d = d - (d * h).sum(1, keepdim=True) * h
    d = (d / d.norm(dim=1, keepdim=True))[1:]
    low, t = int(x), x - int(x)
    v = (1 - t) * d[low] + (t * d[low + 1] if t else 0)
    v = v - (v @ h[layer + 1]) * h[layer + 1]
    directions = found()
    (blend,) = directions.blends(x, layer)
    torch.testing.assert_close(blend.of(directions.table(layer).double()), v / v.norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x", [0.0, 1.37, 3.0])
@pytest.mark.parametrize("layer", range(4))
def test_orthogonal_to_the_mean_of_the_edited_layer(x: float, layer: int) -> None:
    directions = found()
    assert directions.harmless is not None
    (blend,) = directions.blends(x, layer)
    v = blend.of(directions.table(layer).double())
    assert abs(float(v @ directions.harmless[layer + 1].double())) < 1e-12
    assert float(v.norm()) == pytest.approx(1, abs=1e-12)
    if x == layer:  # a direction of the layer's own is orthogonal already
        torch.testing.assert_close(v.float(), directions.at(x), rtol=1e-5, atol=1e-6)


def test_a_direction_along_the_mean_of_the_edited_layer_is_no_direction() -> None:
    vectors = torch.eye(3)[[0, 0, 1]]
    directions = Directions(vectors, torch.eye(3)[[2, 2, 0]])
    assert directions.blends(0.0, 1)[0].is_zero
    assert directions.blends(0.0, 0)[0].rows == (0, 2)
    assert Directions(vectors, torch.zeros(3, 3)).blends(0.0, 1)[0].rows == (0,)


@pytest.mark.parametrize("mode", ["full", "columns"])
def test_every_module_loses_the_direction_of_its_layer(mode: str) -> None:
    loaded = make_loaded(make_model("llama"))
    info = loaded.info
    plain, harmless = make_directions(info.n_layers, info.d_model), make_directions(info.n_layers, info.d_model, 7).vectors
    directions = Directions(plain.vectors, harmless)
    editor = Editor(loaded.targets, directions, EditSettings(mode=mode), EditHooks(loaded.targets), SvdMemo(0), budget_bytes=0)
    params = make_params(1, scope="global")
    for name, key in editor.plan(params).items():
        layer, weight = editor._by_name[name].layer, loaded.model.get_submodule(name).weight
        v = plain.at(float(key[1])).double()
        v = v - (v @ harmless[layer + 1].double()) * harmless[layer + 1].double() / harmless[layer + 1].double().square().sum()
        expected = dense_edit(weight, v / v.norm(), key[2][0], mode)
        torch.testing.assert_close(weight + editor.factors(params)[name].delta(weight), expected.float(), rtol=1e-4, atol=1e-5)
        (stated,), _ = editor.vectors(params, key)
        torch.testing.assert_close(stated, v / v.norm(), rtol=1e-6, atol=1e-6)


def test_protected_directions_keep_the_means() -> None:
    directions = found()
    capabilities = torch.nn.functional.normalize(torch.randn(5, 2, 12, dtype=torch.float64), dim=-1)
    kept = protect(directions, capabilities, 0.0)
    assert kept.harmless is directions.harmless
    (blend,) = kept.blends(1.37, 3)
    assert abs(float(blend.of(kept.table(3).double()) @ directions.harmless[4].double())) < 1e-12  # type: ignore[index]


def test_the_file_of_a_run_carries_the_means() -> None:
    directions, plain = found(), Directions(found().vectors)
    assert directions_file(directions) == directions_file(found())
    again = directions_of(directions_file(directions))
    assert torch.equal(again.vectors, directions.vectors)
    assert torch.equal(again.harmless, directions.harmless)  # type: ignore[arg-type]
    assert directions_of(directions_file(plain)).harmless is None
    assert directions_record(directions).vectors_sha256 != directions_record(plain).vectors_sha256
    # As earlier versions computed it.
    assert directions_record(plain).vectors_sha256 == hashlib.sha256(plain.vectors.numpy().tobytes()).hexdigest()
    with pytest.raises(ValueError, match="harmless means"):
        Directions(directions.vectors, directions.vectors[1:])
