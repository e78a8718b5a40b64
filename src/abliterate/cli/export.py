"""`abliterate export`: export any complete trial of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli.exit import ending_at_once, quiet_libraries
from abliterate.errors import InputError
from abliterate.export.folder import record_of
from abliterate.pipeline import export_gguf as pipeline_export_gguf
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings
from abliterate.settings.untrusted import code_note, unsaid, with_places_of, without
from abliterate.terminal.reporters import make_reporter
from abliterate.types import Reporter


def export_trial(
    path: Path, number: int, kind: str, out: Path | None, push: str, *, verify: bool, trust: bool = False, as_json: bool
) -> None:
    """`abliterate export RUN --trial N`, with the run's own settings but for the trial and the export."""
    directory, settings, doubts = _open(path, kind, push, trust=trust)
    if settings.export.kind == "none":
        raise InputError("There is nothing to export with --kind none; choose merged or adapter.")
    if out is not None and not str(out).strip("."):
        raise InputError("The current directory can't be an export; name a folder with --out.")
    final = out or path / f"model-trial-{number}"
    if final.resolve() == directory.export.resolve():
        raise InputError(
            f"The folder {final} is the run's own export; choose another --out; "
            f"{directory.resuming('changes the choice of the run', '--select', f'trial:{number}')}."
        )
    with _reporting(doubts, final, as_json=as_json) as reporter:
        pipeline_export_trial.export_trial(settings, reporter, directory, number, final, scores=verify)


def export_gguf(
    path: Path, number: int, gguf: Path, kind: str, out: Path | None, *, trust: bool = False, as_json: bool
) -> None:
    """`abliterate export RUN --trial N --gguf FILE`: a copy of that file with the trial's edits."""
    directory, settings, doubts = _open(path, "merged", "", trust=trust)
    final = out or path / f"model-trial-{number}.gguf"
    request = pipeline_export_gguf.GgufRequest(gguf, final, kind)
    with _reporting(doubts, final, as_json=as_json) as reporter:
        pipeline_export_gguf.export_gguf(settings, reporter, directory, number, request)


@contextlib.contextmanager
def _reporting(doubts: Sequence[str], final: Path, *, as_json: bool) -> Iterator[Reporter]:
    """A reporter that has told the doubts, and that an interruption closes."""
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    for note in doubts:
        reporter.warn(note)
    before = _identity(final)

    def interrupted() -> str:
        if _identity(final) in (before, None):
            return f"interrupted; no export was made in {final}; repeat the command to make it."
        if final.is_file():  # a GGUF file gets its name once it is checked
            return f"interrupted; {final} is finished and checked."
        if record_of(final).get("verified") is not None:
            return f"interrupted; the export in {final} is written and checked; it may not be pushed."
        return f"interrupted; the export in {final} is written, but not checked; repeat the command to make and check it."

    with ending_at_once(reporter, interrupted, as_json=as_json):
        yield reporter


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder from another one of its name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open(path: Path, kind: str, push: str, *, trust: bool) -> tuple[RunDirectory, Settings, list[str]]:
    """The run's directory, its settings with this export's, and what to warn of."""
    directory = RunDirectory(path)
    doubt = Result.read(directory).doubt  # read first, so that "no run there" is the first error
    # The run decides what its trials mean, and not even the environment may change that. The repository of the run's own
    # export isn't used for this export.
    stored = directory.stored_settings()
    options = {
        name: value for name, value in stored.items() if name not in ("cache_dir", "device", "efficiency", "export", "out")
    }
    own = load_settings("")
    # Custom scorers don't run here, and their names are part of what the run's trials mean.
    left_out = [request for request in unsaid(options, own) if request.setting.startswith("load.") and not trust]
    export = {"kind": kind, "push": push, "push_private": own.export.push_private}
    settings = load_settings(str(directory.settings), without(options, left_out) | {"export": export})
    settings = with_places_of(own, settings)
    return directory, settings, list(filter(None, (doubt, code_note(left_out, "--trust-remote-code"))))
