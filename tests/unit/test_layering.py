"""The layers of docs/design.md §3: imports inside the package go down one list of ranks, and nowhere in a circle."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import abliterate

ROOT = Path(abliterate.__file__).parent
# A unit (a folder or a file of the package) imports units of lower ranks only; "/" ends a rank.
RANKS = """
_version types errors / files objectives plugins ranks / settings terminal / directions / edits / model search /
prompts scorers / artifacts engine / evaluation / refine report / export / pipeline / chat / cli / __init__ __main__
"""
RANK = {unit: rank for rank, units in enumerate(RANKS.split("/")) for unit in units.split()}
NO_TORCH = ("_version", "types", "errors", "files", "objectives", "plugins", "settings", "terminal", "search")
ONLY_TORCH = ("directions", "edits")
RICH = ("terminal/reporters.py", "terminal/tables.py", "chat/display.py")
HEAVY = ("torch", "transformers", "optuna", "peft", "datasets", "pydantic", "pydantic_settings", "rich")


def module_of(path: Path) -> str:
    """`engine.decode` of engine/decode.py; a package is called by its name alone."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "demo"}


@functools.cache  # not at the import, because every test process imports every test
def trees() -> dict[str, ast.Module]:
    """The parsed source of each module."""
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, anywhere in it but for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    names = (name.removeprefix("abliterate.") for name in imported(trees()[module]) if name.startswith("abliterate."))
    return {name if name in FILES else name.rpartition(".")[0] or "__init__" for name in names} - {module}


def unit_of(module: str) -> str:
    return module.split(".")[0]


def outside(module: str) -> set[str]:
    """Top-level packages that a module imports."""
    return {name.split(".")[0] for name in imported(trees()[module])}


@functools.cache
def imports() -> dict[str, set[str]]:
    """{module: the modules of the package that it imports}."""
    return {module: own_imports(module) for module in trees()}


def test_the_walk_sees_the_package() -> None:
    assert len(FILES) > 150
    assert {"engine.forward", "engine.kv_cache"} <= imports()["engine.decode"]
    assert {unit_of(module) for module in FILES} == set(RANK), "every unit has a rank here and in docs/design.md §3"


def test_the_design_shows_this_house() -> None:
    design = (ROOT.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    assert RANKS.strip() in design
    tree = design.partition("src/abliterate/\n")[2].partition("```")[0]
    files = {path.name for path in FILES.values() if path.name != "__init__.py" and path.parent.name != "formats"}
    assert set(re.findall(r"\w+\.py", tree)) - {"__init__.py"} == files
    folders = {path.parent.name for path in FILES.values()} - {ROOT.name}
    assert folders <= set(re.findall(r"(\w+)/", tree))


def test_imports_go_down() -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in imports().items()
        for other in others
        if unit_of(other) != unit_of(module) and RANK[unit_of(other)] >= RANK[unit_of(module)]
    ]
    assert not upward


def levels() -> dict[str, int]:
    """{module: its distance from the bottom}; a module in or above a circle has none."""
    level: dict[str, int] = {}
    while ready := [module for module in imports() if module not in level and imports()[module] <= level.keys()]:
        for module in ready:
            level[module] = 1 + max((level[other] for other in imports()[module]), default=-1)
    return level


def test_imports_have_no_circle() -> None:
    assert not imports().keys() - levels().keys()


def test_the_house_has_at_most_twelve_floors() -> None:
    units = {unit_of(module): set[str]() for module in imports()}
    for module, others in imports().items():
        units[unit_of(module)] |= {unit_of(other) for other in others} - {unit_of(module)}
    del units["__main__"]  # it only calls cli.app
    floor: dict[str, int] = {}
    while ready := [unit for unit in units if unit not in floor and units[unit] <= floor.keys()]:
        floor |= {unit: 1 + max((floor[other] for other in units[unit]), default=0) for unit in ready}
    assert units.keys() == floor.keys()
    assert max(floor.values()) <= 12, sorted(floor.items(), key=lambda item: item[1])


def test_what_may_be_imported_from_outside() -> None:
    heavy = {"torch", "transformers"}
    offences = [f"{module}: torch" for module in FILES if unit_of(module) in NO_TORCH and heavy & outside(module)]
    offences += [
        f"{module}: {name}"
        for module in FILES
        if unit_of(module) in ONLY_TORCH
        for name in outside(module) - {"abliterate", "torch"} - sys.stdlib_module_names
    ]
    rich = [module for module in FILES if "rich" in outside(module)]
    offences += [f"{module}: rich" for module in rich if FILES[module].relative_to(ROOT).as_posix() not in RICH]
    assert not offences


def test_functions_are_short() -> None:
    """At most 60 lines; only the options of a command, one a line, may be longer."""
    long = [
        f"{module}.{node.name}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and module != "cli.app" and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long


def test_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, abliterate.cli.app; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_the_library_imports_nothing_before_it_is_used() -> None:
    code = f"import sys, abliterate; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
