"""Inputs of modules, captured of all modules in one pass, and edits that are computed from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.directions import Directions, ModuleInputs
from abliterate.edits import SvdMemo
from abliterate.errors import AbliterateError, InputError
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.inputs import Text, capture_inputs, refuse_uncaptured
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import dense_weight
from abliterate.settings.schema import EditSettings
from abliterate.types import RefinedParams
from support.inputs import MIDDLE, params_of, random_inputs
from support.models import (
    NAMED,
    PROMPTS,
    logits_of,
    make_chat,
    make_directions,
    make_loaded,
    make_model,
    make_params,
    write_weight,
)


def capture(loaded: LoadedModel, batch_size: int = 2) -> dict[str, Tensor]:
    texts = [Text(make_chat().token_ids(prompt)) for prompt in PROMPTS]
    return capture_inputs(loaded.model, loaded.targets, texts, batch_size=batch_size, device=torch.device("cpu"))


def make_editor(loaded: LoadedModel, mode: str, inputs: dict[str, ModuleInputs] | None = None) -> Editor:
    directions = make_directions(loaded.info.n_layers, loaded.info.d_model)
    directions = Directions(directions.vectors, inputs=random_inputs(loaded) if inputs is None else inputs)
    return Editor(loaded.targets, directions, EditSettings(mode=mode), EditHooks(loaded.targets), SvdMemo(0))


@pytest.mark.parametrize("family", ["llama_biased", "gpt2", "falcon", "qwen3_5"])
def test_inputs_are_those_of_each_prompt_alone(family: str) -> None:
    loaded = make_loaded(make_model(family), components=NAMED[family][2] if family in NAMED else None)
    found = capture(loaded)
    expected: dict[str, list[Tensor]] = {target.name: [] for target in loaded.targets}

    def hook(name: str) -> Any:
        return lambda module, args: expected[name].append(args[0][0, -1])

    handles = [target.module.register_forward_pre_hook(hook(target.name)) for target in loaded.targets]
    with torch.no_grad():
        for prompt in PROMPTS:
            loaded.model(**make_chat().encode([prompt]))
    for handle in handles:
        handle.remove()
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], torch.stack(rows), rtol=1e-4, atol=1e-5)
    again = capture(loaded, batch_size=3)
    for name, rows in found.items():
        torch.testing.assert_close(again[name], rows, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("family", ["llama_biased", "qwen3_5"])
def test_inputs_along_answers_are_those_of_each_text_alone(family: str) -> None:
    loaded = make_loaded(make_model(family), components=NAMED[family][2] if family in NAMED else None)
    texts = [Text([5, 9, 3], [7, 2, 11]), Text([4, 8], [6]), Text([1, 2, 3, 4, 5], [10, 12])]
    found = capture_inputs(loaded.model, loaded.targets, texts, batch_size=2, device=torch.device("cpu"))
    expected: dict[str, list[Tensor]] = {target.name: [] for target in loaded.targets}
    for text in texts:
        for length in range(1, len(text.answer) + 1):  # the input at a token is that at the end of what ends with it
            one = [Text([*text.prompt, *text.answer[:length]])]
            alone = capture_inputs(loaded.model, loaded.targets, one, batch_size=1, device=torch.device("cpu"))
            for name, rows in alone.items():
                expected[name].append(rows)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_inputs_that_are_not_numbers_raise() -> None:
    loaded = make_loaded(make_model("llama"))
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(AbliterateError, match="overflow in this dtype"):
        capture(loaded)


def test_experts_have_no_inputs_at_a_known_position() -> None:
    loaded = make_loaded(make_model("mixtral"))
    with pytest.raises(InputError, match=r"'key-conditional' needs the inputs.*fused experts in .*experts"):
        refuse_uncaptured(loaded.targets, "key-conditional")
    with pytest.raises(InputError, match="fused experts"):
        make_editor(loaded, "key-conditional", {})
    with pytest.raises(InputError, match="isn't called once with every position"):
        capture(loaded)


@pytest.mark.parametrize("mode", ["key-conditional", "least-squares", "arbitrary-rank"])
def test_edits_are_those_of_matrices_written_to_the_model(mode: str) -> None:
    loaded = make_loaded(make_model("llama_biased"))
    editor, params = make_editor(loaded, mode), params_of(mode)
    editor.prepare()
    base = logits_of(loaded.model)
    editor.apply(params)
    found = logits_of(loaded.model)
    written = editor.hooks.misses
    editor.apply(params)  # nothing is written again
    assert editor.hooks.misses == written
    factors = editor.factors(params)
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)
    other = make_model("llama_biased")
    for name, own in factors.items():
        module = other.get_submodule(name)
        weight = dense_weight(module).clone()
        write_weight(module, weight + own.delta(weight))
    torch.testing.assert_close(found, logits_of(other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-3)


def test_other_numbers_are_another_edit() -> None:
    loaded = make_loaded(make_model("llama"))
    editor, params = make_editor(loaded, "arbitrary-rank"), params_of("arbitrary-rank")
    editor.apply(params)
    one = logits_of(loaded.model)
    editor.apply(replace(params, extra={**MIDDLE, "steer": 0.5}))
    assert not torch.equal(logits_of(loaded.model), one)


@pytest.mark.parametrize("offloaded", [False, True])
def test_edits_without_directions_need_none(offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that are zero change nothing of an edit that doesn't use them, and leave no module out."""
    monkeypatch.setattr("abliterate.model.editor._has_own_memory", lambda device: True)
    loaded, params = make_loaded(make_model("llama")), params_of("arbitrary-rank")
    plain = make_editor(loaded, "arbitrary-rank")
    parts = (loaded.targets, replace(plain.directions, vectors=torch.zeros_like(plain.directions.vectors)), plain._settings)
    without = Editor(*parts, EditHooks(loaded.targets), SvdMemo(0), 0 if offloaded else 1e9)
    found, expected = without.factors(params), plain.factors(params)
    assert len(found) > 1
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        torch.testing.assert_close(factors.delta(factors.b), expected[name].delta(factors.b))


@pytest.mark.parametrize("extra", [{}, {**MIDDLE, "neighbours": 99}, {**MIDDLE, "steer": 0.0}])
def test_numbers_of_a_damaged_run(extra: dict[str, float]) -> None:
    editor = make_editor(make_loaded(make_model("llama")), "arbitrary-rank")
    with pytest.raises(InputError, match=r"The trial has no (preserve|neighbours|steer) from .* put the run's own files back"):
        editor.apply(replace(make_params(0), extra=extra))
    refined = RefinedParams({"model.layers.0.mlp.down_proj": 1.0}, "refined/1.safetensors", "0" * 64, {})
    with pytest.raises(InputError, match="no preserve"):
        editor.apply(refined)


def test_directions_without_inputs_or_with_those_of_another_model() -> None:
    loaded = make_loaded(make_model("llama"))
    other = make_loaded(make_model("llama", intermediate_size=40))
    for inputs in ({}, random_inputs(other)):
        with pytest.raises(InputError, match=r"needs the inputs of model\.layers\..*come without them"):
            make_editor(loaded, "key-conditional", inputs).prepare()


def test_modules_whose_inputs_allow_no_edit_are_left_out() -> None:
    loaded = make_loaded(make_model("llama"))
    inputs = random_inputs(loaded)
    name = "model.layers.1.mlp.down_proj"
    inputs[name] = ModuleInputs(inputs[name].harmless, inputs[name].harmless)
    editor, params = make_editor(loaded, "key-conditional", inputs), params_of("key-conditional")
    editor.prepare()
    assert editor.unedited == [name]
    every = make_editor(loaded, "key-conditional")
    assert set(every.plan(params)) - set(editor.plan(params)) == {name}
    refined = RefinedParams(dict.fromkeys(inputs, 1.0), "refined/1.safetensors", "0" * 64, {})
    assert name not in editor.plan(refined)
