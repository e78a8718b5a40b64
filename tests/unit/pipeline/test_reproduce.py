"""`recipe.json` and `abliterate reproduce`: the same bytes without a search, nothing private, no trust in a stranger's file."""

from __future__ import annotations

import copy
import dataclasses
import getpass
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate import scorers
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.edits import Factors
from abliterate.edits.fingerprint import largest_difference, sketch
from abliterate.errors import AbliterateError, InputError
from abliterate.export.recipe import Recipe, hashes, read_recipe
from abliterate.files import digest_of, write_json
from abliterate.model.loader import demo_path
from abliterate.objectives import JUDGES
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline import stages
from abliterate.pipeline.cache_keys import OBJECTIVES_PART, SCORERS_PART
from abliterate.pipeline.reproduce import reproduce as pipeline_reproduce_reproduce
from abliterate.pipeline.reproduce.compare import Comparison
from abliterate.pipeline.reproduce.recipe_settings import settings_of
from abliterate.scorers import judges
from abliterate.search.study import Study
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path
from support.cli import Invoke, assert_sentence, forbidden
from support.forked import finish
from support.models import make_editor, make_loaded, make_model, make_params
from support.runs import Recorder, copy_run, other_trial, quick_settings, run_in, with_kind

pytestmark = pytest.mark.usefixtures("lean")
Finished = tuple[Path, dict[str, Any], Settings]
TOKEN = "hf_notThisOne0123456789"


def options(files: dict[str, str]) -> list[str]:
    """The command line's options that give prompt files."""
    return [text for name, path in files.items() for text in (f"--{name.replace('_', '-')}", path)]


def again(recipe: Path, files: dict[str, str], cache: Path, out: Path, **over: Any) -> tuple[dict[str, Any], Recorder]:
    """Reproduce in this process: the result as JSON values, and what was reported."""
    recorder = Recorder()
    kind = over.pop("kind", "")
    own = {"model": "", "prompts": files, "cache_dir": str(cache), **over}
    return pipeline_reproduce_reproduce.reproduce(recipe, own, recorder, kind=kind, out=out).to_record(), recorder


def changed(recipe: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a recipe with something else in it."""
    record = json.loads(recipe.read_text(encoding="utf-8"))
    change(record)
    to.write_text(json.dumps(record), encoding="utf-8")
    return to


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "ask", forbidden)
    monkeypatch.setattr(pipeline_run, "open_study", forbidden)


def test_a_fresh_process_with_another_cache_makes_the_same_bytes(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str]
) -> None:
    path, result, _ = finished
    arguments = ["reproduce", path / "recipe.json", *options(prompt_files), "-o", "again", "--cache-dir", "other", "--json"]
    command = finish(arguments, tmp_path)  # of an interpreter whose hashes are others than this one's
    assert command.end() == 0, command.err
    assert hashes(tmp_path / "again") == hashes(path / "model")
    last = command.events[-1]
    assert last["event"] == "result"
    assert last["result"]["reproduction"]["outcome"] == "identical"
    assert last["result"]["reproduction"]["directions_equal"] is True
    assert last["result"]["trials"][0]["scores"] == result["trials"][result["selected"]]["scores"]
    # What was reproduced can be reproduced, and its card says the same.
    first, second = (json.loads((folder / "recipe.json").read_text()) for folder in (path / "model", tmp_path / "again"))
    assert first == second
    cards = [(folder / "README.md").read_text().split("## Checked")[0] for folder in (path / "model", tmp_path / "again")]
    assert cards[0] == cards[1]
    assert "abliterate reproduce recipe.json" in cards[0]


def test_the_run_directory_and_the_export_have_the_recipe(finished: Finished) -> None:
    path, result, settings = finished
    assert (path / "recipe.json").read_bytes() == (path / "model" / "recipe.json").read_bytes()
    recipe = read_recipe(path)
    assert recipe.trial.number == result["selected"]
    assert recipe.export.verified is True
    assert recipe.export.files.keys() == {str(file.relative_to(path / "model")) for file in (path / "model").iterdir()} - {
        "README.md",
        "abliterate.json",
        "recipe.json",
    }
    assert recipe.seed == settings.seed
    assert recipe.environment.versions == result["environment"]["versions"]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.usefixtures("no_search")
def test_an_export_of_another_trial_and_of_a_directory(
    kind: str, finished: Finished, tmp_path: Path, prompt_files: dict[str, str]
) -> None:
    """By factors of the weight files; the model lies elsewhere under another name."""
    path, first, settings = finished
    base = copy_run(demo_path() / "model", tmp_path / "base")
    same = with_kind(settings.model_copy(update={"model": str(base)}), kind)
    run = copy_run(path, tmp_path / "run")
    record = copy.deepcopy(first)
    record["model"]["id"] = "base"
    write_json(run / "result.json", record | {"sha256": digest_of(record)})
    pipeline_export_trial.export_trial(same, Recorder(), RunDirectory(run), other_trial(first), tmp_path / "export")
    recipe = read_recipe(tmp_path / "export")
    assert (recipe.export.kind, recipe.export.origin, recipe.model.id) == (kind, "weight files", "base")
    assert (run / "recipe.json").read_bytes() == (path / "recipe.json").read_bytes()
    with pytest.raises(InputError, match="'base' was a directory of its author"):
        again(tmp_path / "export", prompt_files, tmp_path / "cache", tmp_path / "again")
    base.rename(tmp_path / "elsewhere")
    model = {"model": str(tmp_path / "elsewhere")}
    result, recorder = again(tmp_path / "export", prompt_files, Path(settings.cache_dir), tmp_path / "again", **model)
    assert result["reproduction"]["outcome"] == "identical"
    assert hashes(tmp_path / "again") == hashes(tmp_path / "export")
    assert recorder.warnings == []
    assert result["export"]["verification"]["checks"].keys() >= {"weights", "modules"}


def test_another_pick_is_another_recipe_with_an_adapter_or_none(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str]
) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    number = next(number for number in first["front"] if number != first["selected"])
    search = settings.search.model_copy(update={"select": f"trial:{number}"})
    run_in(run, with_kind(settings, "adapter").model_copy(update={"search": search}), resume=True)
    recipe = read_recipe(run)
    assert (recipe.trial.number, recipe.export.kind, recipe.export.origin) == (number, "adapter", "trial")
    result, _ = again(run, prompt_files, Path(settings.cache_dir), tmp_path / "again")
    assert result["reproduction"]["outcome"] == "identical"
    assert hashes(tmp_path / "again") == hashes(run / "model")
    # PEFT writes a set, whose order is another one in each process.
    modules = json.loads((run / "model" / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert modules == sorted(modules)

    run_in(run, with_kind(settings, "none"), resume=True)
    recipe = read_recipe(run)
    assert (recipe.trial.number, recipe.export.kind, recipe.export.files) == (first["selected"], "none", {})
    result, _ = again(run, prompt_files, Path(settings.cache_dir), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert result["reproduction"]["outcome"] == "identical"
    assert result["reproduction"]["files"] is None


def test_nothing_private_is_in_a_recipe(tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "of-somebody"
    base = copy_run(demo_path() / "model", private / "base")
    shutil.copyfile(config_path("markers.txt"), private / "markers.txt")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    over = {
        "model": str(base),
        "out": str(private / "run"),
        "evaluation": {"markers": str(private / "markers.txt")},
        "load": {"chat_template": str(base / "chat_template.jinja"), "max_memory": {"cpu": "987654GB"}},
        "efficiency": {"residual_cache_dir": str(private / "cache")},
        "response": {"max_new_tokens": 8},
        "search": {"trials": 1, "storage": f"sqlite:///{private / 'secret-base.db'}"},
    }
    settings = quick_settings(prompt_files, private / "cache", **over)
    run_in(private / "run", settings)
    text = (private / "run" / "recipe.json").read_text(encoding="utf-8")
    for secret in (str(tmp_path), str(Path.home()), "/tmp", "of-somebody", "secret", "987654", "sqlite", TOKEN):
        assert secret not in text
    if getpass.getuser() not in text.replace(str(demo_path()), ""):  # a name like "model" would be there anyway
        assert f"/{getpass.getuser()}" not in text
    recipe = read_recipe(private / "run")
    assert recipe.files["evaluation.markers"].name == "markers.txt"
    assert {one.source for one in recipe.prompts.values()} == {f"{name}.jsonl" for name in prompt_files}
    # The author's files must be given, and are.
    own = {"model": str(base), "load": {"chat_template": str(base / "chat_template.jinja")}}
    with pytest.raises(InputError, match=r"'markers.txt' \(sha256 .* give it with --markers FILE"):
        again(private / "run", prompt_files, tmp_path / "cache", tmp_path / "again", **own)
    own |= {"evaluation": {"markers": str(private / "markers.txt")}}
    result, _ = again(private / "run", prompt_files, private / "cache", tmp_path / "again", kind="none", **own)
    assert result["reproduction"]["outcome"] == "identical"
    (private / "markers.txt").write_text("sorry\n", encoding="utf-8")
    with pytest.raises(InputError, match="another set of scorers or markers"):
        again(private / "run", prompt_files, tmp_path / "cache", tmp_path / "again", **own)


def test_other_prompts_are_named(finished: Finished, tmp_path: Path, prompt_files: dict[str, str], invoke: Invoke) -> None:
    path, _, _ = finished
    outcome = invoke("reproduce", path)
    assert_sentence(outcome, 2, "--harmless FILE ('harmless.jsonl', 30 prompts)")
    lines = Path(prompt_files["harmful"]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    outcome = invoke("reproduce", path, *options(prompt_files), "--harmful", "other.jsonl")
    assert_sentence(outcome, 2, "harmful (29 in 'other.jsonl', the recipe's were 30 in 'harmful.jsonl')")
    assert not list(tmp_path.glob("*reproduced*"))


def test_another_model_is_refused(finished: Finished, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    path, _, _ = finished
    base = copy_run(demo_path() / "model", tmp_path / "base")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="The model base isn't the recipe's 'demo'"):
        again(path, prompt_files, tmp_path / "cache", tmp_path / "again", model=str(base))
    shutil.copyfile(demo_path() / "model" / "config.json", base / "config.json")
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][-1], id=99999, content="<new>"))
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="another tokenizer"):
        again(path, prompt_files, tmp_path / "cache", tmp_path / "again", model=str(base))
    assert not (tmp_path / "again").exists()


def _hash(record: dict[str, Any]) -> None:
    record["export"]["files"]["model.safetensors"]["sha256"] = "0" * 64


def _coeff(record: dict[str, Any]) -> None:
    record["trial"]["params"]["kernels"]["attn.o_proj"]["max_coeff"] *= 1.01
    record["trial"]["scores"]["kl"]["mean"] *= 1.5


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_coeff, ["self_attn.o_proj is 0.9", "instead of 0.035"]),
        (_hash, ["other bytes in model.safetensors, though"]),
    ],
)
def test_a_changed_recipe_fails(
    change: Callable[[dict[str, Any]], None],
    parts: list[str],
    finished: Finished,
    tmp_path: Path,
    prompt_files: dict[str, str],
) -> None:
    path, _, settings = finished
    recipe = changed(path / "recipe.json", tmp_path / "recipe.json", change)
    with pytest.raises(AbliterateError, match="isn't the recipe's model") as caught:
        again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "out" / "again")
    assert caught.value.exit_code == 1
    assert all(part in str(caught.value) for part in parts), caught.value


SAME = Comparison(
    files={"model.safetensors": "equal", "tokenizer.json": "equal"},
    same_scores=True,
    refusals=(3, 3),
    kl=(0.05, 0.05),
    baseline=(90, 90),
    tolerance={"refusals": 1.0, "kl": 1e-3, "edits": 1e-4},
    edits=(0.0, "layer"),
    same_directions=True,
    environment={},
    verified=True,
)
WEIGHTS_DIFFER = {"model.safetensors": "other", "tokenizer.json": "equal"}


@pytest.mark.parametrize(
    ("over", "outcome"),
    [
        ({}, "identical"),
        ({"files": None, "edits": None}, "identical"),
        ({"environment": {"torch": ("1", "2")}, "same_directions": False}, "identical"),
        ({"same_scores": False, "refusals": (3, 4), "kl": (0.05, 0.0505)}, "equivalent"),
        ({"refusals": (3, 5)}, "different"),
        ({"baseline": (90, 80)}, "different"),
        ({"kl": (0.05, 0.06)}, "different"),
        ({"kl": (0.05, float("nan"))}, "different"),
        ({"edits": (float("inf"), "layer")}, "different"),
        ({"edits": (float("nan"), "layer")}, "different"),
        ({"verified": False}, "different"),
        ({"verified": None}, "identical"),
        ({"files": {"model.safetensors": "equal", "tokenizer.json": "other", "LICENSE": "missing"}}, "equivalent"),
        ({"files": {"model.safetensors": "equal", "more.safetensors": "new"}}, "different"),
        ({"files": WEIGHTS_DIFFER}, "different"),
        ({"files": WEIGHTS_DIFFER, "edits": (5e-5, "layer")}, "equivalent"),
        ({"files": WEIGHTS_DIFFER, "edits": (2e-4, "layer")}, "different"),
        ({"files": WEIGHTS_DIFFER, "environment": {"torch": ("1", "2")}}, "equivalent"),
        ({"files": WEIGHTS_DIFFER, "same_directions": False}, "equivalent"),
        ({"files": WEIGHTS_DIFFER, "edits": None}, "equivalent"),
    ],
)
def test_what_counts_as_reproduced(over: dict[str, Any], outcome: str) -> None:
    found = dataclasses.replace(SAME, **over)
    assert found.outcome == outcome
    assert bool(found.causes) == (outcome == "different")
    json.dumps(found.to_record(), allow_nan=outcome == "different")
    assert all(list(found.lines()))
    assert found.sentence().endswith(".") == (outcome != "identical")


def test_other_versions_explain_other_bytes(finished: Finished, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    def change(record: dict[str, Any]) -> None:
        _hash(record)
        record["environment"]["versions"]["torch"] = "1.0"
        record["trial"]["scores"]["kl"]["mean"] *= 1 + 1e-6
        record["directions"] = ""

    path, _, settings = finished
    recipe = changed(path / "recipe.json", tmp_path / "recipe.json", change)
    result, recorder = again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "out" / "again")
    found = result["reproduction"]
    assert found["outcome"] == "equivalent"
    assert found["environment"] == {"torch": {"recipe": "1.0", "here": torch.__version__}}
    assert found["files"]["model.safetensors"] == "other"
    assert recorder.warnings[-1].startswith("Reproduced but for rounding: other bytes in model.safetensors and scores")


_KERNEL = {"max_coeff": 1, "position": 1, "min_coeff": 0, "distance": 1}
_MODEL = {"revision": "", "dtype": "float32", "quantization": "none"}
HOSTILE: list[tuple[str, Any, str]] = [
    ("format", 2, "has format 2, this version reads format 1"),
    ("format", "1", "has format '1'"),
    ("format", None, "is no recipe"),
    ("format", True, "has format True"),
    ("extra", 1, "'extra' is wrong"),
    ("seed", "0", "'seed' is wrong"),
    ("model.revision", "../../etc", "'model.revision' is wrong"),
    ("model.id", "a\x1b[31mb", "'model.id' is wrong"),
    ("export.files", {"../outside": {"sha256": "0", "size": 1}}, "not a name inside an export"),
    ("export.files", {"/etc/passwd": {"sha256": "0", "size": 1}}, "not a name inside an export"),
    ("export.files", {"C:\\x": {"sha256": "0", "size": 1}}, "not a name inside an export"),
    ("export.files", {"a\\..\\..\\x": {"sha256": "0", "size": 1}}, "not a name inside an export"),
    ("trial.params.kernels.attn\\.o_proj.distance", 0, "distance' is wrong"),
    ("trial.params.kernels.attn\\.o_proj.max_coeff", 1e300, "max_coeff' is wrong"),
    ("trial.params.kernels.attn\\.o_proj.min_coeff", -1e300, "min_coeff' is wrong"),
    ("trial.params.kernels.attn\\.o_proj.distance", 1e308, "distance' is wrong"),
    ("trial.params.direction_index", 1e308, "'trial.params.direction_index' is wrong"),
    ("trial.params.direction_index", 11.5, "has a direction of layer 11.5, beyond 11"),
    ("trial.scores.kl.mean", 1e200, "'trial.scores.kl.mean' is wrong"),
    ("trial.scores.refusals", -1, "'trial.scores.refusals' is wrong"),
    ("seed", 10**30, "'seed' is wrong"),
    ("batch_sizes.prefill", 10**30, "'batch_sizes.prefill' is wrong"),
    ("trial.params.scope", "everywhere", "'trial.params.scope' is wrong"),
    (
        "trial.params.kernels",
        {"other": _KERNEL},
        "lacks a kernel",
    ),
    ("trial.state", "stopped", "'trial.state' is wrong"),
    ("trial.scores.kl.mean", "0.1", "'trial.scores.kl.mean' is wrong"),
    ("batch_sizes.decode", 0, "'batch_sizes.decode' is wrong"),
    ("settings.load.trust_remote_code", True, "--trust-remote-code"),
    ("settings.load.attn_implementation", "owner/kernels", "--trust-remote-code"),
    ("settings.evaluation.markers", "/etc/passwd", "setting evaluation.markers, which is no part of a recipe"),
    ("settings.load.chat_template", "/etc/passwd", "setting load.chat_template, which is no part of a recipe"),
    ("settings.prompts.harmful", "/etc/passwd", "setting prompts.harmful, which is no part of a recipe"),
    ("settings.search.storage", "postgresql://there/db", "setting search.storage, which is no part of a recipe"),
    ("settings.export.push", "some/body", "setting export.push, which is no part of a recipe"),
    ("settings.efficiency.residual_cache_dir", "/var", "which is no part of a recipe"),
    ("settings.evaluation.heldout_scorers", ["/etc/evil.py:Evil"], "which is no part of a recipe"),
    ("settings.evaluation.judge_model", "/etc", "which is no part of a recipe"),
    ("settings.evaluation.judge_label", "refusal", "which is no part of a recipe"),
    ("settings.prompts.harmful_heldout", "/etc/passwd", "which is no part of a recipe"),
    ("settings.prompts.harmless_heldout", "/etc/passwd", "which is no part of a recipe"),
    ("settings.prompts.over_refusal", "owner/name:train:text", "which is no part of a recipe"),
    ("response_prefix", None, "'response_prefix' is wrong"),
    ("rendering", None, "'rendering' is wrong"),
    ("batch_sizes", None, "'batch_sizes' is wrong"),
    ("settings.edit.new", 1, "setting 'edit.new' can't be used"),
    ("settings.edit.rank", 0, "setting 'edit.rank' can't be used"),
    ("settings.edit.mode", "auto", "doesn't name its edit mode"),
    ("settings.place", {"x": 1}, "settings 'place' that this version doesn't know"),
    ("prompts.harmful", None, "'prompts.harmful' is wrong"),
    (
        "model",
        _MODEL | {"id": "/etc", "fingerprint": "sha256:0"},
        "--model PATH",
    ),
    (
        "model",
        _MODEL | {"id": "../x", "fingerprint": "hub:x"},
        "no name on the Hub",
    ),
]


@pytest.mark.parametrize(("place", "value", "part"), HOSTILE, ids=[f"{place}={str(value)[:20]}" for place, value, _ in HOSTILE])
def test_hostile_recipes_are_refused(
    place: str,
    value: Any,
    part: str,
    finished: Finished,
    tmp_path: Path,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(record: dict[str, Any]) -> None:
        *sections, leaf = place.replace("\\.", "\0").split(".")
        inner = record
        for section in sections:
            inner = inner[section.replace("\0", ".")]
        inner[leaf] = value

    path, _, settings = finished
    monkeypatch.setattr(stages, "residuals", forbidden)  # found before anything is computed
    recipe = changed(path / "recipe.json", tmp_path / "recipe.json", change)
    with pytest.raises(InputError) as caught:
        again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "out" / "again")
    assert part in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    "source",
    ["../secrets:train:text", "/etc/passwd", "~/mine.txt", "secrets.txt", ".ssh/id:train:text", "a/b:train:text"],
)
def test_a_source_in_a_recipe_is_never_a_path(
    source: str, finished: Finished, tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets.txt").write_text("secret\n", encoding="utf-8")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(pipeline_reproduce_reproduce, "read_prompts", forbidden)

    def change(record: dict[str, Any]) -> None:
        record["prompts"]["harmful"]["source"] = source

    recipe = changed(finished[0] / "recipe.json", tmp_path / "recipe.json", change)
    files = {name: path for name, path in prompt_files.items() if name != "harmful"}
    with pytest.raises(InputError, match="give them with --harmful FILE"):
        again(recipe, files, tmp_path / "cache", tmp_path / "again")


def _with_judges(record: dict[str, Any]) -> None:
    """As if its trials had been scored by judges, too."""
    record["settings"]["evaluation"]["scorers"] = ["refusals", "kl", "classifier", "endpoint"]
    record["settings"]["search"]["objectives"] = ["classifier:minimize", "endpoint"]
    record["identity"] |= {SCORERS_PART: "another", OBJECTIVES_PART: "another"}


def test_a_recipe_makes_no_judge_be_asked(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else in it is right; the person even has an endpoint of their own."""
    path, _, settings = finished
    recipe = changed(path / "recipe.json", tmp_path / "recipe.json", _with_judges)
    for name in ("URL", "MODEL"):
        monkeypatch.setenv(f"ABLITERATE_JUDGE_{name}", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(judges.Classifier, "__init__", forbidden)
    monkeypatch.setattr(judges.Endpoint, "__init__", forbidden)
    monkeypatch.setattr(scorers, "load_scorer", forbidden)
    here = settings_of(read_recipe(recipe), {"prompts": prompt_files}, "")
    assert here.evaluation == settings.evaluation.model_copy(update={"scorers": ("refusals", "kl")})
    assert here.search.objectives == ("kl",)
    assert here.prompts.harmful_heldout == here.prompts.over_refusal == ""
    result, recorder = again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "out" / "again", kind="none")
    assert result["reproduction"]["outcome"] == "identical"
    assert [text for text in recorder.warnings if "judges ('classifier', 'endpoint'); they aren't run here" in text]
    # Another identity is let pass for judges of trials only, and no other part of it.
    for change in (
        lambda record: None,
        lambda record: (_with_judges(record), record["identity"].update({"edit mode": "another"})),
    ):
        recipe = changed(
            path / "recipe.json",
            tmp_path / "other.json",
            lambda record, change=change: (change(record), record["identity"].update({SCORERS_PART: "another"})),
        )
        with pytest.raises(InputError, match="made with another"):
            again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "out" / "again", kind="none")


def test_judges_are_all_known() -> None:
    """Every built-in scorer that asks another model is one that no recipe may name."""
    assert {one.name for one in judges.AnswerJudge.__subclasses__()} == set(JUDGES)
    assert set(JUDGES) < set(scorers.SCORERS)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "damaged or no recipe"),
        ("{", "damaged or no recipe"),
        ("[]", "it has no format"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": NaN}', "NaN is no number"),
        ("\0\1", "damaged or no recipe"),
    ],
)
def test_what_is_no_recipe_is_said(content: str, part: str, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "recipe.json").write_text(content, encoding="utf-8")
    assert_sentence(invoke("reproduce", "recipe.json"), 2, part)


def test_every_cut_of_a_recipe_is_refused(finished: Finished, tmp_path: Path) -> None:
    content = (finished[0] / "recipe.json").read_bytes()
    for length in range(0, len(content.rstrip()), 97):
        (tmp_path / "recipe.json").write_bytes(content[:length])
        with pytest.raises(InputError):
            read_recipe(tmp_path / "recipe.json")


def test_where_an_export_may_go(finished: Finished, tmp_path: Path, invoke: Invoke, prompt_files: dict[str, str]) -> None:
    assert_sentence(invoke("reproduce", "nowhere"), 2, "There is no recipe nowhere")
    run = copy_run(finished[0], tmp_path / "run")
    for place in ("run/model", "run", "."):
        code = invoke("reproduce", "run/model/recipe.json", *options(prompt_files), "-o", place)
        assert_sentence(code, 2, "choose another --out" if place != "." else "name a folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert_sentence(invoke("reproduce", run, *options(prompt_files), "-o", "mine"), 2, "no export of abliterate")
    assert_sentence(invoke("reproduce", run, "--kind", "other"), 2, "There is no export kind 'other'")
    assert hashes(run / "model") == hashes(finished[0] / "model")


def test_the_environment_changes_no_recipe(
    finished: Finished, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:

    recipe = read_recipe(finished[0])
    plain = settings_of(recipe, {"model": "", "prompts": prompt_files}, "")
    monkeypatch.setenv("ABLITERATE_EDIT__MODE", "none")
    monkeypatch.setenv("ABLITERATE_SEED", "5")
    monkeypatch.setenv("ABLITERATE_MODEL", "other/model")
    monkeypatch.setenv("ABLITERATE_LOAD__TEMPLATE_OPTIONS", '{"x": true}')
    monkeypatch.setenv("ABLITERATE_SEARCH__MAX_COEFF", '{"default": [0, 1], "mlp.down_proj": [0, 1]}')
    assert settings_of(recipe, {"model": "", "prompts": prompt_files}, "") == plain


def test_protected_capabilities_of_a_recipe_are_built_in_or_given_here(
    finished: Finished, prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"model": "", "prompts": prompt_files}

    def recipe(*entries: str) -> Recipe:
        def change(record: dict[str, Any]) -> None:
            record["settings"]["directions"]["protect"] = list(entries)

        return read_recipe(changed(finished[0] / "recipe.json", tmp_path / "recipe.json", change))

    monkeypatch.setenv("ABLITERATE_DIRECTIONS__PROTECT", "[]")
    assert settings_of(recipe("code", "owner/set:train:text"), own, "").directions.protect == ("code", "owner/set:train:text")
    with pytest.raises(InputError, match=r"poems\.txt.*all 2 sets.*ABLITERATE_DIRECTIONS__PROTECT"):
        settings_of(recipe("code", "poems.txt"), own, "")
    here = tmp_path / "mine.txt"
    here.write_text("Write a poem.\n", encoding="utf-8")
    monkeypatch.setenv("ABLITERATE_DIRECTIONS__PROTECT", f'["{here}"]')
    with pytest.raises(InputError, match=r"all 2 sets.*, not 1\."):
        settings_of(recipe("code", "poems.txt"), own, "")
    monkeypatch.setenv("ABLITERATE_DIRECTIONS__PROTECT", f'["code", "{here}"]')
    assert settings_of(recipe("code", "poems.txt"), own, "").directions.protect == ("code", str(here))
    assert settings_of(recipe("style"), own, "").directions.protect == ("style",)


@pytest.mark.parametrize("mode", ["full", "none"])
def test_a_sketch_sees_another_edit_and_not_rounding(mode: str) -> None:
    editor = make_editor(make_loaded(make_model("llama")), mode=mode)
    params = make_params(0, scope="per layer")
    factors = editor.factors(params)
    one = {name: sketch(found) for name, found in factors.items()}
    assert largest_difference(one, one)[0] == 0
    size = {name: float((found.b @ found.a).norm()) for name, found in factors.items()}
    assert one.keys() == size.keys()
    assert all(abs(one[name][0] - size[name]) < 1e-5 * size[name] for name in one)
    half = {name: sketch(Factors(f.row_scale, f.a.bfloat16().float(), f.b)) for name, f in factors.items()}
    assert 0 < largest_difference(one, half)[0] < 0.02
    doubled = {name: sketch(Factors(f.row_scale, f.a * 2, f.b / 2)) for name, f in factors.items()}
    assert largest_difference(one, doubled)[0] < 1e-6
    name = min(factors)
    off = one | {name: sketch(Factors(factors[name].row_scale, factors[name].a, factors[name].b * 1.05))}
    assert largest_difference(one, off)[0] > 0.02
    assert largest_difference(one, off)[1] == name
    other = torch.randn(factors[name].a.shape, generator=torch.Generator().manual_seed(1))
    turned = one | {name: sketch(Factors(None, other * factors[name].a.norm() / other.norm(), factors[name].b))}
    assert largest_difference(one, turned)[0] > 0.1
    assert largest_difference(one, {})[0] == float("inf")


def test_names_on_the_hub_are_used_as_they_are(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(record: dict[str, Any]) -> None:
        record["model"] |= {"id": "owner/name", "revision": "abc123", "fingerprint": "hub:owner/name@abc123"}
        for name, part in record["prompts"].items():
            part["source"] = f"owner/set:train[:4]:{name}"
        record["settings"]["load"]["trust_remote_code"] = True

    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(changed(finished[0] / "recipe.json", tmp_path / "recipe.json", change))
    with pytest.raises(InputError, match="--trust-remote-code"):
        settings_of(recipe, {"model": ""}, "")
    trusted = {"model": "", "load": {"trust_remote_code": True}}
    settings = settings_of(recipe, trusted, "")
    assert (settings.model, settings.load.revision, settings.load.trust_remote_code) == ("owner/name", "abc123", True)
    assert settings.prompts.harmful_eval == "owner/set:train[:4]:harmful_eval"
    assert settings.load.dtypes == ("float32",)
    # Consent to code that the recipe doesn't need changes nothing, and another place has no such commit.
    files = {name: str(tmp_path / "recipe.json") for name in recipe.prompts}
    assert settings_of(read_recipe(finished[0]), trusted | {"prompts": files}, "none").load.trust_remote_code is False
    (tmp_path / "mine").mkdir()
    assert settings_of(recipe, trusted | {"model": "mine"}, "").load.revision == ""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(InputError, match="the recipe means the Hub's"):
        settings_of(recipe, trusted, "")


def test_a_copy_of_a_hub_model_and_another_day_are_compared_by_what_comes_out(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str]
) -> None:
    """Both are said: the model's own files aren't at hand, and its template writes the date."""

    def change(record: dict[str, Any]) -> None:
        record["model"] |= {"id": "owner/name", "revision": "abc123", "fingerprint": "hub:owner/name@abc123"}
        record["identity"]["model"] = "of the Hub's"
        record["rendering"] = "another day"

    path, _, settings = finished
    recipe = changed(path / "recipe.json", tmp_path / "recipe.json", change)
    base = str(demo_path() / "model")
    result, recorder = again(recipe, prompt_files, Path(settings.cache_dir), tmp_path / "again", model=base, kind="none")
    assert result["reproduction"]["outcome"] == "identical"
    for part in ("the other is a directory", "today's date"):
        assert [text for text in recorder.warnings if part in text], recorder.warnings
    assert (result["model"]["id"], result["model"]["revision"]) == ("owner/name", "abc123")
