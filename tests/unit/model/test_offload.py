"""Models spread over several places by `load.device_map`: here main memory and the disk, the two devices that a CPU has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from abliterate.directions import ModuleInputs
from abliterate.edits import METHODS, SvdMemo
from abliterate.engine import drafts as drafts_module
from abliterate.engine import trial_engine
from abliterate.engine.batching import Batches
from abliterate.engine.forward import Passes
from abliterate.engine.self_check import check
from abliterate.engine.trial_engine import Pacing
from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.model import loader
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.inputs import Text, capture_inputs
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import dense_weight, device_and_dtype
from abliterate.refine.descent import Pass
from abliterate.refine.loss import Rows
from abliterate.refine.parameters import Module, Parameters
from abliterate.scorers.refusals import Refusals
from abliterate.settings.schema import EditSettings, LoadSettings
from support.engine import HARMFUL, HARMLESS, TOKENS, Lab, assert_same, last_layer, make_engine, make_lab, make_setup, trials
from support.models import (
    CPU,
    PROMPTS,
    logits_of,
    make_chat,
    make_directions,
    make_editor,
    make_loaded,
    make_model,
    save_model,
    write_dense,
)
from support.runs import outcomes, quick_settings, run_in
from support.zoo import everywhere, make_specimen


def spread(folder: Path, budget: str) -> loader.LoadedModel:
    """A saved model with so much of it in main memory, and the rest on the disk."""
    load = LoadSettings(device_map="auto", max_memory={"cpu": budget})
    return loader.load_model(str(folder), load, CPU, lambda tokenizer, at: make_chat().encode(PROMPTS[:1]), print)


@pytest.mark.parametrize("name", ["llama_biased", "qwen3_moe", "gpt_oss", "gpt2"])
def test_offloaded_modules_are_read_and_edited(name: str, tmp_path: Path) -> None:
    model = make_specimen(name)
    folder = save_model(model, tmp_path / "m")
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = spread(folder, f"{size * 6 // 10 // 1000}KB")
    elsewhere = [target for target in loaded.targets if any(one.is_meta for one in target.module.parameters())]
    assert elsewhere
    for target in loaded.targets:
        assert torch.equal(dense_weight(target.module), dense_weight(model.get_submodule(target.name)))
        assert device_and_dtype(target.module)[0] == CPU
    editor = make_editor(loaded)
    base = logits_of(loaded.model)
    torch.testing.assert_close(base, logits_of(model))
    editor.apply(everywhere(loaded.info.n_layers))
    found = logits_of(loaded.model)
    write_dense(model, editor, everywhere(loaded.info.n_layers), "full")
    torch.testing.assert_close(found, logits_of(model), rtol=1e-3, atol=2e-5)
    assert (found - base).abs().max() > 1e-3
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "auto"])
def test_a_run_of_a_spread_model_is_the_run(mode: str, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    short: dict[str, Any] = {
        "edit": {"mode": mode},
        "search": {"trials": 2},
        "response": {"max_new_tokens": 6, "detect_prefix": False},
        "export": {"kind": "none"},
    }
    place = {"load": {"device_map": "auto", "max_memory": {"cpu": "6MB"}}}
    plain, _ = run_in(tmp_path / "plain", quick_settings(prompt_files, tmp_path / "a", **short))
    found, recorder = run_in(tmp_path / "spread", quick_settings(prompt_files, tmp_path / "b", **short, **place))
    assert outcomes(found) == outcomes(plain)
    assert recorder.warnings == []


PLACES = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def dispatched(folder: Path, family: str) -> LoadedModel:
    """A model whose embedding, last layers and head are on the disk but for their own passes."""
    model = make_model(family)
    model.tie_weights()
    placed = dispatch_model(model, PLACES, offload_dir=str(folder), main_device="cpu")
    return make_loaded(placed)


def test_inputs_of_offloaded_modules_and_their_edits(tmp_path: Path) -> None:
    """Least squares, the default, reads both: what goes into a module, and its weight."""
    found = []
    for loaded in (make_loaded(make_model("llama")), dispatched(tmp_path, "llama")):
        texts = [Text(make_chat().token_ids(prompt)) for prompt in PROMPTS]
        captured = capture_inputs(loaded.model, loaded.targets, texts, batch_size=2, device=CPU)
        inputs = {name: ModuleInputs(rows[:2], rows[2:]) for name, rows in captured.items()}
        directions = replace(make_directions(loaded.info.n_layers, loaded.info.d_model), inputs=inputs)
        edit = EditSettings(mode="least-squares")
        editor = Editor(loaded.targets, directions, edit, EditHooks(loaded.targets), SvdMemo(0))
        base = logits_of(loaded.model)
        editor.apply(everywhere(loaded.info.n_layers))
        found.append((captured, logits_of(loaded.model)))
        assert (found[-1][1] - base).abs().max() > 1e-3
        editor.clear()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("switches", [{}, {"use_static_cache": True}], ids=["drafts", "static"])
def test_the_engines_mechanisms_on_an_offloaded_model(
    switches: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes begin at an offloaded layer, chunks are joined, rows leave and drafts are right, as on the plain model."""
    joined: list[int] = []
    starts: set[int] = set()
    join, starting_at = trial_engine.join, Passes.starting_at
    monkeypatch.setattr(trial_engine, "join", lambda parts: joined.append(len(parts)) or join(parts))
    monkeypatch.setattr(
        Passes, "starting_at", lambda self, start, hidden: starts.add(start) or starting_at(self, start, hidden)
    )
    plain = make_lab("llama", batch_size=5)
    loaded = dispatched(tmp_path, "llama")
    assert loaded.device == CPU
    assert all(parameter.is_meta for parameter in loaded.layers[2].parameters())
    reference = make_engine(loaded.model, 5, TOKENS)
    lab = Lab(loaded, reference, make_editor(loaded), Pacing(margin=0, pause=4, pass_cost=64))
    engine = lab.engine(Refusals(["no such text"]), **switches)
    for params in (*trials(plain, 2), last_layer(), last_layer()):
        expected = plain.expected(params)
        lab.editor.apply(params)
        found = engine.respond(HARMFUL, limit=2)
        assert found is not None
        assert [response.text for response in found] == expected[1]
        assert_same((engine.first_logprobs(HARMLESS), expected[1]), expected)
    assert max(joined) > 1
    assert max(starts) == 2
    assert check(engine, make_setup(lab)).ok
    drafts = engine._sets[(True, HARMFUL)].drafts
    assert (drafts is not None and drafts._right > drafts_module.PRIOR[0]) == (not switches)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_refinement_of_an_offloaded_model_has_the_same_gradients(checkpointing: bool, tmp_path: Path) -> None:
    """Weights that are on the disk between passes are there again for the backward pass."""
    rows = Rows(
        (TeacherForced((5, 6, 7), (8, 9, 10)), TeacherForced((5, 6, 13, 14, 15), (16, 17))),
        (TeacherForced((5, 6, 22), (23, 24)), TeacherForced((5, 6, 33, 34), (35,))),
    )
    losses, gradients = [], []
    for loaded in (make_loaded(make_model("llama")), dispatched(tmp_path, "llama")):
        modules = [Module(target.name, target.layer, partial(dense_weight, target.module)) for target in loaded.targets]
        vectors = make_directions(loaded.info.n_layers, loaded.info.d_model, seed=3).table()
        directions = torch.stack([vectors[module.layer] for module in modules])
        parameters = Parameters(modules, METHODS["full"], torch.linspace(0.2, 1.1, len(modules)), directions)
        hooks, batches = EditHooks(loaded.targets), Batches(16, CPU)
        passes = Pass(loaded.model, loaded.layers, hooks, loaded.device, batches, checkpointing, share=True)
        loss, found = passes.gradients(parameters.factors(), rows, 2.0)
        parameters.pull_back(found)
        losses.append(loss.total(2.0))
        gradients.append((parameters.coeffs.grad, parameters.directions.grad))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
