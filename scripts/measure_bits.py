"""Count what rounding in bfloat16 changes: flags, counts, fronts, early stops and KL. Writes a table of docs/performance.md.

    OMP_NUM_THREADS=1 python scripts/measure_bits.py demo --out bits.jsonl
    python scripts/measure_bits.py demo --out bits.jsonl --page

In bfloat16 the reference itself isn't one number: its logits depend on the batch size. So each trial is measured by the
reference at two batch sizes and by the trial engine, with and without drafts, and every difference from the reference at the
first size stands beside the reference's own difference between its sizes. Trials are random points of the search space. Twenty
of them after each other are a search: each way prunes by the trials that it has measured itself. The model is `demo`, or a
folder that `train_demo_model.py --variant` or `real_model.py` made, with its prompts.

Each trial adds a line to the file, and a file that has lines already is continued.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rig import Quiet, settings_of
from torch import Tensor

from abliterate import Workbench, load
from abliterate.engine.prefill import resume_layers
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.self_check import Engine, EngineSetup, check
from abliterate.evaluation.trial import early_scorer
from abliterate.objectives import BY_MARKERS, KL, REFUSALS
from abliterate.pipeline import stages
from abliterate.scorers.base import EarlyScorer
from abliterate.scorers.kl import kl_divergence
from abliterate.search.front import pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import Baseline, BatchSizes, Params, Prompt, Trial, TrialParams

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- bits -->", "<!-- /bits -->"
SEARCH = 20  # trials that share a front
SEED = 0  # of the trials' parameters
FIRST, SECOND, PLAIN, DRAFTING = "reference", "reference, other batch size", "engine without drafts", "engine with drafts"
HEAD = (
    "| | flags that differ | trials whose count differs | fronts that differ | early stops | contradicted by the reference "
    "| by the engine itself | KL of a trial differs, median | most |"
)

Line = dict[str, Any]


@dataclass
class Way:
    """One way to measure trials: an engine, the base model's scores by it, and the trials of the current search."""

    name: str
    engine: Engine
    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    early: EarlyScorer
    trials: list[Trial] = field(default_factory=list)

    def measure_base(self) -> None:
        """Measure the unedited model, which is on now."""
        self.base: Tensor = self.engine.first_logprobs(self.harmless)
        flags = self.flags(None)
        assert flags is not None
        self.baseline = Baseline(sum(flags), len(self.harmful))

    def flags(self, limit: int | None) -> list[bool] | None:
        """Which harmful prompts are refused; None if the engine stopped at the `limit`."""
        responses = self.engine.respond(self.harmful, limit=limit)
        return None if responses is None else [self.early.counts(response) for response in responses]

    def measure(self, number: int, params: Params) -> Line:
        """Measure the edited model as trial `number` of the current search."""
        kl = kl_divergence(self.base, self.engine.first_logprobs(self.harmless))
        limit = DominancePruner.of(self.trials, self.baseline, BY_MARKERS).limit({KL: float(kl.mean())}, REFUSALS)
        flags = self.flags(limit)
        stopped = flags is None
        if flags is None:
            flags = self.flags(None)
            assert flags is not None
        if isinstance(self.engine, ReferenceEngine):  # it never stops; the line tells where it could have
            stopped = limit is not None and sum(flags) >= limit
        line = {"kl": kl.tolist(), "flags": flags, "limit": limit, "stopped": stopped}
        self.trials.append(trial_of(number, params, line))
        return line


def trial_of(number: int, params: Params, line: Line) -> Trial:
    """The trial of one way, from its part of a line."""
    refusals, kl = sum(line["flags"]), statistics.fmean(line["kl"])
    state = "stopped" if line["stopped"] else "complete"
    return Trial(number, params, state, {REFUSALS: refusals, KL: {"mean": kl}}, 0.0, values={REFUSALS: float(refusals), KL: kl})


def make_ways(setup: EngineSetup, second: int) -> list[Way]:
    """The four ways; `second` is the other batch size of the reference. The model must carry no edit."""
    reference, early = setup.reference, setup.early
    assert early is not None
    other = ReferenceEngine(
        reference.model,
        reference.chat,
        reference.reader,
        max_new_tokens=reference.max_new_tokens,
        sizes=BatchSizes.same(second),
    )
    engines: dict[str, Engine] = {
        FIRST: reference,
        SECOND: other,
        PLAIN: setup.engine(EfficiencySettings(use_drafts=False)),
        DRAFTING: setup.engine(EfficiencySettings()),
    }
    ways = [Way(name, engine, setup.harmful, setup.harmless, early) for name, engine in engines.items()]
    for way in ways:
        way.measure_base()
    return ways


def measure_trials(
    ways: Sequence[Way],
    trials: Sequence[TrialParams],
    edit: Callable[[Params], None],
    lines: list[Line],
    keep: Callable[[Line], None] = lambda line: None,
) -> None:
    """Measure the trials that aren't in `lines` yet, by every way, and add their lines; `keep` is called with each."""
    for number in range(len(lines) // SEARCH * SEARCH, len(lines)):
        for way in ways:
            way.trials.append(trial_of(number, trials[number], lines[number][way.name]))
    for number in range(len(lines), len(trials)):
        edit(trials[number])
        line: Line = {}
        for way in ways:
            if number % SEARCH == 0:
                way.trials.clear()
            line[way.name] = way.measure(number, trials[number])
        lines.append(line)
        keep(line)


@dataclass(frozen=True)
class Differences:
    """How often a way differs from the reference at its first batch size.

    `kl` has the difference of each trial's mean KL, in nats. `stops` counts trials that the way stops early (or, as the
    reference never stops, could have stopped), `contradicted` the ones of them in which the reference's whole responses have
    fewer refusals than the stop says, and `by_itself` those in which the way's own whole responses have.
    """

    flags: int
    counts: int
    fronts: int
    stops: int
    contradicted: int
    by_itself: int
    kl: list[float]


def differences(lines: Sequence[Line], name: str, baselines: dict[str, Baseline], trials: Sequence[Params]) -> Differences:
    """The differences of a way over all lines."""
    pairs = [(line[FIRST], line[name]) for line in lines]
    stopped = [(first, one) for first, one in pairs if one["stopped"]]
    return Differences(
        flags=sum(a != b for first, one in pairs for a, b in zip(first["flags"], one["flags"], strict=True)),
        counts=sum(sum(first["flags"]) != sum(one["flags"]) for first, one in pairs),
        fronts=sum(
            front(lines[start : start + SEARCH], FIRST, baselines, trials)
            != front(lines[start : start + SEARCH], name, baselines, trials)
            for start in range(0, len(lines), SEARCH)
        ),
        stops=len(stopped),
        contradicted=sum(sum(first["flags"]) < one["limit"] for first, one in stopped),
        by_itself=sum(sum(one["flags"]) < one["limit"] for _, one in stopped),
        kl=[abs(statistics.fmean(first["kl"]) - statistics.fmean(one["kl"])) for first, one in pairs],
    )


def front(lines: Sequence[Line], name: str, baselines: dict[str, Baseline], trials: Sequence[Params]) -> list[int]:
    """The places in one search of the trials on a way's front."""
    measured = [trial_of(number, trials[number], line[name]) for number, line in enumerate(lines)]
    return [trial.number for trial in pareto_front(measured, baselines[name], BY_MARKERS)]


def table(lines: Sequence[Line], baselines: dict[str, Baseline], trials: Sequence[Params]) -> list[str]:
    """The page's table."""
    flags, searches = sum(len(line[FIRST]["flags"]) for line in lines), -(-len(lines) // SEARCH)
    rows = [HEAD, "|---|" + "---|" * (HEAD.count("|") - 2)]
    for name in (SECOND, PLAIN, DRAFTING):
        found = differences(lines, name, baselines, trials)
        cells = (
            name,
            f"{found.flags} of {flags}",
            f"{found.counts} of {len(lines)}",
            f"{found.fronts} of {searches}",
            found.stops,
            found.contradicted,
            found.by_itself,
            f"{statistics.median(found.kl):.1e}",
            f"{max(found.kl):.1e}",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def prepared(bench: Workbench, count: int) -> EngineSetup:
    """The setup of engines on the first `count` prompts of each set."""
    bench.make_edits(stages.directions(bench.context, stages.residuals(bench)))
    layers = resume_layers(bench.editor.first_layers(bench.space.samples(256, seed=0)))
    prompts, early = bench.prompts, early_scorer(bench.scorers)
    return EngineSetup(
        bench.plain,
        bench.loaded.layers,
        bench.editor.hooks,
        early,
        prompts.harmful_eval[:count],
        prompts.harmless_eval[:count],
        layers,
        bench.editor.budget_bytes,
    )


def head_of(bench: Workbench, setup: EngineSetup, ways: Sequence[Way], given: Line) -> Line:
    """The file's first line: what is measured, what the self-check finds, and the unedited model's refusals by each way."""
    bench.editor.apply_exactly(bench.space.upper_half())
    engine = ways[-1].engine
    assert not isinstance(engine, ReferenceEngine)
    verdict = check(engine, setup)
    bench.editor.clear()
    checked = {"difference": verdict.difference, "allowed": verdict.allowed, "noise": verdict.noise}
    refused = {way.name: way.baseline.refusals for way in ways}
    return given | {"self_check": checked, "refused": refused, "prompts": len(setup.harmful)}


def main() -> None:
    """Measure the trials that the file lacks, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each set")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a response")
    parser.add_argument("--sizes", type=int, nargs=2, default=[20, 10], help="batch sizes of the reference")
    parser.add_argument("--dtype", default="bfloat16", help="float32 shows that nothing but rounding differs")
    parser.add_argument("--out", type=Path, required=True, help="file to which lines are added")
    parser.add_argument("--page", action="store_true", help="write the file's figures to the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        options = [f"cache_dir={cache}", f'load.dtypes=["{args.dtype}"]', f"response.max_new_tokens={args.tokens}"]
        options += [f"evaluation.batch_size={args.sizes[0]}", 'search.objectives=["refusals", "kl"]', "edit.mode=full"]
        lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
        given = {"model": Path(args.model).name, "dtype": args.dtype, "tokens": args.tokens, "sizes": args.sizes, "seed": SEED}
        if lines and any(lines[0][name] != value for name, value in given.items()):
            raise SystemExit(f"{args.out} has lines of other options; name another file.")
        with load(settings_of(args.model, 0, options), Quiet()) as bench:
            trials = bench.space.samples(args.trials, SEED)
            if not args.page:
                fill(bench, trials, args, given, lines)
    if args.page and lines:
        write_page(lines[0], lines[1:], trials, args)


def fill(bench: Workbench, trials: Sequence[TrialParams], args: Any, given: Line, lines: list[Line]) -> None:
    """Measure the trials that aren't in `lines` and add them to the file."""
    setup = prepared(bench, args.prompts)
    ways = make_ways(setup, args.sizes[1])

    def keep(line: Line) -> None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    if not lines:
        keep(head_of(bench, setup, ways, given))
    measure_trials(ways, trials, bench.editor.apply, lines[1:], keep)


def write_page(head: Line, lines: Sequence[Line], trials: Sequence[Params], args: Any) -> None:
    """Write the table and what it was measured on between the page's marks."""
    baselines = {name: Baseline(refused, head["prompts"]) for name, refused in head["refused"].items()}
    checked, noted = head["self_check"], f"{head['prompts']} + {head['prompts']} prompts, {head['tokens']} tokens"
    command = f"python scripts/measure_bits.py {args.model} --out bits.jsonl".replace(str(Path.home()), "~")
    text = [
        f"{datetime.date.today()}, `{command}`: {len(lines)} trials, {noted}, {head['dtype']}; the reference at "
        f"{head['sizes'][0]} and at {head['sizes'][1]} prompts a batch. The self-check found a difference of "
        f"{checked['difference']:.3f}, the reference's own between pads and none was {checked['noise']:.3f}, and "
        f"{checked['allowed']:.3f} was allowed.",
        "",
        *table(lines, baselines, trials),
    ]
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(text) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
