"""The engine's self-check: what it lets through, what it catches, and what it says."""

from __future__ import annotations

import pytest

from abliterate.engine import self_check
from abliterate.engine.prefill import KeptStates, NoEdit
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.self_check import check
from abliterate.engine.trial_engine import TrialEngine, Unsupported
from abliterate.settings.schema import EfficiencySettings
from support.engine import (
    Lab,
    make_setup,
    short_lab,
    trusted,
)
from support.models import make_params


@pytest.fixture(scope="module")
def llama() -> Lab:
    """The plainest family."""
    return short_lab("llama")


def test_the_self_check_says_that_a_models_answers_depend_on_pads(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PaliGemma's do: engine and reference agree, but what they agree on depends on the batch."""
    plain = self_check._plain_logits
    monkeypatch.setattr(self_check, "_plain_logits", lambda *rest: plain(*rest).roll(1, dims=-1))
    warnings: list[str] = []
    assert isinstance(trusted(llama, warnings), TrialEngine)
    assert len(warnings) == 1
    assert "depend on how prompts are padded" in warnings[0]


def test_the_self_check_catches_pads_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads between prefix and suffix are silently wrong with sliding windows; then nothing is shared, and it is said."""
    monkeypatch.setattr("abliterate.engine.trial_engine.sharing_of", lambda cache, config: "between")
    lab, warnings = short_lab("mistral"), list[str]()
    engine = trusted(lab, warnings)
    assert isinstance(engine, TrialEngine)
    assert not engine._switches.use_shared_prefix
    assert not engine.drafting
    assert engine._switches.use_layer_skip
    assert len(warnings) == 2
    assert "differs" in warnings[1], "without drafts, which fail or differ"


def test_the_self_check_catches_a_wrong_layer_skip(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at = KeptStates.at
    monkeypatch.setattr(
        KeptStates, "at", lambda self, start, rows=None: None if (hidden := at(self, start, rows)) is None else hidden * 1.01
    )
    warnings: list[str] = []
    engine = trusted(llama, warnings)
    assert isinstance(engine, TrialEngine)
    assert not engine._switches.use_layer_skip
    assert "differs" in warnings[0]


def test_the_reference_is_used_where_rows_cannot_be_selected(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.engine.trial_engine.is_supported", lambda cache: False)
    warnings: list[str] = []
    assert trusted(llama, warnings) is llama.reference
    assert "reference" in warnings[-1]
    with pytest.raises(Unsupported):
        TrialEngine(llama.reference, llama.loaded.layers, NoEdit(), EfficiencySettings(), None)


def test_the_self_check_measures(llama: Lab) -> None:
    engine = llama.engine()
    llama.editor.apply(make_params(1))
    verdict = check(engine, make_setup(llama))
    assert verdict.ok
    assert verdict.difference < 1e-4


def test_answers_that_end_at_once_can_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = short_lab("llama")
    real = ReferenceEngine.raw_logits
    monkeypatch.setattr(
        ReferenceEngine, "raw_logits", lambda self, prompts, most: tuple(each[:, :1] for each in real(self, prompts, most))
    )
    warnings: list[str] = []
    assert isinstance(trusted(lab, warnings), TrialEngine)
    assert warnings == []
