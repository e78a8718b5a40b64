"""The layers of DESIGN §3: an AST walk over the package; imports go downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import abliterate

ROOT = Path(abliterate.__file__).parent
LAYERS = {
    5: (
        *(
            "cli",
            "cli_cache",
            "cli_reproduce",
            "cli_results",
            "__main__",
            "endings",
            "events",
            "console",
            "tables",
            "terminal_report",
        ),
        *("commands", "cache_commands", "trial_commands", "report_commands", "evaluate_commands", "batch"),
        *("chat_commands", "chat_input", "chat_screen", "terminal_report"),
    ),
    4: (
        *("pipeline", "stages", "exporting", "later", "bench", "inputs", "tuning", "workers", "inspection", "identity"),
        *("checks", "findings", "heldout", "evaluating", "benchmarks", "reproduce", "recipe_settings", "comparison"),
        *("chat_session", "chat_voice", "chat_edits", "chat_target"),
    ),
    3: ("search", "space", "storage", "front", "hypervolume", "importance", "results", "rundir", "report", "export"),
    2: ("evaluation", "calibration"),
    1: ("model", "directions", "edits", "cache"),
    0: (
        *("settings", "settings_sources", "stored_settings", "objectives", "prompts", "errors", "types", "interrupts", "locks"),
        "__init__",
    ),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
# What a module may import of the package beyond its own files, where that is less than its layer allows.
NARROW = {
    "directions": {"errors"},
    "edits": {"directions", "errors"},
    "cache": {"errors", "types"},
    "console": {"errors", "events", "objectives", "tables", "types"},
    "events": {"types"},
    "tables": {"errors", "objectives", "types"},
    "objectives": {"types"},
    "front": {"errors", "objectives", "types"},
    "hypervolume": {"front", "objectives", "types"},
    "space": {"objectives", "settings", "types"},
    "search": {"errors", "objectives", "settings", "space", "storage", "types"},
    "storage": {"errors"},
    "importance": {"objectives", "types"},
    "report": {"errors", "front", "hypervolume", "importance", "objectives", "rundir", "settings_sources", "types"},
    "terminal_report": {"objectives", "report", "tables", "types"},
}
RICH_ALLOWED = {"console", "tables", "chat_screen"}
HEAVY = ("torch", "transformers", "optuna", "peft", "datasets", "pydantic", "pydantic_settings", "rich")


def unit_of(path: Path) -> str:
    """The top-level module or package of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: str = "abliterate") -> Iterator[str]:
    """Dotted names that a tree imports, anywhere in it; relative imports are not used in this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            if node.module == package:
                yield from (f"{package}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def own_imports(tree: ast.AST) -> set[str]:
    """Units of the package that a tree imports; a name of `abliterate/__init__.py` counts as that."""
    dotted = [name.split(".") for name in imported(tree) if name.split(".")[0] == "abliterate"]
    units = {parts[1] if len(parts) > 1 else "__init__" for parts in dotted}
    return {unit if (ROOT / unit).is_dir() or (ROOT / f"{unit}.py").exists() else "__init__" for unit in units}


FILES = sorted(path for path in ROOT.rglob("*.py") if "demo" not in path.relative_to(ROOT).parts)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def test_walk_sees_the_package() -> None:
    assert len(FILES) > 30
    assert own_imports(TREES[ROOT / "search.py"]) == {"errors", "objectives", "settings", "space", "storage", "types"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_module_has_a_layer(path: Path) -> None:
    assert unit_of(path) in LAYER_OF, f"{path.name} has no layer: add it to LAYERS here and to DESIGN §3"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_downward(path: Path) -> None:
    own = unit_of(path)
    upward = {unit for unit in own_imports(TREES[path]) if LAYER_OF[unit] > LAYER_OF[own]}
    assert not upward, f"{own} (layer {LAYER_OF[own]}) imports from above: {sorted(upward)}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_narrow_modules_import_no_more_than_they_may(path: Path) -> None:
    own = unit_of(path)
    if own in NARROW:
        assert own_imports(TREES[path]) - {own, "__init__"} <= NARROW[own]


@pytest.mark.parametrize(
    "path", [p for p in FILES if unit_of(p) in ("directions", "edits")], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_tensor_math_imports_torch_and_stdlib_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(TREES[path])}
    assert tops - {"abliterate", "torch"} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", [p for p in FILES if unit_of(p) not in RICH_ALLOWED], ids=lambda p: str(p.relative_to(ROOT)))
def test_console_owns_rich(path: Path) -> None:
    assert "rich" not in {name.split(".")[0] for name in imported(TREES[path])}


def test_commands_use_rich_for_tables_only() -> None:
    used = {name for name in imported(TREES[ROOT / "commands.py"]) if name.split(".")[0] == "rich"}
    assert used <= {"rich.table"}


@pytest.mark.parametrize(
    "name",
    [
        "settings",
        "settings_sources",
        "objectives",
        "prompts",
        "errors",
        "types",
        "interrupts",
        "front",
        "hypervolume",
        "rundir",
    ],
)
def test_values_know_no_torch(name: str) -> None:
    assert not {"torch", "transformers"} & {dotted.split(".")[0] for dotted in imported(TREES[ROOT / f"{name}.py"])}


def test_search_knows_no_torch_and_front_no_optuna() -> None:
    assert "torch" not in {dotted.split(".")[0] for dotted in imported(TREES[ROOT / "search.py"])}
    assert "optuna" not in {dotted.split(".")[0] for dotted in imported(TREES[ROOT / "front.py"])}


def test_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, abliterate.cli.app; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_imports_have_no_cycles() -> None:
    graph = {unit: set[str]() for unit in LAYER_OF}
    for path, tree in TREES.items():
        graph[unit_of(path)] |= own_imports(tree) - {unit_of(path), "__init__"}
    while ready := [unit for unit, needs in graph.items() if not needs & graph.keys()]:
        for unit in ready:
            del graph[unit]
    assert not graph, f"a cycle among {sorted(graph)}"
