"""Plugins: packages installed beside the tool that add one of each seam, broken ones, and ones whose names are taken."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedModel

from abliterate.cli import app
from abliterate.cli.checks import BUILT_IN
from abliterate.directions import METHODS, direction_method
from abliterate.edits import edit_method
from abliterate.errors import InputError
from abliterate.export import EXPORTERS, check_kind
from abliterate.model.architectures import ARCHITECTURES, known_architecture
from abliterate.pipeline.reproduce.recipe_settings import _leave_scorers
from abliterate.plugins import GROUP, SEAMS, installed
from abliterate.scorers import SCORERS, make_scorers
from abliterate.settings.schema import Settings
from support.contracts import ArchitectureContract
from support.forked import Forked, import_afresh
from support.paths import ROOT
from support.runs import quick_settings, run_in
from support.zoo import make_specimen

Finished = tuple[Path, dict[str, Any], Settings]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
MODULE, TESTS = "\n\n".join(BLOCKS[:-1]), BLOCKS[-1]
MINE = ModuleType("abliterate_mine")
exec(compile(MODULE, "abliterate_mine.py", "exec"), MINE.__dict__)
sys.modules[MINE.__name__] = MINE
exec(compile(TESTS, "tests/test_mine.py", "exec"), globals())  # the page's test classes are tests of this file
del sys.modules[MINE.__name__]
USED = {"directions": {"method": "trimmed"}, "edit": {"mode": "half"}, "export": {"kind": "listed"}}


class Installer:
    """Puts packages onto the path, as pip would leave them, and takes them away again."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self._modules: list[str] = []
        folder.mkdir()
        patch.syspath_prepend(folder)
        installed.forget()

    def __call__(self, code: str, package: str = "abliterate-mine", version: str = "1.0", name: str = "mine") -> None:
        """A package of one module, with its entry point."""
        module = package.replace("-", "_")
        (self.folder / f"{module}.py").write_text(code, encoding="utf-8")
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}\n", encoding="utf-8")
        importlib.invalidate_caches()
        self._modules.append(module)
        installed.forget()

    def remove(self) -> None:
        """Nothing of them stays."""
        for module in self._modules:
            sys.modules.pop(module, None)
        installed.forget()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Installer]:
    """Packages for one test."""
    with pytest.MonkeyPatch.context() as patch:
        installer = Installer(patch, tmp_path / "site")
        yield installer
    installer.remove()


@pytest.fixture
def mine(install: Installer) -> None:
    """The page's own plugin, installed."""
    install(MODULE)


def sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    """One sentence with these parts."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.usefixtures("mine")
class TestPageArchitecture(ArchitectureContract):
    """The page's family, whose row the table lacks."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return make_specimen("biogpt")


def test_the_page_shows_one_of_each() -> None:
    assert {seam for seam in SEAMS if hasattr(MINE, seam)} == set(SEAMS)
    assert {"TestLength", "TestTrimmed", "TestHalf", "TestListed"} <= globals().keys()


@pytest.mark.usefixtures("mine", "lean")
def test_a_run_uses_a_plugins_names(finished: Finished, prompt_files: dict[str, str], tmp_path: Path) -> None:
    search = {"trials": 2, "objectives": ["refusals", "kl", "length"], "max_coeff": {"default": [2.4, 3.0]}}  # it takes half
    settings = quick_settings(prompt_files, Path(finished[2].cache_dir), **USED, search=search)
    result, recorder = run_in(tmp_path / "run", settings)
    assert [one["name"] for one in result["objectives"]] == ["kl", "refusals", "length"]
    assert result["export"]["kind"] == "listed"
    assert result["export"]["verified"] is True, result["export"]
    assert (tmp_path / "run" / "model" / "EDITED.txt").read_text(encoding="utf-8").startswith("model.layers.")
    assert result["environment"]["versions"]["abliterate-mine"] == "1.0"
    assert result["trials"][0]["scores"]["length"]["words"] > 0


@pytest.mark.usefixtures("lean")
def test_a_run_is_not_resumed_with_another_version(
    install: Installer, finished: Finished, prompt_files: dict[str, str], tmp_path: Path
) -> None:
    install(MODULE)
    over = {"directions": {"method": "trimmed"}, "export": {"kind": "none"}, "search": {"trials": 1, "startup_trials": 1}}
    settings = quick_settings(prompt_files, Path(finished[2].cache_dir), **over)
    run_in(tmp_path / "run", settings)
    install.remove()
    (info,) = install.folder.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    (info / "METADATA").write_text(metadata.replace("1.0", "1.1"), encoding="utf-8")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="direction method"):
        run_in(tmp_path / "run", settings, resume=True)


@pytest.mark.usefixtures("mine")
def test_errors_name_plugins_too() -> None:
    with pytest.raises(InputError, match=r"no direction method 'trimed'.*projected.*trimmed"):
        direction_method("trimed")
    with pytest.raises(InputError, match=r"no edit mode 'hlaf'.*full.*half"):
        edit_method("hlaf")
    with pytest.raises(InputError, match=r"no export kind 'lsited'.*merged.*listed.*none"):
        check_kind("lsited")
    with pytest.raises(InputError, match=r"no scorer 'lenght'.*refusals.*length"):
        make_scorers(["refusals", "kl", "lenght"], ["no"])


def test_without_plugins_there_are_the_built_in_names(install: Installer) -> None:
    assert installed() == ()
    assert tuple(METHODS) == BUILT_IN["directions.method"][1]
    assert list(EXPORTERS) == ["merged", "adapter"]
    assert METHODS.plugin("mean") is None
    assert METHODS.origin("mean") == {}


def test_no_two_rows_of_the_table_have_one_type() -> None:
    types = [model_type for row in ARCHITECTURES.values() for model_type in row.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("import nothing_of_that_name", ("can't be imported (ModuleNotFoundError: No module named", "pip uninstall")),
        ("raise SystemExit('no licence')", ("can't be imported (SystemExit: no licence)",)),
        ("def broken(:\n", ("can't be imported (SyntaxError",)),
        ("scorer = {}", ("has none of architectures, scorers",)),
        ("scorers = ['length']", ("has scorers that are no dictionary",)),
        ("scorers = {'a:b': print}", ("has scorers that are no dictionary",)),
        ("class Mean:\n    name = 'mean'\n    compute = print\ndirections = {'mean': Mean()}", ("'mean'", "abliterate itself")),
        ("class Any:\n    name = 'other'\n    compute = print\ndirections = {'any': Any()}", ("calls itself 'other' (name)",)),
        ("directions = {'any': 3}", ("has no name; see docs/extending.md",)),
        ("class None_:\n    kind = 'none'\n    write = load = reread = print\nexporters = {'none': None_()}", ("itself",)),
        ("scorers = {'kl': print}", ("adds the scorer 'kl', and so does abliterate itself; uninstall",)),
        (
            "from abliterate.model.architectures import Architecture\n"
            "architectures = {'mine': Architecture('mine', ('llama',), 'model.layers', {})}",
            ("The model type 'llama' belongs to the families llama and mine",),
        ),
    ],
)
def test_a_broken_or_colliding_plugin_is_one_sentence(install: Installer, code: str, parts: tuple[str, ...]) -> None:
    install(code)
    for _ in range(2):  # the second look is no better
        with pytest.raises(InputError) as error:
            list(METHODS), list(EXPORTERS), list(SCORERS), known_architecture("llama")
        sentence(error, "'mine' (package abliterate-mine 1.0)", *parts)


def test_two_plugins_of_one_name(install: Installer) -> None:
    install(MODULE)
    install("from abliterate_mine import directions", "abliterate-other", "2.0", "other")
    with pytest.raises(InputError) as error:
        direction_method("trimmed")
    sentence(error, "'other' (package abliterate-other 2.0)", "'mine' (package abliterate-mine 1.0)")


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("scorers = {'mine': lambda making: 1 / 0}", ("can't be made: ZeroDivisionError",)),
        ("scorers = {'mine': lambda making: 3}", ("mine of the plugin", "has no setup")),
        (
            "class S:\n    name, goal, setup, score = 'yours', 'none', print, print\nscorers = {'mine': lambda making: S()}",
            ("calls itself 'yours'",),
        ),
        (
            "class S:\n    name, goal, setup, score = 'auto', 'none', print, print\nscorers = {'auto': lambda making: S()}",
            ("can't be called 'auto'",),
        ),
    ],
)
def test_what_is_no_scorer(install: Installer, code: str, parts: tuple[str, ...]) -> None:
    install(code)
    with pytest.raises(InputError) as error:
        make_scorers(["refusals", "kl", "auto" if "'auto'" in code else "mine"], ["no"])
    sentence(error, "'mine' (package abliterate-mine 1.0)", *parts)


@pytest.mark.usefixtures("lean")
def test_a_failing_scorer_fails_the_trial_with_a_sentence(
    install: Installer, finished: Finished, prompt_files: dict[str, str], tmp_path: Path
) -> None:
    code = MODULE.replace(
        "return Score(self.name, abs", 'assert words == self.base, "another"\n        return Score(self.name, abs'
    )
    install(code)
    over = {"evaluation": {"scorers": ["refusals", "kl", "length"]}, "export": {"kind": "none"}, "search": {"trials": 3}}
    settings = quick_settings(prompt_files, Path(finished[2].cache_dir), **over)
    result, _ = run_in(tmp_path / "run", settings)
    failed = [trial["reason"] for trial in result["trials"] if trial["state"] == "failed"]
    assert failed
    assert all("the scorer length fails: AssertionError: another" in reason for reason in failed)


def test_a_plugin_may_look_into_registries_as_it_is_imported(install: Installer, capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "from abliterate.directions import METHODS\nprint(len(METHODS))\n"
        "class Again(type(METHODS['mean'])):\n    name = 'again'\ndirections = {'again': Again()}"
    )
    assert tuple(METHODS) == (*BUILT_IN["directions.method"][1], "again")
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{len(METHODS) - 1}\n")  # standard output may be JSON lines


def test_plugins_are_imported_once_and_not_by_the_command_line(install: Installer, tmp_path: Path) -> None:
    install("import sys\nprint('imported')\nscorers = {}")
    modules = ["abliterate.cli.app", "abliterate.pipeline.run"]
    given = [["abliterate"], modules, "abliterate_mine"]
    child = Forked(import_afresh, given, tmp_path, environment={"PYTHONPATH": str(install.folder)})
    assert child.end() == 0, child.err
    assert (child.out, child.err) == ("False\n", "")
    assert installed() is installed()
    assert "abliterate_mine" in sys.modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "demo", "--export", "gguf"], "There is no export kind 'gguf'; choose one of merged, adapter, none"),
        (["run", "demo", "--set", "directions.method=medain"], "There is no direction method 'medain'"),
        (["reproduce", "recipe.json", "--kind", "gguf"], "There is no export kind 'gguf'"),
    ],
)
def test_unknown_names_end_the_command_with_a_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text("{}", encoding="utf-8")
    assert said in command(arguments, monkeypatch, capsys, tmp_path)


def test_a_broken_plugin_ends_the_command_with_a_sentence(
    install: Installer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("import nothing_of_that_name")
    said = command(["run", "demo"], monkeypatch, capsys, tmp_path)
    assert "error: The plugin 'mine' (package abliterate-mine 1.0) can't be imported" in said


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """A command that ends with bad input: what it says on standard error, in one line."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["abliterate", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.usefixtures("mine")
def test_a_recipe_runs_no_plugins_scorer() -> None:
    stated = {"evaluation": {"scorers": ["refusals", "kl", "length", "unknown"]}, "search": {"objectives": ["length:maximize"]}}
    _leave_scorers(stated)
    assert stated == {"evaluation": {"scorers": ["refusals", "kl"]}, "search": {"objectives": ["kl"]}}
