"""Modules that read the residual stream lose what they see of a direction from their inputs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from abliterate.directions import Blend, Directions
from abliterate.edits import METHODS, SvdMemo, edit_method, reading_method
from abliterate.errors import InputError
from abliterate.export.adapter import dora_factors
from abliterate.export.check_weights import by_definition_of_reading
from abliterate.model.architectures import READERS, find_targets
from abliterate.model.coverage import coverage_of
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, architecture_of
from abliterate.model.readers import gain_of, with_gains
from abliterate.pipeline.stages import directions_file, directions_of
from abliterate.refine.parameters import Module, Parameters
from abliterate.settings.schema import EditSettings, LoadSettings
from abliterate.types import Kernel, TrialParams
from support.models import logits_of, make_directions, make_loaded, make_model

MODES = ("full", "columns", "pre", "none")
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "mistral")


def loaded_with_readers(family: str) -> LoadedModel:
    """A tiny model whose norms have weights of all sizes, with the modules that read as targets."""
    loaded = make_loaded(make_model(family))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    row = architecture_of(loaded.model, LoadSettings(readers=True))
    targets = find_targets(loaded.model, row, loaded.info.d_model)
    return replace(loaded, architecture=row, targets=targets)


def editor_of(loaded: LoadedModel, **settings: object) -> Editor:
    directions = with_gains(make_directions(loaded.info.n_layers, loaded.info.d_model), loaded.model, loaded.targets)
    edit = EditSettings.model_validate({"mode": "full", **settings})
    return Editor(loaded.targets, directions, edit, EditHooks(loaded.targets), SvdMemo(9))


def only_readers(loaded: LoadedModel, coeff: float = 1.0) -> TrialParams:
    names = {target.component for target in loaded.targets}
    kernels = {name: Kernel(coeff if name in READERS else 0.0, 1.0, coeff if name in READERS else 0.0, 9.0) for name in names}
    return TrialParams("global", 1.3, kernels)


def by_hand(weight: Tensor, v: Tensor, coeff: float, mode: str) -> Tensor:
    edited = weight.double() - coeff * torch.outer(weight.double() @ v, v)
    if mode in ("none", "pre"):
        return edited
    return edited * (weight.double().norm(dim=1) / edited.norm(dim=1))[:, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_edited_readers_are_the_dense_ones(family: str, mode: str) -> None:
    loaded = loaded_with_readers(family)
    editor, params = editor_of(loaded, mode=mode), only_readers(loaded, 0.8)
    dense, plan = copy.deepcopy(loaded.model), editor.plan(params)
    assert {loaded.model.get_submodule(name).weight.shape[1] for name in plan} == {loaded.info.d_model}  # type: ignore[union-attr]
    for target in loaded.targets:
        if target.name not in plan:
            continue
        module = dense.get_submodule(target.name)
        v = editor.directions.at(1.3).double() * gain_of(dense.get_submodule(target.norm), loaded.info.d_model, "").double()
        module.weight.copy_(by_hand(module.weight, v / v.norm(), 0.8, mode))  # type: ignore[operator, union-attr]
    base = logits_of(loaded.model)
    editor.apply(params)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)
    assert (logits_of(loaded.model) - base).abs().max() > 1e-3
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_direction_in_the_stream_is_not_read(family: str, mode: str) -> None:
    """At λ = 1, W'(γ∘v) = 0: what the stream has along v changes no output, but for the norm's scale."""
    loaded = loaded_with_readers(family)
    editor = editor_of(loaded, mode=mode)
    factors = editor.factors(only_readers(loaded))
    v, h = editor.directions.at(1.3), torch.randn(loaded.info.d_model)
    for target in loaded.targets:
        if target.reads:
            weight, norm = target.module.weight, loaded.model.get_submodule(target.norm)
            edited = weight + factors[target.name].delta(weight)  # type: ignore[operator, arg-type]
            outputs = [edited @ norm(x) * x.square().mean().sqrt() for x in (h, h + 3 * v)]
            torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
            if mode in ("full", "columns"):
                torch.testing.assert_close(edited.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=1e-6)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_reads_what_its_norm_returns(family: str) -> None:
    loaded = loaded_with_readers(family)
    readers = [target for target in loaded.targets if target.reads]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in {name for target in readers for name in (target.name, target.norm)}:
        module = loaded.model.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))  # type: ignore[misc]
    logits_of(loaded.model)
    assert len(readers) == loaded.info.n_layers * (2 if family == "phi3" else 5)
    assert all(torch.equal(seen[target.name][0], seen[target.norm][1]) for target in readers)


@pytest.mark.parametrize("keeps", [False, True])
def test_definition_of_several_directions(keeps: bool) -> None:
    torch.manual_seed(0)
    weight, vectors, coeffs = torch.randn(10, 8), torch.nn.functional.normalize(torch.randn(2, 8).double(), dim=1), [0.9, 0.4]
    method = reading_method(edit_method("full" if keeps else "none"))
    prepared = method.prepare(lambda: weight.T, vectors)
    factors = method.product(prepared, [Blend((0,), (1.0,)), Blend((1,), (1.0,))], torch.tensor(coeffs).double()).transposed()
    found = weight + factors.delta(weight)
    expected = by_definition_of_reading(vectors, coeffs, keeps_rows=keeps)(weight)
    torch.testing.assert_close(found.double(), torch.cat([expected(slice(0, 4)), expected(slice(4, 10))]), rtol=1e-5, atol=1e-6)
    if keeps:
        a, b, norms = dora_factors(factors, weight)
        as_peft = norms[:, None] * torch.nn.functional.normalize(weight + b @ a, dim=1)
        torch.testing.assert_close(as_peft, found, rtol=1e-5, atol=1e-6)


def test_refinement_starts_from_what_a_module_sees_and_pulls_gradients_back() -> None:
    torch.manual_seed(0)
    weight, v = torch.randn(6, 8, dtype=torch.float64), torch.nn.functional.normalize(torch.randn(8), dim=0)
    parameters = Parameters(
        [Module("m", 0, lambda: weight, METHODS["columns"], True)], METHODS["full"], torch.tensor([0.7]), v[None].clone()
    )
    factors = parameters.factors()["m"]
    torch.testing.assert_close(
        weight + factors.delta(weight).double(), by_hand(weight, v.double(), 0.7, "full"), rtol=1e-5, atol=1e-6
    )
    parameters.pull_back({"m": [torch.ones_like(tensor) for tensor in factors.tensors()]})
    assert parameters.coeffs.grad is not None
    assert parameters.coeffs.grad.abs().item() > 1e-6


@pytest.mark.parametrize("mode", ["columns", "none"])  # as which all modes read
def test_gradients_of_a_reader_equal_finite_differences_of_the_definition(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, goal = (torch.randn(6, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    v = torch.nn.functional.normalize(torch.randn(1, 8, dtype=torch.float64, generator=generator), dim=1)
    coeff = torch.tensor([0.7], dtype=torch.float64)
    parameters = Parameters([Module("m", 0, lambda: weight, METHODS[mode], True)], METHODS[mode], coeff, v)

    def total(v: Tensor, coeff: Tensor) -> float:
        return float((goal * by_hand(weight, v[0] / v.norm(), float(coeff), mode)).sum())

    factors = parameters.factors()["m"]
    scaled = weight if factors.row_scale is None else factors.row_scale.double()[:, None] * weight
    found = (goal * (scaled + factors.b.double() @ factors.a.double())).sum()
    assert float(found.detach()) == pytest.approx(total(v, coeff), rel=1e-5)
    parameters.pull_back({"m": list(torch.autograd.grad(found, factors.tensors()))})
    steps = 1e-5 * torch.eye(8, dtype=torch.float64)
    of_v = torch.tensor([[total(v + step, coeff) - total(v - step, coeff) for step in steps]], dtype=torch.float64) / 2e-5
    of_coeff = (total(v, coeff + 1e-5) - total(v, coeff - 1e-5)) / 2e-5
    assert parameters.directions.grad is not None
    assert parameters.coeffs.grad is not None
    torch.testing.assert_close(parameters.directions.grad, of_v, rtol=1e-4, atol=1e-4 * float(of_v.abs().max()))
    assert float(parameters.coeffs.grad) == pytest.approx(of_coeff, rel=1e-4)


def test_the_file_of_a_run_carries_the_gains() -> None:
    loaded = loaded_with_readers("llama")
    directions = editor_of(loaded).directions
    again = directions_of(directions_file(directions))
    assert directions_file(again) == directions_file(directions)
    assert again.gains.keys() == {target.norm for target in loaded.targets if target.reads}
    assert all(torch.equal(again.gains[name], gain) for name, gain in directions.gains.items())
    assert directions_file(Directions(directions.vectors)) == directions_file(with_gains(directions, loaded.model, ()))


def test_gains_that_are_missing_or_wrong_are_said() -> None:
    loaded = loaded_with_readers("llama")
    directions = editor_of(loaded).directions
    gains = dict(directions.gains)
    name = next(iter(gains))
    for wrong in (gains[name][1:], gains[name] * torch.nan):
        with pytest.raises(ValueError, match="weights of the norm"):
            replace(directions, gains=gains | {name: wrong})
    del gains[name]
    edit, known = EditSettings(mode="full"), replace(directions, gains=gains)
    with pytest.raises(InputError, match=f"without the weights of {name}"):
        Editor(loaded.targets, known, edit, EditHooks(loaded.targets), SvdMemo(9))


def test_biprojected_readers_keep_the_harmless_mean_of_what_they_read() -> None:
    """Attention reads the residual at its layer's index; the MLP's counts as that behind the layer."""
    loaded = loaded_with_readers("llama")
    harmless = make_directions(loaded.info.n_layers, loaded.info.d_model, 7).vectors
    directions = replace(editor_of(loaded).directions, harmless=harmless)
    editor = Editor(loaded.targets, directions, EditSettings(mode="none"), EditHooks(loaded.targets), SvdMemo(9))
    params = only_readers(loaded)
    for name, key in editor.plan(params).items():
        target = editor._by_name[name]
        (v,), _ = editor.vectors(params, key)
        mean = harmless[target.layer + (target.component != "attn.qkv")].double()
        assert abs(float((v / directions.gains[target.norm].double()) @ mean)) < 1e-7
        delta = editor.factors(params)[name].delta(target.module.weight)  # type: ignore[arg-type]
        expected = by_hand(target.module.weight, v, 1.0, "none") - target.module.weight  # type: ignore[arg-type]
        torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-5)


def test_coverage_counts_what_writes() -> None:
    loaded, plain = loaded_with_readers("llama"), make_loaded(make_model("llama"))
    records = [coverage_of(each.model, each.architecture, each.targets).to_record() for each in (loaded, plain)]
    assert records[0] == records[1]


def test_what_cannot_be_read_through_is_one_sentence() -> None:
    with pytest.raises(InputError, match="aren't known for 'gpt2'"):
        architecture_of(make_model("gpt2"), LoadSettings(readers=True))
    with pytest.raises(InputError, match="doesn't only scale"):
        gain_of(nn.LayerNorm(8), 8, "norm")

    with pytest.raises(InputError, match="norm is offloaded"):
        gain_of(nn.LayerNorm(8, device="meta"), 8, "norm")

    class Own(type(METHODS["none"])):  # type: ignore[misc]
        name = "own"  # `reads_as` isn't inherited, because this one may edit in another way than its base

    with pytest.raises(InputError, match="'own' edits no modules that read"):
        reading_method(Own())
