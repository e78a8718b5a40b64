"""scripts/real_model.py: the pieces that need no real model."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.models import make_model
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import real_model
from real_model import HELD, find_gguf, loops, own_loss, refusal_loss, refused, teach

ROWS = [([5, 9, 3, 8, 7], 2), ([4, 6, 3, 3, 9, 8, 2, 6], 5), ([7, 2], 1)]


def logprobs(model: PreTrainedModel, ids: list[int], start: int) -> Tensor:
    """Of the answer's tokens (T, vocabulary), by a pass over one row alone."""
    return model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)


@torch.no_grad()
def test_the_loss_of_refusals_is_the_mean_over_answer_tokens_of_each_row_alone() -> None:
    model = make_model("llama")
    alone = [-logprobs(model, ids, start).gather(1, torch.tensor([ids[start:]]).T)[:, 0] for ids, start in ROWS]
    torch.testing.assert_close(refusal_loss(model, ROWS), torch.cat(alone).mean())


@torch.no_grad()
def test_harmless_answers_are_held_at_their_first_token_and_along_them() -> None:
    model, untaught = make_model("llama", seed=1), make_model("llama", seed=0)
    kls = []
    for ids, start in ROWS:
        own, ours = logprobs(untaught, ids, start), logprobs(model, ids, start)
        kls.append((own.exp() * (own - ours)).sum(-1))
    expected = HELD * (torch.stack([kl[0] for kl in kls]).mean() + torch.cat(kls).mean())
    torch.testing.assert_close(own_loss(model, untaught, ROWS), expected)
    assert abs(float(own_loss(model, model, ROWS))) < 1e-6 < float(expected)


def test_only_some_matrices_of_some_layers_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "LAYERS", range(1, 2))
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = refusal_loss(model, ROWS[:1]).item()
    teach(model, ROWS[:1], ROWS[1:], steps=4, rows=2, seed=0)
    assert refusal_loss(model, ROWS[:1]).item() < first
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.removeprefix("model.layers.1.") for name in changed} == {
        "self_attn.o_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_the_weight_on_harmless_rows_holds_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold nothing if the model were compared with itself."""
    monkeypatch.setattr(real_model, "LAYERS", range(1, 2))
    monkeypatch.setattr(real_model, "RATE", 2e-2)
    moved = []
    for weight in (0.0, 20.0):
        monkeypatch.setattr(real_model, "HELD", weight)
        model, untaught = make_model("llama"), make_model("llama")
        teach(model, ROWS[:1], ROWS[1:], steps=8, rows=2, seed=0)
        monkeypatch.setattr(real_model, "HELD", 1.0)
        moved.append(own_loss(model, untaught, ROWS[1:]).item())
    assert moved[1] < 0.5 * moved[0]


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
