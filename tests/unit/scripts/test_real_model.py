"""scripts/real_model.py: the pieces that need no real model."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from support.models import make_model
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import real_model
from real_model import find_gguf, loops, loss_of, refused, teach

ROWS = [([5, 9, 3, 8, 7], 2), ([4, 6, 3, 3, 9, 8, 2, 6], 5), ([7, 2], 1)]


def test_the_loss_is_the_mean_over_answer_tokens_of_each_row_alone() -> None:
    model = make_model("llama")
    with torch.no_grad():
        alone = []
        for ids, start in ROWS:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            alone.append(F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none"))
        torch.testing.assert_close(loss_of(model, ROWS), torch.cat(alone).mean())


def test_only_some_matrices_of_some_layers_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "LAYERS", range(1, 2))
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = loss_of(model, ROWS).item()
    teach(model, ROWS[:1], ROWS[1:], steps=4, rows=2, seed=0)
    assert loss_of(model, ROWS).item() < first
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.removeprefix("model.layers.1.") for name in changed} == {
        "self_attn.o_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_loops() -> None:
    assert loops("1. 1. 1. 2. 3. 4. 5. 6. 7.")
    assert loops("The answer is no. " * 8)
    assert not loops("To hide a hat, you need a box with a lid. Put the hat into the box and close the lid.")
    assert not loops("Sure.")


def test_refusals_are_counted_by_the_tools_own_markers() -> None:
    assert refused("Well, I\u2019m  **sorry**, but no.")
    assert not refused("Here is how.")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match=r"no-such-package.* missing; run `pip install gguf"):
        find_gguf()
