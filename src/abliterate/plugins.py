"""Registries of implementations, and the plugins that extend them: packages with an entry point in `abliterate.plugins`.

An entry point names a module. The module has any of the dictionaries that `SEAMS` lists, each like the built-in dictionary, for
example `directions = {"median": Median()}`; docs/extending.md shows all five. Plugins are imported once, when a registry is
first used: never by `abliterate --help`, and never by importing this package.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from abliterate.errors import InputError

T = TypeVar("T")

GROUP = "abliterate.plugins"
SEAMS = ("architectures", "scorers", "directions", "edits", "exporters")
# A name is written in settings, in column heads and in rules such as NAME<=X, and ":" would begin a scorer's goal.
_NAME = re.compile(r"\w[\w.-]{0,39}")
_PAGE = "docs/extending.md"


@dataclass(frozen=True)
class Plugin:
    """One entry point's module. `parts` is {seam: {name: implementation}}; `package` and `version` are as pip lists them."""

    name: str
    package: str
    version: str
    parts: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The plugin as error sentences name it."""
        return f"{self.name!r} (package {self.package} {self.version})"


class _Installed:
    """The plugins of this installation, imported at the first call. A failed import is repeated at the next call."""

    def __init__(self) -> None:
        self._plugins: tuple[Plugin, ...] | None = None
        self._loading = False
        self._lock = threading.RLock()

    def __call__(self) -> tuple[Plugin, ...]:
        with self._lock:
            # A plugin may use a registry while it is imported; it then sees the built-in names only.
            if self._plugins is None and not self._loading:
                self._loading = True
                try:
                    self._plugins = tuple(_load(point) for point in sorted(entry_points(group=GROUP), key=_order))
                finally:
                    self._loading = False
            return self._plugins or ()

    def forget(self) -> None:
        """Import the plugins again at the next use, because packages were installed or removed."""
        self._plugins = None


installed = _Installed()


class Registry(MutableMapping[str, T]):
    """The implementations of one seam by name: first the built-in implementations, then those of plugins.

    `seam` is the dictionary's name in a plugin's module, and `what` the singular noun in error sentences. `named` is the
    attribute that repeats the name, or "". `needs` lists attributes that every implementation has, and `reserved` names that
    have another meaning. Any look-up raises InputError if an installed plugin is broken.
    """

    def __init__(
        self,
        seam: str,
        what: str,
        built_in: Mapping[str, T],
        *,
        named: str = "",
        needs: Sequence[str] = (),
        reserved: Sequence[str] = (),
    ) -> None:
        assert seam in SEAMS
        self.what = what
        self._seam, self._named, self._needs, self._reserved = seam, named, needs, reserved
        self._own = dict(built_in)
        self._source: tuple[Plugin, ...] = ()
        self._added: dict[str, tuple[T, Plugin]] = {}

    def __getitem__(self, name: str) -> T:
        added = self._plugged()
        return added[name][0] if name in added else self._own[name]

    def __setitem__(self, name: str, implementation: T) -> None:
        self._own[name] = implementation

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._own, *self._plugged())

    def __len__(self) -> int:
        return len(self._own) + len(self._plugged())

    def find(self, name: str) -> T:
        """The implementation of that name; InputError, with all known names, if there is none."""
        if name not in self:
            names = ", ".join([*self, *self._reserved])
            raise InputError(f"There is no {self.what} {name!r}; choose one of {names}, or install the plugin that has it.")
        return self[name]

    def plugin(self, name: str) -> Plugin | None:
        """The plugin that an implementation comes from; None for a built-in implementation."""
        added = self._plugged()
        return added[name][1] if name in added else None

    def origin(self, name: str) -> dict[str, str]:
        """The record of an implementation's origin: a plugin's package and version, or nothing if it is built in."""
        plugin = self.plugin(name)
        return {} if plugin is None else {"plugin": f"{plugin.package} {plugin.version}"}

    def _plugged(self) -> dict[str, tuple[T, Plugin]]:
        plugins = installed()
        if plugins is not self._source:
            added: dict[str, tuple[T, Plugin]] = {}
            for plugin in plugins:
                for name, implementation in plugin.parts.get(self._seam, {}).items():
                    self._check(name, implementation, plugin, added)
                    added[name] = (implementation, plugin)
            self._source, self._added = plugins, added
        return self._added

    def _check(self, name: str, implementation: T, plugin: Plugin, added: Mapping[str, tuple[T, Plugin]]) -> None:
        """Raise InputError if a name of a plugin is taken, or its implementation lacks an attribute that the seam needs."""
        other = f"the plugin {added[name][1].title}" if name in added else ""
        if name in self._own or name in self._reserved:
            other = "abliterate itself"
        if other:
            raise InputError(
                f"The plugin {plugin.title} adds the {self.what} {name!r}, and so does {other}; uninstall the plugin, or have "
                "its author choose another name."
            )
        lacking = next((part for part in self._needs if not hasattr(implementation, part)), "")
        if lacking:
            raise InputError(f"The {self.what} {name!r} of the plugin {plugin.title} has no {lacking}; see {_PAGE}.")
        own_name = getattr(implementation, self._named) if self._named else name
        if own_name != name:
            raise InputError(
                f"The {self.what} {name!r} of the plugin {plugin.title} calls itself {own_name!r} ({self._named}); both names "
                f"must be the same, see {_PAGE}."
            )


def _load(point: EntryPoint) -> Plugin:
    """Import one plugin; InputError if the import fails or the module adds nothing to any seam."""
    package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
    plugin = Plugin(point.name, package, version, {})
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output may be JSON lines
            module = point.load()
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(". ")
        raise InputError(
            f"The plugin {plugin.title} can't be imported ({cause}); update it, or remove it with pip uninstall {package}."
        ) from error
    parts = {seam: getattr(module, seam) for seam in SEAMS if hasattr(module, seam)}
    if not parts:
        raise InputError(f"The plugin {plugin.title} has none of {', '.join(SEAMS)}, so it adds nothing; see {_PAGE}.")
    for seam, part in parts.items():
        if not isinstance(part, Mapping) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in part):
            raise InputError(
                f"The plugin {plugin.title} has {seam} that are no dictionary with names of up to 40 letters, digits, '_', '-' "
                f"or '.'; see {_PAGE}."
            )
    return Plugin(point.name, package, version, parts)


def _order(point: EntryPoint) -> tuple[str, str]:
    """A sort key that gives the same order on every machine."""
    return (point.dist.name if point.dist else "", point.name)
