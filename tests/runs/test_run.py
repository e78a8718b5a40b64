"""Whole runs on the demo model with few prompts: artifacts, caches, resuming, failures. No exact scores: models change."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import AbliterateError, InputError, Interrupted, TrialError
from abliterate.export.merged import Merged
from abliterate.files import digest_of, write_json
from abliterate.model.editor import Editor
from abliterate.model.loader import demo_path
from abliterate.pipeline import cache_keys, context, stages, workbench
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline.context import StageClock
from abliterate.pipeline.run import Candidates
from abliterate.scorers.kl import KL
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path
from abliterate.types import Trial, kl_text
from support.cli import forbidden
from support.models import logits_of
from support.runs import Recorder, copy_run, interrupt_after, outcomes, quick_settings, run_in, with_kind

pytestmark = pytest.mark.usefixtures("lean")
Finished = tuple[Path, dict[str, Any], Settings]
Files = dict[str, str]


def read_result(path: Path) -> dict[str, Any]:
    """The run's `result.json`."""
    return json.loads((path / "result.json").read_text(encoding="utf-8"))


PAPERS_ORDER = ["load", "calibrate", "residuals", "directions", "baseline", "search", "export", "verify"]


def in_order(recorder: Recorder) -> list[str]:
    """Those of the stages that are the paper's steps, as they came."""
    return [stage for stage in recorder.stages if stage in PAPERS_ORDER]


def fail_on(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Make the trials with these numbers fail."""
    real, count = Editor.apply, iter(range(10_000))

    def apply(self: Editor, params: Any) -> None:
        if next(count) in numbers:
            raise TrialError("no decomposition converged")
        real(self, params)

    monkeypatch.setattr(Editor, "apply", apply)


def test_leaves_every_artifact(finished: Finished) -> None:
    path, _, _ = finished
    names = {entry.name for entry in path.iterdir()}
    assert names == {
        *("settings.toml", "study.journal", "directions.safetensors", "geometry.json", "answers.json", "result.json"),
        *("recipe.json", "report.html", "model"),
    }
    assert (path / "model" / "config.json").is_file()
    assert "<html" in (path / "report.html").read_text(encoding="utf-8").lower()


def test_result_has_the_documented_layout(finished: Finished) -> None:
    path, returned, _ = finished
    result = read_result(path)
    assert result.pop("sha256") == digest_of(result)
    assert result == json.loads(json.dumps(returned))
    assert result["format"] == 1
    assert {"id", "revision", "fingerprint"} <= set(result["model"])
    assert result["baseline"]["prompts"] == 12
    assert 0 < result["baseline"]["refusals"] <= 12
    assert set(result["front"]) <= {trial["number"] for trial in result["trials"]}
    assert result["selected"] in result["front"]
    assert {"kind", "path", "verified"} <= set(result["export"])
    assert {"load", "calibrate", "residuals", "directions", "baseline", "search", "export", "verify"} <= set(result["timings"])
    assert result["memory"]["peak_rss_bytes"] > 1e8
    of_stages = result["memory"]["stages"]
    assert set(of_stages) == set(result["timings"])
    assert max(of_stage["peak_rss_bytes"] for of_stage in of_stages.values()) == result["memory"]["peak_rss_bytes"]
    assert {"residuals", "svd", "adapters"} <= set(result["caches"])
    assert all({"hits", "misses"} <= set(counts) for counts in result["caches"].values())
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["environment"]["device"]


def test_trials_have_the_documented_layout(finished: Finished) -> None:
    _, result, _ = finished
    assert [trial["number"] for trial in result["trials"]] == [0, 1, 2, 3]
    for trial in result["trials"]:
        assert set(trial) == {"number", "params", "state", "reason", "scores", "values", "seconds"}
        assert trial["state"] in ("complete", "stopped")
        assert 0 <= trial["scores"]["refusals"] <= 12
        assert {"mean", "median", "max"} <= set(trial["scores"]["kl"])
        assert 0 <= trial["scores"]["kl"]["mean"] <= trial["scores"]["kl"]["max"]
        assert trial["seconds"] > 0


def test_result_holds_no_path_of_this_machine(finished: Finished) -> None:
    path, result, _ = finished
    text = json.dumps(result)
    assert str(path) not in text
    assert str(Path.home()) + "/" not in text
    assert str(demo_path()) not in text


def test_verification_is_recorded_and_true(finished: Finished) -> None:
    _, result, _ = finished
    assert result["export"]["verified"] is True
    selected = result["trials"][result["selected"]]
    assert result["export"]["verification"]["scores"]["kl"]["mean"] == pytest.approx(selected["scores"]["kl"]["mean"], abs=0.02)


def test_export_loads_with_transformers_alone(finished: Finished) -> None:
    path, _, _ = finished
    edited = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(demo_path() / "model", dtype=torch.float32).eval()
    assert not torch.equal(logits_of(edited), logits_of(base))


def test_model_card_has_the_scores(finished: Finished) -> None:
    path, result, _ = finished
    card = (path / "model" / "README.md").read_text(encoding="utf-8")
    selected = result["trials"][result["selected"]]
    assert f"| {result['baseline']['refusals']} | {selected['scores']['refusals']} |" in card
    assert f"mean {kl_text(selected['scores']['kl']['mean'])}" in card
    found = result["export"]["verification"]
    assert f"| refusals of 12 harmful prompts | {selected['scores']['refusals']} | {found['scores']['refusals']} |" in card
    assert f"harmless prompts mean {found['kl_from_trial']['harmless']['mean']:.1e}" in card
    assert f"--trial {selected['number']} --kind merged" in card
    for sets in result["prompts"].values():
        assert sets["digest"] in card
    assert result["prompts"]["harmless_eval"]["count"] == 12


def test_another_key_is_not_taken_from_the_cache(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    _, _, settings = finished
    other = quick_settings(
        prompt_files, Path(settings.cache_dir), prompts={"suffix": " Please."}, search={"trials": 1}, export={"kind": "none"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "capture_residuals", forbidden)
        with pytest.raises(AssertionError, match="must not be called"):
            run_in(tmp_path / "run", other)


def test_corrupt_cache_entry_is_recomputed_with_a_warning(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    _, first, settings = finished
    cache = copy_run(Path(settings.cache_dir), tmp_path / "cache")
    for entry in cache.rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-8] + b"damaged!")
    few = quick_settings(prompt_files, cache, export={"kind": "none"}, search={"trials": 2})
    again, recorder = run_in(tmp_path / "run", few)
    # Residuals of two sets, calibration, yardstick, baseline.
    assert sum("checksum" in warning for warning in recorder.warnings) == 5
    assert again["caches"]["residuals"] == {"hits": 0, "misses": 2}
    assert outcomes(again) == outcomes(first)[:2]
    assert in_order(recorder) == PAPERS_ORDER[:-2]


def test_resumed_study_equals_uninterrupted(finished: Finished, tmp_path: Path) -> None:
    _, uninterrupted, settings = finished
    settings = with_kind(settings, "none")
    recorder, directory = Recorder(), RunDirectory(tmp_path / "run")
    with pytest.raises(Interrupted):
        pipeline_run.run(settings, recorder, directory, check=interrupt_after(recorder, 2))
    kept = read_result(directory.path)
    assert outcomes(kept) == outcomes(uninterrupted)[:2]
    resumed, _ = run_in(directory.path, settings, resume=True)
    assert outcomes(resumed) == outcomes(uninterrupted)
    assert (resumed["front"], resumed["selected"]) == (uninterrupted["front"], uninterrupted["selected"])


def test_more_trials_continue_the_study(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    more = quick_settings(prompt_files, Path(settings.cache_dir), search={"trials": 6})
    result, recorder = run_in(run, more, resume=True)
    assert outcomes(result)[:4] == outcomes(first)
    assert [trial["number"] for trial in result["trials"]] == list(range(6))
    assert [trial.number for trial in recorder.trials] == [4, 5]
    assert result["export"]["verified"] is True


def test_finished_run_resumed_searches_nothing_and_offers_its_front(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first, settings = finished
    monkeypatch.setattr(stages, "evaluate", forbidden)
    offered: list[list[int]] = []

    def choose(given: Candidates) -> Trial:
        offered.append([trial.number for trial in given.front])
        return given.front[-1]

    run = copy_run(path, tmp_path / "run")
    result, recorder = run_in(run, with_kind(settings, "none"), resume=True, choose=choose)
    assert recorder.trials == []
    assert outcomes(result) == outcomes(first)
    assert offered == [first["front"]]
    assert result["selected"] == first["front"][-1]


def test_interrupted_resume_forgets_nothing(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    path, first, settings = finished
    run, recorder = copy_run(path, tmp_path / "run"), Recorder()
    more = quick_settings(prompt_files, Path(settings.cache_dir), search={"trials": 6})
    with pytest.raises(Interrupted):
        pipeline_run.run(more, recorder, RunDirectory(run), resume=True, check=interrupt_after(recorder, 1))
    kept = read_result(run)
    assert (kept["selected"], kept["export"]) == (first["selected"], first["export"])
    assert outcomes(kept)[:4] == outcomes(first)
    assert kept["timings"]["export"] == first["timings"]["export"]
    assert kept["timings"]["search"] > first["timings"]["search"]
    assert all(kept["memory"][name] >= first["memory"][name] for name in ("peak_rss_bytes", "peak_device_bytes"))
    assert set(first["memory"]["stages"]) <= set(kept["memory"]["stages"])


def test_resume_rebuilds_a_result_that_cant_be_read(finished: Finished, tmp_path: Path) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    fresh = Result().to_record()
    for content in ("", "{", '{"format": "1"}', '{"format": 1}'):
        (run / "result.json").write_text(content, encoding="utf-8")
        assert Result.continued(RunDirectory(run)).to_record() == fresh, content
    for content in ("{", '{"format": 1}'):
        (run / "result.json").write_text(content, encoding="utf-8")
        result, _ = run_in(run, with_kind(settings, "none"), resume=True)
        assert (outcomes(result), result["selected"]) == (outcomes(first), first["selected"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": {"suffix": " Now."}}, "set of prompts"),
        ({"seed": 5}, "seed"),
        ({"edit": {"mode": "none"}}, "edit mode"),
        ({"directions": {"method": "mean"}}, "direction method"),
        ({"efficiency": {"use_amp_for_residuals": True}}, "precision of residuals"),
        ({"response": {"thinking_blocks": [["<a>", "<a></a>"]]}}, "set of thinking blocks"),
        ({"response": {"answer_tags": ["<a>"]}}, "set of thinking blocks or answer tags"),
        ({"load": {"attn_implementation": "eager"}}, "attention implementation"),
        (
            {"load": {"decoder_layers": "model.layers", "components": {"mlp.down_proj": "mlp.down_proj"}}},
            "set of edited modules",
        ),
    ],
)
def test_changed_meaning_is_refused_on_resume(
    finished: Finished, tmp_path: Path, prompt_files: Files, change: dict[str, Any], named: str
) -> None:
    path, _, settings = finished
    run = copy_run(path, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("result.json", "settings.toml", "directions.safetensors")}
    with pytest.raises(InputError, match=f"another {named}"):
        run_in(run, quick_settings(prompt_files, Path(settings.cache_dir), **change), resume=True)
    assert {name: (run / name).read_bytes() for name in before} == before


def test_other_default_markers_are_refused_on_resume(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, settings = finished
    content = config_path("markers.txt").read_text(encoding="utf-8")
    for text, refused in ((f"# said otherwise\n{content}", False), (f"{content}\nanother marker\n", True)):
        (tmp_path / "markers.txt").write_text(text, encoding="utf-8")
        monkeypatch.setattr(cache_keys, "config_path", lambda name: tmp_path / name)
        run = copy_run(path, tmp_path / f"run-{refused}")
        if refused:
            with pytest.raises(InputError, match="another set of scorers or markers"):
                run_in(run, settings, resume=True)
        else:
            run_in(run, with_kind(settings, "none"), resume=True)


def test_svd_representation(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    _, _, first = finished
    over: dict[str, Any] = {"edit": {"representation": "svd"}, "export": {"kind": "adapter"}, "search": {"trials": 3}}
    result, recorder = run_in(tmp_path / "run", quick_settings(prompt_files, Path(first.cache_dir), **over))
    assert in_order(recorder) == PAPERS_ORDER
    assert recorder.result is not None
    assert result["export"]["verified"] is True
    assert (result["export"]["method"], result["export"]["rank"]) == ("lora", 3)
    lost = result["export"]["approximation_error"]
    assert 0.001 < lost["mean"] < lost["max"] < 0.3
    assert f"misses {lost['mean']:.1%}" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert result["caches"]["svd"]["misses"] > 0


def test_adapter_export_is_dora_and_loads_with_peft(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    quick = quick_settings(prompt_files, Path(settings.cache_dir), export={"kind": "adapter"})
    result, _ = run_in(run, quick, resume=True)
    assert (result["export"]["method"], result["export"]["rank"], result["export"]["verified"]) == ("dora", 1, True)
    assert "approximation_error" not in result["export"]
    base = AutoModelForCausalLM.from_pretrained(demo_path() / "model", dtype=torch.float32)
    with_adapter = logits_of(PeftModel.from_pretrained(base, str(run / "model")).eval())
    merged = logits_of(AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32).eval())
    assert first["selected"] == result["selected"]
    assert (with_adapter - merged).norm() / merged.norm() < 0.02  # the merged one is stored in bfloat16


def test_failed_trial_is_recorded_and_the_study_goes_on(
    finished: Finished, tmp_path: Path, prompt_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, settings = finished
    fail_on(monkeypatch, {1})
    result, recorder = run_in(tmp_path / "run", with_kind(settings, "none"))
    states = [trial["state"] for trial in result["trials"]]
    assert states[1] == "failed"
    assert result["trials"][1]["reason"] == "no decomposition converged"
    assert len(states) == 4
    assert "failed" not in (states[0], states[2], states[3])
    assert 1 not in result["front"]
    assert outcomes(result)[0] == outcomes(first)[0]
    assert recorder.trials[1].state == "failed"


def test_a_trial_is_not_lost_to_memory_anywhere(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only passes run out of it: putting edits on the model, and scores."""
    calls: dict[str, int] = {}

    def fail_once(owner: type, name: str, at: int) -> None:
        real = getattr(owner, name)

        def once(self: Any, *args: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == at:
                raise RuntimeError("MPS backend out of memory")
            return real(self, *args)

        monkeypatch.setattr(owner, name, once)

    fail_once(Editor, "apply", 2)
    fail_once(KL, "score", 4)  # in the trial after that, as the first is the base's
    result, _ = run_in(tmp_path / "run", with_kind(finished[2], "none"))
    assert outcomes(result) == outcomes(finished[1])
    assert (calls["apply"], calls["score"]) == (6, 6), "both trials were repeated"


def test_nothing_but_failures_ends_with_advice(
    finished: Finished, tmp_path: Path, prompt_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, settings = finished
    fail_on(monkeypatch, set(range(100)))
    over = {"search": {"max_consecutive_failures": 2}, "export": {"kind": "none"}}
    stubborn = quick_settings(prompt_files, Path(settings.cache_dir), **over)
    with pytest.raises(AbliterateError, match=r"last 2 trials failed \(no decomposition converged\)"):
        run_in(tmp_path / "run", stubborn)
    assert len(read_result(tmp_path / "run")["trials"]) == 2
    monkeypatch.undo()  # mended: the advice to resume can be followed
    result, _ = run_in(tmp_path / "run", stubborn, resume=True)
    assert [trial["state"] for trial in result["trials"]] == ["failed", "failed", "complete", "complete"]


def test_empty_front_ends_with_advice(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    _, _, settings = finished
    weak = quick_settings(prompt_files, Path(settings.cache_dir), search={"max_coeff": {"default": [0.0, 0.0]}, "trials": 2})
    with pytest.raises(AbliterateError, match="-n"):
        run_in(tmp_path / "run", weak)
    result = read_result(tmp_path / "run")
    assert result["front"] == []
    assert all(trial["scores"]["kl"]["mean"] == 0 for trial in result["trials"])


def test_model_that_refuses_nothing_ends_with_advice(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    _, _, settings = finished
    (tmp_path / "markers.txt").write_text("zzzz never said zzzz\n", encoding="utf-8")
    over = {"evaluation": {"markers": str(tmp_path / "markers.txt")}}
    with pytest.raises(AbliterateError, match=r"None of the model's 12 answers .* has a marker of markers\.txt"):
        run_in(tmp_path / "run", quick_settings(prompt_files, Path(settings.cache_dir), **over))


def test_same_prompts_on_both_sides_end_with_advice(tmp_path: Path, prompt_files: Files) -> None:
    same = prompt_files | {"harmless": prompt_files["harmful"]}
    with pytest.raises(AbliterateError, match="no direction"):
        run_in(tmp_path / "run", quick_settings(same, tmp_path / "cache"))


def test_full_disk_keeps_the_study_and_resume_exports(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    weights = (run / "model" / "model.safetensors").read_bytes()

    def full(self: Merged, job: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Merged, "write", full)
        with pytest.raises(AbliterateError, match="No space left"):
            run_in(run, settings, resume=True)
    assert (run / "model" / "model.safetensors").read_bytes() == weights  # the old export stays
    assert not (run / "model.partial").exists()
    assert outcomes(read_result(run)) == outcomes(first)
    result, _ = run_in(run, settings, resume=True)
    assert result["export"]["verified"] is True


def test_run_on_a_used_directory_is_refused(finished: Finished) -> None:
    path, _, settings = finished
    before = (path / "result.json").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        run_in(path, settings)
    assert (path / "result.json").read_bytes() == before


def test_second_run_measures_nothing_again(
    finished: Finished, tmp_path: Path, prompt_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residuals, batch size, prefix and baseline come from the cache; another question about the base model doesn't."""
    path, first, settings = finished
    cache = Path(settings.cache_dir)
    monkeypatch.setattr(stages, "capture_residuals", forbidden)
    monkeypatch.setattr("abliterate.pipeline.batch_size.tune", forbidden)
    monkeypatch.setattr("abliterate.pipeline.calibrate.response_prefix", forbidden)
    responds = []
    respond = TrialEngine.respond
    monkeypatch.setattr(TrialEngine, "respond", lambda self, *a, **k: responds.append(k.get("limit")) or respond(self, *a, **k))
    again, _ = run_in(tmp_path / "run", with_kind(settings, "none"))
    assert again["caches"]["residuals"] == {"hits": 2, "misses": 0}
    assert first["caches"]["residuals"] == {"hits": 0, "misses": 2}
    assert outcomes(again) == outcomes(first)  # cached equals fresh, and equal seeds equal trials
    assert torch.equal(*(load_file(run / "directions.safetensors")["directions"] for run in (tmp_path / "run", path)))
    assert not (tmp_path / "run" / "model").exists()
    assert None not in responds, "only trials respond"
    markers = tmp_path / "markers.txt"
    markers.write_text("sorry\n", encoding="utf-8")
    other = quick_settings(prompt_files, cache, evaluation={"markers": str(markers)})
    monkeypatch.setattr(stages, "evaluate", forbidden)
    with pytest.raises(AssertionError, match="must not be called"):  # at the first trial
        run_in(tmp_path / "other", other)
    assert responds[-1] is None


def test_unfinished_thinking_is_said_at_the_baseline(prompt_files: Files, tmp_path: Path) -> None:
    """Every prompt ends inside a block that the demo model never closes."""
    response = {"max_new_tokens": 4, "detect_prefix": False, "prefix": "<think>"}
    settings = quick_settings(
        prompt_files, tmp_path / "cache", response=response, search={"trials": 1}, export={"kind": "none"}
    )
    directory = RunDirectory(tmp_path / "run")
    recorder = Recorder()
    with pytest.raises(AbliterateError):  # nothing refuses less
        pipeline_run.run(settings, recorder, directory)
    assert any("12 of 12 responses are still inside a thinking block" in warning for warning in recorder.warnings)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets peaks")
def test_a_stage_records_its_own_peak_memory() -> None:
    clock = StageClock()
    for name, size in (("small", 10**6), ("large", 3 * 10**8), ("small again", 10**6)):
        with clock.stage(name):
            torch.ones(size // 4).sum()
    peaks = {name: one["peak_rss_bytes"] for name, one in clock.memory.stages.items()}
    assert peaks["large"] > max(peaks["small"], peaks["small again"]) + 2e8
    assert clock.memory.peak_rss_bytes == peaks["large"]


def test_prompts_that_are_there_twice_are_said(prompt_files: Files, tmp_path: Path) -> None:
    """Within a set, and in both the direction and the evaluation set."""
    lines = Path(prompt_files["harmful"]).read_text(encoding="utf-8").splitlines(keepends=True)
    both = tmp_path / "both.jsonl"
    both.write_text("".join([*lines[:5], lines[0], lines[1]]), encoding="utf-8")
    recorder = Recorder()
    own = quick_settings(prompt_files | {"harmful_eval": str(both)}, tmp_path / "cache")
    context.read_prompts(context.Context.of(own, recorder))
    assert any("2 of the 7 prompts in the set harmful_eval are there more than once" in one for one in recorder.warnings)
    assert any("5 of the harmful prompts are in both" in one for one in recorder.warnings)
    assert len(recorder.warnings) == 2


def test_a_continued_run_keeps_its_baseline_and_prefix(
    finished: Finished, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again on another device or by another library, they may differ, and the old trials are relative to them."""
    path, result, _ = finished
    run = copy_run(path, tmp_path / "run")
    record = json.loads((run / "result.json").read_text(encoding="utf-8"))
    kept = record["baseline"]["refusals"] - 1
    record["baseline"]["refusals"] = kept
    write_json(run / "result.json", {name: value for name, value in record.items() if name != "sha256"})
    asked: list[Any] = []
    real = workbench.known_prefix
    monkeypatch.setattr(workbench, "known_prefix", lambda *given: asked.append(given) or real(*given))
    settings = quick_settings(prompt_files, tmp_path / "cache", search={"trials": 5})
    again, recorder = run_in(run, settings, resume=True)
    assert again["baseline"]["refusals"] == kept
    assert any(
        f"In this session the model refuses {kept + 1} prompts, in the run {kept};" in text for text in recorder.warnings
    )
    assert not asked
    assert len(again["trials"]) == 5


@pytest.mark.parametrize("content", [pytest.param(None, marks=pytest.mark.slow), "{"])
def test_a_lost_result_is_made_again_from_the_study(
    content: str | None, finished: Finished, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the baseline and the directions that its trials are relative to, though they would be others now."""
    path, result, _ = finished
    run = copy_run(path, tmp_path / "run")
    if content is None:
        (run / "result.json").unlink()
    else:
        (run / "result.json").write_text(content, encoding="utf-8")
    real = stages.directions

    def turned(*given: Any) -> Directions:
        found = real(*given)
        return Directions(found.vectors.roll(1, dims=-1))

    monkeypatch.setattr(stages, "directions", turned)
    settings = quick_settings(prompt_files, tmp_path / "cache", search={"trials": 5})
    again, recorder = run_in(run, settings, resume=True)
    assert again["directions"] == result["directions"]
    assert again["baseline"] == result["baseline"]
    assert outcomes(again)[:4] == outcomes(result)
    assert any("made again from the study" in note for note in recorder.notes)
