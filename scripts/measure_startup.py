"""Count what each stage before a first search feeds the model, in reference trials. Writes a table of docs/performance.md.

    OMP_NUM_THREADS=1 python scripts/measure_startup.py demo ~/.cache/abliterate-models/smollm2-refusing

The cache is empty, and loading is left out. A reference trial is the mean of three random trials by `model.generate`, which
answers all prompts of both evaluation sets; an answering one is that of the plain edit under which fewest of them are
refused, whose responses are longer. Forward passes and the tokens in them are counted, because they don't depend on the
machine's other work; the seconds are those of the processor. The yardstick's parts are counted apart. A model is `demo`, or a
folder that `train_demo_model.py --variant` or `real_model.py` made, with its prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rig import Counters, Quiet, settings_of

from abliterate import Workbench, find_directions, load
from abliterate.pipeline import stages, workbench, yardstick
from abliterate.refine.teachers import plain_edits
from abliterate.scorers.refusals import Refusals
from abliterate.types import Params

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- startup -->", "<!-- /startup -->"
TRIALS = 3  # of the reference
STRONG = 4  # plain edits, those that edit attention and MLPs alike
# The parts of the yardstick's stage, as functions of `pipeline/yardstick.py`.
PARTS = {
    "own_answers": "yardstick: sampled and greedy answers",
    "measured": "yardstick: sampled answers after their prompts",
    "other_logprobs": "yardstick: their beginnings after other prompts",
}


@dataclass
class Cost:
    """Forward passes, the tokens in them, and seconds of the processor."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Costs(Quiet):
    """A reporter that counts what each stage costs, as {stage: cost}. Parts of a stage may be counted apart."""

    counters: Counters = field(default_factory=Counters)
    of: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._names = ["load"]
        self._before = (0, 0, time.process_time())

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        """Count for the stage `name` from now on."""
        self._settle()
        self._names = [name]

    def stage_ended(self) -> None:
        """Count for no stage."""
        self._settle()
        self._names = ["between stages"]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the `with` block for the part `name`, and not for its stage."""
        self._settle()
        self._names.append(name)
        try:
            yield
        finally:
            self._settle()
            self._names.pop()

    def _settle(self) -> None:
        now = (self.counters.passes, self.counters.tokens, time.process_time())
        cost = self.of.setdefault(self._names[-1], Cost())
        cost.passes += now[0] - self._before[0]
        cost.tokens += now[1] - self._before[1]
        cost.seconds += now[2] - self._before[2]
        self._before = now


@contextlib.contextmanager
def counted(costs: Costs) -> Iterator[None]:
    """While active, models that are opened are counted, and so are the parts of the yardstick."""
    opened = workbench.open_workbench

    def opening(*args: Any, **kwargs: Any) -> Workbench:
        bench = opened(*args, **kwargs)
        bench.loaded.model.register_forward_pre_hook(costs.counters.count, with_kwargs=True)
        return bench

    def apart(name: str) -> Any:
        real = getattr(yardstick, name)

        def part(*args: Any, **kwargs: Any) -> Any:
            with costs.part(PARTS[name]):
                return real(*args, **kwargs)

        return mock.patch.object(yardstick, name, part)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(workbench, "open_workbench", opening))
        for name in PARTS:
            stack.enter_context(apart(name))
        yield


def first_start(model: str, assignments: list[str]) -> tuple[dict[str, Cost], Cost, Cost]:
    """{stage: what it costs} of a first start, what a trial of the reference costs, and what one costs whose model answers."""
    costs = Costs()
    with (
        tempfile.TemporaryDirectory() as cache,
        counted(costs),
        load(settings_of(model, 0, [f"cache_dir={cache}", *assignments]), costs) as bench,
    ):
        find_directions(bench)
        stages.baseline(bench)
        found = {name: cost for name, cost in costs.of.items() if cost.tokens}
        for params in bench.space.samples(TRIALS, seed=1):
            reference_trial(bench, params, costs, "reference")
        plain = plain_edits(bench.space.n_layers, bench.space.components)[:STRONG]
        refused = [reference_trial(bench, params, costs, f"plain {index}") for index, params in enumerate(plain)]
    whole, answering = costs.of["reference"], costs.of[f"plain {refused.index(min(refused))}"]
    return found, Cost(round(whole.passes / TRIALS), round(whole.tokens / TRIALS), whole.seconds / TRIALS), answering


def reference_trial(bench: Workbench, params: Params, costs: Costs, name: str) -> int:
    """The number of refusals in a trial of the reference, which is counted as the part `name`."""
    markers = next(scorer for scorer in bench.scorers if isinstance(scorer, Refusals))
    with costs.part(name), bench.edited(params):
        found = bench.plain.observe(bench.prompts.harmful_eval, bench.prompts.harmless_eval, lambda done, total: None)
    return sum(map(markers.is_refusal, found.responses))


def rows_of(found: dict[str, Cost], trial: Cost, answering: Cost) -> list[str]:
    """The rows of a model's table."""
    total = Cost(*(sum(getattr(cost, name) for cost in found.values()) for name in ("passes", "tokens", "seconds")))
    named = {"a reference trial": trial, "a reference trial that answers": answering, **found, "**all stages**": total}
    return [
        f"| {name} | {cost.passes} | {cost.tokens} | {cost.seconds:.1f} | {cost.passes / trial.passes:.2f} "
        f"| {cost.tokens / trial.tokens:.2f} | {cost.seconds / trial.seconds:.2f} |"
        for name, cost in named.items()
    ]


def main() -> None:
    """Count for a model, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--set", nargs="*", default=[], dest="assignments", help="further settings, key=value")
    parser.add_argument("--no-page", action="store_true", help="print the table only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python scripts/measure_startup.py {' '.join(args.models)}".replace(str(Path.home()), "~")
    lines = [f"{datetime.date.today()}, `{command}`:"]
    for model in args.models:
        head = f"| {Path(model).name} | passes | tokens | seconds | passes, in reference trials | tokens | seconds |"
        lines += ["", head, "|---" * 7 + "|", *rows_of(*first_start(model, args.assignments))]
    print("\n".join(lines), json.dumps(args.assignments), flush=True)
    if not args.no_page:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
