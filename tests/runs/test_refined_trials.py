"""A refined trial in a run: every command treats it as any other trial, and none trusts its file blindly."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.open import ChatTarget, open_session
from abliterate.errors import InputError
from abliterate.evaluation.lm_eval import Tasks
from abliterate.export.recipe import hashes, read_recipe
from abliterate.files import DIGEST, digest_of, write_json
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import stages
from abliterate.pipeline.evaluate import evaluate, parse_candidate
from abliterate.pipeline.reproduce.reproduce import reproduce
from abliterate.pipeline.workers import work
from abliterate.search.study import Study
from abliterate.settings.schema import Settings
from abliterate.types import RefinedParams, Trial
from support.cli import Invoke, assert_sentence, forbidden
from support.events import checked
from support.runs import Recorder, copy_run, run_in, with_kind

Refined = tuple[Path, Trial, Settings]
pytestmark = pytest.mark.usefixtures("lean")


def made_again(recipe: Path, files: dict[str, str], settings: Settings, out: Path) -> dict[str, Any]:
    """The result of reproducing a recipe."""
    own = {"model": "", "prompts": files, "cache_dir": settings.cache_dir}
    return reproduce(recipe, own, Recorder(), out=out).to_record()


def test_its_record_and_its_file(refined: Refined) -> None:
    path, trial, settings = refined
    assert trial.state == "complete"
    assert trial.number == settings.search.trials
    assert Result.read(RunDirectory(path)).trial(trial.number, path) == trial
    assert isinstance(trial.params, RefinedParams)
    given = RefinedStore(RunDirectory(path).refined).directions(trial.params)
    assert given.keys() == trial.params.coeffs.keys()
    assert all(abs(cosine) < 0.999 for cosine in trial.params.facts["cosine"].values())
    record = json.loads((path / "result.json").read_text(encoding="utf-8"))
    assert [one["params"].get("kind") for one in record["trials"]] == [None] * trial.number + ["refined"]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_it_is_exported_and_its_recipe_makes_the_same_export(
    kind: str, refined: Refined, prompt_files: dict[str, str], tmp_path: Path
) -> None:
    """From the files of the base alone; and the reloaded export has the trial's scores."""
    path, trial, settings = refined
    scores = kind == "merged"
    directory = RunDirectory(path)
    out = pipeline_export_trial.export_trial(
        with_kind(settings, kind), Recorder(), directory, trial.number, tmp_path / "out", scores=scores
    )
    checks = out.export.model_dump()
    assert checks["verified"] is True
    assert checks["verification"]["checks"].keys() >= ({"weights", "modules", "kl"} if scores else {"weights"})
    assert kind == "merged" or (checks["method"], checks["rank"]) == ("dora", 1)
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    for part in (
        "Its strengths and directions were learned by gradient",
        "β 10, 40 steps",
        f"taught by the answers of trial {trial.params.facts['start']}",
        "harmful prompts (30, sha256 d1); harmless prompts (30, sha256 d2)",
    ):
        assert part in card
    assert "No training took place" not in card
    recipe = read_recipe(tmp_path / "out")
    assert hashlib.sha256(recipe.refined_file).hexdigest() == trial.params.sha256
    result = made_again(tmp_path / "out", prompt_files, settings, tmp_path / "again")
    assert result["reproduction"]["outcome"] == "identical"
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    assert read_recipe(tmp_path / "again") == recipe


def test_a_continued_run_selects_it_as_any_trial(
    refined: Refined, prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exported by the run itself, with the model in memory, and its scores are those of the export."""
    path, trial, settings = refined
    run = copy_run(path, tmp_path / "run")
    search = settings.search.model_copy(update={"select": f"trial:{trial.number}"})
    settings = with_kind(settings, "adapter").model_copy(update={"search": search})
    monkeypatch.setattr(Study, "ask", forbidden)  # the budget is used
    result, recorder = run_in(run, settings, resume=True)
    assert not recorder.warnings
    assert (result["selected"], result["export"]["verified"]) == (trial.number, True)
    assert result["trials"][-1] == trial.to_record()
    recipe = read_recipe(run)
    assert (recipe.trial.number, recipe.export.origin) == (trial.number, "trial")
    again = made_again(run, prompt_files, settings, tmp_path / "again")
    assert again["reproduction"]["outcome"] == "identical"
    assert hashes(tmp_path / "again") == hashes(run / "model")
    none = with_kind(settings, "none")
    run_in(run, none, resume=True)
    assert read_recipe(run).refined == recipe.refined


def test_a_larger_budget_leaves_it_where_it_is(refined: Refined, tmp_path: Path) -> None:
    path, trial, settings = refined
    run = copy_run(path, tmp_path / "run")
    search = settings.search.model_copy(update={"trials": trial.number + 3})
    settings = with_kind(settings, "none").model_copy(update={"search": search})
    result, recorder = run_in(run, settings, resume=True)
    assert [one["number"] for one in result["trials"]] == list(range(trial.number + 4)), "three new ones"
    assert result["trials"][trial.number] == trial.to_record()
    assert [one.number for one in recorder.trials] == [trial.number + 1, trial.number + 2, trial.number + 3]


def test_a_worker_doesnt_need_its_directions(refined: Refined, tmp_path: Path) -> None:
    path, trial, settings = refined
    run = RunDirectory(copy_run(path, tmp_path / "run"))
    shutil.rmtree(run.refined)
    recorder = Recorder()
    assert work(run.path, "", "", {"cache_dir": settings.cache_dir}, recorder) == trial.number + 1
    assert recorder.warnings == []


def test_it_is_chatted_with(refined: Refined) -> None:
    path, trial, _ = refined
    session, fields = open_session(str(path), ChatTarget(), {}, Recorder())
    assert fields["trial"].startswith(f"{trial.number}: ")
    model, ids = session._voice._model, torch.arange(5, 25)[None]
    with torch.no_grad():
        base = model(ids).logits
        with session._active("edited"):
            edited = model(ids).logits
        session.choose(0)
        with session._active("edited"):
            other = model(ids).logits
        session.choose(trial.number)
        with session._active("edited"):
            assert torch.equal(model(ids).logits, edited)
        assert torch.equal(model(ids).logits, base)
    assert not torch.allclose(edited, base)
    assert not torch.allclose(edited, other)


def test_it_is_evaluated(refined: Refined, heldout_files: dict[str, str]) -> None:
    path, trial, settings = refined
    prompts = settings.prompts.model_copy(update=heldout_files)
    candidate = parse_candidate(f"{path}:{trial.number}")
    found = evaluate(settings.model_copy(update={"prompts": prompts}), Recorder(), candidate, Tasks())["heldout"]
    assert found["trial"] == trial.number
    assert found["search"]["kl"] == trial.scores["kl"]
    assert 0 < found["kl"]["mean"] < 1


def test_tables_lines_and_columns(refined: Refined, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trial, _ = refined
    monkeypatch.setenv("COLUMNS", "250")
    out = invoke("trials", path).out
    assert f"β 10, 40 steps, {trial.params.edited} modules" in out
    assert "per module" in out
    header, *rows = (line.split(",") for line in invoke("trials", path, "--csv").out.splitlines())
    last = dict(zip(header, rows[-1], strict=True))
    assert (last["refined_beta"], last["refined_steps"], last["direction_index"]) == ("10.0", "40", "")
    assert dict(zip(header, rows[0], strict=True))["refined_beta"] == ""
    lines = checked(invoke("trials", path, "--json"), "trials")
    assert lines[-1]["trials"][-1]["params"] == trial.params.to_record()
    shown = invoke("report", path, "--terminal").out
    assert f"Trial {trial.number}, refined by gradient" in shown


def _gone(run: RunDirectory) -> None:
    next(run.refined.iterdir()).unlink()


def _foreign(run: RunDirectory) -> None:
    file = next(run.refined.iterdir())
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))


def _linked(run: RunDirectory) -> None:
    run.refined.rename(run.path.parent / "elsewhere")
    run.refined.symlink_to(run.path.parent / "elsewhere")


def _other_model(run: RunDirectory) -> None:
    """Another module's name, in the record and in the file."""
    record = json.loads(run.result.read_text(encoding="utf-8"))
    params = record["trials"][-1]["params"]
    file = run.path / params["file"]
    tensors = RefinedStore(run.refined).directions(RefinedParams.from_record(params))
    name = next(iter(tensors))
    content = save({f"other.{module}" if module == name else module: v for module, v in tensors.items()})
    file.write_bytes(content)
    params["coeffs"][f"other.{name}"] = params["coeffs"].pop(name)
    params["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(run.result, record | {DIGEST: digest_of(record)})


CHANGES: dict[str, tuple[Callable[[RunDirectory], None], str]] = {
    "gone": (_gone, "No such file"),
    "foreign": (_foreign, "by its hash"),
    "a link": (_linked, "link"),
    "of another model": (_other_model, "isn't a module to edit of the model"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_directions_that_arent_the_runs_are_a_sentence_everywhere(
    name: str, refined: Refined, heldout_files: dict[str, str], tmp_path: Path, invoke: Invoke
) -> None:
    path, trial, _ = refined
    run = RunDirectory(copy_run(path, tmp_path / "run"))
    change, words = CHANGES[name]
    change(run)
    held = [text for option, file in heldout_files.items() for text in (f"--{option.replace('_', '-')}", file)]
    for command in (
        ["export", run.path, "--trial", trial.number, "-o", tmp_path / "export"],
        ["chat", run.path],
        ["evaluate", "demo", run.path, *held],
    ):
        outcome = invoke(*command)
        if name == "of another model":  # which only the model can tell
            outcome = dataclasses.replace(outcome, err=outcome.err[outcome.err.index("error: ") :])
        assert_sentence(outcome, 2, words)
    assert not (tmp_path / "export").exists()
    assert invoke("report", run.path).code == 0  # which needs no tensors
    assert invoke("trials", run.path).code == 0


def _changes(record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Changed recipes, and what is said of them."""
    params, whole = record["trial"]["params"], record["refined"]
    content = base64.b64decode(whole)

    def with_params(**fields: Any) -> dict[str, Any]:
        return record | {"trial": record["trial"] | {"params": params | fields}}

    yield {name: value for name, value in record.items() if name != "refined"}, "by its hash"
    yield record | {"refined": whole[:-4]}, "by its hash"
    yield record | {"refined": "not base64!"}, "the file in 'refined' is wrong"
    yield record | {"refined": base64.b64encode(content[:-1] + b"x").decode()}, "by its hash"
    yield record | {"refined": 7}, "'refined' is wrong"
    yield with_params(kind="other"), "'trial.params.kind' is wrong"
    yield with_params(file="../../etc/passwd"), "its file or the file's hash"
    yield with_params(coeffs=params["coeffs"] | {"more": 1.0}), "other modules"
    yield with_params(coeffs=dict.fromkeys(params["coeffs"], 1e300)), "'trial.params.coeffs."
    yield with_params(facts={"steps": "many"}), "is no number"
    yield with_params(facts=[1]), "'trial.params.facts' is wrong"
    yield with_params(extra=1), "'trial.params.extra' is wrong"


def test_hostile_recipes_of_refined_trials(refined: Refined, tmp_path: Path, finished: tuple[Path, Any, Any]) -> None:
    path, trial, settings = refined
    pipeline_export_trial.export_trial(
        with_kind(settings, "adapter", verify=False), Recorder(), RunDirectory(path), trial.number, tmp_path / "out"
    )
    record = json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))
    plain = json.loads((finished[0] / "recipe.json").read_text(encoding="utf-8"))
    tried = [*_changes(record), (plain | {"refined": record["refined"]}, "its trial isn't refined")]
    assert read_recipe(tmp_path / "out").refined == record["refined"]
    for changed, words in tried:
        (tmp_path / "recipe.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            read_recipe(tmp_path / "recipe.json")
        assert words in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_recipe_of_another_models_modules_is_refused(
    refined: Refined, prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trial, settings = refined
    pipeline_export_trial.export_trial(
        with_kind(settings, "adapter", verify=False), Recorder(), RunDirectory(path), trial.number, tmp_path / "out"
    )
    record = json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))
    v = torch.nn.functional.normalize(torch.ones(128), dim=0)
    content = save({"model.layers.99.mlp.down_proj": v})
    record["refined"] = base64.b64encode(content).decode()
    record["trial"]["params"] |= {
        "coeffs": {"model.layers.99.mlp.down_proj": 1.0},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (tmp_path / "recipe.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(stages, "residuals", forbidden)  # found before anything is computed
    with pytest.raises(InputError, match=r"edits model\.layers\.99\.mlp\.down_proj.*another model"):
        made_again(tmp_path / "recipe.json", prompt_files, settings, tmp_path / "again")
