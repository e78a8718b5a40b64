"""A custom scorer: a class in a file that the user names, whose code runs. No file is looked for that isn't named."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from abliterate.errors import InputError, TrialError
from abliterate.model.memory import is_out_of_memory
from abliterate.scorers.base import Scorer

_MODULE = "abliterate_own_"
_PACKAGE = __name__.partition(".")[0]
# A scorer's name heads a column and stands in rules such as NAME<=X.
_NAME = re.compile(r"\w(?:[\w .-]{0,38}[\w.-])?")
_TAKEN = {
    *("trial", "number", "state", "front", "selected", "refusals_exact", "kl_mean", "kl_median", "kl_max", "seconds"),
    *("scope", "direction", "direction_index", "reason", "auto", "knee"),
}


@contextlib.contextmanager
def own_errors(scorer: Scorer) -> Iterator[None]:
    """While active, what a custom or a plugin's scorer raises becomes a TrialError, and its prints go to standard error."""
    if type(scorer).__module__.partition(".")[0] == _PACKAGE:
        yield
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output may be JSON lines
            yield
    except TrialError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):  # smaller batches may cure that
            raise
        raise TrialError(f"the scorer {scorer.name} fails: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def load_scorer(name: str) -> Scorer:
    """The scorer `path/to/file.py:ClassName`, made without arguments.

    Raises:
        InputError: no such file or class, the file fails, or the class is no scorer.
    """
    place, _, wanted = name.rpartition(":")
    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"There is no file {place} with a scorer; give path/to/file.py:ClassName.")
    spec = importlib.util.spec_from_file_location(f"{_MODULE}{abs(hash(path.absolute()))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            scorer = getattr(module, wanted)()
    except AttributeError as error:
        if hasattr(module, wanted):
            raise InputError(f"The scorer {wanted} in {path.name} can't be made: {error}.") from error
        raise InputError(f"The file {path.name} has no class {wanted!r}; give path/to/file.py:ClassName.") from error
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        raise InputError(f"The scorer {wanted} in {path.name} can't be made: {type(error).__name__}: {error}.") from error
    check_scorer(scorer, f"{wanted} in {path.name}")
    return scorer


def check_scorer(scorer: Scorer, title: str) -> None:
    """InputError where somebody's `scorer` isn't one, or has a name that tables can't have; `title`: which one it is."""
    lacking = [part for part in ("setup", "score") if not callable(getattr(scorer, part, None))]
    lacking += [part for part in ("name", "goal") if not isinstance(getattr(scorer, part, None), str)]
    if lacking:
        raise InputError(f"The scorer {title} has no {lacking[0]}; see docs/extending.md.")
    if scorer.name in _TAKEN or not _NAME.fullmatch(scorer.name):
        raise InputError(
            f"The scorer {title} can't be called {scorer.name!r}; give it a name of up to 40 letters, digits, "
            f"spaces, '_', '-' or '.' that isn't one of {', '.join(sorted(_TAKEN))}."
        )
