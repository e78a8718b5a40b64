"""Signals become `Interrupted` at a safe point; a process that belongs to another ends with it."""

from __future__ import annotations

import contextlib
import signal

import pytest

from abliterate.errors import TERMINATED, Interrupted
from abliterate.pipeline.context import Context
from abliterate.settings.schema import Settings
from abliterate.terminal.interrupts import Interrupts
from support.runs import Recorder

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


def watched(interrupts: Interrupts) -> Context:
    return Context.of(Settings(), interrupts.watched(Recorder()), interrupts.check)


def test_a_stage_that_loses_nothing_ends_at_once() -> None:
    interrupts = Interrupts()
    context = watched(interrupts)
    with interrupts.listening(), context.stage("load", at_once=True), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [None, ValueError])
def test_after_such_a_stage_a_signal_waits_for_a_safe_point(error: type[Exception] | None) -> None:
    """What follows it may be half done, such as moving an old run aside, even where the stage has failed."""
    interrupts = Interrupts()
    context = watched(interrupts)
    with interrupts.listening():
        with contextlib.suppress(ValueError), context.stage("held-out prompts", at_once=True):
            if error:
                raise error
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted), context.stage("load", at_once=True):
            pytest.fail("the next stage began")


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
