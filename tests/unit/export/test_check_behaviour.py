"""Verification: every correct export passes, one that lacks or distorts an edit doesn't, however weak the edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.artifacts.result import Result
from abliterate.engine import self_check
from abliterate.engine.self_check import Verdict
from abliterate.export.check_behaviour import Expected, Precision, compare
from abliterate.model.editor import Editor
from abliterate.model.loader import demo_path, load_tokenizer
from abliterate.model.weights import dense_weight
from abliterate.pipeline import export as pipeline_export
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.export import Picked, prompt_records
from abliterate.pipeline.workbench import Workbench, load_calibrated
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import LoadSettings
from abliterate.types import Kernel, Trial, TrialParams
from support.models import dense_edit
from support.runs import Recorder, quick_settings


def params(scale: float = 1.0) -> TrialParams:
    """About twenty modules, the outermost with a fiftieth of the strongest coeff."""
    return TrialParams(
        "global",
        6.3,
        {
            "attn.o_proj": Kernel(1.1 * scale, 7.0, 0.2 * scale, 4.0),
            "mlp.down_proj": Kernel(0.9 * scale, 6.5, 0.02 * scale, 4.5),
        },
    )


@dataclass(frozen=True)
class Case:
    """A trial on a loaded model, ready to be exported in any state."""

    context: Context
    bench: Workbench
    result: Result
    picked: Picked
    recorder: Recorder

    @property
    def editor(self) -> Editor:
        """The workbench's."""
        return self.bench.editor

    def verified(self, folder: Path, kind: str, picked: Picked | None = None) -> tuple[bool, dict[str, Any]]:
        """Export, reload, compare."""
        settings = self.context.settings
        export = settings.export.model_copy(update={"kind": kind})
        context = self.context.with_settings(settings.model_copy(update={"export": export}))
        expected = pipeline_export._expect(self.bench, kind, self.picked.job, self.picked.trial)
        picked = replace(picked or self.picked, expected=expected)
        *_, record = pipeline_export.export_and_verify(context, picked, self.result, folder / kind)
        return record.verified, record.model_dump()["verification"]

    def with_factors(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Picked:
        """The pick with other factors in its job than the trial had."""
        return replace(self.picked, job=replace(self.picked.job, factors=change(dict(self.picked.job.factors))))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of bases and one cache: what is measured before a trial is the same for many of these cases.

    Nor is the trial engine compared with the reference for each of them; scores that it gets wrong wouldn't verify.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_check, "check", lambda engine, setup: Verdict(0, 0, 0, False))
        yield tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def few(prompt_files: dict[str, str], shared: Path) -> dict[str, str]:
    """Half of those prompts, but all that refusals are counted on."""
    files = dict(prompt_files)
    for name in files.keys() - {"harmful_eval"}:
        lines = Path(files[name]).read_text(encoding="utf-8").splitlines()
        files[name] = str(shared / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(lines[: len(lines) // 2]), encoding="utf-8")
    return files


def make_case(shared: Path, files: dict[str, str], stored: str, **over: Any) -> Case:
    """A case on the demo model, saved in the dtype `stored` first."""
    base = shared / stored
    if not base.exists():
        model = AutoModelForCausalLM.from_pretrained(demo_path() / "model", dtype=getattr(torch, stored))
        model.save_pretrained(base)
        load_tokenizer(str(demo_path() / "model"), LoadSettings()).save_pretrained(base)
    over |= {"response": {"max_new_tokens": 8}}  # of the base model enough to refuse
    settings = quick_settings(files, shared / "cache", model=str(base), **over)
    recorder = Recorder()
    context = Context.of(settings, recorder)
    bench = load_calibrated(context, read_prompts(context))
    directions = stages.find_directions(bench)
    baseline = stages.baseline(bench)
    trial = stages.evaluate(bench, 0, params(), DominancePruner.never())
    parts = {"identity": bench.identity(), "startup_trials": 1, "directions": stages.directions_record(directions)}
    result = Result(**bench.record(), **parts, prompts=prompt_records(settings, bench.prompts))
    result.searched([trial], [trial], baseline, bench.objectives)
    picked = pipeline_export.prepare(bench, settings, result, trial)
    return Case(context, bench, result, picked, recorder)


@pytest.fixture(scope="module")
def case(shared: Path, few: dict[str, str]) -> Case:
    """The usual case: stored in bfloat16, run in float32."""
    return make_case(shared, few, "bfloat16")


def edits_by_strength(case: Case) -> list[str]:
    """Edited modules, the weakest first."""
    probes = case.picked.expected.probes
    return sorted(probes, key=lambda name: float((probes[name].edited - probes[name].base).norm()))


@pytest.mark.parametrize(
    ("stored", "run", "representation"),
    [
        ("bfloat16", "float32", "exact"),
        ("bfloat16", "float32", "svd"),
        pytest.param("bfloat16", "bfloat16", "svd", marks=pytest.mark.slow),
        ("float16", "float16", "exact"),
        pytest.param("bfloat16", "bfloat16", "exact", marks=pytest.mark.slow),
        pytest.param("float16", "float16", "svd", marks=pytest.mark.slow),
    ],
)
def test_correct_exports_verify(
    stored: str, run: str, representation: str, shared: Path, tmp_path: Path, few: dict[str, str]
) -> None:
    over = {"load": {"dtypes": [run]}, "edit": {"representation": representation}}
    case = make_case(shared, few, stored, **over)
    for kind in ("merged", "adapter"):
        verified, record = case.verified(tmp_path, kind)
        assert verified, record
        assert record["module_error"]["max"] < 0.6 * record["tolerance"]["modules"]


@pytest.mark.parametrize("mode", ["pre", "none"])
def test_correct_exports_of_other_modes_verify(mode: str, shared: Path, tmp_path: Path, few: dict[str, str]) -> None:
    case = make_case(shared, few, "float32", edit={"mode": mode})
    for kind in ("merged", "adapter"):
        verified, record = case.verified(tmp_path, kind)
        assert verified, record


@pytest.mark.parametrize("quantization", ["bnb_8bit", "bnb_4bit"])
def test_exports_of_quantized_trials_verify_by_module(
    quantization: str, shared: Path, tmp_path: Path, few: dict[str, str]
) -> None:
    pytest.importorskip("bitsandbytes")
    case = make_case(shared, few, "bfloat16", load={"quantization": quantization})
    verified, record = case.verified(tmp_path, "merged")
    assert verified, record
    dropped = edits_by_strength(case)[9]  # in 4 bits the weakest two are less than the storage's own error
    verified, record = case.verified(tmp_path, "merged", case.with_factors(lambda f: {n: f[n] for n in f if n != dropped}))
    assert not verified
    assert record["module_error"]["off"] == [dropped]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("place", [0, 9, -1], ids=["weakest", "median", "strongest"])
def test_one_module_left_out_does_not_verify(case: Case, tmp_path: Path, kind: str, place: int) -> None:
    dropped = edits_by_strength(case)[place]
    verified, record = case.verified(tmp_path, kind, case.with_factors(lambda f: {n: f[n] for n in f if n != dropped}))
    assert not verified
    assert record["module_error"]["off"] == [dropped]
    assert record["module_error"]["max"] == pytest.approx(1, abs=0.2)  # of the weakest, an eighth is lost to storage
    assert "modules" in case.recorder.warnings[-1]
    assert "**The check failed** (" in (tmp_path / kind / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("scale", [0.95, 1.05])
def test_coeff_off_by_five_percent_does_not_verify(case: Case, tmp_path: Path, kind: str, scale: float) -> None:
    other = {name: factors.to("cpu") for name, factors in case.editor.factors(params(scale)).items()}
    verified, record = case.verified(tmp_path, kind, case.with_factors(lambda factors: other))
    assert not verified
    assert set(record["module_error"]["off"]) == set(other)
    # Behaviour alone sees it too: where it is largest, on the harmful prompts, and in the KL.
    assert not any(record["checks"][name] for name in ("kl_from_trial", "kl", "modules"))
    assert record["kl_from_trial"]["harmful"]["mean"] > 100 * record["tolerance"]["kl_from_trial"]


def test_unedited_base_does_not_verify(case: Case, tmp_path: Path) -> None:
    verified, record = case.verified(tmp_path, "merged", case.with_factors(lambda factors: {}))
    assert not verified
    assert record["checks"] == dict.fromkeys(("kl_from_trial", "kl", "refusals", "modules"), False)


def test_export_of_no_numbers_does_not_verify(case: Case, tmp_path: Path) -> None:
    some = edits_by_strength(case)[0]
    nan = replace(case.picked.job.factors[some], b=torch.full_like(case.picked.job.factors[some].b, torch.nan))
    verified, record = case.verified(tmp_path, "merged", case.with_factors(lambda factors: factors | {some: nan}))
    assert not verified
    assert "not numbers" in record["reason"]
    assert "not numbers)" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


def test_expecting_leaves_the_base_model(case: Case) -> None:
    assert case.editor.hooks.active == frozenset()


class Counts:
    """A scorer pair's records, as given."""

    name, goal = "refusals", "minimize"

    def __init__(self, name: str, record: Any) -> None:
        self.name, self.record = name, record

    def setup(self, base: Any) -> None: ...
    def score(self, observation: Any) -> Any:
        return self


@pytest.mark.parametrize(("state", "found", "ok"), [("complete", 5, False), ("stopped", 5, True), ("stopped", 2, False)])
def test_refusals_of_a_stopped_trial_are_a_lower_bound(state: Any, found: int, ok: bool) -> None:
    from abliterate.scorers import Observation, Response

    logprobs = torch.zeros(2, 1)
    trial = Trial(0, params(), state, {"refusals": 3, "kl": {"mean": 0.1}})
    expected = Expected(trial, logprobs, logprobs, 0.0, {})
    observed = Observation([Response("a")] * 10, logprobs)
    scorers = [Counts("refusals", found), Counts("kl", {"mean": 0.1})]
    verdict = compare(expected, observed, logprobs, {}, scorers, Precision(torch.float32, torch.float32))  # type: ignore[arg-type]
    assert verdict.ok is ok


def test_approximation_error_is_that_of_dense_matrices(shared: Path, few: dict[str, str]) -> None:
    case = make_case(shared, few, "float32", edit={"representation": "svd", "rank": 2})
    errors = []
    plan = case.editor.plan(params())
    modules = {target.name: target.module for target in case.bench.loaded.targets}
    for name, factors in case.picked.job.factors.items():
        weight = dense_weight(modules[name])
        _, index, (coeff,) = plan[name]
        change = dense_edit(weight, case.editor.directions.at(index), coeff, "full") - weight
        errors.append(float((change - factors.b @ factors.a).norm() / change.norm()))
    found = case.picked.approximation
    assert (found["mean"], found["max"]) == (
        pytest.approx(sum(errors) / len(errors), rel=1e-3),
        pytest.approx(max(errors), rel=1e-3),
    )
    print(found)
