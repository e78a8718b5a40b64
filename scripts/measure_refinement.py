"""Measure refinement against the search alone: the least KL at few refusals, its cost, and exact good answers.

    python scripts/measure_refinement.py demo --seeds 0 1 2 --trials 200 --starts 0 10 20 --out refinement.jsonl

Each line of the output is one course of one seed: `trials` trials and no refinement, or `starts` trials and refinement after
them. `tokens` counts what the model was fed from the start, prompts for the directions and the baseline included (`ready`): a
token forward once, backward twice. The model is `demo`, or a folder that `train_demo_model.py --variant` or `real_model.py`
made, with its prompts. Good answers are counted exactly where the corpus knows them (`ground_truth.py`). With `--heldout`, the
trial of least KL at 3 % refusals or fewer and the one that a run would select are measured on held-out prompts, too; with
`--heldout refined` every refined trial is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ground_truth import is_good
from rig import Counters, Quiet, settings_of

from abliterate import Workbench, find_directions, load, search
from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.model.loader import demo_path
from abliterate.pipeline import passes, refine, stages, workbench
from abliterate.pipeline.heldout import measured as measured_heldout
from abliterate.pipeline.heldout import read_heldout, views
from abliterate.pipeline.lesson import Lesson, Teacher
from abliterate.pipeline.refine import Refinement
from abliterate.prompts.sets import HUB_HELDOUT
from abliterate.refine.descent import Pass
from abliterate.refine.loss import Rows
from abliterate.search.front import pareto_front
from abliterate.search.selection import parse_rule
from abliterate.settings.schema import Settings
from abliterate.types import Baseline, Params, Prompt, RefinedParams, Trial

# The shares of refused prompts at which the least KL is read off.
SHARES = (0.0, 0.03, 0.1)
HELDOUT = 0.03  # the one of them whose trial is measured on held-out prompts


def main() -> None:
    """Measure all courses, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", type=int, default=200, help="trials of the search alone; 0 leaves it out")
    parser.add_argument("--starts", type=int, nargs="*", default=[0, 10, 20, 40], help="trials before refinement")
    parser.add_argument("--spoil", type=float, default=0.0, help="share of the targets whose tokens are shuffled")
    parser.add_argument("--apart", action="store_true", help="share no prompts and keep no logits, to see what that saves")
    parser.add_argument(
        "--heldout",
        nargs="?",
        const="two",
        choices=["two", "refined"],
        help="measure two trials on held-out prompts, too, or every refined one besides",
    )
    parser.add_argument("--set", nargs="*", default=[], dest="assignments", help="further settings, key=value")
    parser.add_argument("--out", type=Path, required=True, help="file to which lines are added")
    args = parser.parse_args()
    for seed in args.seeds:
        for trials, refined in [(args.trials, False)] * bool(args.trials) + [(start, True) for start in args.starts]:
            # A cache of its own, so that no course gets for nothing what another one has paid for.
            with (
                all_apart() if args.apart else contextlib.nullcontext(),
                spoiled_targets(args.spoil),
                tempfile.TemporaryDirectory() as cache,
            ):
                settings = settings_of(args.model, seed, [f"cache_dir={cache}", *args.assignments])
                line = course(settings, trials, refined=refined, heldout=args.heldout)
            given = {
                "day": datetime.date.today().isoformat(),
                "model": Path(args.model).name,
                "seed": seed,
                "set": _with_mode(args.assignments, line.pop("mode")),
                "spoil": args.spoil,
                "apart": args.apart,
            }
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(given | line) + "\n")
            print(json.dumps({key: line[key] for key in ("trials", "refined", "best", "tokens", "seconds")}), flush=True)


def _with_mode(assignments: Sequence[str], mode: str) -> list[str]:
    """The settings that were set, with the edit mode that the run had."""
    given = [text for text in assignments if not text.startswith("edit.mode=")]
    return [f"edit.mode={mode}", *given]


def course(settings: Settings, trials: int, *, refined: bool, heldout: str | None = None) -> dict[str, Any]:
    """One course: its trials, what was best on the way, and the cost of each."""
    started, counters, points = time.perf_counter(), Counters(), list[dict[str, Any]]()
    with load(settings, Quiet()) as bench:
        bench.loaded.model.register_forward_pre_hook(counters.count, with_kwargs=True)
        directions = find_directions(bench)
        baseline = stages.baseline(bench)
        ready = {"tokens": counters.tokens, "seconds": round(time.perf_counter() - started, 2)}

        def note(trial: Trial, backward: int) -> None:
            cost = {"tokens": counters.tokens + backward, "seconds": round(time.perf_counter() - started, 2)}
            points.append(point(trial) | cost)
            if isinstance(trial.params, RefinedParams):
                print(json.dumps(points[-1]), flush=True)

        bench.baseline = baseline
        searched = search(bench, directions, trials)
        for trial in searched if trials else ():
            note(trial, 0)
        if refined:
            with backward_tokens(counters) as fed:
                for trial in Refinement(bench, searched.study, searched.trials, trials):
                    note(trial, sum(fed))
        everything = searched.study.trials()
        best = {str(share): least_kl(everything, baseline, share) for share in SHARES}
        seconds = round(time.perf_counter() - started, 1)
        found = {share: None if trial is None else measured(bench, settings, trial) for share, trial in best.items()}
        least = best[str(HELDOUT)] if heldout else None
        front = pareto_front(everything, baseline, bench.objectives) if heldout else ()
        selected = parse_rule("auto", objectives=bench.objectives)(front) if front else None
        every = [trial for trial in everything if isinstance(trial.params, RefinedParams)] if heldout == "refined" else []
        wanted = {trial.number: trial for trial in (least, selected, *every) if trial is not None}
        figures = {number: on_heldout(bench, trial) for number, trial in wanted.items()}
        return {
            "weights": bench.loaded.info.fingerprint,  # what `real_model.py` makes depends on the kind of CPU
            "mode": bench.settings.edit.mode,
            "trials": trials,
            "refined": refined,
            "best": found,
            "heldout": None if least is None else figures[least.number],
            "every": {trial.number: figures[trial.number] for trial in every},
            "selected": None if selected is None else point(selected) | {"heldout": figures[selected.number]},
            "ready": ready,
            "prompts": baseline.prompts,
            "points": points,
            "tokens": points[-1]["tokens"] if points else 0,
            "seconds": seconds,
        }


@contextlib.contextmanager
def all_apart() -> Iterator[None]:
    """While active, every row is fed whole, and the unedited model is asked in every step."""
    with (
        mock.patch.object(workbench, "may_share", return_value=False),
        mock.patch.object(passes, "may_share", return_value=False),
        mock.patch.object(Pass, "keep_base_logits", return_value=None),
    ):
        yield


@contextlib.contextmanager
def spoiled_targets(share: float) -> Iterator[None]:
    """While active, this share of the answers to learn from have their tokens in random order."""
    real = refine.prepare_lesson

    def spoiled(bench: Workbench, teachers: Sequence[Teacher]) -> Lesson | None:
        lesson = real(bench, teachers)
        if lesson is None:
            return None
        draw, rows = random.Random(0), list(lesson.training.harmful)
        for index in draw.sample(range(len(rows)), round(share * len(rows))):
            rows[index] = replace(rows[index], answer=draw.sample(list(rows[index].answer), len(rows[index].answer)))
        return replace(lesson, training=replace(lesson.training, harmful=rows))

    refine.prepare_lesson = spoiled  # type: ignore[assignment]
    try:
        yield
    finally:
        refine.prepare_lesson = real


@contextlib.contextmanager
def backward_tokens(counters: Counters) -> Iterator[list[int]]:
    """While active, the list gets twice the tokens of each edited forward pass, as the cost of its backward pass."""
    fed: list[int] = []
    asked: list[int] = []  # those of passes of the unedited model, which have no backward pass
    real, real_base = Pass.gradients, Pass.base_of

    def counted(self: Pass, factors: Any, rows: Rows, beta: float) -> Any:
        before, asked_before = counters.tokens, sum(asked)
        found = real(self, factors, rows, beta)
        fed.append(2 * (counters.tokens - before - (sum(asked) - asked_before)))
        return found

    def counted_base(self: Pass, rows: Sequence[TeacherForced]) -> list[torch.Tensor]:
        before = counters.tokens
        found = real_base(self, rows)
        asked.append(counters.tokens - before)
        return found

    with mock.patch.object(Pass, "gradients", counted), mock.patch.object(Pass, "base_of", counted_base):
        yield fed


def point(trial: Trial) -> dict[str, Any]:
    """What a line says of a trial."""
    unanswered = trial.unanswered if "unanswered" in trial.scores else None
    record = {
        "number": trial.number,
        "state": trial.state,
        "kl": trial.kl if "kl" in trial.scores else None,  # a trial that failed has no scores
        "refusals": trial.scores.get("refusals"),
        "unanswered": unanswered,
    }
    facts = getattr(trial.params, "facts", {})
    return record | {key: facts[key] for key in ("beta", "steps", "validation") if key in facts}


def least_kl(trials: Sequence[Trial], baseline: Baseline, share: float) -> Trial | None:
    """The complete trial of least KL among those that refuse at most this share of the prompts."""
    fit = [trial for trial in trials if trial.state == "complete" and trial.refusals <= share * baseline.prompts]
    return min(fit, key=lambda trial: trial.kl, default=None)


def measured(bench: Workbench, settings: Settings, trial: Trial) -> dict[str, Any]:
    """A trial's scores, with exact good answers where the corpus knows them."""
    return point(trial) | {"good": good_answers(bench, settings, trial.params)}


def on_heldout(bench: Workbench, trial: Trial) -> dict[str, Any]:
    """A trial's figures on held-out prompts: unanswered harmful ones, and how far answers to harmless ones move."""
    folder, settings = prompts_folder(bench.settings.model), bench.settings
    sets = {path.stem: str(path) for name in HUB_HELDOUT if (path := folder / f"{name}.jsonl").exists()}
    evaluation = settings.evaluation.model_copy(update={"heldout": True})
    named = settings.model_copy(update={"prompts": settings.prompts.model_copy(update=sets), "evaluation": evaluation})
    held = read_heldout(bench.context.with_settings(named), tuple(bench.prompts.by_name().values()))
    assert held is not None
    found = measured_heldout(bench, *views(bench, trial), held)
    kinds = {name: found[name]["unanswered"] for name in ("base", "candidate")}
    over = {name: found[name]["over_refusals"] for name in ("base", "candidate")}
    return {name: found[name] for name in ("kl", "kl_answers", "perplexity", "unchanged")} | {
        "unanswered": kinds,
        "over_refusals": over,
    }


def prompts_folder(model: str) -> Path:
    """The folder with a model's prompt sets."""
    return demo_path() / "prompts" if model == "demo" else Path(model) / "prompts"


def good_answers(bench: Workbench, settings: Settings, params: Params) -> int | None:
    """The number of exact good answers to the harmful evaluation prompts; None for a model without a corpus."""
    lines = (prompts_folder(settings.model) / "harmful_eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if not all("verb" in row for row in rows):
        return None
    with bench.edited(params):
        answers = bench.plain.answers([Prompt(row["prompt"], settings.prompts.system) for row in rows])
    return sum(is_good(row, one.response.text, cut=not one.ended) for row, one in zip(rows, answers, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
