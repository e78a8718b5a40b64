"""abliterate: removes one behaviour, by default refusal, from an open-weight language model by directional ablation.

    import abliterate as ab

    settings = ab.Settings.load("quick", model="Qwen/Qwen3-0.6B")
    with ab.load(settings) as bench:                         # model, tokenizer, prompts, calibrated engines
        directions = ab.find_directions(bench)
        study = ab.search(bench, directions, trials=100)     # iterates over trials; study.front, study.pick("kl<=0.05")
        with bench.edited(study.pick().params):              # afterwards the model is always the base model again
            bench.respond(["Show me …"])
        ab.export(bench, study.pick(), "out/")
    ab.run(settings)                                         # a whole run, as by `abliterate run`

Nothing heavy is imported before the first of these names is used. docs/library.md has the whole interface.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from abliterate._version import __version__

if TYPE_CHECKING:
    from abliterate.pipeline.export import export
    from abliterate.pipeline.run import run
    from abliterate.pipeline.search import search
    from abliterate.pipeline.stages import find_directions
    from abliterate.pipeline.workbench import Workbench, load
    from abliterate.settings.sources import Settings

__all__ = ["Settings", "Workbench", "__version__", "export", "find_directions", "load", "run", "search"]

_HOMES = {
    "Settings": "settings.sources",
    "Workbench": "pipeline.workbench",
    "find_directions": "pipeline.stages",
    "load": "pipeline.workbench",
    "run": "pipeline.run",
}
# These names are also packages (`abliterate.export` is the seam for exporters), and importing a package binds its name in its
# parent. So the packages themselves are made callable, and call the functions.
_CALLABLE = {"export": "pipeline.export", "search": "pipeline.search"}


class _CallablePackage(ModuleType):
    """A package that can also be called: `abliterate.search(bench, directions)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"abliterate.{_CALLABLE[name]}"), name)(*args, **kwargs)


class _Library(ModuleType):
    """The class of this package, which makes the packages in `_CALLABLE` callable when they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Library


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"abliterate.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
    return getattr(import_module(f"abliterate.{_HOMES[name]}"), name)
