"""Load a custom scorer: a class in a file that the user names. Its code runs, so only a file that is named is ever loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator

from abliterate.errors import InputError, Interrupted, TrialError
from abliterate.files import expanded
from abliterate.model.memory import is_out_of_memory
from abliterate.scorers.base import Scorer

_MODULE = "abliterate_own_"
_PACKAGE = __name__.partition(".")[0]
# An absolute path, of which a trial's reason keeps the last part: the report, which may be passed on, shows it.
_PATH = re.compile(r"(?<![\w./:~\\])(?:[A-Za-z]:)?[/\\]+(?:[^\s'\"/\\:]+[/\\]+)+(?=[^\s'\"/\\:])")
# The same between quotes, where a path may have spaces; nothing that has a scheme, as https://.
_QUOTED = re.compile(r"(?<=['\"])(?:[A-Za-z]:)?[/\\][^'\":]*[/\\](?=[^'\"/\\:]+['\"])")
# A scorer's name heads a column and appears in rules such as NAME<=X.
_NAME = re.compile(r"\w(?:[\w .-]{0,38}[\w.-])?")
_TAKEN = {
    *("trial", "number", "state", "front", "selected", "refusals_exact", "kl_mean", "kl_median", "kl_max", "seconds"),
    *("scope", "direction", "direction_index", "reason", "auto", "knee", "unanswered", "broken", "off_topic"),
}


@contextlib.contextmanager
def own_errors(scorer: Scorer) -> Iterator[None]:
    """While active, errors of a custom or a plugin's scorer become a TrialError, and its prints go to standard error."""
    if type(scorer).__module__.partition(".")[0] == _PACKAGE:
        yield
        return
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output may be JSON lines
            yield
    except (TrialError, Interrupted):
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):  # smaller batches may help
            raise
        message = _PATH.sub("", _QUOTED.sub("", " ".join(f"{type(error).__name__}: {error}".split())))
        raise TrialError(f"the scorer {scorer.name} fails: {message}") from error


def load_scorer(name: str) -> Scorer:
    """The scorer `path/to/file.py:ClassName`, made without arguments.

    Raises:
        InputError: the file or class doesn't exist, the file fails, or the class is no scorer.
    """
    file, _, class_name = name.rpartition(":")
    path = expanded(file)
    if not path.is_file():
        raise InputError(f"There is no file {file} with a scorer; give path/to/file.py:ClassName.")
    spec = importlib.util.spec_from_file_location(f"{_MODULE}{abs(hash(path.absolute()))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
            scorer = getattr(module, class_name)()
    except AttributeError as error:
        if hasattr(module, class_name):
            raise InputError(f"The scorer {class_name} in {path.name} can't be made: {error}.") from error
        raise InputError(f"The file {path.name} has no class {class_name!r}; give path/to/file.py:ClassName.") from error
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        raise InputError(f"The scorer {class_name} in {path.name} can't be made: {type(error).__name__}: {error}.") from error
    check_scorer(scorer, f"{class_name} in {path.name}")
    return scorer


def check_scorer(scorer: Scorer, title: str) -> None:
    """InputError if somebody's `scorer` isn't a scorer, or has a name that tables can't have; `title` says which one it is."""
    missing = [attribute for attribute in ("setup", "score") if not callable(getattr(scorer, attribute, None))]
    missing += [attribute for attribute in ("name", "goal") if not isinstance(getattr(scorer, attribute, None), str)]
    if missing:
        raise InputError(f"The scorer {title} has no {missing[0]}; see docs/extending.md.")
    if scorer.name in _TAKEN or not _NAME.fullmatch(scorer.name):
        raise InputError(
            f"The scorer {title} can't be called {scorer.name!r}; give it a name of up to 40 letters, digits, "
            f"spaces, '_', '-' or '.' that isn't one of {', '.join(sorted(_TAKEN))}."
        )
