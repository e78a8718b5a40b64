"""Nothing measures the base model with an edit on it, in whatever order a run's options put its stages.

The base's answers and figures are compared with plain `generate` on the demo model as `transformers` alone loads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.scorers import Response
from abliterate.scorers.refusals import Refusals, read_markers
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path
from support.runs import Untouched, quick_settings, run_in

Files = dict[str, str]
# The order of stages of a new run, and of the same one continued: (whether held-out prompts are measured, export). Any two of
# held-out, export and new or continued meet.
ORDERS = (
    ((True, "none"), (False, "adapter")),
    ((False, "merged"), (True, "merged")),
    ((True, "adapter"), (False, "none")),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs: the base's residuals, response prefix and baseline are measured once."""
    return tmp_path_factory.mktemp("cache")


def settings_of(files: Files, heldout_files: Files, cache: Path, heldout: bool, kind: str, trials: int) -> Settings:
    """A run of few short trials, the last of which is likely another one than the selected one."""
    return quick_settings(
        files,
        cache,
        prompts=heldout_files,
        response={"max_new_tokens": 10},
        search={"trials": trials, "startup_trials": 4},
        evaluation={"heldout": heldout},
        export={"kind": kind},
    )


def texts_in(path: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def perplexity(untouched: Untouched, texts: list[str], settings: Settings, prefix: str) -> float:
    """Of the model's own greedy answers, fed after their prompts one by one."""
    ends = {untouched.model.generation_config.eos_token_id}
    losses: list[float] = []
    for text, row in zip(texts, untouched.generate(texts, settings, prefix), strict=True):
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        ids, answer = untouched.ids(text, settings.prompts.system, prefix), row[:length]
        with torch.inference_mode():
            logits = untouched.model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        losses += (-logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0]).tolist()
    return math.exp(sum(losses) / len(losses))


def assert_base_untouched(run: Path, result: Mapping[str, Any], settings: Settings, untouched: Untouched) -> None:
    """In everything that a run has written of the base model."""
    prefix = result["response_prefix"]
    answers = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert answers["trial"] == result["selected"]
    rows = [*answers["harmful"], *answers["harmless"]]
    assert len(rows) == 16
    expected = untouched.answers([row["prompt"] for row in rows], settings, prefix)
    assert [row["base"]["text"] for row in rows] == expected
    assert [row["edited"]["text"] for row in rows] != expected, "the edit changes nothing, so the test shows nothing"

    refusals = Refusals(read_markers(config_path("markers.txt")))

    def refused(path: str) -> int:
        found = untouched.answers(texts_in(path), settings, prefix)
        return sum(refusals.is_refusal(Response(text)) for text in found)

    sets = settings.prompts
    assert result["baseline"]["refusals"] == refused(sets.harmful_eval)
    if not settings.evaluation.heldout:
        assert "heldout" not in result
        return
    base = result["heldout"]["base"]
    pairs = {"refusals": "harmful_heldout", "harmless_refusals": "harmless_heldout", "over_refusals": "over_refusal"}
    found_counts = {name: base[name]["count"] for name in pairs}
    assert found_counts == {name: refused(getattr(sets, source)) for name, source in pairs.items()}
    expected_perplexity = perplexity(untouched, texts_in(sets.harmless_heldout), settings, prefix)
    assert result["heldout"]["perplexity"]["base"] == pytest.approx(expected_perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("new", "continued"), [ORDERS[0], *(pytest.param(*order, marks=pytest.mark.slow) for order in ORDERS[1:])]
)
def test_the_base_is_the_untouched_model_in_every_order_of_stages(
    new: tuple[bool, str],
    continued: tuple[bool, str],
    prompt_files: Files,
    heldout_files: Files,
    cache: Path,
    untouched: Untouched,
    tmp_path: Path,
) -> None:
    """A new run, and the same one continued by a trial."""
    run = tmp_path / "run"
    for (heldout, kind), trials, resume in ((new, 2, False), (continued, 3, True)):
        settings = settings_of(prompt_files, heldout_files, cache, heldout, kind, trials)
        result, recorder = run_in(run, settings, resume=resume)
        assert recorder.warnings == []
        assert len(result["trials"]) == trials
        assert ("held-out" in recorder.stages, "export" in recorder.stages) == (heldout, kind != "none")
        assert_base_untouched(run, result, settings, untouched)
