"""The question after a search: keys, numbers, and the time after which the proposal is taken."""

from __future__ import annotations

import io
import os
import pty
import termios
import threading
import time

import pytest

from abliterate.terminal.question import Choice, Question, ask

INFINITE = float("inf")


def question(wait: float = INFINITE) -> Question:
    """Trials 3, 7 and 12 are on the front, in this order; 7 is proposed, and 0 and 5 are complete, too."""
    return Question({0, 3, 5, 7, 12}, [3, 7, 12], 7, wait)


def answered(keys: str, wait: float = INFINITE) -> tuple[Choice, str]:
    """The answer to these keys, and what the terminal shows."""
    controller, terminal = pty.openpty()
    try:
        before = termios.tcgetattr(terminal)

        def press() -> None:  # keys pressed before the question don't count
            while termios.tcgetattr(terminal)[3] & termios.ICANON:
                time.sleep(0.001)
            os.write(controller, keys.encode())

        threading.Thread(target=press, daemon=True).start()
        out = io.StringIO()
        with os.fdopen(os.dup(terminal)) as source:
            choice = ask(question(wait), source, out)
        assert termios.tcgetattr(terminal) == before
        return choice, out.getvalue()
    finally:
        os.close(controller)
        os.close(terminal)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("\r", Choice("export", 7)),
        ("\n", Choice("export", 7)),
        ("12\n", Choice("export", 12)),
        ("5\n", Choice("export", 5)),  # complete, though not on the front
        ("99\n\x7f\x7f3\n", Choice("export", 3)),  # there is no trial 99
        ("\x1b[A\n", Choice("export", 3)),
        ("\x1b[B\n", Choice("export", 12)),
        ("\x1b[B\x1b[B\x1b[A\n", Choice("export", 7)),
        ("\x1b[A\x1b[A\x1b[A\n", Choice("export", 3)),
        ("c", Choice("chat", 7)),
        ("12c", Choice("chat", 12)),
        ("99cq", Choice("quit", 7)),
        ("3q", Choice("quit", 7)),
        ("xyz\x1b?\n", Choice("export", 7)),
        ("3\x04", Choice("export", 7)),
        ("\x1b[C\x1bOQ\x1b[3~\x1b[1;5A\n", Choice("export", 7)),  # → F2, Delete and Ctrl+↑ are no answers
        ("\x1b[A12\n", Choice("export", 12)),  # a number behind an arrow begins anew
    ],
)
def test_keys(keys: str, expected: Choice) -> None:
    assert answered(keys)[0] == expected


def test_a_number_that_is_no_complete_trial_is_told() -> None:
    asked = question()
    assert [asked.key(key) for key in "99\n"] == [None] * 3
    assert asked.line() == "Export trial 99? (no complete trial)"
    assert len(asked.line()) < 60


def test_without_a_key_the_proposal_is_taken_and_a_key_begins_the_time_anew() -> None:
    assert answered("", wait=0.05) == (Choice("export", 7), "\r\x1b[2KExport trial 7? (proposed) \n")
    # The shown number isn't the proposal: nobody has confirmed it.
    assert answered("12", wait=0.05)[0] == Choice("export", 7)


def test_where_the_terminal_has_gone_the_proposal_is_taken() -> None:
    controller, terminal = pty.openpty()
    os.close(controller)
    try:
        with os.fdopen(os.dup(terminal)) as source:
            assert ask(question(), source, io.StringIO()) == Choice("export", 7)
    finally:
        os.close(terminal)


def test_without_single_keys_each_line_is_an_answer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.terminal.question.termios", None)
    lines = iter(["99", "12"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    assert ask(question(600), out=io.StringIO()) == Choice("export", 12)
    assert "If no key" not in question(600).explanation()  # nothing ends the wait for a line


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["exit", "abort", "Q"], Choice("quit", 7)),
        (["cancel", "no"], Choice("quit", 7)),
        (["12 c"], Choice("chat", 12)),
        (["chat"], Choice("chat", 7)),
        ([""], Choice("export", 7)),
    ],
)
def test_a_line_that_is_no_answer_exports_nothing(lines: list[str], expected: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.terminal.question.termios", None)
    given, out = iter(lines), io.StringIO()
    monkeypatch.setattr("builtins.input", lambda: next(given))
    assert ask(question(600), out=out) == expected
    assert out.getvalue().count("is none of these. Enter exports") == len(lines) - 1


def test_the_explanation_tells_the_time() -> None:
    assert "for 10 minutes, trial 7 is exported" in question(600).explanation()
    assert "for 30 seconds, trial 7 is exported" in question(30).explanation()
    assert "If no key" not in question().explanation()


def test_a_job_in_the_background_is_not_stopped_and_takes_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    monkeypatch.setattr("abliterate.terminal.question._LOOK", 0.01)
    monkeypatch.setattr(termios, "tcsetattr", lambda *given: pytest.fail("this would stop the job"))
    controller, terminal = pty.openpty()
    with os.fdopen(terminal) as source:
        assert ask(question(0.05), source, io.StringIO()) == Choice("export", 7)
    os.close(controller)
