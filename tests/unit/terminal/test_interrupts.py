"""Signals become `Interrupted` at a safe point; a process that belongs to another ends with it."""

from __future__ import annotations

import signal

import pytest

from abliterate.errors import TERMINATED, Interrupted
from abliterate.terminal.interrupts import Interrupts

HANGUP = signal.SIGHUP


def test_a_closed_terminal_ends_a_run_as_sigterm_does() -> None:
    for number in (HANGUP, signal.SIGTERM):
        interrupts = Interrupts()
        with interrupts.listening():
            signal.raise_signal(number)
            with pytest.raises(Interrupted) as caught:
                interrupts.check()
        assert caught.value.exit_code == TERMINATED


def test_at_a_question_a_closed_terminal_ends_the_run_at_once() -> None:
    interrupts = Interrupts()
    with interrupts.listening(), pytest.raises(Interrupted), interrupts.at_once():
        signal.raise_signal(HANGUP)


def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        interrupts = Interrupts()
        with interrupts.listening():
            signal.raise_signal(HANGUP)
            interrupts.check()
        assert signal.getsignal(HANGUP) is signal.SIG_IGN
    finally:
        signal.signal(HANGUP, before)


def test_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, HANGUP)]
    with Interrupts().listening():
        assert signal.getsignal(HANGUP) != before[2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, HANGUP)] == before
