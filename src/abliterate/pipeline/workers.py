"""Let several processes and machines work on one study: a run shares its setup, and workers join it (`abliterate worker`).

A worker loads the model and searches; it reads directions, prompts, response prefix and baseline from the study's storage.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from pydantic import BaseModel
from safetensors import SafetensorError

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.artifacts.runs import no_run
from abliterate.directions import Directions
from abliterate.errors import InputError, first_line
from abliterate.files import expanded
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context
from abliterate.pipeline.module_inputs import with_inputs
from abliterate.pipeline.search import Search
from abliterate.pipeline.workbench import Workbench, load_calibrated
from abliterate.prompts.sets import PromptSets
from abliterate.scorers.yardstick import Yardstick
from abliterate.search.samplers import check_packages
from abliterate.search.storage import open_storage, shared
from abliterate.search.study import STUDY_NAME, Study, changed_parts, name_in_journal, open_study
from abliterate.settings import untrusted
from abliterate.settings.schema import PromptSettings, Settings
from abliterate.settings.sources import check_storage, config_path, dump_settings, load_settings, merge, read_toml
from abliterate.types import Baseline, Prompt, Reporter

FORMAT = 3

# The names of the entries that a run shares; the setup is written last, so it is complete once it is there.
_SETUP, _DIRECTIONS = "setup", "directions"
# A run's present session, and that of the setup; studies of earlier versions have neither.
_SESSION, _SETUP_OF = "session", "session of setup"

# Settings that each machine has for itself, or that only the run needs, by section; "" names those outside of sections.
_OWN = {
    "": ("out", "cache_dir", "device", "export"),
    "load": ("device_map", "max_memory", "offload_folder"),
    "search": ("storage", "seed_from"),
    "efficiency": ("residual_cache_dir",),
    "prompts": tuple(name for name in PromptSettings.model_fields if name not in ("system", "prefix", "suffix")),
    "directions": ("protect",),
    "evaluation": ("heldout_scorers",),
}
# Settings of the search that are no part of a study's identity, because a continued run may change them; a worker may not.
_BUDGET = ("trials", "startup_trials")
# Settings that name files of the run's machine; the content of these files is shared.
_FILES = ("evaluation.markers", "load.chat_template")

# Seconds between two looks into the storage.
_POLL = 2.0


@dataclass(frozen=True)
class SharedSetup:
    """Everything that the trials of a run depend on, in the form in which the run shares it with its workers."""

    settings: str
    files: Mapping[str, str]
    dtype: str
    prefix: str
    prompts: PromptSets
    baseline: Baseline
    identity: Mapping[str, str]
    yardstick: Mapping[str, Any] | None = None
    answers: Sequence[Sequence[int]] = ()

    def to_bytes(self) -> bytes:
        """The JSON form; the inverse of `of_bytes`."""
        sets = {name: [(prompt.text, prompt.system) for prompt in prompts] for name, prompts in self.prompts.by_name().items()}
        record = vars(self) | {"format": FORMAT, "prompts": sets, "baseline": self.baseline.to_record()}
        return json.dumps({**record, "files": dict(self.files), "identity": dict(self.identity)}).encode()

    @staticmethod
    def of_bytes(content: bytes) -> SharedSetup:
        """The inverse of `to_bytes`; InputError if another version of abliterate or another program wrote the content."""
        try:
            record = json.loads(content)
            version = record.pop("format", None)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _strange(error) from error
        if version != FORMAT:
            raise InputError(
                f"The study was set up by another version of abliterate (format {version}, not {FORMAT}); install the same "
                "version on all machines."
            )
        try:
            sets = {name: tuple(Prompt(*fields) for fields in prompts) for name, prompts in record.pop("prompts").items()}
            answers = tuple(map(tuple, record.pop("answers", ())))
            baseline = Baseline.from_record(record.pop("baseline"))
            setup = SharedSetup(prompts=PromptSets.of_names(sets), baseline=baseline, answers=answers, **record)
            if setup.yardstick is not None:
                Yardstick.from_record(setup.yardstick)
            texts = [setup.settings, setup.dtype, setup.prefix, *setup.files.values(), *setup.identity.values()]
            if not all(type(token) is int and token >= 0 for ids in setup.answers for token in ids):
                raise ValueError("an answer has no ids")
            texts += [text for prompts in sets.values() for prompt in prompts for text in (prompt.text, prompt.system)]
            if not all(isinstance(text, str) for text in texts) or set(setup.files) - set(_FILES):
                raise ValueError("a text is no text, or a file is none that a run shares")  # whose name might lead anywhere
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _strange(error) from error
        return setup


def _strange(error: Exception) -> InputError:
    return InputError(
        f"The study's setup can't be read ({type(error).__name__}: {first_line(error)}); check --storage and --study, or "
        "continue the run itself with --resume, which writes it again."
    )


def publish(bench: Workbench, study: Study, baseline: Baseline, directions: Directions, identity: Mapping[str, str]) -> None:
    """Write everything that workers need to the study's storage, without paths of this machine or the storage's URL."""
    settings = bench.settings
    files = {name: path.read_text(encoding="utf-8") for name in _FILES if (path := _file(settings, name)) is not None}
    setup = SharedSetup(
        settings=dump_settings(_shared(settings)),
        files=files,
        dtype=bench.loaded.info.dtype,
        prefix=bench.response_prefix,
        prompts=bench.prompts,
        baseline=baseline,
        identity=identity,
        yardstick=bench.yardstick.to_record() if bench.yardstick else None,
        answers=bench.own_answers or published_answers(study),
    )
    # Without the inputs of modules, which are too large for a database: a worker has them from its own model, or the cache.
    study.share(_DIRECTIONS, stages.directions_file(replace(directions, inputs={})))
    study.share(_SETUP, setup.to_bytes())
    study.share(_SETUP_OF, study.shared(_SESSION) or b"")


@contextlib.contextmanager
def announced(study: Study) -> Iterator[None]:
    """Have workers that start in the `with` block wait for the setup that is published in it, since an earlier may be another.

    If the session fails before, an earlier session's setup holds again.
    """
    study.share(_SESSION, uuid.uuid4().bytes)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            study.share(_SESSION, study.shared(_SETUP_OF) or b"")
        raise


def _file(settings: Settings, name: str) -> Path | None:
    section, option = name.split(".")
    path = getattr(getattr(settings, section), option)
    if name == "evaluation.markers" and not path:  # the default file may differ between versions
        return config_path("markers.txt")
    return expanded(path) if path else None


def study_location(run: Path | None, url: str, name: str, own: Mapping[str, Any] | None = None) -> tuple[str, Path, str]:
    """(database URL or "", journal, study name) from a worker's options: a run's directory, or `--storage` and `--study`.

    Raises:
        InputError: neither or both of these are given, or the directory holds no run, or it names a database that lies
            elsewhere and that neither the environment nor the `own` options name.
    """
    if (run is None) == (not url):
        raise InputError("A worker needs a run's directory, or --storage URL and --study NAME; give one of them.")
    if run is None:
        if not name:
            raise InputError("A worker at a database needs the study's name; give --study what the run's study.name holds.")
        return url, Path(), name
    directory = RunDirectory(run)
    if name:
        raise InputError("The option --study names a study at a database, with --storage; a run's directory names its own.")
    if not directory.holds_run:
        raise no_run(run)
    directory.check_links()
    study = directory.study_name() if directory.study.exists() else STUDY_NAME
    if not directory.settings.exists():
        return "", directory.journal, study
    directory.stored_settings()
    settings, mine = load_settings(str(directory.settings), own), load_settings("", own)
    stored = settings.search.storage
    check_storage(stored, f"--storage URL --study {study} instead of the directory")
    asked = untrusted.unsaid({"search": {"storage": stored}}, mine, directory.path)
    if asked:
        raise InputError(
            f"The run in {run} keeps its study in the database {stored}, which only you may have opened; if you trust the run, "
            f"give {shlex.join(['--storage', stored, '--study', study])} instead of the directory."
        )
    return stored, directory.journal, study


def wait_for_setup(
    url: str, journal: Path, name: str, reporter: Reporter, check: Callable[[], None], poll: float = _POLL
) -> tuple[SharedSetup, Directions]:
    """Wait until the run has written its setup to the storage, and return it with the directions; look every `poll` seconds.

    Raises:
        InputError: the storage or the study doesn't exist.
    """
    try:
        found = open_storage(url, journal)
        study = optuna.load_study(study_name=name if url else name_in_journal(found, name), storage=found)
    except KeyError as error:
        raise InputError(f"The storage holds no study {name}; begin the run first, or check --study.") from error
    except Exception as error:
        raise InputError(
            f"The study can't be opened: {first_line(error)}; check --storage and that the database runs."
        ) from error
    noted = False
    while True:
        # The session first: what is read after it isn't older than it.
        is_present = (shared(study, _SETUP_OF) or b"") == (shared(study, _SESSION) or b"")
        directions, setup = (shared(study, name) if is_present else None for name in (_DIRECTIONS, _SETUP))
        if directions is not None and setup is not None:
            try:
                return SharedSetup.of_bytes(setup), stages.directions_of(directions)
            except (SafetensorError, KeyError, ValueError) as error:
                raise _strange(error) from error
        if not noted:
            reporter.note("waiting for the run to compute its directions and baseline")
            noted = True
        check()
        time.sleep(poll)


def _shared(settings: Settings) -> Settings:
    """The settings with the defaults of those in `_OWN`."""

    def plain(section: BaseModel, names: Sequence[str]) -> dict[str, Any]:
        return {name: type(section).model_fields[name].get_default(call_default_factory=True) for name in names}

    sections = {name: getattr(settings, name) for name in _OWN if name}
    copies = {name: section.model_copy(update=plain(section, _OWN[name])) for name, section in sections.items()}
    return settings.model_copy(update=plain(settings, _OWN[""]) | copies)


def published(study: Study) -> tuple[SharedSetup, Directions] | None:
    """What an earlier session of the run has published; None if there is nothing that this version can read."""
    setup, directions = study.shared(_SETUP), study.shared(_DIRECTIONS)
    if not setup or not directions:
        return None
    with contextlib.suppress(InputError, SafetensorError, KeyError, ValueError):  # of another version, or of another program
        return SharedSetup.of_bytes(setup), stages.directions_of(directions)
    return None


def published_answers(study: Study) -> Sequence[Sequence[int]]:
    """The answers that a continued run has published before: its directions are kept with what was made of these."""
    before = published(study)
    return before[0].answers if before else ()


def _without_own(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold for all workers: a run's own without those in `_OWN`, which `_shared` has left empty."""
    return {
        name: {leaf: given for leaf, given in value.items() if leaf not in _OWN.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in stored.items()
        if name not in _OWN[""]
    }


@contextlib.contextmanager
def settings_of(setup: SharedSetup, own: Mapping[str, Any]) -> Iterator[Settings]:
    """The run's settings, overridden by `own` options (device, model, …); shared files exist during the `with` block."""
    with tempfile.TemporaryDirectory(prefix="abliterate-worker-") as name:
        folder = Path(name)
        (folder / "settings.toml").write_text(setup.settings, encoding="utf-8")
        # They override the worker's environment, as the run's own options have overridden the run's.
        overrides = merge(_without_own(read_toml(folder / "settings.toml")), {"load": {"dtypes": [setup.dtype]}})
        for option, content in setup.files.items():
            section, leaf = option.split(".")
            path = folder / leaf
            path.write_text(content, encoding="utf-8")
            overrides = merge(overrides, {section: {leaf: str(path)}})
        settings, run = (load_settings("", options) for options in (merge(overrides, own), overrides))
        for name in _BUDGET:
            if getattr(settings.search, name) != getattr(run.search, name):
                raise InputError(
                    f"A worker doesn't decide search.{name}, which is the run's; leave it out, or continue the run with it."
                )
        untrusted.check(settings, load_settings("", own))
        yield settings


def work(
    run_directory: Path | None,
    url: str,
    name: str,
    own: Mapping[str, Any],
    reporter: Reporter,
    *,
    check: Callable[[], None] = lambda: None,
    poll: float = _POLL,
) -> int:
    """Work on a run's study, given by its directory or by storage and name, until its budget is used; returns the trial count.

    `own` holds this worker's options (device, model, cache), which override the run's. `poll` is as in `wait_for_setup`.
    """
    location = study_location(run_directory, url, name, own)
    setup, directions = wait_for_setup(*location, reporter, check, poll)
    with settings_of(setup, own) as settings:
        context = Context.of(settings, reporter, check)
        check_packages(settings.search)  # this machine may lack what the run's has
        with load_calibrated(context, setup.prompts, setup.prefix) as bench:
            study = join(bench, location, setup, directions)
            search = Search(bench, study, setup.baseline, settings.search.trials)
            search.finish()
            return len(search.trials)


def join(bench: Workbench, location: tuple[str, Path, str], setup: SharedSetup, directions: Directions) -> Study:
    """Prepare the workbench for the run's trials, and return the study that gives them out.

    Raises:
        InputError: trials on this workbench would differ in meaning from the run's.
    """
    context, (url, journal, name) = bench.context, location
    changed = changed_parts(setup.identity, bench.identity())
    if changed:
        raise InputError(
            f"This worker can't join the run with another {', '.join(changed)}: its trials would mean something else; give "
            "the same model, and the same versions."
        )
    study = open_study(url, journal, bench.space, bench.settings.seed, name, uuid.uuid4().hex, check=context.check)
    bench.prepare(with_inputs(bench, directions, setup.answers))
    if setup.yardstick is not None:  # the bounds decide what counts, so all workers use the run's
        bench.yardstick = Yardstick.from_record(setup.yardstick)
    stages.warn_of_another_baseline(context, stages.baseline(bench), setup.baseline, "On this machine")
    return study
