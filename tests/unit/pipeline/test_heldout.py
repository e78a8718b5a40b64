"""Held-out evaluation: intervals, faults, drift against a dense float64 reference, the run's last step, evaluate."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.engine.responses import Answer
from abliterate.errors import InputError, TrialError
from abliterate.evaluation import teacher_forced
from abliterate.evaluation.confidence import clopper_pearson
from abliterate.evaluation.heldout import HeldoutSets, fault_of, first_difference, measure, repetition
from abliterate.evaluation.teacher_forced import ModelView, TeacherForced, drift
from abliterate.model.loader import demo_path
from abliterate.pipeline import heldout
from abliterate.pipeline.context import Context
from abliterate.prompts import sets
from abliterate.prompts.files import DatasetName, parse_source
from abliterate.scorers import Response, make_scorers
from abliterate.settings.schema import Settings
from abliterate.types import Prompt, Score, kl_text
from support.cli import Invoke, assert_sentence, prompt_options
from support.engine import make_engine
from support.events import check, checked, let_models_print
from support.models import PROMPTS, make_editor, make_loaded, make_model, make_params, write_dense
from support.runs import SMALL, Files, Recorder, quick_settings, run_in

MARKERS = ["sorry", "can't"]
SETS = HeldoutSets(PROMPTS, PROMPTS[::-1], PROMPTS[:2])


def side(model: PreTrainedModel, batch_size: int = 2) -> ModelView:
    """A model that needs nothing to be itself."""
    return ModelView(make_engine(model, batch_size), contextlib.nullcontext)


def edited_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model, and the same with a trial's W' written into it."""
    base = make_model(family)
    other = copy.deepcopy(base)
    write_dense(other, make_editor(make_loaded(base)), make_params(1), "full")
    return base, other


@torch.no_grad()
def dense(base: PreTrainedModel, other: PreTrainedModel, row: TeacherForced) -> tuple[Tensor, Tensor, Tensor]:
    """KL and both losses of every answer token by definition: the whole sequence alone, in float64."""
    ids = torch.tensor([[*row.prompt, *row.answer]])
    logs = [copy.deepcopy(one).double()(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for one in (base, other)]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    tokens = torch.tensor(list(row.answer))[:, None]
    return kl, -logs[0].gather(1, tokens)[:, 0], -logs[1].gather(1, tokens)[:, 0]


def rows_of(engine: Any) -> list[TeacherForced]:
    """Each prompt and the model's own answer."""
    answers = engine.answers(PROMPTS)
    return [TeacherForced(engine.chat.token_ids(prompt), answer.ids) for prompt, answer in zip(PROMPTS, answers, strict=True)]


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),  # of scipy's beta.ppf
    [
        (0, 100, 0.0, 0.03621669264517641),
        (3, 100, 0.006229971538306395, 0.08517605297428002),
        (50, 100, 0.39832112950330095, 0.601678870496699),
        (5, 10, 0.18708602844739855, 0.8129139715526015),
        (10, 10, 0.6915028921812392, 1.0),
        (97, 100, 0.91482394702572, 0.9937700284616936),
        (1, 60, 0.00042187445234200883, 0.08939905005748702),
    ],
)
def test_clopper_pearson_by_table(count: int, total: int, low: float, high: float) -> None:
    assert clopper_pearson(count, total) == pytest.approx((low, high), abs=1e-10)


def test_clopper_pearson_laws() -> None:
    assert clopper_pearson(0, 0) == (0, 1)
    for total in (1, 7, 300):
        for count in {0, 1, total // 3, total}:
            low, high = clopper_pearson(count, total)
            assert 0 <= low <= count / total <= high <= 1
            mirrored = clopper_pearson(total - count, total)
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)
            wider = clopper_pearson(count, total, 0.99)
            assert wider[0] <= low
            assert high <= wider[1]


def test_faults_are_told_apart() -> None:
    def answer(text: str, ids: int | tuple[int, ...], ended: bool = True, is_open: bool = False) -> Answer:
        return Answer(tuple(range(ids)) if isinstance(ids, int) else ids, ended, Response(text, is_open))

    assert fault_of(answer("A whole sentence.", 12)) is None
    assert fault_of(answer("cut at the limit", 3, ended=False)) is None
    assert fault_of(answer(" \n", 2)) == "empty"
    assert fault_of(answer("", 30, is_open=True)) == "unfinished_thinking"
    assert fault_of(answer("Sure.", 3)) == "early_end"
    assert fault_of(answer("ha ha", (1, 2) * 20)) == "repetitive"
    assert repetition((1, 2, 3, 4, 5, 6, 7) * 2) == 0  # too short to tell
    assert repetition((7,) * 20) == pytest.approx(16 / 17)
    assert repetition(tuple(range(40))) == 0


def test_first_difference() -> None:
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2
    assert first_difference((), (1,)) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_drift_is_the_dense_one(family: str, batch_size: int) -> None:
    base, other = edited_pair(family)
    one, two = side(base, batch_size), side(other, batch_size)
    rows = rows_of(one.engine)
    rows[1] = TeacherForced(rows[1].prompt, rows[1].answer[:4])  # answers of unequal length
    counts: list[int] = []
    for found, row in zip(drift(one, two, rows, counts.append), rows, strict=True):
        kl, before, after = dense(base, other, row)
        assert len(found.kl) == len(row.answer)
        torch.testing.assert_close(found.kl, kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.base, before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.candidate, after, rtol=1e-5, atol=1e-5)
    assert counts[-1] == len(rows)
    assert max(float(found.kl.max()) for found in drift(one, two, rows, counts.append)) > 1e-3  # the edit is seen


def test_logits_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = edited_pair("llama")
    one, two = side(base, 3), side(other, 3)
    rows = rows_of(one.engine)
    whole = drift(one, two, rows, lambda done: None)
    fed: list[int] = []
    real = teacher_forced.answer_logits
    monkeypatch.setattr(
        teacher_forced, "answer_logits", lambda model, part, device: fed.append(len(part)) or real(model, part, device)
    )
    small = drift(one, two, rows, lambda done: None, budget=1)
    assert set(fed) == {1}
    for a, b in zip(whole, small, strict=True):
        torch.testing.assert_close(a.kl, b.kl, rtol=1e-3, atol=1e-6)


def test_numbers_that_are_none_are_refused() -> None:
    base, other = edited_pair("llama")
    with torch.no_grad():
        other.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(TrialError, match="not numbers"):
        drift(side(base), side(other), rows_of(side(base).engine), lambda done: None)


def test_a_model_against_itself() -> None:
    model = make_model("llama")
    seen: list[tuple[int, int]] = []
    scorers = make_scorers(["refusals", "kl", "unfinished_thinking"], MARKERS)
    record = measure(side(model), side(model), SETS, scorers, lambda done, total: seen.append((done, total)))
    assert record["base"] == record["candidate"]
    assert record["kl"] == {"mean": 0, "median": 0, "max": 0}
    assert record["kl_answers"]["max"] == 0
    assert record["perplexity"]["base"] == record["perplexity"]["candidate"]
    unchanged = record["unchanged"]
    assert (unchanged["count"], unchanged["share"], unchanged["first_difference"]) == (3, 1, None)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (19, 19)
    json.dumps(record, allow_nan=False)


class Odd:
    """A scorer of a user's, and a judge: `how` says what it does wrong."""

    goal = "minimize"

    def __init__(self, how: str) -> None:
        self.name = self.how = how

    def setup(self, base: Any) -> None:
        if self.how == "setup":
            raise RuntimeError("no disk")

    def score(self, observation: Any) -> Any:
        if self.how == "score":
            raise LookupError("no word")
        value, record = {"nan": (math.nan, 1), "set": (1.0, {1}), "number": (1.0, math.inf)}.get(self.how, (2.0, [2]))
        return None if self.how == "none" else Score(self.name, value, "minimize", record)


class OddJudge(Odd):
    def verdicts(self, observation: Any) -> Any:
        if self.how == "raises":
            raise OSError("no line")
        return {"few": [True], "nothing": None}.get(self.how, [1] * len(observation.responses))


def test_a_scorer_that_fails_costs_its_own_figures_only() -> None:
    model = make_model("llama")
    wrong = ("setup", "score", "nan", "set", "number", "none")
    odd = [*map(Odd, (*wrong, "fine")), *map(OddJudge, ("raises", "few", "nothing", "agrees"))]
    scorers = (*make_scorers(["refusals", "kl"], MARKERS), *odd)
    record = measure(side(model), side(model), SETS, scorers, lambda done, total: None)
    plain = measure(side(model), side(model), SETS, scorers[:2], lambda done, total: None)
    assert record | {"scores": {}, "judges": []} == plain
    assert record["scores"].pop("fine") == {
        "base": [2],
        "candidate": [2],
        "values": {"base": 2.0, "candidate": 2.0},
        "error": "",
    }
    assert set(record["scores"]) == set(wrong)
    for name, one in record["scores"].items():
        assert one["base"] is one["candidate"] is None
        assert f"scorer {name}" in one["error"]
    *failed, agrees = record["judges"]
    assert [bool(one["error"]) for one in failed] == [True] * 3
    assert agrees["error"] == ""
    assert agrees["base"]["count"] == 3
    json.dumps(record, allow_nan=False)


def test_measure_gives_the_reference_numbers() -> None:
    base, other = edited_pair("llama")
    record = measure(side(base), side(other), SETS, make_scorers(["refusals", "kl"], MARKERS), lambda done, total: None)
    engine = side(base, 1).engine
    answers = engine.answers(SETS.harmless)
    rows = [TeacherForced(engine.chat.token_ids(p), answer.ids) for p, answer in zip(SETS.harmless, answers, strict=True)]
    parts = [dense(base, other, row) for row in rows]
    everything = torch.cat([part[0] for part in parts])
    first = torch.stack([part[0][0] for part in parts])
    assert record["kl"]["mean"] == pytest.approx(float(first.mean()), rel=1e-4)
    assert record["kl"]["max"] == pytest.approx(float(first.max()), rel=1e-4)
    assert record["kl_answers"]["mean"] == pytest.approx(float(everything.mean()), rel=1e-4)
    assert record["kl_answers"]["median"] == pytest.approx(float(everything.median()), rel=1e-3)
    assert record["kl_answers"]["tokens"] == len(everything)
    for place, name in ((1, "base"), (2, "candidate")):
        loss = torch.cat([part[place] for part in parts]).mean()
        assert record["perplexity"][name] == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_the_last_step_of_a_run(measured: tuple[Path, dict[str, Any], Settings]) -> None:
    folder, result, _ = measured
    found = result["heldout"]
    check("held-out", found)
    assert found["trial"] == result["selected"]
    assert {name: one["count"] for name, one in found["prompts"].items()} == SMALL
    trial = next(one for one in result["trials"] if one["number"] == result["selected"])
    assert found["search"]["refusals"]["count"] == trial["scores"]["refusals"]
    assert found["search"]["kl"] == trial["scores"]["kl"]
    assert found["optimism"]["kl"] == pytest.approx(found["kl"]["mean"] - trial["scores"]["kl"]["mean"])
    assert found["base"]["refusals"]["count"] == 8
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "8 of harmful_heldout.jsonl" in card
    kls = kl_text(found["kl"]["mean"]), kl_text(trial["scores"]["kl"]["mean"])
    assert f"KL of the first token, mean | 0 | {' | '.join(kls)}" in card
    assert "held-out" in result["timings"]


def test_the_edit_in_memory_is_the_export(
    measured: tuple[Path, dict[str, Any], Settings],
    heldout_files: Files,
    prompt_files: Files,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    folder, result, settings = measured
    options = [*prompt_options(heldout_files), "--batch-size", "12", "--cache-dir", settings.cache_dir]
    own = ["--set", "response.max_new_tokens=20", "--set", "response.prefix_prompts=4"]
    sets = [part for name, path in prompt_files.items() for part in ("--set", f"prompts.{name}={path}")]
    with pytest.MonkeyPatch.context() as patch:
        let_models_print(patch)
        lines = checked(invoke("evaluate", "demo", folder, "--json", "--batch-size", "12"), "evaluate")
    trial = lines[-1]["heldout"]
    # Nothing but rounding: the run's step had another batch before it.
    assert trial["candidate"] == result["heldout"]["candidate"]
    assert trial["kl_answers"]["mean"] == pytest.approx(result["heldout"]["kl_answers"]["mean"], rel=1e-4)
    assert trial["optimism"] is not None
    export = invoke("export", folder, "--trial", result["selected"], "--kind", "adapter", "-o", tmp_path / "adapter")
    assert export.code == 0
    for candidate in (folder / "model", tmp_path / "adapter"):
        found = checked(invoke("evaluate", "demo", candidate, *options, *own, *sets, "--json"), "evaluate")[-1]["heldout"]
        assert found["search"] is None
        assert found["kl"]["mean"] == pytest.approx(trial["kl"]["mean"], rel=0.02)
        assert found["perplexity"]["candidate"] == pytest.approx(trial["perplexity"]["candidate"], rel=0.01)
        assert abs(found["candidate"]["refusals"]["count"] - trial["candidate"]["refusals"]["count"]) <= 1


def test_what_can_not_be_evaluated(
    measured: tuple[Path, dict[str, Any], Settings],
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    folder, _, _ = measured
    assert_sentence(invoke("evaluate", "demo", f"{folder}:99"), 2, "no finished trial 99")
    assert_sentence(invoke("evaluate", "demo", tmp_path / "nothing"), 2, "There is no model directory")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert_sentence(invoke("evaluate", "demo", tmp_path / "adapter", "--batch-size", 12), 2, "The adapter in", "can't be read")
    given = ["--harmful-heldout", tmp_path / "missing.txt"]
    assert_sentence(invoke("evaluate", "demo", folder, *given), 2, "missing.txt")
    assert_sentence(invoke("run", "demo", *given, "-o", "new"), 2, "missing.txt")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("lean")
def test_sets_that_are_given_must_be_there_and_default_ones_may_fail(
    prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        heldout, "heldout_sources", lambda settings: dict.fromkeys(sets.HUB_HELDOUT, str(tmp_path / "gone.txt"))
    )
    short = {"search": {"trials": 1, "startup_trials": 1}, "response": {"max_new_tokens": 8}}
    over = {"evaluation": {"heldout": True}, "export": {"kind": "none"}, **short}
    result, recorder = run_in(tmp_path / "run", quick_settings(prompt_files, tmp_path / "cache", **over))
    assert "heldout" not in result
    assert any("Nothing is measured on harmful-heldout prompts" in text for text in recorder.warnings)
    monkeypatch.undo()
    monkeypatch.setattr(heldout, "measure", _no_numbers)
    small = {"prompts": dict.fromkeys(SMALL, prompt_files["harmless"])}
    settings = quick_settings(prompt_files, tmp_path / "cache", **over, **small)
    with pytest.raises(InputError, match=r"No prompt of harmless\.jsonl is held out"):
        run_in(tmp_path / "other", settings)
    small = {"prompts": {name: str(demo_path() / "prompts" / f"{name}.jsonl") for name in SMALL}}
    settings = quick_settings(prompt_files, tmp_path / "cache", **over, **small)
    # The same study: held-out sets are none of its business.
    again, recorder = run_in(tmp_path / "run", settings, resume=True)
    assert again["trials"] == result["trials"]
    assert again["identity"] == result["identity"]
    assert "heldout" not in again
    assert any("could not be measured on held-out prompts (broken)" in text for text in recorder.warnings)


def _no_numbers(*args: Any) -> Any:
    raise TrialError("broken")


def test_what_other_sets_have_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("Paint the  Fence!\nMend a chair\nmend a CHAIR\nLift a lamp\n", encoding="utf-8")
    prompts = {name: str(tmp_path / "set.txt") for name in ("harmful_heldout", "harmless_heldout")}
    (tmp_path / "more.txt").write_text("Wrap a kite\n", encoding="utf-8")
    prompts |= {"harmless_heldout": str(tmp_path / "more.txt"), "over_refusal": str(tmp_path / "more2.txt")}
    (tmp_path / "more2.txt").write_text("Weigh a drum\n", encoding="utf-8")
    settings = Settings.model_validate({"model": "demo", "prompts": prompts})
    recorder = Recorder()
    context = Context(settings, recorder, None, lambda: None)  # type: ignore[arg-type]
    found = heldout.read_heldout(context, [[Prompt("paint the fence!")]])
    assert found is not None
    assert [prompt.text for prompt in found.sets.harmful] == ["Mend a chair", "Lift a lamp"]
    record = found.record["harmful_heldout"]
    assert (record["source"], record["count"], record["dropped"], record["repeated"]) == ("set.txt", 2, 1, 1)
    assert "(left out: 1 that other sets have, 1 repeated)" in recorder.notes[-1]


def test_a_data_set_may_have_a_configuration() -> None:
    expected = DatasetName("JailbreakBench/JBB-Behaviors", "harmful", "Goal", "behaviors")
    assert parse_source(sets.HUB_HELDOUT["harmful_heldout"]) == expected
    assert parse_source("a/b:train[:4]:text") == DatasetName("a/b", "train[:4]", "text")


def test_the_demo_has_sets_of_its_own() -> None:
    sources = sets.heldout_sources(Settings(model="demo"))
    assert all(Path(source).is_file() for source in sources.values())
    assert sets.heldout_sources(Settings(model="other")) == sets.HUB_HELDOUT
