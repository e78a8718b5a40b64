"""Chat templates that write the date: a run keeps the moment it renders with, whatever the day on which it is used again."""

from __future__ import annotations

import datetime as real
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as library

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.open import ChatTarget, open_session
from abliterate.cli import export as cli_export
from abliterate.errors import InputError
from abliterate.evaluation.lm_eval import Tasks
from abliterate.files import read_toml
from abliterate.model import chat_template
from abliterate.model.loader import demo_path
from abliterate.pipeline import from_settings
from abliterate.pipeline.cache_keys import baseline_key, means_key, prefix_key, residuals_key, study_identity
from abliterate.pipeline.evaluate import evaluate, parse_candidate
from abliterate.pipeline.from_settings import chat_of
from abliterate.pipeline.reproduce.reproduce import reproduce
from abliterate.pipeline.workers import work
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings, merge
from abliterate.settings.untrusted import to_measure
from abliterate.types import Prompt
from support.models import CPU, PROMPTS, make_loaded, make_model, make_tokenizer
from support.runs import Files, Recorder, copy_run, outcomes, quick_settings, run_in

Wind = Callable[[str], None]
OWN = (demo_path() / "model" / "chat_template.jinja").read_text(encoding="utf-8")
# As Llama 3.2 and others ask for it, but written briefly: more than the day confuses the demo model.
DATED = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d') %}{% else %}{% set today = '26' %}"
    "{% endif %}{{ today }}" + OWN
)


def own_clock(patch: pytest.MonkeyPatch) -> Wind:
    """A clock of one's own for everything that asks for the moment while it renders; the function sets it."""
    present = ["2026-03-31T23:58:00"]

    class Clock(real.datetime):
        @classmethod
        def now(cls, tz: real.tzinfo | None = None) -> Clock:
            return cls.fromisoformat(present[0])

    for module in (library, chat_template, from_settings):
        patch.setattr(module, "datetime", Clock)

    def wind_to(moment: str) -> None:
        present[0] = moment

    return wind_to


@pytest.fixture
def wind(monkeypatch: pytest.MonkeyPatch) -> Wind:
    return own_clock(monkeypatch)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "dated.jinja"
    path.write_text(DATED, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def few(prompt_files: Files, heldout_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Even fewer prompts than those of other runs."""
    folder, files = tmp_path_factory.mktemp("few"), dict[str, str]()
    for name, path in (prompt_files | heldout_files).items():
        lines = Path(path).read_text(encoding="utf-8").splitlines()[: 16 if name in ("harmful", "harmless") else 4]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def dated(few: Files, template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Settings]:
    """A run of the last minutes of a day: (directory, result, settings)."""
    folder = tmp_path_factory.mktemp("dated")
    over = {"load": {"chat_template": str(template)}, "export": {"kind": "adapter"}, "search": {"trials": 2}}
    settings = quick_settings(few, folder / "cache", **merge(over, {"response": {"max_new_tokens": 10}}))
    with pytest.MonkeyPatch.context() as patch:
        own_clock(patch)
        result, recorder = run_in(folder / "run", settings)
    assert result["export"]["verified"], recorder.warnings
    return folder / "run", result, settings


def test_the_moment_is_kept_in_settings_and_recipe(dated: tuple[Path, dict[str, Any], Settings]) -> None:
    path, result, _ = dated
    assert read_toml(path / "settings.toml")["load"]["template_now"] == "2026-03-31T23:58:00"
    assert '"template_now": "2026-03-31T23:58:00"' in (path / "recipe.json").read_text(encoding="utf-8")
    assert any("template_now" in name or "load.template_now" in name for name in result["identity"])


def test_a_continued_run_renders_as_it_began(dated: tuple[Path, dict[str, Any], Settings], wind: Wind, tmp_path: Path) -> None:
    path, before, settings = dated
    copy, wider = copy_run(path, tmp_path / "run"), settings.search.model_copy(update={"trials": 3})
    wind("2026-04-01T00:03:00")
    # An empty cache, so that everything is measured on this day.
    options = {
        "search": wider,
        "cache_dir": str(tmp_path / "cache"),
        "export": settings.export.model_copy(update={"kind": "none"}),
    }
    after, recorder = run_in(copy, settings.model_copy(update=options), resume=True)
    assert outcomes(after)[:2] == outcomes(before)
    assert after["directions"]["vectors_sha256"] == before["directions"]["vectors_sha256"]
    assert after["rendering"] == before["rendering"]
    assert after["baseline"] == before["baseline"]
    assert not [text for text in recorder.warnings if "differ" in text]
    assert read_toml(copy / "settings.toml")["load"]["template_now"] == "2026-03-31T23:58:00"


def test_another_moment_is_another_run(dated: tuple[Path, dict[str, Any], Settings], tmp_path: Path) -> None:
    path, _, settings = dated
    copy = copy_run(path, tmp_path / "run")
    load = settings.load.model_copy(update={"template_now": "2026-04-02T00:00:00"})
    with pytest.raises(InputError, match=r"another moment at which prompts are rendered"):
        run_in(copy, settings.model_copy(update={"load": load}), resume=True)


def test_a_worker_of_the_next_day_joins(dated: tuple[Path, dict[str, Any], Settings], wind: Wind, tmp_path: Path) -> None:
    copy = copy_run(dated[0], tmp_path / "run")
    wind("2026-04-01T09:00:00")
    recorder = Recorder()
    assert work(copy, "", "", {"cache_dir": str(tmp_path / "cache")}, recorder) == 2
    assert not recorder.warnings, "its baseline is the run's"


def test_an_export_of_the_next_day_is_exact(dated: tuple[Path, dict[str, Any], Settings], wind: Wind, tmp_path: Path) -> None:
    copy = copy_run(dated[0], tmp_path / "run")
    wind("2026-04-01T09:00:00")
    cli_export.export_trial(copy, dated[1]["selected"], "adapter", tmp_path / "out", "", verify=True, as_json=True)
    record = json.loads((tmp_path / "out" / "abliterate.json").read_text(encoding="utf-8"))["export"]
    assert record["verified"] is True
    assert all(record["verification"]["checks"].values())


def test_evaluate_measures_the_runs_prompts(dated: tuple[Path, dict[str, Any], Settings], wind: Wind, tmp_path: Path) -> None:
    path, result, settings = dated
    own = to_measure(read_toml(path / "settings.toml"))
    options = merge(own, {"model": "demo", "cache_dir": str(tmp_path / "cache")})
    figures = []
    for moment in ("2026-03-31T23:59:00", "2026-04-01T09:00:00"):
        wind(moment)
        candidate = parse_candidate(f"{path}:{result['selected']}")
        found = evaluate(load_settings("", options), Recorder(), candidate, Tasks())
        figures.append(found["heldout"])
    assert figures[0] == figures[1]


def test_a_chat_with_the_run_is_told_its_date(dated: tuple[Path, dict[str, Any], Settings], wind: Wind) -> None:
    wind("2026-04-01T09:00:00")
    session, _ = open_session(str(dated[0]), ChatTarget(), {}, Recorder())
    rendered, _ = session._voice._chat.render_turns("", (("user", "Hi"),))  # type: ignore[attr-defined]
    assert rendered.startswith("31")


def test_a_recipe_is_reproduced_on_another_day(
    dated: tuple[Path, dict[str, Any], Settings], wind: Wind, template: Path, few: Files, tmp_path: Path
) -> None:
    wind("2026-05-09T09:00:00")
    own = {
        "cache_dir": str(tmp_path / "cache"),
        "prompts": {name: few[name] for name in ("harmful", "harmless", "harmful_eval", "harmless_eval")},
        "load": {"chat_template": str(template)},
    }
    recorder = Recorder()
    result = reproduce(dated[0] / "recipe.json", own, recorder, kind="none", out=tmp_path / "out")
    assert result.reproduction is not None
    assert result.reproduction["outcome"] == "identical"
    assert not [text for text in recorder.warnings if "renders prompts differently" in text]


def test_a_run_of_a_template_without_a_date_names_no_moment(finished: tuple[Path, dict[str, Any], Settings]) -> None:
    assert read_toml(finished[0] / "settings.toml")["load"]["template_now"] == ""
    assert not [name for name in finished[1]["identity"] if "moment" in name]
    assert Result.read(RunDirectory(finished[0])).rendering == finished[1]["rendering"]


# Templates that write the date in other ways: to the minute, for some prompts only, or without a system prompt only.
ODD = {
    "the time": "{{ strftime_now('%H:%M') }}" + OWN,
    "some prompts": "{% if 'mailbox' in messages[-1]['content'] %}{{ strftime_now('%Y-%m-%d') }}{% endif %}" + OWN,
    "the weekday": OWN + "{% set now = strftime_now %}{{ now('%A') }}",
}


@pytest.mark.parametrize("name", ODD)
def test_keys_depend_on_rendered_prompts(name: str, wind: Wind) -> None:
    loaded = make_loaded(make_model("llama"))
    loaded.tokenizer.chat_template = ODD[name]

    def keys(moment: str) -> list[Any]:
        settings = Settings(load={"template_now": moment})  # type: ignore[arg-type]
        chat = chat_of(settings, loaded.tokenizer, CPU)
        return [
            residuals_key(settings, loaded, chat, PROMPTS),
            means_key(settings, loaded, chat, PROMPTS),
            baseline_key(settings, loaded, chat, (PROMPTS, PROMPTS)),
            prefix_key(settings, loaded, chat, (PROMPTS,)),
            study_identity(settings, loaded, chat, (PROMPTS,)),
        ]

    today = keys("2026-03-31T23:58:00")
    wind("2027-01-01T12:00:00")
    assert keys("2026-03-31T23:58:00") == today
    assert all(ours != theirs for ours, theirs in zip(keys("2026-04-02T10:01:00"), today, strict=True))


def test_one_encoder_is_told_one_moment(wind: Wind) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ODD["the time"]
    chat = chat_of(Settings(), tokenizer, CPU)
    first = chat.render(Prompt("Hi"))
    wind("2027-01-01T12:00:00")
    assert chat.render(Prompt("Hi there")).startswith("23:58")
    assert first.startswith("23:58")


@pytest.mark.parametrize("wrong", ["yesterday", "31.3.2026", "2026-02-30"])
def test_a_moment_that_is_none(wrong: str) -> None:
    with pytest.raises(InputError, match="template_now"):
        load_settings("", {"load": {"template_now": wrong}})


def test_moments_of_people(wind: Wind) -> None:
    assert load_settings("", {"load": {"template_now": "2026-03-31"}}).load.template_now == "2026-03-31T00:00:00"
