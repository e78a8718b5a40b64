"""At 60, 80 and 120 columns: counts and times stay whole, and a trial takes one line."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

from abliterate.terminal.reporters import RichReporter, show_error
from abliterate.terminal.tables import make_console, print_on
from abliterate.types import Column, Kernel, Table, Trial, TrialParams, kl_text

WIDTHS = (60, 80, 120)
_CODES = re.compile("\x1b\\[[0-9;?]*[a-zA-Z]")


def console_of(width: int, **options: object) -> tuple[object, io.StringIO]:
    """A terminal of so many columns, and what it shows."""
    out = io.StringIO()
    return make_console(file=out, width=width, force_terminal=True, **options), out


def trial_of(number: int) -> Trial:
    """A trial whose numbers take many columns."""
    params = TrialParams("global", 2.0, {"attn.o_proj": Kernel(1.0, 2.0, 0.5, 3.0)})
    kl = 0.1234 if number % 2 else 0.00001234
    scores = {"unanswered": {"count": 100}, "refusals": 100, "kl": {"mean": kl}}
    return Trial(number, params, "stopped", scores, 123.4, values={"unanswered": 100.0, "refusals": 100.0, "kl": kl})


@pytest.mark.parametrize("width", WIDTHS)
def test_count_and_times_stay_whole_and_trials_take_one_line(width: int) -> None:
    console, out = console_of(width)
    reporter = RichReporter(console)  # type: ignore[arg-type]
    reporter.stage("search", "200 trials")
    best = trial_of(198)
    for number in (197, 198, 199):
        reporter.trial(trial_of(number), 200, True, best)
    reporter.close()
    lines = [line for line in re.split("[\r\n]+", _CODES.sub("", out.getvalue())) if line.strip()]
    assert all(cell_len(line) <= width for line in lines)
    bars = [line for line in lines if " left " in line]
    assert bars
    assert all(re.search(r"trials .*\d+/200 .*\d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2}", line) for line in bars)
    shown = [line for line in lines if "★" in line]
    assert len(shown) == 3
    for line, kl in zip(shown, ("0.1234", "0.000012", "0.1234"), strict=True):
        assert "unanswered ≥100" in line
        assert "refusals ≥100" in line
        assert f"KL {kl} " in line
    assert "best" in bars[-1]  # what gives way


@pytest.mark.parametrize(
    ("kl", "text"),
    [
        *((0.0, "0.0000"), (4e-7, "0.0000"), (6e-7, "0.000001"), (1.24e-5, "0.000012"), (0.000987, "0.00099")),
        *((0.001, "0.0010"), (0.01236, "0.0124"), (1.5, "1.5000"), (-0.00032, "-0.00032")),
        *((float("inf"), "inf"), (float("nan"), "nan")),
    ],
)
def test_small_kls_keep_two_digits(kl: float, text: str) -> None:
    assert kl_text(kl) == text
    assert Column("kl", "KL", digits="KL").text(kl) == text


def test_commands_at_the_end_can_be_copied_whole() -> None:
    console, out = console_of(60)
    command = f"  abliterate evaluate owner/model runs/{'long-name-' * 8}model-20260101-120000  try other prompts"
    RichReporter(console).finish({}, "run", [command])  # type: ignore[arg-type]
    assert _CODES.sub("", out.getvalue()) == f"{command}\n"


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_stay_whole_and_words_give_way(width: int) -> None:
    columns = (*(Column(name, name) for name in ("trial", "unanswered", "refusals")), Column("how", "how", "word"))
    table = Table("", columns, ((12, "100/100", "99/100", "by a word that is rather long and has spaces in it"),) * 2)
    console, out = console_of(width)
    print_on(console, table)  # type: ignore[arg-type]
    lines = _CODES.sub("", out.getvalue()).splitlines()
    assert sum("100/100" in line and "99/100" in line for line in lines) == 2
    assert all(cell_len(line) <= width for line in lines)


def test_numbers_have_no_colour_of_their_own() -> None:
    console, out = console_of(80, color_system="standard")
    console.print("12 of 100 'prompts' in /tmp/a.txt are None")  # type: ignore[attr-defined]
    assert not _CODES.search(out.getvalue())


@pytest.mark.parametrize("width", WIDTHS)
def test_an_error_breaks_between_words_and_leaves_a_path_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_terminal(**options: object) -> object:
        return make_console(force_terminal=True, width=width, color_system=None, **options)

    monkeypatch.setattr("abliterate.terminal.reporters.make_console", at_terminal)
    path = "/a" * 70
    message = f"The model {path} can't be fetched from the Hub; check the id and the network, or give a local directory of it."
    show_error(message)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(line.rstrip() for line in lines) == f"error: {message}"
    assert all(len(line) <= width for line in lines if path not in line)
    assert len(lines) > 1


def test_an_error_in_a_pipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_error("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_title_is_wider_than_its_table() -> None:
    console, out = console_of(80, color_system=None)
    title = "Front: every trial that no other beats on both scores, by rising KL"
    print_on(console, Table(title, (Column("a", "a"),), (("1",),)))  # type: ignore[arg-type]
    assert out.getvalue().splitlines()[0].rstrip() == title
