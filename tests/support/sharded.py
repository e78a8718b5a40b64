"""What two ranks do together in tests: a model that is sharded over them must be the model of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from abliterate import ranks
from abliterate.edits import edit_method
from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, load_model
from abliterate.model.residuals import capture_residuals
from abliterate.model.sharding import is_sharded
from abliterate.model.weights import dense_weight
from abliterate.refine.descent import Pass
from abliterate.refine.loss import Rows
from abliterate.refine.parameters import Module, Parameters
from abliterate.settings.schema import LoadSettings
from abliterate.types import TrialParams
from support.engine import HARMFUL, HARMLESS, Lab, make_engine, trials
from support.models import CPU, make_chat, make_directions, make_editor, make_loaded, make_model


def _probe(tokenizer: object, device: torch.device) -> object:
    return make_chat().encode(HARMFUL[:1])


def lab_of(loaded: LoadedModel, mode: str) -> Lab:
    """A lab around any loaded model."""
    return Lab(loaded, make_engine(loaded.model, 3), make_editor(loaded, mode=mode))


def compare(folder: str, families: Sequence[str], mode: str = "full") -> None:
    """What the engine computes under edits of a mode, on a sharded and on a whole model of each family in `folder`."""
    torch.set_num_threads(1)
    with ranks.joined():
        for family in families:
            shards = load_model(str(Path(folder) / family), LoadSettings(), CPU, _probe, print)
            assert ranks.size() == 2
            assert all(is_sharded(target.module) for target in shards.targets)
            sharded, whole = lab_of(shards, mode), lab_of(make_loaded(make_model(family)), mode)
            for check in (_weights, _residuals, _trials):
                check(sharded, whole)
            _gradients(sharded, whole, mode)


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _weights(sharded: Lab, whole: Lab) -> None:
    for mine, other in zip(sharded.loaded.targets, whole.loaded.targets, strict=True):
        assert mine.name == other.name
        assert torch.equal(dense_weight(mine.module), dense_weight(other.module))


def _residuals(sharded: Lab, whole: Lab) -> None:
    captured = [
        capture_residuals(lab.loaded.model, lab.loaded.layers, make_chat(), HARMFUL, batch_size=3) for lab in (sharded, whole)
    ]
    _close(*captured)


def _trials(sharded: Lab, whole: Lab) -> None:
    params = trials(whole, 2)
    fast = sharded.engine()
    for each in params:
        logprobs, texts = whole.expected(each)
        for engine in (sharded.reference, fast):
            sharded.editor.apply(each)
            responses = engine.respond(HARMFUL)
            assert responses is not None
            assert [response.text for response in responses] == texts
            _close(engine.first_logprobs(HARMLESS), logprobs)
        _same_factors(sharded.editor, whole.editor, each)
        sharded.editor.suspend()
        _close(sharded.reference.first_logprobs(HARMLESS), _base(whole))
    whole.editor.clear()


def _base(lab: Lab) -> Tensor:
    lab.editor.suspend()
    return lab.reference.first_logprobs(HARMLESS)


def _same_factors(mine: Editor, other: Editor, params: TrialParams) -> None:
    expected = other.factors(params)
    for name, factors in mine.factors(params).items():
        for tensor, other_tensor in zip(factors.tensors(), expected[name].tensors(), strict=True):
            assert torch.equal(tensor, other_tensor)


def _gradients(sharded: Lab, whole: Lab, mode: str) -> None:
    """Loss and gradients of a step of refinement."""
    tokens = [make_chat().token_ids(prompt) for prompt in (*HARMFUL, *HARMLESS)]
    rows = [TeacherForced(prompt, prompt[-4:]) for prompt in tokens]
    for checkpointing in (False, True):
        found = []
        for lab in (sharded, whole):
            passes = Pass(
                lab.loaded.model, lab.loaded.layers, lab.editor.hooks, CPU, Batches(4, CPU), checkpointing=checkpointing
            )
            parameters = _parameters(lab, mode)
            loss, gradients = passes.gradients(parameters.factors(), Rows(rows[:3], rows[3:6]), 1.0)
            parameters.pull_back(gradients)
            found.append((torch.tensor([loss.target, loss.first, loss.along]), parameters))
        (loss, mine), (other_loss, other) = found
        _close(loss, other_loss)
        assert mine.coeffs.grad is not None
        assert other.coeffs.grad is not None
        _close(mine.coeffs.grad, other.coeffs.grad, 1e-4)
        _close(mine.directions.grad, other.directions.grad, 1e-4)  # type: ignore[arg-type]


def _parameters(lab: Lab, mode: str) -> Parameters:
    info = lab.loaded.info
    directions = make_directions(info.n_layers, info.d_model).table().float()
    modules = [Module(target.name, target.layer, partial(dense_weight, target.module)) for target in lab.loaded.targets]
    starts = torch.stack([directions[module.layer] for module in modules])
    return Parameters(modules, edit_method(mode), torch.full((len(modules),), 0.3), starts)
