"""Edits that are computed from inputs of modules, from the stage that captures them to exports of a run's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from abliterate.artifacts.cache import ArtifactStore
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli.batch import _is_of
from abliterate.directions import Directions, Keys, ModuleInputs
from abliterate.edits import METHODS, SvdMemo, needs_answers
from abliterate.errors import AbliterateError, InputError
from abliterate.files import read_toml
from abliterate.model import loader
from abliterate.model.architectures import known_architecture
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.pipeline import module_inputs, preflight, stages
from abliterate.pipeline.cache_keys import inputs_key, study_identity
from abliterate.pipeline.context import Context
from abliterate.pipeline.export import approximation_of
from abliterate.pipeline.export_trial import export_trial
from abliterate.pipeline.module_inputs import _spread, with_inputs
from abliterate.pipeline.preflight import as_refinable, check_edit, check_names, with_edit_mode
from abliterate.pipeline.reproduce.reproduce import reproduce
from abliterate.pipeline.search import search
from abliterate.pipeline.workbench import load, open_workbench
from abliterate.settings.schema import EditSettings, SearchSettings, Settings
from support.exports import make_run
from support.inputs import params_of, random_inputs
from support.models import PROMPTS, logits_of, make_chat, make_loaded, make_model, save_model
from support.runs import Recorder, outcomes, quick_settings, run_in

MODES = ["key-conditional", "least-squares", "arbitrary-rank"]


def make_finished(folder: Path, mode: str, **edit: object) -> tuple[Settings, RunDirectory, Directions]:
    """A run of one trial on a tiny model, whose directions come with what the mode needs of inputs of its modules."""
    base = save_model(make_model("llama"), folder / "base")
    settings, directory = make_run(folder, base, edit={"mode": mode, **edit})
    result = Result.read(directory)
    method = METHODS[mode]
    raw = random_inputs(make_loaded(make_model("llama")), along=7 if needs_answers(method) else 0)
    inputs = {name: method.reduced(own) for name, own in raw.items()}
    directions = replace(stages.read_directions(directory.directions, result), inputs=inputs)
    trial = replace(result.trials[0], params=params_of(mode))
    assert result.baseline is not None
    result.searched([trial], [trial], result.baseline, result.objectives_or_default())
    result.update(directions=stages.directions_record(directions))
    result.write(directory)
    directory.directions.write_bytes(stages.directions_file(directions))
    return settings, directory, directions


def with_kind(settings: Settings, kind: str) -> Settings:
    return settings.model_copy(update={"export": settings.export.model_copy(update={"kind": kind})})


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("mode", MODES)
def test_exports_from_files_are_the_edit(mode: str, kind: str, tmp_path: Path) -> None:
    settings, directory, directions = make_finished(tmp_path, mode)
    final = tmp_path / "out"
    record = export_trial(with_kind(settings, kind), Recorder(), directory, 0, final).export
    assert record.verified is True
    compared = record.verification.get("compared_with")  # type: ignore[attr-defined]
    assert compared == ("factors" if mode == "arbitrary-rank" else None)
    card = (final / "README.md").read_text(encoding="utf-8")
    assert ("arbitrary-rank ablation" in card) == (mode == "arbitrary-rank")
    assert ("the factors that the optimization found" in card) == (mode == "arbitrary-rank")
    path = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(path if kind == "adapter" else final, dtype=torch.float32)
    exported = logits_of((PeftModel.from_pretrained(model, str(final)) if kind == "adapter" else model).eval())
    loaded = make_loaded(make_model("llama"))
    editor = Editor(loaded.targets, directions, settings.edit, EditHooks(loaded.targets), SvdMemo(0))
    base = logits_of(loaded.model)
    editor.apply(params_of(mode))
    torch.testing.assert_close(exported, logits_of(loaded.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(exported, base, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_directions_and_inputs_are_one_file(mode: str, tmp_path: Path) -> None:
    _, directory, directions = make_finished(tmp_path, mode)
    found = stages.read_directions(directory.directions, Result.read(directory))
    assert found.inputs.keys() == directions.inputs.keys()
    for name, own in found.inputs.items():
        assert type(own) is type(directions.inputs[name])
        for part in ("harmful", "harmless") if isinstance(own, ModuleInputs) else ("keys", "selector"):
            assert torch.equal(getattr(own, part), getattr(directions.inputs[name], part))
    assert stages.directions_file(found) == directory.directions.read_bytes()


@pytest.mark.parametrize("fault", ["missing", "of another width", "not a number"])
def test_a_strangers_file(fault: str, tmp_path: Path) -> None:
    settings, directory, directions = make_finished(tmp_path, "key-conditional")
    fakes = {"missing": None, "of another width": torch.ones(3, 7), "not a number": torch.full((3, 32), torch.nan)}
    rows = fakes[fault]
    changed: dict[str, Keys] = {}
    for name, own in directions.inputs.items() if rows is not None else ():
        assert isinstance(own, Keys)
        changed[name] = replace(own)  # past the check of the class
        object.__setattr__(changed[name], "keys", rows.clone())
        object.__setattr__(changed[name], "selector", rows.clone())
    forged = replace(directions, inputs=changed)
    result = Result.read(directory)
    result.update(directions=stages.directions_record(forged))
    result.write(directory)
    directory.directions.write_bytes(stages.directions_file(forged))
    with pytest.raises(InputError, match=r"needs the inputs of|can't be read or aren't its own"):
        export_trial(with_kind(settings, "merged"), Recorder(), directory, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_stage(prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture for each set, kept in the cache; workers get directions alone and capture the same."""
    over = {
        "response": {"max_new_tokens": 4, "detect_prefix": False},
        "edit": {"mode": "least-squares", "capture_prompts": 5, "capture_tokens": 3},
    }
    settings, recorder = quick_settings(prompt_files, tmp_path, **over), Recorder()
    with load(settings, recorder) as bench:
        found = stages.find_directions(bench)
        assert {(len(own.keys), len(own.selector)) for own in found.inputs.values() if isinstance(own, Keys)} == {(5, 5)}
        assert found.inputs.keys() == {target.name for target in bench.loaded.targets}
        assert bench.space.samples(20, 0)[3].kernels["attn.o_proj"].max_coeff >= 1
        assert {bench.space.coeffs} == {(1.0, 8.0)}
        alone = replace(found, inputs={})
        again = with_inputs(bench, alone)
        assert "module inputs come from the cache" in recorder.notes
        name = next(iter(found.inputs))
        for part in ("keys", "selector"):
            assert torch.equal(getattr(again.inputs[name], part), getattr(found.inputs[name], part))
        assert {"harmful prompts", "harmless prompts", "answers to harmless prompts"} <= {unit for _, unit in recorder.units}
        assert stages.directions_record(again) == stages.directions_record(found)
        assert len(bench.own_answers) == 5
        assert found.answers == bench.own_answers
        assert max(map(len, bench.own_answers)) == 3
        with monkeypatch.context() as patch:  # memory for few modules at a time, and nothing in the cache
            patch.setattr(module_inputs, "usable_memory", lambda device: 4 * 4 * 25 * 1000)
            patch.setattr(ArtifactStore, "get", lambda *given, **options: None)
            groups = module_inputs._groups(bench.loaded.targets, 25)
            assert len(groups) > 2
            assert [target for group in groups for target in group] == list(bench.loaded.targets)
            apart = with_inputs(bench, alone)
        for name, own in found.inputs.items():
            torch.testing.assert_close(apart.inputs[name].selector, own.selector)  # type: ignore[union-attr]
        others = with_inputs(bench, alone, [[5, 7], *bench.own_answers[1:]])  # as a worker whose run has other words
        assert not torch.equal(others.inputs[name].selector, found.inputs[name].selector)  # type: ignore[union-attr]
        for strange in ([[5], [7]], [[5], [7], [9], [5], [10**6]], [[5], [7], [9], [5], [7] * 4]):
            with pytest.raises(InputError, match=f"The run's {len(strange)} answers aren't this model's to 5 prompts"):
                with_inputs(bench, alone, strange)
        with pytest.raises(InputError, match="come without them"):
            bench.prepare(alone)
        assert search(bench, alone, trials=0).bench.directions is not alone, "directions of a caller's own get their inputs"
        same = {key: replace(own, selector=torch.zeros_like(own.selector)) for key, own in found.inputs.items()}  # type: ignore[call-arg,union-attr]
        with pytest.raises(InputError, match="can edit no module, because"):
            bench.prepare(replace(found, inputs=same))


def test_prompts_are_spread_evenly() -> None:
    assert _spread(list(range(10)), 4) == (0, 2, 5, 7)  # type: ignore[arg-type]
    assert _spread(list(range(3)), 64) == (0, 1, 2)  # type: ignore[arg-type]


def test_only_a_mode_that_uses_directions_needs_any() -> None:
    same = stages.Residuals(torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64), {})
    for mode, means in (("arbitrary-rank", True), ("full", False)):
        settings = Settings.model_validate({"model": "demo", "edit": {"mode": mode}})
        context = Context.of(settings, Recorder())
        if means:
            assert not stages.directions(context, same).vectors.any()
            continue
        with pytest.raises(AbliterateError, match="no direction to remove"):
            stages.directions(context, same)


@pytest.mark.parametrize("mode", ["none", "pre", "arbitrary-rank"])
def test_what_a_low_rank_holds_exactly_is_not_computed_again(mode: str) -> None:
    loaded, settings = make_loaded(make_model("llama")), EditSettings(mode=mode, representation="svd")
    directions = Directions(torch.eye(4, 32), inputs=random_inputs(loaded))
    editor = Editor(loaded.targets, directions, settings, EditHooks(loaded.targets), SvdMemo(0))
    params = params_of("arbitrary-rank")

    def read(target: object) -> torch.Tensor:
        raise AssertionError("no weight need be read")

    assert approximation_of(settings, directions, {}.get, loaded.targets, read, params, editor.factors(params)) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "load", "mode"),
    [
        ("llama", {}, "least-squares"),
        ("llama", {"readers": True}, "full"),
        ("llama", {"components": {"mlp.down_proj": "mlp.down_proj"}}, "least-squares"),
        ("llama", {"components": {"attn.q_proj": "self_attn.q_proj"}}, "full"),
        ("llama", {"decoder_layers": "model.layers"}, "least-squares"),
        ("qwen3_5", {"separate_kinds": True}, "least-squares"),
        ("mixtral", {}, "full"),  # fused experts
        ("qwen2_moe", {"components": {"mlp.down_proj": "mlp.shared_expert.down_proj"}}, "full"),  # which sees all rows as one
    ],
)
def test_auto_is_a_mode_that_the_model_allows(
    family: str, load: dict[str, object], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(make_model(family), tmp_path / "model")
    settings = Settings.model_validate({"model": str(path), "load": load, "edit": {"mode": "auto", "rank": 5}})
    found = with_edit_mode(settings)
    assert (found.edit.mode, found.edit.rank) == (mode, 5)
    assert with_edit_mode(found) is found
    if family == "llama" and not load:
        lora = settings.model_copy(update={"edit": EditSettings(mode="auto", representation="svd")})
        assert with_edit_mode(lora).edit.mode == "full"
        ranged = settings.model_copy(update={"search": SearchSettings(max_coeff={"default": (0, 1)})})
        notes: list[str] = []
        assert with_edit_mode(ranged, notes.append).edit.mode == "least-squares"
        assert notes
        assert notes[0].startswith("largest coeffs: default 0 to 1 by search.max_coeff, and otherwise 1 to 8")
        monkeypatch.setattr(preflight, "is_built_in", lambda model_type: False)  # as of a plugin's family
        assert with_edit_mode(settings).edit.mode == "full"
        monkeypatch.setattr(loader, "skeleton", lambda *_: None)  # only weights show what can be edited
        assert with_edit_mode(settings).edit.mode == "full"


@pytest.mark.usefixtures("lean")
def test_a_run_keeps_the_mode_that_was_found_and_its_directions(
    prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another device a continued run would find other words, and so other edits for its trials."""
    over = {"search": {"trials": 1, "startup_trials": 1}, "response": {"max_new_tokens": 4}, "export": {"kind": "none"}}
    edit = {"mode": "auto", "capture_prompts": 5, "capture_tokens": 2}
    settings = quick_settings(prompt_files, tmp_path / "cache", **over, edit=edit)
    first, recorder = run_in(tmp_path / "run", settings)
    assert "module inputs" in recorder.stages
    assert read_toml(tmp_path / "run" / "settings.toml")["edit"]["mode"] == "least-squares"
    monkeypatch.setattr(module_inputs, "_own_answers", lambda *_: [[5, 7]] * 5)
    again, _ = run_in(tmp_path / "run", settings.model_copy(update={"cache_dir": str(tmp_path / "other")}), resume=True)
    assert outcomes(again) == outcomes(first)
    assert again["directions"] == first["directions"]
    (tmp_path / "run" / "directions.safetensors").write_bytes(b"another file")
    made, _ = run_in(tmp_path / "run", settings.model_copy(update={"cache_dir": str(tmp_path / "other")}), resume=True)
    assert made["directions"] == first["directions"], "what isn't the run's is made again, along its answers"
    own = {"model": "", "prompts": prompt_files, "cache_dir": str(tmp_path / "third")}
    repeated = reproduce(tmp_path / "run" / "recipe.json", own, Recorder(), out=tmp_path / "again").to_record()
    assert (repeated["reproduction"]["outcome"], repeated["reproduction"]["directions_equal"]) == ("identical", True)
    assert _is_of(settings, read_toml(tmp_path / "run" / "settings.toml"))


def test_whoever_opens_a_model_has_a_mode() -> None:
    """`evaluate` and `tune-batch` open it with settings that no run has resolved; the prompts' lengths need the mode."""
    settings = Settings.model_validate({"model": "demo", "edit": {"mode": "auto"}})
    with open_workbench(Context.of(settings, Recorder()), sets={"harmful": PROMPTS}) as bench:
        assert bench.settings.edit.mode == "least-squares"


def test_keys_and_identity() -> None:
    loaded, chat = make_loaded(make_model("llama")), make_chat()
    plain = Settings(model="x")
    more = plain.model_copy(update={"edit": plain.edit.model_copy(update={"capture_prompts": 32})})
    one, other = (study_identity(settings, loaded, chat, (PROMPTS,)) for settings in (plain, more))
    assert {name for name in one if one[name] != other[name]} == {"edit mode"}

    def identity(**edit: object) -> str:
        settings = Settings.model_validate({"model": "x", "edit": edit})
        return study_identity(settings, loaded, chat, (PROMPTS,))["edit mode"]

    assert identity(capture_tokens=4) == one["edit mode"]  # full uses none
    assert identity(mode="least-squares") != identity(mode="least-squares", capture_tokens=4)
    answers = ((), (), [[1, 2]], [[1], [2]])
    keys = [
        inputs_key(plain, loaded, chat, (PROMPTS, harmless), ids)
        for harmless, ids in zip((PROMPTS, PROMPTS[:2], PROMPTS, PROMPTS), answers, strict=True)
    ]
    other_mode = plain.model_copy(update={"edit": plain.edit.model_copy(update={"mode": "least-squares"})})
    keys.append(inputs_key(other_mode, loaded, chat, (PROMPTS, PROMPTS), ()))
    assert all(one != other for place, one in enumerate(keys) for other in keys[:place])


def test_what_is_refused_before_a_search() -> None:
    settings = Settings.model_validate({"model": "demo", "edit": {"mode": "arbitrary-rank"}, "refine": {"enabled": True}})
    check_names(settings)
    notes: list[str] = []
    assert not as_refinable(settings, notes.append).refine.enabled
    assert ["keeps the search's front" in note for note in notes] == [True]
    plain = Settings(model="demo")
    assert as_refinable(plain, notes.append) is plain
    with pytest.raises(InputError, match=r"finds nothing; give more trials with -n\.$"):
        check_names(settings.model_copy(update={"search": settings.search.model_copy(update={"trials": 0})}))
    fused = make_loaded(make_model("mixtral"))
    with pytest.raises(InputError, match="fused experts"):
        check_edit(settings, fused.architecture, fused.targets)
    check_edit(plain, fused.architecture, fused.targets)
    row = known_architecture("opt")
    named = known_architecture("opt", components={"mlp.down_proj": "fc2"})
    for family in (row, named):  # whose names differ
        assert family is not None
        with pytest.raises(InputError, match="can't be captured in the family opt; choose"):
            check_edit(settings, family, [])
        check_edit(plain, family, [])
    spared = Settings.model_validate({"model": "demo", "directions": {"protect": ["code"]}})
    check_names(spared)
    with pytest.raises(InputError, match=r"'arbitrary-rank' uses no directions.*leave directions\.protect"):
        check_names(spared.model_copy(update={"edit": settings.edit}))
    llama = make_loaded(make_model("llama"))
    reader = replace(llama.targets[0], reads=True)
    check_edit(plain, llama.architecture, [reader])
    for mode in MODES:
        own = Settings.model_validate({"model": "demo", "edit": {"mode": mode}})
        with pytest.raises(InputError, match=f"{mode!r} edits no modules that read"):
            check_edit(own, llama.architecture, [reader])
