"""The card's recipe: its commands rebuild the export, and name nothing of this machine."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from abliterate.export import card as export_card
from abliterate.model.loader import demo_path
from abliterate.objectives import BY_MARKERS
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path, load_settings, parse_assignments
from abliterate.types import TrialParams, weight_name
from support.cli import Invoke
from support.exports import CARD_FACTS, raw
from support.refined import refined_trial
from support.runs import copy_run, quick_settings

RECORD = {
    "model": {"id": "owner/name", "revision": "", "fingerprint": "sha256:0", "dtype": "float32", "quantization": "none"},
    "environment": {
        "versions": {"abliterate": "1", "torch": "2", "transformers": "3", "optuna": "4"},
        "device": "cpu (1 threads)",
    },
}


def card_commands(card: str) -> list[list[str]]:
    """The command lines of a card, without `abliterate`."""
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (.*)$", card, re.MULTILINE)]


def settings_of(command: list[str]) -> Settings:
    """What the `--set` options of a command make."""
    assignments = [value for name, value in pairwise(command) if name == "--set"]
    return load_settings("", parse_assignments(assignments))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"edit": {"mode": "full"}},
    {"edit": {"mode": "least-squares"}},
    {"edit": {"mode": "pre", "representation": "svd", "rank": 5, "coeff_grid": 0.02}},
    {"prompts": {"system": "", "prefix": "a\n\t\"b\" 'c' $HOME \\ 😀 é \x7f", "suffix": " -- = ["}},
    {"response": {"thinking_blocks": [["<a>", "<a></a>"], ["[b]", "[b]{b = 1}"]], "detect_prefix": False, "prefix": "So,"}},
    {"search": {"max_coeff": {"default": [0.1, 1.0], "attn.o_proj": [1e-05, 2.0]}, "position": [0, 1]}},
    {"load": {"components": {"attn.o_proj": "self_attn.o_proj|conv"}, "decoder_layers": "model.layers"}},
    {"load": {"max_memory": {"0": "20GiB", "cpu": "64GiB"}, "device_map": "auto", "trust_remote_code": True}},
    {"efficiency": {"use_certified_stop": False, "max_svd_cache_size": 7}, "evaluation": {"batch_size": 3}},
    {"prompts": {"harmful": "me/set:train[:40]:text"}},
    {
        "load": {"template_options": {"enable_thinking": False, "effort": "low", "budget": 512}},
        "response": {"thinking": "keep"},
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_the_command_says_every_setting(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDIT__MODE", "REFINE__ENABLED"):  # which would say what the command doesn't
        monkeypatch.delenv(f"ABLITERATE_{name}")
    settings = load_settings("", {"model": "owner/name", "seed": 3, **options})
    first, second = export_card.commands(settings, RECORD, "adapter", 7)
    command = shlex.split(first)
    assert command[:6] == ["abliterate", "run", "owner/name", "--seed", "3", "-n"]
    found = settings_of(command)
    for name in ("load", "prompts", "response", "directions", "edit", "evaluation", "efficiency"):
        assert getattr(found, name) == getattr(settings, name)
    assert found.search == settings.search.model_copy(update={"trials": found.search.trials})
    assert shlex.split(second) == ["abliterate", "export", "run", "--trial", "7", "--kind", "adapter"]


def test_a_hub_model_is_named_with_its_commit() -> None:
    record = {**RECORD, "model": {**RECORD["model"], "revision": "abc123"}}
    command = shlex.split(export_card.commands(load_settings("", {"model": "owner/name"}), record, "merged", 0)[0])
    assert settings_of(command).load.revision == "abc123"
    assert "revision `abc123`" in export_card.recipe(load_settings("", {"model": "owner/name"}), record, "merged", 0)


def test_what_is_of_this_machine_or_a_secret_is_not_said(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "markers.txt").write_text("sorry\n", encoding="utf-8")
    options = {
        "model": str(tmp_path / "base"),
        "out": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "search": {"storage": "postgresql://me:secret@host/db"},
        "efficiency": {"residual_cache_dir": str(tmp_path / "more")},
        "evaluation": {
            "markers": str(tmp_path / "markers.txt"),
            "judge_model": str(tmp_path / "base"),
            "judge_label": "refused",
            "heldout_scorers": ["classifier", "unfinished_thinking"],
        },
        "prompts": {name: str(tmp_path / "markers.txt") for name in ("harmful_heldout", "harmless_heldout", "over_refusal")},
        "load": {"chat_template": str(tmp_path / "gone.jinja")},
    }
    text = export_card.recipe(load_settings("", options), RECORD, "merged", 0)
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "heldout" not in text
    assert "over_refusal" not in text
    assert "judge" not in text
    assert "run base --seed" in text
    assert 'evaluation.markers="markers.txt"' in text
    assert "`markers.txt`, sha256 `" in text
    assert "`gone.jinja`, sha256 `not at hand`" in text


def test_a_judge_of_trials_is_said(tmp_path: Path) -> None:
    """Where what it says is part of a trial, a run without it would be another."""
    (tmp_path / "judge").mkdir()
    for scorers in (
        {"evaluation": {"scorers": ["kl", "classifier"]}},
        {"search": {"objectives": ["kl", "classifier:minimize"]}},
    ):
        for judge, said in ((str(tmp_path / "judge"), "judge"), ("owner/judge", "owner/judge")):
            stated = {"model": "m", **scorers}
            stated["evaluation"] = {"judge_label": "no", "judge_model": judge, **scorers.get("evaluation", {})}
            found = settings_of(shlex.split(export_card.commands(load_settings("", stated), RECORD, "merged", 0)[0]))
            assert (found.evaluation.judge_model, found.evaluation.judge_label) == (said, "no")


def test_random_trials_are_as_many_as_when_the_study_began() -> None:
    settings = load_settings("", {"model": "m", "search": {"trials": 100}})
    assert "--startup-trials 30 " in export_card.commands(settings, RECORD, "merged", 0)[0]
    assert "--startup-trials 2 " in export_card.commands(settings, {**RECORD, "startup_trials": 2}, "merged", 0)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("lean")
def test_the_recipe_rebuilds_the_export(
    invoke: Invoke,
    tmp_path: Path,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run continued with more trials, on a local model with prompts and markers of its own; made again by its card."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        copy_run(demo_path() / "model", folder / "base")
        shutil.copyfile(config_path("markers.txt"), folder / "mine.txt")
        for name, path in prompt_files.items():
            shutil.copyfile(path, folder / f"{name}.jsonl")
    monkeypatch.chdir(here)
    names = {name: f"{name}.jsonl" for name in prompt_files}
    over = {"evaluation": {"markers": "mine.txt"}, "response": {"max_new_tokens": 8}}
    settings = quick_settings(names, tmp_path / "cache", model="base", seed=1, **over)
    stated = [f"--set={name}={export_card._toml(value)}" for name, value in export_card.changed_settings(settings)]
    options = [*stated, "--seed", "1", "--startup-trials", "2", "--cache-dir", tmp_path / "cache", "-o", "first"]
    assert invoke("run", "base", "-n", "1", *options, "--export", "none").code in (0, 1)
    assert invoke("run", "base", "-n", "3", *options, "--resume", "--export", "merged").code == 0
    card = (here / "first" / "model" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    run, export = card_commands(card)
    monkeypatch.chdir(there)
    assert invoke(*run, "--cache-dir", tmp_path / "other").code == 0
    assert invoke(*export, "-o", "again").code == 0
    assert raw(there / "again") == raw(here / "first" / "model")
    again = (there / "again" / "README.md").read_text(encoding="utf-8")
    assert again.split("## Checked")[0] == card.split("## Checked")[0]


def test_a_card_says_how_many_directions_were_removed() -> None:
    params = TrialParams("global", 1.0, CARD_FACTS["params"].kernels, {weight_name(0): 0.4, weight_name(1): 0.9})
    card = " ".join(export_card.model_card(CARD_FACTS | {"params": params}).split())
    assert "the 2 directions of each layer along which the model separates" in card
    assert "answers were removed from matrices" in card
    assert '"weight.2": 0.9' in card
    refined = refined_trial(3, directions=4).params
    assert "loses 4 directions of its own" in " ".join(export_card.model_card(CARD_FACTS | {"params": refined}).split())
    plain = " ".join(export_card.model_card(CARD_FACTS).split())
    assert "the direction along which the model separates" in plain
    assert "answers was removed from matrices" in plain


def test_a_card_says_what_readers_lose_and_what_keys_leave() -> None:
    plain, readers, keys, weighed = (
        " ".join(export_card.model_card(CARD_FACTS | more).split())
        for more in ({}, {"readers": True}, {"mode": "key-conditional"}, {"mode": "least-squares"})
    )
    assert "that write to the residual stream, and from the inputs of matrices that read it. No training" in readers
    assert "in the leading directions of those on harmless prompts is left as it was. No training" in keys
    assert (
        "in least squares, it moves what they do to inputs on harmless prompts as little as that allows. No training" in weighed
    )
    assert "that write to the residual stream. No training" in plain
    assert "special about" not in plain + readers


def test_a_card_says_which_prompts_are_unanswered() -> None:
    base = {"count": 98, "refused": 97, "broken": 1, "off_topic": 0, "answered": 2}
    kinds = {"count": 20, "refused": 12, "broken": 5, "off_topic": 3, "answered": 80}
    card = export_card.model_card(CARD_FACTS | {"before_kinds": base, "kinds": kinds})
    assert "| unanswered (100 harmful prompts, by the base's own measure) | 98 | 20 |" in card
    broken, off_topic = "| of these broken | 1 | 5 |", "| of these off-topic | 0 | 3 |"
    assert f"{broken}\n{off_topic}\n| refusals (100 harmful prompts, marker count) | 97 | 12 |" in card
    assert "unanswered" not in export_card.model_card(CARD_FACTS | {"objectives": BY_MARKERS})
