"""The study: a budget of trials whose parameters a seeded sampler suggests, shared by any number of workers.

Every finished trial is durable before the next is asked for. Optuna doesn't store a sampler's state, so the sampler is seeded
anew for each trial from the run's seed and the trial's number; a resumed study then equals the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from abliterate.errors import AbliterateError, InputError, first_line
from abliterate.objectives import reported_values
from abliterate.search.samplers import make_sampler, startup_values
from abliterate.search.space import Space, Value
from abliterate.search.storage import (
    BEAT,
    FIRST_PAUSE,
    HEARTBEAT,
    PATIENCE,
    Result,
    Silence,
    check_driver,
    disk_refused,
    heartbeat,
    open_storage,
    patiently,
    share,
    shared,
)
from abliterate.types import Trial, TrialParams, number

STUDY_NAME = "abliterate"
FORMAT = 1
# The name of the worker that the run itself is. Only one run works at a time, so all trials left under this name are its own.
RUN = "run"
_RECORD, _IDENTITY, _INTERRUPTED, _STARTUP = "record", "identity", "interrupted", "startup_trials"
_SLOT, _WORKER, _FORMAT = "slot", "worker", "format"
# What a study is given at its beginning, for all sessions and workers, and the setting that each of it comes from.
_SEEDS, _PRIOR = "seeds", "prior"
_COMES_FROM = {_SEEDS: "search.seed_from", _PRIOR: "search.prior"}
_FIXED = "fixed_params"  # where Optuna looks for the values that it must suggest


@dataclass(frozen=True)
class Asked:
    """A running trial: its logical number (a slot of the budget), its parameters, and Optuna's handle."""

    number: int
    params: TrialParams
    handle: optuna.Trial

    def __reduce__(self) -> tuple[Any, ...]:
        """Only the process that asked has Optuna's handle; other ranks get the rest."""
        return Asked, (self.number, self.params, None)


class Study:
    """One study in a journal file or an Optuna RDB, for one or several workers.

    The budget of trials consists of slots 0, 1, …. A worker takes a slot by beginning a trial for it, and the slot is free
    again if that trial is interrupted or its worker dies. If two workers take a slot at the same time, it belongs to the trial
    with the lower number in the storage. `patience` and `pause` are as in `patiently`.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        space: Space,
        seed: int,
        worker: str = RUN,
        *,
        patience: float = PATIENCE,
        pause: float = FIRST_PAUSE,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._space = space
        self._check = check
        self._seed = seed
        self._worker = worker
        self._patience, self._pause = patience, pause
        self._silence = Silence(space.settings.grace_seconds)
        self._reported: dict[int, Trial] = {}
        self._known: dict[str, Any] = {}  # what doesn't change any more, because fetching it costs a database's whole answer
        # This sampler is never used, because `ask` sets its own.
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
        """Give the study its `identity` (everything that a trial's meaning depends on), or check that it has this identity.

        Raises:
            InputError: the study has another identity (the sentence names the parts) or another version's format, or it is new
                although its run has `begun`.
        """
        attributes = self._patiently(lambda: self._study.user_attrs)
        check_format(attributes)
        stored = attributes.get(_IDENTITY)
        if stored is None:
            if begun:
                raise InputError(
                    "The run's study is gone, though its result.json lists trials; put study.journal (with --storage: "
                    "study.name and the database) back, or start over with --restart."
                )
            own = {_FORMAT: FORMAT, _STARTUP: self._space.settings.n_startup_trials, _IDENTITY: dict(identity)}
            for name, value in own.items():  # the identity last: with it the study is claimed
                self._patiently(partial(self._study.set_user_attr, name, value))
            return
        changed = changed_parts(stored, identity)
        if changed:
            raise InputError(
                f"The run can't be continued with another {', '.join(changed)}: its finished trials would mean something "
                "else; use the old options, or --restart, or another --out."
            )
        if not attributes.get(_STARTUP):  # it was begun with -n 0 or 1; the search begins now
            self._patiently(partial(self._study.set_user_attr, _STARTUP, self._space.settings.n_startup_trials))

    @property
    def n_startup(self) -> int:
        """The number of random trials as the study began: continuing with more trials must not change which are random."""
        given = self._space.settings.startup_trials or self._known.get(_STARTUP)
        if given is None:
            stored = self._patiently(lambda: self._study.user_attrs).get(_STARTUP)
            if stored is None:  # it isn't claimed yet
                return self._space.settings.n_startup_trials
            given = self._known[_STARTUP] = int(stored)
        return int(given)

    def fail_interrupted(self) -> int:
        """Mark the trials that this worker left unfinished when it last ended as interrupted; returns their number."""
        stale = [frozen for frozen in self._running() if frozen.user_attrs[_WORKER] == self._worker]
        return sum(self._interrupt(frozen._trial_id) for frozen in stale)

    def fail_silent(self) -> int:
        """Mark other workers' trials without a heartbeat for `search.grace_seconds` as interrupted; returns their number."""
        others = [frozen for frozen in self._running() if frozen.user_attrs[_WORKER] != self._worker]
        silent = self._silence.of({frozen._trial_id: frozen.user_attrs.get(BEAT) for frozen in others})
        return sum(self._interrupt(trial_id) for trial_id in silent)

    def trials(self) -> tuple[Trial, ...]:
        """All finished trials by logical number; interrupted ones don't count."""
        return self._finished(self._all())

    def ask(self, budget: int | None = None) -> Asked | None:
        """The next trial's parameters, all suggested before work starts; None if no slot of the budget can be had now."""
        while True:
            everything = self._all()
            running = [frozen for frozen in everything if frozen.state == TrialState.RUNNING]
            taken = {_slot(frozen) for frozen in running} | {trial.number for trial in self._finished(everything)}
            skipped = 0
            while (slot := _free(taken, skipped)) < (math.inf if budget is None else budget):
                trial_id, passed = self._patiently(partial(self._take, slot, itertools.count()))
                if trial_id is not None:
                    try:
                        known = sum(frozen.state == TrialState.COMPLETE for frozen in everything)
                        return self._patiently(partial(self._suggested, slot, trial_id, bool(running), known))
                    except UpdateFinishedTrialError:  # on a slow machine others took this worker for dead: ask again later
                        return None
                    except AbliterateError:  # the storage is lost, and would be waited for once more
                        raise
                    except BaseException:
                        self._interrupt(trial_id)
                        raise
                # Workers that look at the same moment see the same free slots. A worker that lost a slot skips as many free
                # slots as there were workers before it, so n workers begin about 2 n trials, and not n².
                skipped += passed
            if skipped == 0:
                return None

    def begin(self, **given: Sequence[Any]) -> None:
        """Give a new study what its first trials depend on; what it has been given before holds, whatever is given now.

        `seeds`: the values of parameters by name, of each trial that isn't left to the sampler. `prior`: weights of the layers.

        Raises:
            InputError: the study has trials already and began without.
        """
        for name, content in given.items():
            if self._given(name) is not None:
                continue
            if self._all():
                raise InputError(
                    f"The run has begun without {_COMES_FROM[name]}, on which its first trials depend; leave it out, or start "
                    "over with --restart."
                )
            self.share(name, json.dumps(content, allow_nan=False).encode())

    def has(self, name: str) -> bool:
        """Whether the study has been given what `begin` calls so."""
        return self._given(name) is not None

    def _given(self, name: str) -> Any:
        """What `begin` was given; None if nothing. InputError if another program wrote it."""
        content = shared(self._study, name, self._patience, self._pause)
        try:
            return None if content is None else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _strange(name, error) from error

    def _begun_with(self, name: str) -> Any:
        """As `_given`, once there are trials: then it stays, and isn't fetched again with all else that the study shares."""
        if name not in self._known:
            self._known[name] = self._given(name)
        return self._known[name]

    def _fixed(self, slot: int, known: int) -> dict[str, Value]:
        """The values that a trial must have, by name: those of a seed, or of a start-up trial; the sampler chooses the others.

        `known` is the number of trials that the sampler learns from.
        """
        seeds, name = self._begun_with(_SEEDS) or (), _SEEDS
        try:
            if slot < len(seeds):
                return self._space.fitted(seeds[slot])
            if known >= self.n_startup:
                return {}
            name = _PRIOR
            prior = tuple(float(number(weight)) for weight in self._begun_with(_PRIOR) or ())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _strange(name, error) from error
        return startup_values(replace(self._space, prior=prior), self._seed, slot)

    def _suggested(self, slot: int, trial_id: int, liar: bool, known: int) -> Asked:
        """Idempotent: a retry after a lost connection returns the same suggestion."""
        self._study.sampler = make_sampler(self._space.settings, self.n_startup, self._seed, slot, liar=liar)
        if fixed := self._fixed(slot, known):
            self._storage.set_trial_system_attr(trial_id, _FIXED, fixed)
        self._study._thread_local.cached_all_trials = None  # as in `optuna.Study.ask`: the sampler must see all reported trials
        handle = optuna.Trial(self._study, trial_id)
        return Asked(slot, self._space.suggest(handle), handle)

    def tell(self, asked: Asked, trial: Trial, n_prompts: int) -> bool:
        """Record a finished trial with refusals out of `n_prompts`; on return it is durable.

        The sampler sees the objectives, by default mean KL and the share of refusals, and for a pruned trial its bound: over 20
        seeds that gave exactly the fronts of full evaluation (docs/generated/sampler.md). False means that other workers took
        this worker for dead, and the trial is theirs now.
        """
        record = json.dumps(trial.to_record(), allow_nan=False)
        values = None if trial.state == "failed" else reported_values(trial, self._space.objectives, n_prompts)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        return self._settle(asked.handle._trial_id, record, state, values)

    def free_slot(self, budget: int) -> int:
        """The lowest slot from `budget` on that no trial has: the number that `add` accepts for a trial beyond the budget."""
        everything = self._all()
        taken = {_slot(frozen) for frozen in everything if frozen.state == TrialState.RUNNING}
        taken |= {trial.number for trial in self._finished(everything)}
        return next(slot for slot in itertools.count(budget) if slot not in taken)

    def add(self, trial: Trial) -> bool:
        """Record a finished trial that the sampler didn't suggest, in the slot of its number; on return it is durable.

        It is stored in the state of failed trials, which the sampler never sees, so that all later suggestions are as they
        would be without it. False means that another trial has the slot; after an interruption, `add` may be repeated.
        """
        record = json.dumps(trial.to_record(), allow_nan=False)
        if record in self._records():
            return True
        trial_id, _ = self._patiently(partial(self._take, trial.number, itertools.count()))
        return trial_id is not None and self._settle(trial_id, record, TrialState.FAIL, None)

    def give_up(self, asked: Asked) -> None:
        """Mark a trial as interrupted, so that a resume runs it again."""
        self._interrupt(asked.handle._trial_id)

    def at_work(self, asked: Asked) -> contextlib.AbstractContextManager[None]:
        """While active, other workers see the trial's heartbeat."""
        return heartbeat(self._storage, asked.handle._trial_id, min(HEARTBEAT, self._space.settings.grace_seconds / 3))

    def share(self, name: str, content: bytes) -> None:
        """Leave `content` in the storage for other workers."""
        share(self._study, name, content, self._patience, self._pause)

    def shared(self, name: str) -> bytes | None:
        """What was left under this name, also by an earlier session; None if nothing was."""
        return shared(self._study, name, self._patience, self._pause)

    def _take(self, slot: int, tries: Iterator[int]) -> tuple[int | None, int]:
        """Begin a trial for a slot; a retry finds the trial that the first try began.

        Returns the trial's id, or None if another worker has the slot, and how many workers came before.
        """
        mine = [frozen for frozen in self._running() if frozen.user_attrs[_WORKER] == self._worker] if next(tries) else []
        claimed = next((frozen for frozen in mine if _slot(frozen) == slot), None)
        if claimed is None:
            begun = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={_SLOT: slot, _WORKER: self._worker})
            claimed = self._storage.get_trial(self._storage.create_new_trial(self._study._study_id, begun))
        everything = self._all()
        earlier = [frozen for frozen in everything if _slot(frozen) == slot and frozen.number < claimed.number]
        first = next((index for index, frozen in enumerate(earlier) if frozen.state == TrialState.RUNNING), len(earlier))
        passed = len(earlier) - first  # the trial that has the slot, and those that lost it to that trial, too
        if not passed and slot not in {trial.number for trial in self._finished(everything)}:
            return claimed._trial_id, 0
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(claimed._trial_id, state=TrialState.FAIL)
        return None, max(1, passed)

    def _settle(self, trial_id: int, record: str, state: TrialState, values: Sequence[float] | None) -> bool:
        """Write a running trial's record, and then its state; False if other workers have finished it."""

        def once() -> bool:
            try:
                self._storage.set_trial_user_attr(trial_id, _RECORD, record)
                self._storage.set_trial_state_values(trial_id, state=state, values=values)
            except UpdateFinishedTrialError:  # this worker finished it before an answer was lost, or another worker did
                stored = self._storage.get_trial(trial_id)
                return stored.state == state and stored.user_attrs.get(_RECORD) == record
            return True

        return self._patiently(once, may_end=False)  # the trial is done, so the run doesn't end before it is stored

    def _records(self) -> set[str]:
        """The records of all finished trials as they are stored."""
        return {
            frozen.user_attrs[_RECORD]
            for frozen in self._all()
            if frozen.state.is_finished() and _RECORD in frozen.user_attrs and not frozen.user_attrs.get(_INTERRUPTED)
        }

    def _interrupt(self, trial_id: int) -> bool:
        """Mark a running trial as interrupted; returns whether it was still running."""
        try:
            self._patiently(partial(self._storage.set_trial_user_attr, trial_id, _INTERRUPTED, True))
            self._patiently(partial(self._storage.set_trial_state_values, trial_id, state=TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False
        return True

    def _patiently(self, work: Callable[[], Result], *, may_end: bool = True) -> Result:
        began = time.monotonic()

        def wait() -> None:
            # While the database is away no worker's heartbeat comes, so none of them has been silent. A moment's trouble, as
            # with a file that another process has locked, keeps none from coming.
            if time.monotonic() - began >= HEARTBEAT:
                self._silence = Silence(self._space.settings.grace_seconds)
            if may_end:
                self._check()

        return patiently(work, wait, self._patience, self._pause)

    def _all(self) -> list[FrozenTrial]:
        return self._patiently(lambda: self._study.get_trials(deepcopy=False))

    def _running(self) -> list[FrozenTrial]:
        return [frozen for frozen in self._all() if frozen.state in (TrialState.RUNNING, TrialState.WAITING)]

    def _finished(self, everything: Sequence[FrozenTrial]) -> tuple[Trial, ...]:
        for frozen in everything:
            if frozen._trial_id in self._reported or not frozen.state.is_finished() or _RECORD not in frozen.user_attrs:
                continue
            # The record is written before the state; a trial that a kill left in between was marked as interrupted later.
            if frozen.state == TrialState.COMPLETE or not frozen.user_attrs.get(_INTERRUPTED):
                self._reported[frozen._trial_id] = _trial(frozen, self._space)
        return tuple(sorted(self._reported.values(), key=lambda trial: trial.number))


def _trial(frozen: FrozenTrial, space: Space) -> Trial:
    """The record of a finished trial. InputError if no run in this space can have written it."""
    try:
        trial = Trial.from_record(json.loads(frozen.user_attrs[_RECORD]))
        if trial.params.fault(space.n_layers, space.components):
            raise ValueError("its parameters are of another model")
        return trial
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"The study's trial {frozen.number} can't be read ({type(error).__name__}: {first_line(error)}); put the study "
            "back, or start over with --restart."
        ) from error


def _strange(name: str, error: Exception) -> InputError:
    return InputError(
        f"The study's {name} can't be read ({type(error).__name__}: {first_line(error)}); put the study back, or start over "
        "with --restart."
    )


def _slot(frozen: FrozenTrial) -> int:
    """The slot of a begun trial."""
    return int(frozen.user_attrs[_SLOT])


def _free(taken: Container[int], skipped: int) -> int:
    """The slot with `skipped` free slots before it."""
    return next(itertools.islice((slot for slot in itertools.count() if slot not in taken), skipped, None))


def check_format(attributes: Mapping[str, Any]) -> None:
    """InputError: another version of abliterate made the study with these attributes, which are empty in a new study."""
    study_format = attributes.get(_FORMAT)
    if study_format != FORMAT and attributes:
        raise InputError(
            f"The study has format {study_format}, this version reads format {FORMAT}; continue it with the version of "
            "abliterate that made it, or start over with --restart."
        )


def changed_parts(stored: Mapping[str, str], identity: Mapping[str, str]) -> list[str]:
    """The names of the parts in which two identities differ, sorted."""
    return sorted(name for name in {*stored, *identity} if stored.get(name) != identity.get(name))


def open_study(
    url: str,
    journal: Path,
    space: Space,
    seed: int,
    name: str = STUDY_NAME,
    worker: str = RUN,
    *,
    patience: float = PATIENCE,
    pause: float = FIRST_PAUSE,
    check: Callable[[], None] = lambda: None,
) -> Study:
    """The study in the run directory's journal, whatever its name, or the study called `name` in the RDB at `url`.

    A new study gets the `name` in both. `patience` and `pause` are as in `patiently`; `check` is called while the database is
    away, and may end the wait by an error, but not that for a finished trial to be stored.

    Raises:
        InputError: the storage can't be reached or read.
        AbliterateError: the disk refuses.
    """
    try:
        storage = open_storage(url, journal)
        known = name if url else name_in_journal(storage, name)
        return Study(storage, known, space, seed, worker, patience=patience, pause=pause, check=check)
    except Exception as error:
        raise _unusable(error, url, journal) from error


def name_in_journal(storage: BaseStorage, name: str) -> str:
    """The name of the one study in a run's journal; `name` if it has none yet, or several, which no run has written."""
    names = optuna.get_all_study_names(storage)
    return names[0] if len(names) == 1 else name


def check_database(url: str) -> None:
    """Raise InputError if the database at `url` can't be opened; a run asks before it loads a model, which may take minutes."""
    if url:
        check_driver(url)
        try:
            open_storage(url, Path())
        except Exception as error:
            raise _unusable(error, url, Path()) from error


def _unusable(error: Exception, url: str, journal: Path) -> AbliterateError:
    """The sentence for a study that can't be opened: SQLAlchemy, its drivers and the journal each raise errors of their own."""
    if isinstance(error, OSError | AbliterateError):
        if not url:
            return disk_refused(error)
        return InputError(f"The study at the storage URL given can't be opened: {first_line(error)}.")
    location = "at the storage URL given" if url else f"in {journal}"
    remedy = "check --storage and that the database runs" if url else "start over with --restart"
    return InputError(f"The study {location} can't be opened: {first_line(error)}; {remedy}.")
