"""bitsandbytes, on a CPU: the demo model loaded in 8 and 4 bits, its matrices read back, edited, and observed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from abliterate.edits import SvdMemo
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, load_model
from abliterate.model.weights import dense_weight
from abliterate.settings.schema import EditSettings, LoadSettings
from abliterate.types import Prompt
from support.models import CPU, dense_edit, logits_of, make_chat, make_directions, make_params

pytest.importorskip("bitsandbytes")

# What the storage itself loses, relative to ‖W‖, and what its products lose on top (8 bits also round the input).
LOSS = {"bnb_8bit": (0.02, 0.01), "bnb_4bit": (0.2, 0.01)}


@pytest.fixture(scope="module", params=list(LOSS))
def quantized(request: pytest.FixtureRequest) -> LoadedModel:
    """The demo model; a pass has gone through it, as in any run."""
    settings = LoadSettings(quantization=request.param)
    return load_model("demo", settings, CPU, lambda tokenizer, at: make_chat(tokenizer).encode([Prompt("Hi")]), pytest.fail)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """The same in float32."""
    return load_model(
        "demo", LoadSettings(), CPU, lambda tokenizer, at: make_chat(tokenizer).encode([Prompt("Hi")]), print
    ).model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_matrices_are_read_as_they_multiply(quantized: LoadedModel, plain: nn.Module) -> None:
    stored, product = LOSS[quantized.info.quantization]
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for target in quantized.targets[::5]:
        weight = dense_weight(target.module)
        assert weight.shape == plain.get_submodule(target.name).weight.shape  # type: ignore[union-attr]
        assert relative(weight, plain.get_submodule(target.name).weight) < stored  # type: ignore[arg-type]
        if target.component == "attn.o_proj":
            assert relative(target.module(x), x @ weight.float().T) < product


def test_edited_modules_multiply_by_the_edited_matrix(quantized: LoadedModel) -> None:
    _, product = LOSS[quantized.info.quantization]
    info = quantized.info
    editor = Editor(
        quantized.targets,
        make_directions(info.n_layers, info.d_model),
        EditSettings(mode="full"),
        EditHooks(quantized.targets),
        SvdMemo(0),
    )
    before = logits_of(quantized.model)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    plan = editor.plan(make_params(1, info.n_layers))
    dense = {t.name: (t.module, dense_weight(t.module)) for t in quantized.targets if t.name in plan and "o_proj" in t.name}
    editor.apply(make_params(1, info.n_layers))
    assert relative(logits_of(quantized.model), before) > 0.01
    for name, (module, weight) in dense.items():
        _, index, (coeff,) = plan[name]
        edited = dense_edit(weight, editor.directions.at(index), coeff, "full")
        assert relative(edited, weight) > 2 * product
        assert relative(module(x), x @ edited.float().T) < product
    assert dense
    editor.clear()
    assert torch.equal(logits_of(quantized.model), before)
