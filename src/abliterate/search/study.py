"""The search: a seeded sampler, and the study with its budget of trials. Knows no model and no tensors.

Every finished trial is durable before the next is asked for. Optuna doesn't store a sampler's state: it is seeded
anew for each ask from the run's seed and the number of trials told, so a resumed study is the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from abliterate.errors import AbliterateError, InputError
from abliterate.objectives import reported_values
from abliterate.search.space import Space
from abliterate.search.storage import (
    BEAT,
    HEARTBEAT,
    Silence,
    disk_refused,
    first_line,
    heartbeat,
    open_storage,
    patiently,
    share,
)
from abliterate.settings.schema import SearchSettings
from abliterate.types import Trial, TrialParams

STUDY_NAME = "abliterate"
FORMAT = 1
# The worker that a run is itself: one at a time, so that what it left is its own.
RUN = "run"
_RECORD, _IDENTITY, _INTERRUPTED, _STARTUP = "record", "identity", "interrupted", "startup_trials"
_SLOT, _WORKER, _FORMAT = "slot", "worker", "format"


@dataclass(frozen=True)
class Asked:
    """A trial in work: its logical number (a slot of the budget), its parameters, and Optuna's handle."""

    number: int
    params: TrialParams
    handle: optuna.Trial


class Study:
    """One study in a journal file or an Optuna RDB, for one or several workers.

    The budget of trials is slots 0, 1, …; a slot is taken by whoever begins a trial for it, and free again if that trial is
    interrupted or its worker dies. Of two that take one at the same time, the trial that the storage numbered first has it.
    """

    def __init__(self, storage: BaseStorage, name: str, space: Space, seed: int, worker: str = RUN) -> None:
        self._space = space
        self._seed = seed
        self._worker = worker
        self._silence = Silence(space.settings.grace_seconds)
        self._told: dict[int, Trial] = {}
        # The sampler given here is never asked: `ask` sets one of its own.
        self._study = patiently(
            lambda: optuna.create_study(
                storage=storage,
                study_name=name,
                directions=space.goals,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),
            ),
            patience=0,
        )
        self._storage = self._study._storage

    def claim(self, identity: Mapping[str, str], *, begun: bool = False) -> None:
        """Make the study one of `identity` (what a trial's meaning depends on), or check that it already is.

        Raises:
            InputError: it was made with others (names them), by another version, or is new although its run has `begun`.
        """
        attributes = self._study.user_attrs
        check_format(attributes)
        stored = attributes.get(_IDENTITY)
        if stored is None:
            if begun:
                raise InputError(
                    "The run's study is gone, though its result.json lists trials; put study.journal (with --storage: "
                    "study.name and the database) back, or begin anew with --restart."
                )
            self._study.set_user_attr(_FORMAT, FORMAT)
            self._study.set_user_attr(_STARTUP, self._space.settings.n_startup_trials)
            self._study.set_user_attr(_IDENTITY, dict(identity))
            return
        changed = changed_parts(stored, identity)
        if changed:
            raise InputError(
                f"The run can't be continued with another {', '.join(changed)}: its finished trials would mean something "
                "else; use the old options, or --restart, or another --out."
            )

    @property
    def n_startup(self) -> int:
        """As the study began: continuing with more trials must not change which of them are random."""
        given = self._space.settings.startup_trials
        return given or int(self._study.user_attrs.get(_STARTUP, self._space.settings.n_startup_trials))

    def fail_interrupted(self) -> int:
        """Mark trials that this worker left when it last ended as interrupted; returns their number."""
        stale = [one for one in self._running() if one.user_attrs.get(_WORKER, self._worker) == self._worker]
        return sum(self._interrupt(one._trial_id) for one in stale)

    def fail_silent(self) -> int:
        """Mark as interrupted what other workers have been silent about for `search.grace_seconds`; returns the number."""
        others = [one for one in self._running() if one.user_attrs.get(_WORKER, self._worker) != self._worker]
        silent = self._silence.of({one._trial_id: one.user_attrs.get(BEAT) for one in others})
        return sum(self._interrupt(trial_id) for trial_id in silent)

    def trials(self) -> tuple[Trial, ...]:
        """All finished trials by logical number; interrupted ones don't count."""
        return self._finished(self._all())

    def ask(self, budget: int | None = None) -> Asked | None:
        """The next trial's parameters, all suggested before work starts; None where all slots of the budget are taken."""
        while True:
            everything = self._all()
            running = [one for one in everything if one.state == TrialState.RUNNING]
            taken = {_slot(one) for one in running} | {trial.number for trial in self._finished(everything)}
            place = 0
            while (slot := _free(taken, place)) < (math.inf if budget is None else budget):
                trial_id, passed = patiently(partial(self._take, slot, itertools.count()))
                if trial_id is not None:
                    return patiently(partial(self._suggested, slot, trial_id, bool(running)))
                # Workers that look at the same moment see the same free slots. Each that lost one to others goes as many
                # places on as came before it: so n workers begin about 2 n trials, and not n².
                place += passed
            if place == 0:
                return None

    def _suggested(self, slot: int, trial_id: int, liar: bool) -> Asked:
        """Asked twice, it finds what was suggested the first time."""
        self._study.sampler = _sampler(self._space.settings, self.n_startup, self._seed, slot, liar=liar)
        self._study._thread_local.cached_all_trials = None  # as `optuna.Study.ask` does: the sampler must see what was told
        handle = optuna.Trial(self._study, trial_id)
        return Asked(slot, self._space.suggest(handle), handle)

    def tell(self, asked: Asked, trial: Trial, n_prompts: int) -> bool:
        """Record a finished trial, with refusals out of `n_prompts`; on return it is durable.

        The sampler is told the objectives, by default mean KL and the share of refusals, of a stopped trial its bound: over 20
        seeds that gave the very fronts of full evaluation (docs/sampler.md). False: other workers took this one for dead, and
        the trial is theirs.
        """
        record = json.dumps(trial.to_record(), allow_nan=False)
        values = None if trial.state == "failed" else reported_values(trial, self._space.objectives, n_prompts)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE

        def once() -> bool:
            try:
                self._storage.set_trial_user_attr(asked.handle._trial_id, _RECORD, record)
                self._storage.set_trial_state_values(asked.handle._trial_id, state=state, values=values)
            except UpdateFinishedTrialError:  # by us, before an answer was lost, or by others
                found = self._storage.get_trial(asked.handle._trial_id)
                return found.state == state and found.user_attrs.get(_RECORD) == record
            return True

        return patiently(once)

    def give_up(self, asked: Asked) -> None:
        """Mark a trial whose work was interrupted, so that a resume does it again."""
        self._interrupt(asked.handle._trial_id)

    def at_work(self, asked: Asked) -> contextlib.AbstractContextManager[None]:
        """While active, other workers see that the trial is worked on."""
        return heartbeat(self._storage, asked.handle._trial_id, min(HEARTBEAT, self._space.settings.grace_seconds / 3))

    def share(self, name: str, content: bytes) -> None:
        """Leave something for other workers in the storage."""
        share(self._study, name, content)

    def _take(self, slot: int, tries: Iterator[int]) -> tuple[int | None, int]:
        """Begin a trial for a slot: its id, or None where others have it, and how many came first. Tried again, it finds it."""
        mine = [one for one in self._running() if one.user_attrs.get(_WORKER) == self._worker] if next(tries) else []
        own = next((one for one in mine if _slot(one) == slot), None)
        if own is None:
            begun = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={_SLOT: slot, _WORKER: self._worker})
            own = self._storage.get_trial(self._storage.create_new_trial(self._study._study_id, begun))
        everything = self._all()
        earlier = [one for one in everything if _slot(one) == slot and one.number < own.number]
        first = next((index for index, one in enumerate(earlier) if one.state == TrialState.RUNNING), len(earlier))
        passed = len(earlier) - first  # those that have lost it to the first one, too
        if not passed and slot not in {trial.number for trial in self._finished(everything)}:
            return own._trial_id, 0
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(own._trial_id, state=TrialState.FAIL)
        return None, max(1, passed)

    def _interrupt(self, trial_id: int) -> bool:
        """Mark a running trial as interrupted; whether it was running still."""
        try:
            patiently(partial(self._storage.set_trial_user_attr, trial_id, _INTERRUPTED, True))
            patiently(partial(self._storage.set_trial_state_values, trial_id, state=TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False
        return True

    def _all(self) -> list[FrozenTrial]:
        return patiently(lambda: self._study.get_trials(deepcopy=False))

    def _running(self) -> list[FrozenTrial]:
        return [one for one in self._all() if one.state in (TrialState.RUNNING, TrialState.WAITING)]

    def _finished(self, everything: Sequence[FrozenTrial]) -> tuple[Trial, ...]:
        for one in everything:
            if one._trial_id in self._told or not one.state.is_finished() or _RECORD not in one.user_attrs:
                continue
            # A record is written before the state; one left by a kill in between was marked as interrupted later.
            if one.state == TrialState.COMPLETE or not one.user_attrs.get(_INTERRUPTED):
                self._told[one._trial_id] = Trial.from_record(json.loads(one.user_attrs[_RECORD]))
        return tuple(sorted(self._told.values(), key=lambda trial: trial.number))


def _slot(one: FrozenTrial) -> int:
    """Of a begun trial; -1 for one that an earlier version began."""
    return int(one.user_attrs.get(_SLOT, -1))


def _free(taken: Container[int], place: int) -> int:
    """The slot with `place` free ones before it."""
    return next(itertools.islice((slot for slot in itertools.count() if slot not in taken), place, None))


def check_format(attributes: Mapping[str, Any]) -> None:
    """InputError where another version of abliterate made the study with these attributes. The first one wrote no format."""
    found = attributes.get(_FORMAT, FORMAT)
    if found != FORMAT:
        raise InputError(
            f"The study has format {found}, this version reads format {FORMAT}; continue it with the version of abliterate "
            "that made it, or begin a new one with --restart."
        )


def changed_parts(stored: Mapping[str, str], identity: Mapping[str, str]) -> list[str]:
    """The names of the parts in which two identities differ."""
    return sorted(name for name in {*stored, *identity} if stored.get(name) != identity.get(name))


def open_study(url: str, journal: Path, space: Space, seed: int, name: str = STUDY_NAME, worker: str = RUN) -> Study:
    """The study in the run directory's journal, or the one called `name` in the RDB at `url`.

    Raises:
        InputError: the storage can't be reached or read. AbliterateError: the disk refuses.
    """
    try:
        return Study(open_storage(url, journal), name, space, seed, worker)
    except (OSError, AbliterateError) as error:
        if not url:
            raise disk_refused(error) from error
        raise InputError(f"The study at the storage URL given can't be opened: {first_line(error)}.") from error
    # SQLAlchemy, its drivers and the journal each raise their own; all mean that there is no usable study.
    except Exception as error:
        place = "at the storage URL given" if url else f"in {journal}"
        remedy = "check --storage and that the database runs" if url else "--restart begins a new one"
        raise InputError(f"The study {place} can't be opened: {first_line(error)}; {remedy}.") from error


def _sampler(settings: SearchSettings, n_startup: int, seed: int, number: int, *, liar: bool) -> TPESampler:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            n_startup_trials=n_startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=liar,
            seed=int.from_bytes(digest[:4], "big"),
        )
