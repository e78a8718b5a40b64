"""What the editor keeps between trials: within its budget, and with the same edits for less of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abliterate.directions import Blend
from abliterate.edits import METHODS, Factors, SvdMemo
from abliterate.edits.base import ROW_CHUNK
from abliterate.model.editor import Editor
from support.models import make_directions, make_editor, make_loaded, make_model, make_params

MODES = sorted(METHODS)


def with_budget(editor: Editor, budget: float) -> Editor:
    """The same editor with another budget of bytes."""
    parts = (editor._targets, editor.directions, editor._settings, editor.hooks)
    made = Editor(*parts, SvdMemo(100), budget)
    made.prepare()
    return made


def held(editor: Editor) -> int:
    """Bytes of prepared modules, tensor by tensor, but for those in main memory."""
    return sum(
        tensor.nbytes
        for name, prepared in editor._prepared.items()
        if name not in editor.offloaded
        for tensor in (prepared.a, prepared.p, prepared.norms)
    )


def assert_equal_factors(found: dict[str, Factors], expected: dict[str, Factors]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
        assert (one.row_scale is None) == (other.row_scale is None)
        assert one.row_scale is None or torch.equal(one.row_scale, other.row_scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_directions_are_one_tensor_for_all_modules(mode: str) -> None:
    editor = make_editor(make_loaded(make_model("llama")), mode=mode)
    editor.prepare()
    assert len(editor._prepared) == 6
    assert len({prepared.directions.data_ptr() for prepared in editor._prepared.values()}) == 1
    assert {prepared.directions.dtype for prepared in editor._prepared.values()} == {torch.float64}


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("options", [{"mode": mode} for mode in MODES] + [{"representation": "svd"}], ids=str)
def test_edits_are_the_same_whatever_the_budget(
    options: dict[str, Any], accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an accelerator: here too everything lies in main memory, but by the way of what is offloaded there."""
    monkeypatch.setattr("abliterate.model.editor._has_own_memory", lambda device: accelerator)
    plain = make_editor(make_loaded(make_model("llama")), **options)
    plain.prepare()
    whole_size = held(plain)
    for budget in (0, whole_size // 3, whole_size - 1, whole_size, 10**9):
        editor = with_budget(plain, budget)
        assert held(editor) <= budget
        assert editor.budget_bytes == budget - held(editor)
        short = budget < whole_size
        assert bool(editor.offloaded) == (short and accelerator)
        assert bool(editor.unprepared) == (short and not accelerator)
        if budget:
            assert held(editor) > 0, "what fits into the budget is kept"
        for seed in range(4):
            assert_equal_factors(editor.factors(make_params(seed)), plain.factors(make_params(seed)))
        assert held(editor) <= budget


def test_modules_beyond_the_budget_are_prepared_in_each_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_editor(make_loaded(make_model("llama")))
    prepared: list[int] = []
    prepare = plain._method.prepare
    monkeypatch.setattr(type(plain._method), "prepare", lambda self, *args: prepared.append(1) or prepare(*args))
    editor = with_budget(plain, 0)
    assert len(prepared) == 6
    editor.factors(make_params(0))
    assert len(prepared) > 6
    ample = with_budget(plain, 10**9)
    prepared.clear()
    ample.factors(make_params(0))
    assert prepared == []


class Largest(TorchDispatchMode):
    """Notes the largest new float32 or float64 tensor that operations give."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.elements = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            wide = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
            if wide and tensor.untyped_storage().data_ptr() not in self._given:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_is_never_copied_whole(mode: str) -> None:
    """Neither to prepare it nor for the few rows that the closed form can't express."""
    d_out, d_in = 4 * ROW_CHUNK, 48
    weight = torch.randn(d_out, d_in).bfloat16()
    directions = make_directions(2, d_out).by_layer().double().clone()
    directions[0] = 0
    directions[0, 9] = 1  # one-hot: a degenerate row at λ = 1
    with Largest([weight, directions]) as seen:
        prepared = METHODS[mode].prepare(lambda: weight, directions)
        factors = METHODS[mode].factors(prepared, Blend((0,), (1.0,)), 1.0)
    assert factors.a.shape[0] == (2 if mode == "full" else 1)
    assert 0 < seen.elements <= ROW_CHUNK * d_in


def test_a_dense_change_needs_one_matrix() -> None:
    """The svd representation decomposes ΔW, which is made without a float32 copy of W beside it."""
    weight = torch.randn(4 * ROW_CHUNK, 24).bfloat16()
    factors = Factors(torch.rand(len(weight)) + 0.5, torch.randn(1, 24), torch.randn(len(weight), 1))
    expected = (factors.row_scale - 1)[:, None] * weight.float() + factors.b @ factors.a  # type: ignore[operator]
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and "to_copy" in str(func):
                sizes.append(result.numel())
            return result

    with Sizes():
        found = factors.delta(weight)
    assert torch.equal(found, expected)
    assert max(sizes) <= ROW_CHUNK * 24
