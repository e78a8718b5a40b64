"""What the commands do once their options are read: settings, run directory, reporter, pipeline."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate import events, later, pipeline, reproduce
from abliterate.console import ask_for_trial, make_reporter
from abliterate.errors import InputError, Interrupted
from abliterate.front import parse_rule
from abliterate.inspection import bytes_text, in_words
from abliterate.interrupts import Interrupts
from abliterate.objectives import of_result
from abliterate.rundir import RunDirectory, default_path, latest_run
from abliterate.settings import Settings
from abliterate.settings_sources import check_storage, load_settings, merge, parse_assignments, read_toml
from abliterate.stored_settings import code_note, distrusted
from abliterate.tables import component_table, make_console, print_table
from abliterate.types import Baseline, Reporter, Trial


@dataclass(frozen=True)
class RunFlags:
    """What `abliterate run` is told beside settings."""

    gpus: int = 1
    resume: bool = False
    restart: bool = False
    as_json: bool = False
    reference: bool = False


def run(given: Mapping[str, Any], config: str, assignments: list[str], flags: RunFlags) -> None:
    """`abliterate run MODEL`."""
    options = options_of(given, assignments)
    settings, directory = resolve(options, config, flags)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not flags.as_json
    carry_out(settings, directory, flags, Interrupts(), ask=at_terminal and "select" not in options.get("search", {}))


def options_of(given: Mapping[str, Any], assignments: list[str]) -> dict[str, Any]:
    """What the command line says, --set included."""
    return merge(_given(given), parse_assignments(assignments))


def resolve(
    options: Mapping[str, Any], config: str, flags: RunFlags, entry: Mapping[str, Any] | None = None
) -> tuple[Settings, RunDirectory]:
    """The settings of a run, new or continued, and where it is; `entry`: what a list of runs says of it."""
    settings = load_settings(config, options, entry=entry)
    directory = _existing(settings) if flags.resume else None
    if directory:
        # A continued run starts from its own settings; what is given now, in any way, wins over them.
        settings = load_settings(config, options, stored=directory.settings, entry=entry)
    if flags.reference:
        settings = settings.model_copy(update={"efficiency": settings.efficiency.reference()})
    check_storage(settings.search.storage)
    return settings, directory or RunDirectory(Path(settings.out) if settings.out else default_path(settings.model))


def carry_out(
    settings: Settings, directory: RunDirectory, flags: RunFlags, interrupts: Interrupts, *, ask: bool
) -> dict[str, Any]:
    """One run to its end; `ask`: a person chooses the trial. Returns the content of `result.json`."""
    quiet_libraries()
    reporter = make_reporter(as_json=flags.as_json)

    def choose(front: Sequence[Trial], default: Trial, baseline: Baseline) -> Trial:
        with interrupts.at_once():
            return ask_for_trial(front, default, baseline, reporter)

    try:
        with interrupts.listening():
            return pipeline.run(
                settings,
                interrupts.watched(reporter),
                directory,
                resume=flags.resume,
                restart=flags.restart,
                gpus=flags.gpus,
                choose=choose if ask else None,
                check=interrupts.check,
            )
    except Interrupted as error:
        raise Interrupted(error.exit_code, _how_to_continue(directory, settings)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(message=_how_to_continue(directory, settings)) from error
    finally:
        reporter.close()
        directory.remove_if_empty()


def work(run_directory: Path | None, url: str, study: str, own: Mapping[str, Any], *, as_json: bool) -> None:
    """`abliterate worker`."""
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    interrupts = Interrupts()
    left = "interrupted; the run and its other workers go on, and do this worker's last trial again."
    try:
        with interrupts.listening():
            trials = pipeline.work(run_directory, url, study, _given(own), interrupts.watched(reporter), check=interrupts.check)
        if as_json:
            events.emit("result", trials=trials)
        else:
            reporter.note(f"the run has its {trials} trials")
    except Interrupted as error:
        raise Interrupted(error.exit_code, left) from error
    except KeyboardInterrupt as error:
        raise Interrupted(message=left) from error
    finally:
        reporter.close()


def tune_batch(given: Mapping[str, Any], config: str, assignments: list[str], *, as_json: bool) -> None:
    """`abliterate tune-batch`."""
    settings = load_settings(config, options_of(given, assignments))
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    with ending_at_once(reporter, "interrupted; sizes are kept once all are measured: repeat the command."):
        tuning = pipeline.tune(settings, reporter)
    if as_json:
        events.emit("result", operations={one.operation: one.to_record() for one in tuning})
        return
    rows = []
    for one in tuning:
        for size, probe in sorted(one.probes.items()):
            found = ("doesn't fit", "") if probe is None else (f"{probe.tokens_per_second:.0f}", bytes_text(probe.peak_bytes))
            rows.append((one.operation, str(size), *found, "← chosen" if size == one.size else ""))
        if one.size not in one.probes:  # made even afterwards, or taken over from another operation
            rows.append((one.operation, str(one.size), "", "", "← chosen"))
    print_table(("operation", "prompts at a time", "tokens/s", "memory", ""), rows, "Short passes over the longest prompts")


def inspect(given: Mapping[str, Any], config: str, assignments: list[str], *, weights: bool, as_json: bool) -> None:
    """`abliterate inspect`."""
    settings = load_settings(config, options_of(given, assignments))
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    with ending_at_once(reporter, "interrupted; nothing was changed."):
        found = pipeline.inspect(settings, reporter, weights=weights)
    if as_json:
        events.emit("result", **found)
        return
    words, on_terminal = in_words(found), sys.stdout.isatty()
    if on_terminal:  # the table says the rest
        words["coverage"] = words["coverage"].splitlines()[0]
    whole, adapter = found["exports"]["merged"], found["exports"]["adapter"]
    streams = "streams the base's files" if whole is not None else "not known without the weight files"
    words["merged"] = f"loads and saves the whole model ({whole})" if whole else streams
    words["adapter"] = f"not possible: {adapter}" if adapter else "possible"
    reporter.header(words)
    if on_terminal:
        make_console().print(component_table(found["coverage"]))


def export_trial(
    path: Path, number: int, kind: str, out: Path | None, push: str, *, verify: bool, trust: bool = False, as_json: bool
) -> None:
    """`abliterate export RUN --trial N`: the run's own settings, with another choice at the end."""
    directory = RunDirectory(path)
    directory.read_result()  # "no run there" comes first
    # What trials mean is the run's: here not even the environment may change it. And where its own export was pushed to is
    # no place for this one.
    stored = read_toml(directory.settings)
    own = {name: part for name, part in stored.items() if name not in ("cache_dir", "device", "efficiency", "export", "out")}
    own = own if trust else distrusted(own)
    settings = load_settings(str(directory.settings), own | {"export": {"kind": kind, "push": push}})
    if settings.export.kind == "none":
        raise InputError("There is nothing to export with --kind none; choose merged or adapter.")
    if out is not None and not str(out).strip("."):
        raise InputError("The current directory can't be an export; name a folder with --out.")
    final = out or path / f"model-trial-{number}"
    if final.resolve() == directory.export.resolve():
        raise InputError(
            f"The folder {final} is the run's own export; choose another --out, or change the run's choice with "
            f"abliterate run --resume --out {path} --select trial:{number}."
        )
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    if note := code_note(stored, settings, "--trust-remote-code"):
        reporter.warn(note)
    with ending_at_once(reporter, f"interrupted; no export was made in {final}, repeat the command for one."):
        later.export_trial(settings, reporter, directory, number, final, scores=verify)


def reproduce_recipe(path: Path, model: str, given: Mapping[str, Any], kind: str, out: Path | None, *, as_json: bool) -> None:
    """`abliterate reproduce RECIPE`."""
    if kind not in ("", "merged", "adapter", "none"):
        raise InputError(f"There is no export of kind {kind!r}; choose merged, adapter or none.")
    if out is not None and not str(out).strip("."):
        raise InputError("The current directory can't be an export; name a folder with --out.")
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    with ending_at_once(reporter, "interrupted; nothing was exported, repeat the command."):
        # Not the model of the environment: it is said by the recipe, or here.
        reproduce.reproduce(path, {**_given(given), "model": model}, reporter, kind=kind, out=out)


@contextlib.contextmanager
def ending_at_once(reporter: Reporter, message: str) -> Iterator[None]:
    """The first Ctrl+C or SIGTERM ends what is inside, with `message`: there is nothing to finish first."""
    interrupts = Interrupts()
    try:
        with interrupts.listening(), interrupts.at_once():
            yield
    except Interrupted as error:
        raise Interrupted(error.exit_code, message) from error
    except KeyboardInterrupt as error:
        raise Interrupted(message=message) from error
    finally:
        reporter.close()


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given; the others (None) leave room for lower sources."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        inner = _given(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            kept[name] = inner
    return kept


def _existing(settings: Settings) -> RunDirectory | None:
    """The run that --resume means: in `out`, else the newest of this model; None where there is none yet."""
    path = Path(settings.out) if settings.out else latest_run(settings.model)
    if path is None:
        return None
    directory = RunDirectory(path)
    return directory if directory.settings.exists() else None


def _how_to_continue(directory: RunDirectory, settings: Settings) -> str:
    where = directory.path
    if not directory.holds_run:
        return "interrupted before anything was found; start the run again."
    text = f"interrupted; finished trials are kept in {where}. Continue with abliterate run --resume --out {where}"
    best = _best_so_far(directory, settings)
    return text + (f", or export one now with abliterate export {where} --trial {best.number}." if best else ".")


def _best_so_far(directory: RunDirectory, settings: Settings) -> Trial | None:
    """What the selection rule would pick now, if there is something to pick."""
    try:
        result = directory.read_result()
    except InputError:  # none yet, or damaged
        return None
    front = [Trial.from_record(record) for record in result["trials"] if record["number"] in result["front"]]
    return parse_rule(settings.search.select, settings.search.select_max_kl, of_result(result)).preview(front)


def quiet_libraries() -> None:
    """Their progress bars and advice would tear ours; their errors still raise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        import datasets

        datasets.disable_progress_bars()
    except ImportError:
        pass
