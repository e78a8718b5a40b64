"""The search: its space as data, a seeded sampler, and the study's storage. Knows no model and no tensors.

Every finished trial is durable before the next is asked for. Optuna doesn't store a sampler's state: it is seeded
anew for each ask from the run's seed and the number of trials told, so a resumed study is the uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from abliterate.errors import AbliterateError, InputError
from abliterate.settings import SearchSettings
from abliterate.types import Kernel, Trial, TrialParams

optuna.logging.set_verbosity(optuna.logging.WARNING)

STUDY_NAME = "abliterate"
_RECORD, _IDENTITY, _INTERRUPTED, _STARTUP = "record", "identity", "interrupted", "startup_trials"


@dataclass(frozen=True)
class Space:
    """The search space of one model: `n_layers` and its components, with the ranges of the settings."""

    settings: SearchSettings
    n_layers: int
    components: tuple[str, ...]

    def suggest(self, trial: optuna.Trial) -> TrialParams:
        """Ask for every parameter, used or not: multivariate TPE needs a fixed space."""
        last, ranges = float(self.n_layers - 1), self.settings
        scope = trial.suggest_categorical("scope", ["global", "per layer"])
        low, high = ranges.direction_index
        index = trial.suggest_float("direction_index", low * last, high * last)
        kernels = {component: self._kernel(trial, component, last) for component in self.components}
        return TrialParams(scope, index, kernels)  # type: ignore[arg-type]

    def samples(self, count: int, seed: int) -> list[TrialParams]:
        """Random points of the space, as the startup trials are drawn."""
        study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=seed))
        return [self.suggest(study.ask()) for _ in range(count)]

    def _kernel(self, trial: optuna.Trial, component: str, last: float) -> Kernel:
        ranges = self.settings
        coeff_range = ranges.max_coeff.get(component, ranges.max_coeff["default"])
        # Values below 0 mean "off": clamping gives that a real probability.
        max_coeff = max(0.0, trial.suggest_float(f"{component}.max_coeff", *coeff_range))
        low, high = ranges.position
        position = trial.suggest_float(f"{component}.position", low * last, high * last)
        fraction = trial.suggest_float(f"{component}.min_fraction", *ranges.min_fraction)
        distance = trial.suggest_float(f"{component}.distance", 1.0, max(1.0, ranges.distance * last))
        return Kernel(max_coeff, position, fraction * max_coeff, distance)


@dataclass(frozen=True)
class Asked:
    """A trial in work: its logical number, its parameters, and Optuna's handle."""

    number: int
    params: TrialParams
    handle: optuna.Trial


class Study:
    """One study in a journal file or an Optuna RDB."""

    def __init__(self, storage: BaseStorage, name: str, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed
        # The sampler given here is never asked: `ask` sets one of its own.
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )

    def claim(self, identity: Mapping[str, str]) -> None:
        """Make the study one of `identity` (what a trial's meaning depends on), or check that it already is.

        Raises:
            InputError: it was made with others; names them.
        """
        stored = self._study.user_attrs.get(_IDENTITY)
        if stored is None:
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
        """Mark trials that nobody works on any more as interrupted; returns their number. One worker only."""
        stale = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
        for trial in stale:
            self._study._storage.set_trial_user_attr(trial._trial_id, _INTERRUPTED, True)
            self._study.tell(trial.number, state=TrialState.FAIL)
        return len(stale)

    def trials(self) -> tuple[Trial, ...]:
        """All finished trials by logical number; interrupted ones don't count."""
        finished = [trial for trial in self._frozen() if trial.state.is_finished() and _RECORD in trial.user_attrs]
        return tuple(Trial.from_record(json.loads(trial.user_attrs[_RECORD])) for trial in finished)

    def ask(self) -> Asked:
        """The next trial's parameters, all suggested before work starts."""
        number = len(self.trials())
        self._study.sampler = _sampler(self._space.settings, self.n_startup, self._seed, number)
        handle = self._study.ask()
        return Asked(number, self._space.suggest(handle), handle)

    def tell(self, asked: Asked, trial: Trial, n_prompts: int) -> None:
        """Record a finished trial, with refusals out of `n_prompts`; on return it is durable.

        The sampler is told mean KL and the share of refusals, of a stopped trial their bound: over 20 seeds that gave the
        very fronts of full evaluation (docs/sampler.md).
        """
        try:
            asked.handle.set_user_attr(_RECORD, json.dumps(trial.to_record(), allow_nan=False))
            if trial.state == "failed":
                self._study.tell(asked.handle, state=TrialState.FAIL)
            else:
                self._study.tell(asked.handle, [trial.kl, trial.refusals / n_prompts])
        except OSError as error:
            raise AbliterateError(
                f"The study can't be written ({error.strerror}); free some space, then continue with --resume."
            ) from error

    def give_up(self, asked: Asked) -> None:
        """Mark a trial whose work was interrupted, so that a resume does it again."""
        asked.handle.set_user_attr(_INTERRUPTED, True)
        self._study.tell(asked.handle, state=TrialState.FAIL)

    def _frozen(self) -> list[FrozenTrial]:
        # A record is written before Optuna is told; one left by a kill in between is marked interrupted later.
        return [t for t in self._study.get_trials(deepcopy=False) if not t.user_attrs.get(_INTERRUPTED)]


def changed_parts(stored: Mapping[str, str], identity: Mapping[str, str]) -> list[str]:
    """The names of the parts in which two identities differ."""
    return sorted(name for name in {*stored, *identity} if stored.get(name) != identity.get(name))


def open_study(url: str, journal: Path, space: Space, seed: int, name: str = STUDY_NAME) -> Study:
    """The study in the run directory's journal, or the one called `name` in the RDB at `url`.

    Raises:
        InputError: the storage can't be reached or read.
    """
    try:
        if not url:
            _drop_torn_line(journal)
        storage: BaseStorage = RDBStorage(url) if url else JournalStorage(JournalFileBackend(str(journal)))
        return Study(storage, name, space, seed)
    # SQLAlchemy, its drivers and the journal each raise their own; all mean that there is no usable study.
    except Exception as error:
        place = "at the storage URL given" if url else f"in {journal}"
        remedy = "check --storage and that the database runs" if url else "--restart begins a new one"
        raise InputError(f"The study {place} can't be opened: {_first_line(error)}; {remedy}.") from error


def _drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a full disk or a kill left unfinished: the next record would be glued to it, and lost."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _sampler(settings: SearchSettings, n_startup: int, seed: int, number: int) -> TPESampler:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            n_startup_trials=n_startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=False,
            seed=int.from_bytes(digest[:4], "big"),
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
