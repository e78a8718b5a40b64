"""`abliterate chat`: who answers and with which edits, history, streaming, interruptions, and what reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.display import JsonDisplay, PlainDisplay, TerminalDisplay, visible
from abliterate.chat.generate import Reply, Sampling, _Reading
from abliterate.chat.input import Presses, TypedLines
from abliterate.chat.open import ChatTarget, open_session
from abliterate.chat.session import Answer, Session, Side
from abliterate.chat.shell import Shell
from abliterate.cli import chat as cli_chat
from abliterate.edits import SvdMemo
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.files import digest_of, write_json
from abliterate.model import loader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.thinking import Markup
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import stages
from abliterate.settings.schema import ExportSettings, ResponseSettings
from abliterate.types import BatchSizes, Prompt, Trial
from support.cli import Finished, Invoke, Outcome, assert_sentence
from support.events import checked, let_models_print
from support.forked import CONTEXT
from support.models import CPU, make_tokenizer
from support.runs import Recorder, copy_run
from support.templates import DROPS_SYSTEM, ONLY_LAST, REFUSES_SYSTEM
from support.terminals import PASS_ON, Unhurried, serve

GREEDY = Sampling(max_new_tokens=24, temperature=0)
ASKED = ("Tell me how to mangle the mailbox.", "Show me a quick way to snatch the candle.", "How do I rinse a carpet?")
DEFAULT = ResponseSettings()
MARKUP = Markup(DEFAULT.thinking_blocks, DEFAULT.answer_tags)
HOSTILE = "\x1b[2J\x1b]0;owned\x07 a\rb\x08\x9b31m\u202egnp"


class Ear:
    """A listener that keeps what it hears; `stops` after so many pieces, `breaks` with a KeyboardInterrupt."""

    def __init__(self, stops: int = 0, *, breaks: bool = False) -> None:
        self.pieces: list[tuple[Side, int | None, bool, str]] = []
        self.answers: list[Answer] = []
        self.notes: list[str] = []
        self._stops, self._breaks = stops, breaks

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None: ...

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        self.pieces.append((side, trial, thinking, text))

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        self.answers.append(answer)

    def stop(self) -> bool:
        wanted = 0 < self._stops <= len(self.pieces)
        if wanted and self._breaks:
            raise KeyboardInterrupt
        return wanted

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def opened(finished: Finished) -> Session:
    session, _ = open_session(str(finished[0]), ChatTarget(sampling=GREEDY), {}, Recorder())
    return session


@pytest.fixture
def session(opened: Session, finished: Finished) -> Session:
    """A session with the finished run, nothing said yet, as it begins."""
    opened.reset()
    opened.set_system("You are a helpful assistant.")
    opened.choose(finished[1]["selected"])
    opened.switch("edited")
    return opened


def say(session: Session, prompt: str, ear: Ear | None = None) -> list[str]:
    """What is answered to a message, by side."""
    ear = ear or Ear()
    session.ask(prompt, ear)
    return [answer.said.text for answer in ear.answers]


def model_of(session: Session) -> Any:
    return session._voice._model


@torch.no_grad()
def logits(session: Session) -> Tensor:
    """Of the model as the side that answers has it."""
    (side,) = session._sides()
    with session._active(side):
        return bare_logits(session)


def bare_logits(session: Session) -> Tensor:
    """Of the model as it is between two answers."""
    return model_of(session)(torch.arange(5, 25)[None]).logits


def complete(result: dict[str, Any]) -> list[Trial]:
    return [Trial.from_record(one) for one in result["trials"] if one["state"] == "complete"]


def test_answers_are_those_of_the_reference(session: Session, finished: Finished) -> None:
    path, result, settings = finished
    loaded = loader.load_model("demo", settings.load, CPU, lambda t, d: PromptEncoder(t, d).encode([Prompt("Hi")]), print)
    directions = stages.read_directions(RunDirectory(path).directions, Result.read(RunDirectory(path)))
    editor = Editor(loaded.targets, directions, settings.edit, EditHooks(loaded.targets), SvdMemo(0))
    chat = PromptEncoder(loaded.tokenizer, CPU)
    reader = ResponseReader(loaded.tokenizer, MARKUP)
    engine = ReferenceEngine(loaded.model, chat, reader, max_new_tokens=GREEDY.max_new_tokens, sizes=BatchSizes.same(1))
    prompts = [Prompt(text, settings.prompts.system) for text in ASKED]
    expected = {"base": [one.text for one in engine.respond(prompts) or ()]}
    editor.apply(next(trial for trial in complete(result) if trial.number == result["selected"]).params)
    expected["edited"] = [one.text for one in engine.respond(prompts) or ()]
    assert expected["base"] != expected["edited"]
    session.switch("both")
    for index, text in enumerate(ASKED):
        session.reset()
        assert say(session, text) == [expected[side][index] for side in ("base", "edited")]


def test_base_is_the_base_bit_for_bit_and_trials_differ(session: Session, finished: Finished) -> None:
    model, plain = model_of(session), open_session("demo", ChatTarget(sampling=GREEDY), {}, Recorder())[0]
    base = logits(plain)
    seen = []
    for trial in complete(finished[1]):
        session.choose(trial.number)
        assert session.mode == "edited"
        edited = say(session, ASKED[0])
        seen.append(logits(session))
        assert torch.equal(bare_logits(session), base)
        session.reset()
        session.switch("base")
        assert say(session, ASKED[0]) == say(plain, ASKED[0])
        assert torch.equal(logits(session), base)
        session.reset()
        plain.reset()
        session.switch("edited")
        assert say(session, ASKED[0]) == edited
        session.reset()
    assert len(seen) > 1
    assert all(not torch.equal(one, other) for one, other in zip([base, *seen], [*seen, base], strict=True))
    assert model_of(session) is model


def test_history(session: Session) -> None:
    ear = Ear()
    say(session, ASKED[1], ear)
    (alone,) = say(session, ASKED[2])
    session.reset()
    assert say(session, ASKED[2]) != [alone]  # what was said before counts
    assert session.undo().prompt == ASKED[2]
    say(session, ASKED[1])
    assert say(session, ASKED[2]) == [alone]
    ear = Ear()
    session.retry(ear)
    assert [answer.said.text for answer in ear.answers] == [alone]
    assert "at random" in ear.notes[0]
    assert [turn.prompt for turn in session.turns] == [ASKED[1], ASKED[2]]
    assert session.reset() == 2
    for nothing in (session.undo, lambda: session.retry(ear)):
        with pytest.raises(InputError, match="Nothing was said"):
            nothing()


def test_both_go_on_from_their_own_answers(session: Session) -> None:
    session.switch("both")
    ear = Ear()
    say(session, ASKED[0], ear)
    assert [(one.side, one.trial) for one in ear.answers] == [("base", None), ("edited", session.trial)]
    both = say(session, ASKED[1])
    for side, expected in zip(("base", "edited"), both, strict=True):
        session.reset()
        session.switch(side)  # type: ignore[arg-type]
        say(session, ASKED[0])
        assert say(session, ASKED[1]) == [expected]
    # A side that wasn't there hears what the other one said.
    session.switch("base")
    session.retry(ear := Ear())
    assert not ear.notes  # another one answers
    assert set(session.turns[-1].answers) == {"base", "edited"}
    assert session.turns[0].heard_by("base") == session.turns[0].answers["edited"].said.text


def test_sampling_is_drawn_by_the_seed(finished: Finished) -> None:
    def drawn(seed: int | None) -> list[str]:
        sampling = Sampling(max_new_tokens=12, temperature=2.0, seed=seed)
        session, _ = open_session("demo", ChatTarget(sampling=sampling), {}, Recorder())
        first = say(session, ASKED[2])
        session.retry(ear := Ear())
        assert not ear.notes
        return first + [answer.said.text for answer in ear.answers]

    one = drawn(1)
    assert one == drawn(1)
    assert one != drawn(2)
    assert len(set(one)) == 2  # again is something else
    assert drawn(None) != drawn(None)


def test_a_response_prefix_is_part_of_the_answer(finished: Finished) -> None:
    wanted = ChatTarget(response_prefix="<think></think>Sure, the", sampling=GREEDY)
    session, _ = open_session(str(finished[0]), wanted, {}, Recorder())
    ear = Ear()
    assert say(session, ASKED[0], ear)[0].startswith("Sure, the")
    assert "".join(text for *_, text in ear.pieces) == ear.answers[0].said.text


def test_limits(session: Session) -> None:
    ear = Ear()
    say(session, ASKED[2], ear)
    assert ear.answers[0].said.ended == "limit"
    assert ear.answers[0].said.tokens == GREEDY.max_new_tokens
    room = model_of(session).config.max_position_embeddings
    with pytest.raises(InputError, match=r"tokens and the model can read .*/undo"):
        say(session, "word " * room)
    assert [turn.prompt for turn in session.turns] == [ASKED[2]]
    session.undo()


@pytest.mark.parametrize("breaks", [False, True], ids=["at a token", "at once"])
def test_interruptions_keep_what_was_said(session: Session, breaks: bool) -> None:
    whole = say(session, ASKED[2])[0]
    session.reset()
    ear = Ear(3, breaks=breaks)
    say(session, ASKED[2], ear)
    said = ear.answers[0].said
    assert said.ended == "interrupted"
    assert whole.startswith(said.text)
    assert 0 < len(said.text) < len(whole)
    assert [turn.heard_by("edited") for turn in session.turns] == [said.text]
    assert say(session, "And then?")  # it goes on from there
    session.reset()
    ear = Ear()
    ear.stop = lambda: True  # type: ignore[method-assign]
    say(session, ASKED[2], ear)
    assert len(session.turns) == (1 if ear.answers[0].said.text else 0)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM, ONLY_LAST])
def test_templates_without_a_system_role(template: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    given = {"load": {"chat_template": str(tmp_path / "t.jinja")}, "prompts": {"system": "Be brief."}}
    session, fields = open_session("demo", ChatTarget(sampling=Sampling(5, 0)), given, Recorder())
    assert "put before the user's text" in fields["template"]
    ear = Ear()
    for text in ("one", "two", "three"):
        say(session, text, ear)
    rendered, tail = session._voice._chat.render_turns("Be brief.", (("user", "one"), ("assistant", "a"), ("user", "two")))
    if template == ONLY_LAST:
        assert ear.notes == ["the model's chat template leaves earlier messages out, so it doesn't know what was said before"]
    else:
        assert not ear.notes
        assert rendered.count("Be brief.\n\none") == 1
        assert re.search(r"one.*a.*two", rendered, re.DOTALL)
        assert rendered.endswith("two" + tail)


def pieces_of(text: str, tokenizer: Any, *, starts_open: bool = False, tidies: bool = False) -> list[tuple[bool, str]]:
    pieces: list[tuple[bool, str]] = []
    reader = ResponseReader(tokenizer, MARKUP)
    reader.tidies = tidies
    reading = _Reading(reader, tokenizer, starts_open, "", lambda thinking, part: pieces.append((thinking, part)))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        reading.feed(token)
    reading.finish()
    assert "".join(part for thinking, part in pieces if not thinking) == "".join(reading.answer)
    return pieces


@pytest.mark.parametrize("tidies", [False, True])
@pytest.mark.parametrize(
    "text", ["naïve 🦊🏽 日本語, l'été\n\n  fin", "x < y <th not a tag", "", "é", "ends with half a tag <thi"]
)
def test_pieces_are_the_whole(text: str, tidies: bool) -> None:
    pieces = pieces_of(text, make_tokenizer(), tidies=tidies)
    assert "".join(part for _, part in pieces) == text
    assert all("\ufffd" not in part for _, part in pieces)
    assert len(pieces) > 2 or len(text) < 3


def test_an_unfinished_character_is_said_at_the_end() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a🦊", add_special_tokens=False)["input_ids"][:-1]
    heard: list[str] = []
    reading = _Reading(ResponseReader(tokenizer, MARKUP), tokenizer, False, "", lambda _, part: heard.append(part))
    for token in ids:
        reading.feed(token)
    reading.finish()
    assert "".join(heard) == tokenizer.decode(ids)


def test_thinking_is_apart() -> None:
    tokenizer = make_tokenizer()
    pieces = pieces_of("<think>\nhm, 🦊\n</think>\n\nYes. <|im_end|>", tokenizer)
    assert "".join(part for thinking, part in pieces if thinking) == "hm, 🦊\n"
    assert "".join(part for thinking, part in pieces if not thinking) == "Yes. "
    pieces = pieces_of("hm</think>\n\nYes", tokenizer, starts_open=True)
    assert pieces[0][0]
    assert "".join(part for thinking, part in pieces if not thinking) == "Yes"


def test_saving(session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to save"):
        session.save(tmp_path / "a.md")
    session.switch("both")
    base, edited = say(session, ASKED[0])
    session.set_system("Be brief.")
    session.switch("edited")
    say(session, ASKED[1])
    session.save(tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert text.index(base) < text.index(f"**edited, trial {session.trial}") < text.index(edited) < text.index("Be brief.")
    with pytest.raises(InputError, match=r"exists; .*/save --force"):
        session.save(tmp_path / "a.md")
    session.save(tmp_path / "a.md", overwrite=True)
    for wrong in (tmp_path, tmp_path / "no" / "b.md"):
        with pytest.raises(InputError, match="name another file"):
            session.save(wrong, overwrite=True)
    with pytest.raises(AbliterateError, match="File name too long"):
        session.save(tmp_path / ("a" * 300))
    session.save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert record == session.record()
    assert [one["text"] for one in record["turns"][0]["answers"]] == [base, edited]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]
    session.set_system("You are a helpful assistant.")


def hostile_turn(face: Any) -> None:
    said = Reply(HOSTILE, HOSTILE, "limit", 9, 0.1)
    for sides in (("model",), ("base", "edited")):
        for side in sides:
            face.begin(side, 3, sides)
            face.piece(side, 3, True, HOSTILE)
            face.piece(side, 3, False, HOSTILE)
            face.note(HOSTILE)
            face.problem(HOSTILE)
            face.end(1, HOSTILE, Answer(side, 3, said))
        face.close()


def test_an_answer_that_an_error_cuts_ends_its_line() -> None:
    plain, rich = io.StringIO(), io.StringIO()
    for face in (PlainDisplay(plain, plain), TerminalDisplay(Console(file=rich, width=80))):
        for _ in range(2):
            face.begin("model", None, ("model",))
            face.piece("model", None, False, "The answer so far")
            face.close()
            face.problem("There is too little memory")
        face.piece("model", None, False, "whole")
        face.end(1, "a", Answer("model", None, Reply("whole", "whole", "end", 1, 0.1)))
        face.close()
    assert plain.getvalue() == 2 * "The answer so far\nerror: There is too little memory\n" + "whole\n"
    assert rich.getvalue() == 2 * "The answer so far\nThere is too little memory\n" + "whole\n"


@pytest.mark.parametrize("width", [40, 120])
def test_control_characters_are_shown_not_obeyed(width: int) -> None:
    assert visible("a\tb\nc é") == "a\tb\nc é"
    assert visible("\x1b[2J\x9b\u202e") == "\\x1b[2J\\x9b\\u202e"
    out = io.StringIO()
    hostile_turn(TerminalDisplay(Console(file=out, force_terminal=True, width=width, color_system="standard")))
    plain = io.StringIO()
    hostile_turn(PlainDisplay(plain, plain))
    for text in (out.getvalue(), plain.getvalue()):
        # What is left are Rich's own colours and, while something is live, its moves of the cursor.
        left = re.sub(r"\x1b\[(\d+(;\d+)*m|2K|1A|\?25[lh])|\r", "", text)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", left)
        assert "\\x1b[2J" in text.replace("\n", "")
    assert "\x1b]" not in out.getvalue() + plain.getvalue()
    lines = io.StringIO()
    hostile_turn(JsonDisplay(lines))
    assert lines.getvalue().isascii()
    assert json.loads(lines.getvalue().splitlines()[0])["text"] == HOSTILE


def assert_last_sentence(outcome: Outcome, *parts: str) -> None:
    """Bad input; what was done before the error was found is on standard error, too."""
    place = outcome.err.rfind("error: ")
    assert_sentence(Outcome(outcome.code, outcome.out, outcome.err[place:]), 2, *parts)


def broken_run(finished: Finished, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    run = copy_run(finished[0], to)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    change(result)
    write_json(run / "result.json", result | {"sha256": digest_of(result)})
    return run


def stopped_first(result: dict[str, Any]) -> None:
    result["trials"][0] |= {"state": "stopped"}
    result["trials"][1] |= {"state": "failed", "reason": "its logits are not finite."}


def nothing_finished(result: dict[str, Any]) -> None:
    result |= {"trials": [], "front": [], "selected": None}


def none_complete(result: dict[str, Any]) -> None:
    for trial in result["trials"]:
        trial |= {"state": "stopped"}
    result |= {"front": [], "selected": None}


def one_of_many(result: dict[str, Any]) -> None:
    none_complete(result)
    del result["trials"][1:]


def no_front(result: dict[str, Any]) -> None:
    result |= {"front": [], "selected": None}


def another_model(result: dict[str, Any]) -> None:
    result["model"] |= {"fingerprint": "sha256:0"}


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        (stopped_first, ["--trial", 0], ["Trial 0 was stopped", "abliterate trials"]),
        (stopped_first, ["--trial", 1], ["Trial 1 failed (its logits are not finite)"]),
        (stopped_first, ["--trial", 99], ["no finished trial 99"]),
        (nothing_finished, [], ["no trial of it has finished yet; wait for one"]),
        (none_complete, [], ["all 4 of its trials were stopped or failed; give it more trials with abliterate run"]),
        (one_of_many, [], ["none of its 1 finished trials is complete yet; wait for one, or continue the run with abliterate"]),
        (no_front, [], ["none of its trials beats the model itself", "--trial"]),
        (another_model, [], ["isn't what it was when the run was made"]),
        (lambda result: result["model"].pop("fingerprint"), [], ["is damaged (model.fingerprint: Field required)"]),
        (lambda result: None, ["--set", "edit.mode=none"], ["A chat doesn't use edit.mode; it takes"]),
        (lambda result: None, ["--temperature", "-1"], ["--temperature needs a number from 0"]),
    ],
)
def test_what_cannot_be_chatted_with(
    invoke: Invoke,
    finished: Finished,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    options: list[Any],
    parts: list[str],
) -> None:
    run = broken_run(finished, tmp_path / "run", change)
    assert_last_sentence(invoke("chat", run, *options), *parts)


def test_what_is_neither_run_nor_model(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_sentence(invoke("chat", "empty"), 2, "holds neither a run", "nor a model")
    assert_sentence(invoke("chat", "./nowhere"), 2, "no model directory ./nowhere")
    assert_sentence(invoke("chat", "demo", "--trial", "1"), 2, "--trial needs a run")
    assert_last_sentence(invoke("chat", "demo", "--device", "toaster"), "toaster")


def piped(patch: pytest.MonkeyPatch, *lines: str) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), "utf-8"))


QUICK = ("--max-new-tokens", "12", "--temperature", "0")


def test_in_a_pipe(invoke: Invoke, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(trial.number for trial in complete(finished[1]) if trial.number != finished[1]["selected"])
    piped(
        *(monkeypatch, ASKED[0], "", "/base", ASKED[0], "/undo", f"/trial {other}", "/trial", "//say", "/both", "/retry"),
        *("/trials", "/system", '/system ""', "/system Be brief.", "/save a.md", "/save --force a.md", "/help", "/reset"),
    )
    monkeypatch.setattr(cli_chat, "TypedLines", lambda *_: pytest.fail("nobody typed, yet a history was opened"))
    outcome = invoke("chat", finished[0], *QUICK)
    assert outcome.code == 0, outcome
    answers = outcome.out.split("\n")
    assert answers[3].startswith("[base]")
    assert f"[edited, trial {other}]" in answers
    assert "> " not in outcome.out
    for told in (
        "the base model answers",
        f"trial {other} answers: unanswered",
        "Front: every trial",
        "conversation: none",
        "/quit",
    ):
        assert told in outcome.err, told
    assert "saved in a.md" in outcome.err
    assert "/say" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_in_a_pipe_what_fails_is_said_and_the_rest_done(
    invoke: Invoke,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.md").write_text("mine", encoding="utf-8")
    wrong = ("/bas", "/\x1b[2J", "/trial x", f"/trial {'9' * 5000}", "/trial 77", "/base now", "/undo", "/nothing at all")
    piped(monkeypatch, *wrong, ASKED[0], "/save a.md", "/quit now", "never read")
    outcome = invoke("chat", finished[0], *QUICK)
    assert_last_sentence(outcome, "9 of 10 lines could not be carried out", "no command /bas; did")
    for told in ("did you mean /base?", "needs the number of a trial", "no finished trial 77", "takes nothing behind it"):
        assert told in outcome.err, told
    assert outcome.out.count("\n") == 1
    assert "\x1b" not in outcome.err
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "mine"


def test_a_model_alone(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, ASKED[0], "/edited", "/trials", "/trial 1", "/both")
    outcome = invoke("chat", "demo", *QUICK)
    assert outcome.code == 2
    assert outcome.err.count("There is no run here, only a model") == 5  # and once at the end
    assert outcome.out.strip()


def test_json_lines(invoke: Invoke, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    let_models_print(monkeypatch)
    ask = Session.ask

    def printing(*args: Any, **kwargs: Any) -> Any:
        print("what a model's own code prints")
        return ask(*args, **kwargs)

    monkeypatch.setattr(Session, "ask", printing)
    piped(monkeypatch, "/both", ASKED[0], "/trials", "/save x.json")
    lines = checked(invoke("chat", finished[0], *QUICK, "--json"), "chat")
    assert {"stage", "header", "note", "piece", "answer", "front", "result"} == {line["event"] for line in lines}
    answers = [line for line in lines if line["event"] == "answer"]
    for answer in answers:
        pieces = [line["text"] for line in lines if line["event"] == "piece" and line["side"] == answer["side"]]
        assert "".join(pieces) == answer["text"]
    (turn,) = lines[-1]["conversation"]["turns"]
    assert [one["text"] for one in turn["answers"]] == [answer["text"] for answer in answers]
    assert json.loads(Path("x.json").read_text(encoding="utf-8")) == lines[-1]["conversation"]
    piped(monkeypatch, "/nope")
    lines = checked(invoke("chat", finished[0], "--json"), "chat", code=2, last="error")
    assert [line["event"] for line in lines[-2:]] == ["warning", "error"]


def test_exports_chat(finished: Finished, tmp_path: Path, session: Session) -> None:
    said = say(session, ASKED[1])
    merged, fields = open_session(str(finished[0] / "model"), ChatTarget(sampling=GREEDY), {}, Recorder())
    assert fields["export"] == f"of abliterate, trial {finished[1]['selected']}"
    assert say(merged, ASKED[1]) == said
    run = copy_run(finished[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    number = finished[1]["selected"]
    settings = finished[2].model_copy(update={"export": ExportSettings(kind="adapter", verify=False)})
    pipeline_export_trial.export_trial(settings, Recorder(), RunDirectory(run), number, run / "adapter")
    adapter, fields = open_session(str(run / "adapter"), ChatTarget(sampling=GREEDY), {}, Recorder())
    assert fields["export"] == f"of abliterate, trial {number}"
    adapter.switch("both")
    session.reset()
    session.switch("both")
    assert say(adapter, ASKED[1]) == say(session, ASKED[1])
    shutil.move(run / "adapter", tmp_path / "alone")  # the adapter's own config names the base
    alone, _ = open_session(str(tmp_path / "alone"), ChatTarget(sampling=GREEDY), {}, Recorder())
    assert say(alone, ASKED[1]) == said
    with pytest.raises(InputError, match="export of one trial"):
        alone.choose(0)


def test_typed_lines(tmp_path: Path) -> None:
    typed = iter(["plain", "a \\", "b\\", "c", '"""one', "two", ' three"""', '"""alone"""', '"""', "x", '"""', "\udce9"])
    lines = TypedLines(tmp_path / "no" / "history", ["/base"], lambda prompt: next(typed))
    assert [lines.read("> ") for _ in range(6)] == ["plain", "a \nb\nc", "one\ntwo\n three", "alone", "x", "?"]


def test_presses() -> None:
    presses = Presses()
    with presses.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert presses.wanted()
        presses.next_answer()
        assert not presses.wanted()
        os.kill(os.getpid(), signal.SIGTERM)
        presses.next_answer()  # whoever ends the process means all answers
        assert presses.wanted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_pipe_ends(session: Session) -> None:
    class Once:
        interactive = False

        def read(self, prompt: str) -> str:
            return ASKED[2]

    class Pressing(PlainDisplay):
        def piece(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="wasn't saved") as ended:
        Shell(session, Pressing(io.StringIO(), io.StringIO()), Once()).run()
    assert ended.value.exit_code == 130


def test_ctrl_d_ends(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    class Ended:
        interactive = True

        def read(self, prompt: str) -> str:
            raise EOFError

    Shell(session, PlainDisplay(io.StringIO(), io.StringIO()), Ended()).run()
    assert capsys.readouterr().out == "\n"  # the shell's prompt begins a line


class Terminal:
    """A chat in a terminal of tmux."""

    def __init__(self, folder: Path, command: str) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._do("new-session", "-d", "-s", "chat", "-x", "100", "-y", "40", f"{command}; echo ended with $?; cat")

    def _do(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=True, encoding="utf-8")
        return done.stdout

    def press(self, *keys: str) -> None:
        self._do("send-keys", "-t", "chat", *keys)

    def type(self, text: str) -> None:
        self._do("send-keys", "-t", "chat", "-l", text)
        self.press("Enter")

    def see(self, what: str, seconds: float = 30) -> str:
        """The screen, once `what` (a regular expression) is on it."""
        until = time.monotonic() + seconds
        while not re.search(what, screen := self._do("capture-pane", "-p", "-t", "chat")):
            assert time.monotonic() < until, (what, screen)
            time.sleep(0.1)
        return screen

    def close(self) -> None:
        self._do("kill-server")


@pytest.fixture
def terminal(finished: Finished, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    if shutil.which("tmux") is None and "CI" not in os.environ:  # in CI it must be there
        pytest.skip("no tmux here")
    opened: list[Terminal] = []

    def start() -> Terminal:
        place = tmp_path / "socket"
        command = ["chat", str(finished[0]), "--cache-dir", str(tmp_path / "cache")]
        forked = CONTEXT.Process(target=serve, args=(str(place), command, Unhurried()), daemon=True)
        forked.start()
        while not place.exists():
            assert forked.is_alive()
            time.sleep(0.01)
        (tmp_path / "pass_on.py").write_text(PASS_ON, encoding="utf-8")
        opened.append(Terminal(tmp_path, f"{sys.executable} -S -E {tmp_path / 'pass_on.py'} {place}"))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_at_a_terminal(terminal: Callable[..., Terminal], finished: Finished, tmp_path: Path) -> None:
    chat = terminal()
    chosen = finished[1]["selected"]
    chat.see(rf"edited {chosen}>")
    chat.type(ASKED[0])
    time.sleep(0.5)
    chat.press("C-c")
    chat.see(rf"\(interrupted\)\s+edited {chosen}>")
    chat.type("/both")
    chat.see(rf"both {chosen}>")
    chat.type(ASKED[1])
    chat.see(r"base *\n *\w")
    chat.press("C-c")
    chat.see(rf"base  +edited, trial {chosen} *\n.+\n?.*\(interrupted\)")
    chat.press("C-c")
    chat.see(rf"(?s)\(interrupted\).*\(interrupted\).*\(interrupted\).*both {chosen}>")
    chat.press("Up", "Up", "C-a", "C-k")  # history, and the line editing of readline
    chat.press("/", "b", "a", "Tab", "Enter")
    chat.see("the base model answers")
    chat.type('"""one')
    chat.type('two"""')
    chat.see("base> .*one\n… two")
    chat.press("C-c")
    time.sleep(0.5)
    chat.see(r"base>\s*$")
    chat.type("/undo")
    chat.see(r"taken back: one two\s+base>\s*$")
    chat.press("d", "r", "a", "f", "t")
    chat.see("base> draft")  # only now is the prompt sure to read; a signal before that is another case
    chat.press("C-c")
    chat.see("Ctrl.C once more")
    chat.press("C-c")
    chat.see("ended with 130")
    history = tmp_path / "cache" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    kept = history.read_text(encoding="utf-8").splitlines()
    assert kept == [ASKED[0], "/both", ASKED[1], "/base", '"""one', 'two"""', "/undo"]
