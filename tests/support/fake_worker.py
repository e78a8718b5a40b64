"""A worker without a model, for tests and measurements: it asks for parameters, waits as long as a trial takes, and reports.

The process prints a line for each reported trial: its number, the seconds of asking, of reporting and of waiting, the times of
asking and of reporting, the seconds of both in which the database was at work, and whether the trial counted.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.search.space import Space
from abliterate.search.storage import FIRST_PAUSE, POLL
from abliterate.search.study import Study, open_study
from abliterate.settings.schema import SearchSettings
from abliterate.types import Trial

COMPONENTS = ("attn.o_proj", "mlp.down_proj")


def study_of(url: str, journal: Path, name: str, worker: str, trials: int, grace: float, pause: float = FIRST_PAUSE) -> Study:
    """The study of the fake workers."""
    settings = SearchSettings(trials=trials, ei_candidates=8, grace_seconds=grace)
    return open_study(url, journal, Space(settings, 12, COMPONENTS), 0, name, worker, pause=pause)


class Clock:
    """The seconds that a study's database took for statements and commits, without the heartbeat's."""

    def __init__(self, study: Study) -> None:
        self.seconds = 0.0
        self._thread = threading.get_ident()
        engine = getattr(getattr(study._storage, "_backend", None), "engine", None)
        if engine is not None:  # a journal has no database engine
            for name in ("do_execute", "do_executemany", "do_execute_no_params", "do_commit", "do_rollback"):
                setattr(engine.dialect, name, partial(self._timed, getattr(engine.dialect, name)))

    def _timed(self, work: Callable[..., Any], *given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*given, **options)
        finally:
            if threading.get_ident() == self._thread:
                self.seconds += time.perf_counter() - started


def work(study: Study, budget: int, seconds: float) -> None:
    """Carry out fake trials until the budget is used."""
    waits, clock = random.Random(), Clock(study)
    while len(study.trials()) < budget:
        study.fail_silent()
        started, before = time.perf_counter(), clock.seconds
        asked = study.ask(budget)
        if asked is None:
            time.sleep(POLL)
            continue
        took = time.perf_counter() - started
        wait, began = seconds * waits.uniform(0.5, 1.5), time.time() - took
        with study.at_work(asked):
            time.sleep(wait)
        count = asked.number % 50
        kl = {"mean": 0.1 * asked.params.kernels["attn.o_proj"].max_coeff}
        scores = {"kl": kl, "refusals": count, "unanswered": {"count": count}}
        started = time.perf_counter()
        mine = study.tell(asked, Trial(asked.number, asked.params, "complete", scores), 100)
        told = time.perf_counter() - started
        words = (
            asked.number,
            f"{took:.4f}",
            f"{told:.4f}",
            f"{wait:.4f}",
            f"{began:.4f}",
            f"{time.time():.4f}",
            f"{clock.seconds - before:.4f}",
        )
        print(*words, "told" if mine else "lost", flush=True)


def main(arguments: Sequence[str]) -> None:
    """A worker, or several threads of them."""
    url, journal, name, worker, budget, seconds, grace, *threads = arguments

    def one(worker: str) -> None:
        work(study_of(url, Path(journal), name, worker, int(budget), float(grace)), int(budget), float(seconds))

    several = [threading.Thread(target=one, args=(f"{worker}-{index}",)) for index in range(int((threads or ["0"])[0]))]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    if not several:
        one(worker)


if __name__ == "__main__":
    main(sys.argv[1:])
