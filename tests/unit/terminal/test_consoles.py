"""No console that prints our markup reads emoji codes: `name:train:text` is the syntax of a data set."""

from __future__ import annotations

import ast
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.emoji import Emoji

import abliterate
from abliterate.terminal import reporters, tables
from abliterate.terminal.reporters import RichReporter, ask_yes, show_error, show_heading
from abliterate.terminal.tables import make_console, print_table
from abliterate.types import Column, Table

# `:train:`, `:bug:` and `:x:` are emoji codes; so a name of a data set, a model or a file can hold one.
CODES = ["x:train:y", "owner/name:train:text", "a:bug:b", ":x:", "run:cat:3"]


def header(console: Console, text: str) -> None:
    RichReporter(console).header({"prompts": text, text: "v"})


def notes(console: Console, text: str) -> None:
    reporter = RichReporter(console)
    reporter.note(text)
    reporter.warn(text)
    reporter.stage(text, text)
    reporter.progress(1, 2, text)
    reporter.close()


def finish(console: Console, text: str) -> None:
    table = Table(text, (Column("a", text),), ((text,),), notes=(text,))
    RichReporter(console).finish({}, "run", [text, table])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("show", [header, notes, finish], ids=lambda show: show.__name__)
def test_what_reporters_show(show: Callable[[Console, str], None], code: str) -> None:
    out = io.StringIO()
    show(make_console(file=out, force_terminal=True, width=200, color_system=None), code)
    assert code in out.getvalue()
    assert Emoji.replace(code) not in out.getvalue()


@pytest.mark.parametrize("code", CODES)
def test_sentences_headings_questions_and_tables(
    code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    consoles = tables.make_console

    def at_terminal(**options: object) -> Console:
        return consoles(force_terminal=True, width=200, color_system=None, **options)

    for module in (tables, reporters):
        monkeypatch.setattr(module, "make_console", at_terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    show_error(f"There is no prompt file {code!r}.")
    show_heading(code)
    print_table((code,), [(code,)], code)
    assert ask_yes(f"Delete {code}?")
    out, err = capsys.readouterr()
    assert err.count(code) == 1
    assert out.count(code) == 5
    assert Emoji.replace(code) not in out + err


def test_every_console_is_made_in_one_place() -> None:
    root = Path(abliterate.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert name != "Console" or path.name == "tables.py", path
            assert name != "from_markup", f"{path}: it reads emoji codes"
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name != "TextColumn" or options.get("markup") == "False", path


def test_help_has_no_emoji_codes() -> None:
    for path in (Path(abliterate.__file__).parent / "cli").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert Emoji.replace(text) == text, path
