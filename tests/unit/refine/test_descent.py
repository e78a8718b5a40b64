"""The loss of refinement and its gradients, against plain forward passes of models into which W' is written, in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from abliterate.edits import METHODS, needs_inputs
from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import TeacherForced, fed_tokens
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import dense_weight
from abliterate.refine.descent import Descent, Pass, Rates, _drawn, _inputs_of
from abliterate.refine.loss import Loss, Rows
from abliterate.refine.parameters import Module, Parameters
from support.models import CPU, dense_edit, make_directions, make_loaded, make_model, write_weight

ROWS = Rows(
    (TeacherForced((5, 6, 7), (8, 9, 10)), TeacherForced((11, 12, 13, 14, 15), (16, 17))),
    (TeacherForced((21, 22), (23, 24, 25, 26)), TeacherForced((31, 32, 33, 34), (35,)), TeacherForced((5, 41), (42, 43))),
)


def parameters_of(loaded: LoadedModel, mode: str, dtype: torch.dtype = torch.float64) -> Parameters:
    modules = [Module(target.name, target.layer, partial(dense_weight, target.module)) for target in loaded.targets]
    directions = make_directions(loaded.info.n_layers, loaded.info.d_model, seed=3).table().to(dtype)
    coeffs = torch.linspace(0.2, 1.1, len(modules), dtype=dtype)
    return Parameters(modules, METHODS[mode], coeffs, torch.stack([directions[module.layer] for module in modules]).clone())


def passes_of(loaded: LoadedModel, size: int = 16, *, checkpointing: bool = True) -> Pass:
    return Pass(loaded.model, loaded.layers, EditHooks(loaded.targets), CPU, Batches(size, CPU), checkpointing)


def slow_loss(loaded: LoadedModel, parameters: Parameters, mode: str, rows: Rows = ROWS) -> Loss:
    """The loss by definition: each row alone, through a copy of the model that holds W'."""
    edited = copy.deepcopy(loaded.model)
    for module, v, coeff in zip(parameters.modules, parameters.directions, parameters.coeffs, strict=True):
        inner = edited.get_submodule(module.name)
        weight = dense_weight(inner)
        parts = weight if weight.ndim == 3 else weight[None]
        written = [dense_edit(part, v / v.norm(), float(coeff), mode) for part in parts]
        write_weight(inner, torch.stack(written).view(weight.shape))
    targets = [float(-logprobs(edited, row).gather(1, torch.tensor([row.answer]).T).mean()) for row in rows.harmful]
    divergences = []
    for row in rows.harmless:
        base, ours = logprobs(loaded.model, row), logprobs(edited, row)
        divergences.append((base.exp() * (base - ours)).sum(-1))
    n = len(rows.harmless)
    return Loss(
        sum(targets) / len(targets),
        float(sum(kl[0] for kl in divergences)) / n,
        float(sum(kl.mean() for kl in divergences)) / n,
    )


@torch.no_grad()
def logprobs(model: nn.Module, row: TeacherForced) -> Tensor:
    logits = model(torch.tensor([[*row.prompt, *row.answer[:-1]]])).logits[0, -len(row.answer) :]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama_biased", "gemma2", "qwen3_moe"])
def test_the_loss_is_that_of_plain_passes(family: str) -> None:
    loaded = make_loaded(make_model(family))
    parameters = parameters_of(loaded, "full", torch.float32)
    found = passes_of(loaded, size=2).loss(parameters.factors(), ROWS)
    expected = slow_loss(loaded, parameters, "full")
    for name in ("target", "first", "along"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6)
    assert found.total(3.0) == pytest.approx(expected.target + 3 * (expected.first + expected.along), rel=1e-4)


# GPT-2 computes in float64 throughout. Other families' norms and grouped products are float32, so steps must be larger there,
# but small enough that no token changes its experts.
@pytest.mark.parametrize("mode", [mode for mode in sorted(METHODS) if not needs_inputs(METHODS[mode])])
@pytest.mark.parametrize(
    ("family", "dtype", "step", "within"), [("gpt2", torch.float64, 1e-4, 1e-4), ("qwen3_moe", torch.float32, 3e-3, 0.03)]
)
def test_gradients_equal_finite_differences(family: str, dtype: torch.dtype, step: float, within: float, mode: str) -> None:
    loaded = make_loaded(make_model(family).to(dtype))
    parameters, beta = parameters_of(loaded, mode), 2.0
    _, gradients = passes_of(loaded, size=2).gradients(parameters.factors(), ROWS, beta)
    parameters.pull_back(gradients)
    assert parameters.coeffs.grad is not None
    assert parameters.directions.grad is not None
    draw, scale = torch.Generator().manual_seed(1), float(parameters.coeffs.grad.abs().max())
    for index in range(len(parameters.modules)):
        bump = torch.nn.functional.normalize(torch.randn(parameters.directions.shape[1], generator=draw), dim=0).double()
        for tensor, change, expected in (
            (parameters.coeffs, torch.tensor(1.0), parameters.coeffs.grad[index]),
            (parameters.directions, bump, parameters.directions.grad[index] @ bump),
        ):
            before, losses = tensor[index].clone(), []
            for sign in (1, -1):
                tensor[index] = before + sign * step * change
                losses.append(slow_loss(loaded, parameters, mode).total(beta))
                tensor[index] = before
            assert float(expected) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=within, abs=within * scale)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_batch_size_and_checkpointing_change_nothing(size: int) -> None:
    loaded = make_loaded(make_model("llama"))
    parameters = parameters_of(loaded, "full", torch.float32)
    expected, whole = passes_of(loaded, checkpointing=False).gradients(parameters.factors(), ROWS, 5.0)
    found, ours = passes_of(loaded, size).gradients(parameters.factors(), ROWS, 5.0)
    assert found.total(5.0) == pytest.approx(expected.total(5.0), rel=1e-5)
    for name, tensors in whole.items():
        for mine, theirs in zip(ours[name], tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_shared_prompts_and_kept_logits_change_nothing() -> None:
    loaded = make_loaded(make_model("llama"))
    parameters = parameters_of(loaded, "full", torch.float32)
    prompts = tuple(TeacherForced((3, 4, *row.prompt), row.answer) for row in (*ROWS.harmful, *ROWS.harmless))
    rows = Rows(prompts[:2], prompts[2:])
    plain = passes_of(loaded, checkpointing=False)
    shared = dataclasses.replace(plain, share=True, base_logits={})
    expected, whole = plain.gradients(parameters.factors(), rows, 5.0)
    shared.keep_base_logits(rows.harmless)
    shared.keep_base_logits(rows.harmless)
    assert len(shared.base_logits) == 3
    assert shared.tokens == 0
    found, ours = shared.gradients(parameters.factors(), rows, 5.0)
    assert found.total(5.0) == pytest.approx(expected.total(5.0), rel=1e-5)
    for name, tensors in whole.items():
        for mine, theirs in zip(ours[name], tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    # The beginning (3, 4) is fed once instead of five times, and the unedited model isn't asked again.
    assert shared.tokens == 3 * (fed_tokens(prompts, share=False) - 4 * 2)
    assert plain.tokens == 3 * fed_tokens(prompts, share=False) + fed_tokens(rows.harmless, share=False)


def test_layers_that_are_computed_twice_share_nothing() -> None:
    passes = passes_of(make_loaded(make_model("llama")), checkpointing=True)
    assert not dataclasses.replace(passes, share=True).share


@pytest.mark.parametrize("size", [1, 16])
def test_logits_beyond_the_limit_are_not_kept(size: int) -> None:
    """Of the three rows the shortest fits, and the others of its batch are computed anew in each pass."""
    loaded = make_loaded(make_model("llama"))
    parameters = parameters_of(loaded, "full", torch.float32)
    passes, row = passes_of(loaded, size), 4 * loaded.model.config.vocab_size
    passes.keep_base_logits(ROWS.harmless, most_bytes=0)
    assert not passes.base_logits
    passes.keep_base_logits(ROWS.harmless, most_bytes=2 * row)
    assert [logits.nbytes for logits in passes.base_logits.values()] == [2 * row]
    found, expected = (each.loss(parameters.factors(), ROWS) for each in (passes, passes_of(loaded)))
    assert found.total(1.0) == pytest.approx(expected.total(1.0), rel=1e-5)


def test_memory_that_runs_out_halves_the_batch_and_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded(make_model("llama"))
    parameters = parameters_of(loaded, "full", torch.float32)
    _, expected = passes_of(loaded).gradients(parameters.factors(), ROWS, 5.0)
    real, sizes = torch.autograd.grad, []

    def scarce(outputs: Tensor, *args: object, **options: object) -> object:
        passes = options.get("allow_unused") and not isinstance(outputs, list)
        if passes:
            sizes.append(1)
            if len(sizes) == 1:
                raise torch.OutOfMemoryError("out of memory")
        return real(outputs, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    passes = passes_of(loaded)
    _, found = passes.gradients(parameters.factors(), ROWS, 5.0)
    assert passes.batches.size < 16
    for name, tensors in expected.items():
        for mine, theirs in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_a_pass_leaves_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded(make_model("llama"))
    ids = torch.tensor([[5, 6, 7]])
    before = loaded.model(ids).logits
    passes = passes_of(loaded)
    passes.gradients(parameters_of(loaded, "full", torch.float32).factors(), ROWS, 1.0)
    assert torch.equal(loaded.model(ids).logits, before)
    assert not any("forward" in vars(layer) for layer in passes.layers)
    assert not passes.hooks.active


@pytest.mark.parametrize("seed", [3, 2**53 - 1])
def test_every_row_is_learned_from_as_often_as_others(seed: int) -> None:
    rows = [TeacherForced([index], [0]) for index in range(5)]
    few = [_drawn(rows, 24, seed, step) for step in range(4)]
    assert all(sorted(row.prompt[0] for row in step) == list(range(5)) for step in few), "fewer than a batch"
    many = Counter(row.prompt[0] for step in range(5) for row in _drawn(rows, 3, seed, step))
    assert set(many.values()) == {3}


def test_descent_lowers_the_loss_and_depends_on_its_seed_alone() -> None:
    loaded = make_loaded(make_model("llama"))

    def descended(seed: int) -> tuple[float, Tensor]:
        parameters = parameters_of(loaded, "full", torch.float32)
        descent = Descent(parameters, passes_of(loaded), ROWS, Rates(0.05, 0.02), batch=2, seed=seed)
        for _ in range(15):
            descent.step(0.5, 1.0)
        torch.testing.assert_close(parameters.directions.norm(dim=1), torch.ones(len(parameters.modules)))
        return passes_of(loaded).loss(parameters.factors(), ROWS).total(0.5), parameters.directions

    first, again, other = descended(0), descended(0), descended(1)
    start = passes_of(loaded).loss(parameters_of(loaded, "full", torch.float32).factors(), ROWS).total(0.5)
    assert first[0] < 0.97 * start
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_only_the_moments_go_on_from_a_descent_before() -> None:
    """The second descent equals one whose Adam was never made anew, and without the moments it doesn't."""
    loaded = make_loaded(make_model("llama"))

    def begun() -> Descent:
        return Descent(
            parameters_of(loaded, "full", torch.float32), passes_of(loaded), ROWS, Rates(0.05, 0.02), batch=2, seed=0
        )

    before, after, fresh, whole = begun(), begun(), begun(), begun()
    for descent in (before, whole):
        for _ in range(4):
            descent.step(0.5, 1.0)
    start = begun().parameters
    with torch.no_grad():
        whole.parameters.coeffs.copy_(start.coeffs)
        whole.parameters.directions.copy_(start.directions)
    whole.steps = 0
    after.load_moments(before.state())
    assert after.steps == 0
    assert torch.equal(after.parameters.directions, start.directions)
    for descent in (after, fresh, whole):
        descent.step(0.5, 1.0)
    assert torch.equal(after.parameters.directions, whole.parameters.directions)
    assert not torch.equal(after.parameters.directions, fresh.parameters.directions)


class Detached(nn.Linear):
    """A kernel without a backward pass, whose outputs no gradient goes through."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, Detached])
def test_a_kernel_that_passes_no_gradient_on_is_found(kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream beside it has one, so no gradient of the edit is missing, but all are wrong."""
    loaded = make_loaded(make_model("llama"))
    monkeypatch.setattr("abliterate.refine.descent.opaque", lambda module: isinstance(module, nn.Linear))
    for module in loaded.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = kind
    passes, factors = passes_of(loaded), parameters_of(loaded, "full", torch.float32).factors()
    assert all(any(given is not None for given in gradients) for gradients in passes.gradients(factors, ROWS, 1.0)[1].values())
    if kind is nn.Linear:
        passes.probe([5, 6, 7, 8], factors)
        return
    with pytest.raises(RuntimeError, match=r"Detached passes no gradient on|does not require grad"):
        passes.probe([5, 6, 7, 8], factors)


def test_experts_that_are_not_called_are_not_asked() -> None:
    """Of many modules of a type, the first that is called is looked at."""
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    with _inputs_of(experts) as calls:
        experts[2](torch.ones(1, 4))
        experts[5](torch.zeros(1, 4))
    ((module, (given,), options),) = calls
    assert (module, given.tolist(), options) == (experts[2], [[1, 1, 1, 1]], {})
    assert not any(expert._forward_pre_hooks for expert in experts)
