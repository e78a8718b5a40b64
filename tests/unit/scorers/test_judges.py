"""Judges and users' own scorers behind the seam, and lm-eval: against a stub server, a tiny classifier, a local task."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib.util
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli.evaluate import _cells
from abliterate.errors import INTERRUPTED, AbliterateError, InputError, Interrupted, ScorerUnavailable, TrialError
from abliterate.evaluation import lm_eval
from abliterate.evaluation.lm_eval import Ready, Tasks, check_tasks, run_tasks
from abliterate.evaluation.teacher_forced import ModelView
from abliterate.objectives import JUDGES
from abliterate.pipeline import evaluate as pipeline_evaluate
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline.cache_keys import _scorers
from abliterate.pipeline.run import run
from abliterate.report.tables import heldout_table
from abliterate.scorers import SCORERS, Making, Observation, Response, Scorer, endpoint, make_objectives, make_scorers
from abliterate.scorers.endpoint import KEY, MODEL, TRIES, URL
from abliterate.scorers.judges import Classifier, Endpoint, refusal_label, usable_positions
from abliterate.scorers.strongreject import Ratings, StrongReject, read_ratings
from abliterate.settings.schema import EvaluationSettings, SearchSettings, Settings
from support.cli import Invoke, assert_sentence, forbidden, prompt_options
from support.contracts import RESPONSES, SEEN, ScorerContract
from support.engine import make_engine
from support.events import check, checked
from support.models import PROMPTS, make_model, make_tokenizer
from support.runs import Recorder, quick_settings, run_in

Files = dict[str, str]
SECRET = "key-of-the-test"
OWN = '''
"""Counts words."""
from dataclasses import dataclass
from abliterate.types import Score

@dataclass
class Words:
    name: str = "words"
    goal: str = "maximize"

    def setup(self, base):
        self.base = sum(len(response.text.split()) for response in base.responses)

    def score(self, observation):
        count = sum(len(response.text.split()) for response in observation.responses)
        return Score(self.name, float(count), self.goal, {"words": count, "base": self.base})

class NoScorer:
    name = "no"

class Broken:
    def __init__(self):
        raise ValueError("out of ideas")
'''


# What the server says of a refusal and of any other answer.
GRADES = "It declines.\nrefused: 1\nconvincing: 2\nspecific: 1", '```json\n{"refused": 0, "convincing": 4, "specific": 3}\n```'


class Stub(BaseHTTPRequestHandler):
    """A chat completions server as others write them: busy at first, then it judges by a word; sometimes it rambles."""

    asked: ClassVar[list[dict[str, Any]]] = []
    busy, busy_with = 1, 503
    status = 0
    headers_too: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, _, answer = body["messages"][0]["content"].rpartition("Answer:\n")
        type(self).asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status = self.status or (self.busy_with if type(self).busy > 0 else 200)
        type(self).busy -= 1
        instead = {"error": {"message": "flagged"}} if "instead" in answer else {}
        refusal, compliance = GRADES if "convincing" in question else ("Verdict: refused.", "COMPLIED")
        said = "hmm" if "ramble" in answer else refusal if "sorry" in answer else compliance
        content = json.dumps(instead or {"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.headers_too.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on loopback; gives its address."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stub]]:
    """The server, and the environment that names it."""
    Stub.asked, Stub.busy, Stub.status, Stub.busy_with, Stub.headers_too = [], 1, 0, 503, {}
    with serving(Stub) as address:
        monkeypatch.setenv(URL, f"{address}/v1/")
        monkeypatch.setenv(MODEL, "judge-1")
        monkeypatch.setenv(KEY, SECRET)
        yield Stub


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A user's file."""
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    return str(tmp_path / "mine.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs here: what is measured before a search is the same."""
    return tmp_path_factory.mktemp("cache")


SHORT: dict[str, Any] = {"response": {"max_new_tokens": 8}, "search": {"trials": 1, "startup_trials": 1}}


class TestBuiltInScorers(ScorerContract):
    """Each of the registry."""

    @pytest.fixture(params=sorted(SCORERS))
    def scorer(self, request: pytest.FixtureRequest, stub: type[Stub], classifier: str) -> Scorer:
        stub.busy = 0
        return SCORERS[request.param](Making(("sorry",), settings=EvaluationSettings(judge_model=classifier)))


class TestCustomScorer(ScorerContract):
    """A class in a user's file."""

    @pytest.fixture
    def scorer(self, own: str) -> Scorer:
        return make_scorers(["refusals", "kl", f"{own}:Words"], ["no"])[-1]


def test_the_endpoint_is_asked_and_its_key_said_nowhere(stub: type[Stub]) -> None:
    waited: list[float] = []
    judge = Endpoint(waited.append)
    assert judge.verdicts(SEEN) == [True, False, True, True]  # empty and unfinished ones without asking
    assert waited == [1.0]
    assert len(stub.asked) == 3
    first = stub.asked[0]
    assert (first["path"], first["key"]) == ("/v1/chat/completions", f"Bearer {SECRET}")
    assert (first["model"], first["temperature"]) == ("judge-1", 0)
    assert PROMPTS[0].text in first["messages"][0]["content"]
    with pytest.raises(TrialError, match=rf"no verdict in {TRIES} tries \(last: 'hmm'\)") as no_verdict:
        judge.verdicts(Observation([Response("ramble")], torch.zeros(1, 2), PROMPTS[:1]))
    assert type(no_verdict.value) is TrialError, "about this response alone, so the run goes on"
    stub.status, before = 401, len(stub.asked)
    assert judge.verdicts(SEEN) == [True, False, True, True], "it remembers its verdicts"
    assert len(stub.asked) == before
    stub.status = 413
    with pytest.raises(TrialError, match="answers 413") as too_long:
        Endpoint().verdicts(SEEN)
    assert type(too_long.value) is TrialError
    flagged = Observation([Response("flagged")], torch.zeros(1, 2), PROMPTS[:1])
    for status, told in ((451, "answers 451"), (403, "answers 403")):  # a gateway's word on this question
        stub.status = status
        with pytest.raises(TrialError, match=told) as refused:
            judge.verdicts(flagged)
        assert type(refused.value) is TrialError
    with pytest.raises(ScorerUnavailable, match="answers 403"):  # no question has been answered, so it may be the key
        Endpoint().verdicts(flagged)
    stub.status, before = 401, len(stub.asked)
    with pytest.raises(ScorerUnavailable, match="answers 401") as error:
        Endpoint().verdicts(SEEN)
    assert SECRET not in str(error.value)
    assert len(stub.asked) == before + 1


def test_an_error_in_place_of_an_answer_is_about_the_question_if_others_are_answered(stub: type[Stub]) -> None:
    asked = Observation([Response("instead")], torch.zeros(1, 2), PROMPTS[:1])
    judge = Endpoint(lambda seconds: None)
    with pytest.raises(ScorerUnavailable):
        judge.verdicts(asked)
    assert judge.verdicts(SEEN) == [True, False, True, True]
    with pytest.raises(TrialError) as error:
        judge.verdicts(asked)
    assert type(error.value) is TrialError


def test_a_run_may_end_between_two_answers(stub: type[Stub]) -> None:
    stub.busy = 0
    times = iter(range(9))

    def check() -> None:
        if next(times) == 1:
            raise Interrupted(INTERRUPTED, "")

    with pytest.raises(Interrupted):
        Endpoint().verdicts(dataclasses.replace(SEEN, check=check))
    assert len(stub.asked) == 1


def test_roberta_counts_positions_from_behind_the_padding() -> None:
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RobertaForSequenceClassification(RobertaConfig(**small, max_position_embeddings=14))
    longest = usable_positions(model)
    assert longest == 12
    assert model(torch.full((1, longest), 5)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))
    assert usable_positions(BertForSequenceClassification(BertConfig(**small, max_position_embeddings=14))) == 14


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "http://127.0.0.1:9/v1")
    monkeypatch.setenv(MODEL, "judge-1")
    with pytest.raises(ScorerUnavailable, match="no verdict"):
        Endpoint(lambda seconds: None).verdicts(SEEN)
    monkeypatch.delenv(URL)
    with pytest.raises(InputError, match=URL):
        make_scorers(["refusals", "kl", "endpoint"], ["no"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(stub: type[Stub], status: int) -> None:
    """The second server would get the key, and its verdict would count."""
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(str(self.headers))
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None: ...

    with serving(Elsewhere) as other:
        stub.status, stub.headers_too = status, {"Location": f"{other}/v1/chat/completions"}
        with pytest.raises(TrialError, match=f"redirects .{status}.*{URL}") as error:
            Endpoint().verdicts(SEEN)
    assert not seen
    assert len(stub.asked) == 1
    assert other not in str(error.value)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{",
        b"what is this?\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_answer(reply: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None: ...

    monkeypatch.setenv(MODEL, "judge-1")
    with serving(Odd) as address:
        monkeypatch.setenv(URL, address)
        with pytest.raises(TrialError, match=f"no verdict in {TRIES} tries"):
            Endpoint(lambda seconds: None).verdicts(SEEN)


@pytest.mark.parametrize(
    "address",
    [
        *("http://loc:port/v1", "http://loc:0/v1", "http://loc:99999/v1", "http://a host/v1", "http://host/v1\n", "http://"),
        *(
            "http://[::1/v1",
            "file:///etc/passwd",
            "ftp://host/v1",
            "judge.example:8000/v1",
            "http://user:pw@host/v1",
            "http://hö.st/",
        ),
    ],
)
def test_an_address_that_is_none_is_said_at_once(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    monkeypatch.setenv(URL, address)
    monkeypatch.setenv(MODEL, "judge-1")
    monkeypatch.setattr(pipeline_evaluate, "check_model", forbidden)
    judge = ["--set", 'evaluation.heldout_scorers=["endpoint"]']
    outcome = invoke("evaluate", "demo", "demo", *judge)
    assert_sentence(outcome, 2, URL)
    assert address == "http://" or address.strip() not in outcome.err


def test_a_key_that_no_header_can_hold(stub: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (f"{SECRET}\n", "schlüssel"):
        monkeypatch.setenv(KEY, key)
        with pytest.raises(InputError, match=KEY) as error:
            Endpoint()
        assert key.strip() not in str(error.value)


def test_a_server_that_is_busy_is_waited_for(stub: type[Stub]) -> None:
    """A minute's limit of requests costs no verdicts; how long is the server's to say, up to a bound."""
    seen = Observation(RESPONSES[:1], torch.zeros(1, 2), PROMPTS[:1])
    waited: list[float] = []
    stub.busy, stub.busy_with = 7, 429
    assert Endpoint(waited.append).verdicts(seen) == [True]
    assert waited == [1, 2, 4, 8, 16, 32, 60]
    stub.busy, stub.headers_too = 2, {"Retry-After": "30"}
    waited.clear()
    assert Endpoint(waited.append).verdicts(seen) == [True]
    assert waited == [30, 30]
    stub.busy, stub.headers_too = 10**6, {"Retry-After": "86400"}
    waited.clear()
    with pytest.raises(TrialError, match=r"no verdict in 8 tries .last: '429 Too Many Requests'"):
        Endpoint(waited.append).verdicts(seen)
    assert waited == [60] * 7
    assert endpoint._retry_after(formatdate(time.time() + 20, usegmt=True)) == pytest.approx(20, abs=2)
    for text in ("", "soon", "-3", "1e999", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400, "²"):
        assert endpoint._retry_after(text) in (0.0, float("inf"))


def test_a_graded_judge(stub: type[Stub]) -> None:
    """The mean of the rubric's score over all responses; three of the four refuse, two of which aren't sent."""
    stub.busy = 0
    judge = StrongReject()
    score = judge.score(SEEN)
    assert (score.value, score.goal) == ((0 + (4 + 3 - 2) / 8 + 0 + 0) / 4, "maximize")
    assert score.record == {"mean": score.value, "refusals": 3}
    assert len(stub.asked) == 2
    question = stub.asked[1]["messages"][0]["content"]
    assert question.endswith(f"Request:\n{PROMPTS[1].text}\n\nAnswer:\n{RESPONSES[1].text}")
    assert read_ratings(question) is None, "an echo of the question is no reply"
    assert judge.verdicts(SEEN) == [True, False, True, True]
    assert len(stub.asked) == 2
    waited: list[float] = []
    with pytest.raises(TrialError, match=rf"no verdict in {TRIES} tries \(last: 'hmm'\)"):
        StrongReject(waited.append).score(Observation([Response("ramble")], torch.zeros(1, 2), PROMPTS[:1]))
    assert waited == [1, 2, 4]
    names = ("refusals", "kl", "strongreject")
    objectives = make_objectives(["strongreject", "kl"], names, make_scorers(names, ["no"]))
    assert [(objective.name, objective.goal) for objective in objectives] == [("kl", "minimize"), ("strongreject", "maximize")]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"refused": 0, "convincing": 5, "specific": 1}', (False, 5, 1)),
        ('{"refused":1,"convincing":1,"specific":1}', (True, 1, 1)),
        ("Refused: 0\nConvincing: 3\nSpecific: 2\n", (False, 3, 2)),
        ("- **refused**: 0\n- **convincing**: 3\n- **specific**: 2", (False, 3, 2)),
        ("refused = 0; convincing = 3; specific = 2.", (False, 3, 2)),
        ('Not {"refused": 1, "convincing": 1, "specific": 1}:\n{"refused": 0, "convincing": 2, "specific": 4}', (False, 2, 4)),
        ('{"refused": 2, "convincing": 5, "specific": 1}', None),
        ('{"refused": -1, "convincing": 5, "specific": 1}', None),
        ('{"refused": 0, "convincing": 0, "specific": 1}', None),
        ('{"refused": 0, "convincing": 5, "specific": 6}', None),
        ('{"refused": 0, "convincing": 3.5, "specific": 1}', None),
        ('{"refused": 0, "convincing": 3, "specific": 1.5}', None),
        ('{"refused": 0, "convincing": 3, "specific": 10}', None),
        ("refused: 0, convincing: 4/5, specific: 3/5", None),
        ('{"refused": 0, "convincing": 3}', None),
        ("0, 3, 2", None),
        ("I can't rate this.", None),
        ("", None),
    ],
)
def test_what_is_read_from_a_grader(reply: str, expected: tuple[bool, int, int] | None) -> None:
    assert read_ratings(reply) == (Ratings(*expected) if expected else None)


def test_grades_span_the_whole_range() -> None:
    assert [Ratings(False, *both).grade for both in ((1, 1), (1, 5), (3, 3), (5, 4), (5, 5))] == [0, 0.5, 0.5, 0.875, 1]
    assert Ratings(True, 5, 5).grade == 0


def test_the_classifier_says_what_its_model_says(classifier: str) -> None:
    texts = ["I'm sorry, no.", "First, take a cloth and rinse the lamp. " * 20, "ok", "Mend it today.", "Look at the kite."] * 4
    seen = Observation([Response(text) for text in texts], torch.zeros(1, 2), PROMPTS[:1] * len(texts))
    found = Classifier(classifier).verdicts(seen)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier).eval(), make_tokenizer()
    expected = []
    for text in texts:  # one at a time, no pads
        batch = tokenizer(
            PROMPTS[0].text, text, truncation="longest_first", max_length=64, return_tensors="pt", return_token_type_ids=False
        )
        expected.append(bool(model(**batch).logits.argmax() == 1))
    assert found == expected
    assert Classifier(classifier, "compliance").verdicts(seen) == [not refuses for refuses in expected]


def test_a_classifier_that_can_not_be_used(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="judge_model"):
        make_scorers(["refusals", "kl", "classifier"], ["no"])
    with pytest.raises(TrialError, match="judge_label"):
        Classifier(classifier, "other").verdicts(SEEN)
    assert refusal_label({0: "NON_REFUSAL", 1: "Refusal"}) == 1
    assert refusal_label({0: "rejected", 1: "not rejected"}) == 0
    with pytest.raises(TrialError, match="LABEL_0, LABEL_1"):
        refusal_label({0: "LABEL_0", 1: "LABEL_1"})


def test_errors_of_a_classifier_name_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in result.json and in the report."""
    for name, content in (("empty", None), ("broken", "{"), ("other", '{"model_type": "llama"}'), ("unknown", "{}")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for source in (*map(str, tmp_path.iterdir()), str(tmp_path / "gone"), "./empty", "../gone", "~/no/such/place"):
        with pytest.raises(TrialError, match=rf"the judge's model {Path(source).name} can't be loaded \(") as error:
            Classifier(source).verdicts(SEEN)
        assert "/" not in str(error.value)
    texts = {"no file of that name on the Hub": True, f"bad zip file {tmp_path}/model.bin": False, "see https://hf.co/a": True}
    for text, kept in texts.items():

        def fails(*args: Any, text: str = text, **options: Any) -> None:
            raise OSError(text)

        monkeypatch.setattr(AutoConfig, "from_pretrained", fails)
        with pytest.raises(TrialError, match="the judge's model owner/name can't be loaded") as error:
            Classifier("owner/name").verdicts(SEEN)
        assert (text in str(error.value)) is kept
        assert str(tmp_path) not in str(error.value)


def test_judges_in_the_last_step(
    stub: type[Stub],
    classifier: str,
    prompt_files: Files,
    heldout_files: Files,
    cache: Path,
    tmp_path: Path,
) -> None:
    stub.busy = 0
    over = SHORT | {
        "prompts": heldout_files,
        "evaluation": {"heldout": True, "heldout_scorers": [*JUDGES], "judge_model": classifier},
        "export": {"kind": "none"},
    }
    result, recorder = run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over))
    assert not recorder.warnings
    assert set(result["trials"][0]["scores"]) <= {"refusals", "kl", "unanswered"}
    check("held-out", result["heldout"])
    found = {judge["name"]: judge for judge in result["heldout"]["judges"]}
    assert set(found) == set(JUDGES)
    # The stub's two judges see the same refusals, and a refusal is graded 0 and any other answer 5/8.
    assert [found["strongreject"][name] for name in ("base", "candidate", "disagreements")] == [
        found["endpoint"][name] for name in ("base", "candidate", "disagreements")
    ]
    grades = {name: 5 / 8 * (1 - found["endpoint"][name]["share"]) for name in ("base", "candidate")}
    assert result["heldout"]["scores"]["strongreject"]["values"] == pytest.approx(grades)
    assert "strongreject" in [row[0] for row in heldout_table(result["heldout"], "trial").rows]
    questions = [request["messages"][0]["content"] for request in stub.asked]
    assert len(questions) == len(set(questions)), "verdicts and grades come of one reply"
    one = found["classifier"]
    differ = one["disagreements"]
    # The signs of the disagreements add up to the difference of the counts.
    extra = sum(bool(case["judge"]) - bool(case["markers"]) for case in differ)
    assert one["candidate"]["count"] == result["heldout"]["candidate"]["refusals"]["count"] + extra
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
        assert path.is_dir() or b"127.0.0.1" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing.py:Words", "no file nothing.py"),
        ("{own}:Nothing", "no class 'Nothing'"),
        ("{own}:NoScorer", "has no setup"),
        ("{own}:Broken", "out of ideas"),
        ("words", "no scorer 'words'"),
    ],
)
def test_what_is_no_own_scorer(own: str, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_scorers(["refusals", "kl", name.format(own=own)], ["no"])


def test_two_scorers_of_one_name(own: str, tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(OWN, encoding="utf-8")
    with pytest.raises(InputError, match="'words'"):
        make_scorers(["refusals", "kl", f"{own}:Words", f"{tmp_path / 'again.py'}:Words"], ["no"])


@pytest.mark.usefixtures("lean")
def test_an_own_scorer_in_a_run(
    own: str,
    prompt_files: Files,
    heldout_files: Files,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation = {"scorers": ["refusals", "kl", "mine.py:Words"], "heldout": True}
    search = SHORT["search"] | {"objectives": ["refusals", "kl", "mine.py:Words"]}
    over = SHORT | {"prompts": heldout_files, "evaluation": evaluation, "search": search, "export": {"kind": "none"}}
    settings = quick_settings(prompt_files, cache, **over)
    assert settings.evaluation.scorers[-1] == f"{own}:Words"  # a run can be continued from anywhere
    result, recorder = run_in(tmp_path / "run", settings)
    assert all(trial["scores"]["words"]["words"] > 0 for trial in result["trials"])
    assert any("needs whole responses" in note for note in recorder.notes)
    shown = result["heldout"]["scores"]["words"]
    assert shown["base"]["words"] == shown["base"]["base"] == shown["candidate"]["base"]
    # Comparing an export with its trial runs no file, but its content still makes the run what it is.
    monkeypatch.setattr("abliterate.scorers.load_scorer", forbidden)
    adapter = settings.model_copy(update={"export": settings.export.model_copy(update={"kind": "adapter"})})
    export = [adapter, Recorder(), RunDirectory(tmp_path / "run"), result["trials"][0]["number"]]
    verified = pipeline_export_trial.export_trial(*export, tmp_path / "adapter", scores=True)
    assert verified.export.verified is True
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    Path(own).write_text(OWN + "\n# changed\n", encoding="utf-8")
    with pytest.raises(InputError, match="set of scorers"):
        pipeline_export_trial.export_trial(*export, tmp_path / "again", scores=True)
    with pytest.raises(InputError, match="scorers"):
        run_in(tmp_path / "run", settings, resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("lean")
def test_what_fails_at_the_end_costs_nothing_else(
    prompt_files: Files,
    heldout_files: Files,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A judge that can't be reached, then a scorer that raises: each costs its own figures and nothing else."""
    monkeypatch.setenv(URL, "http://127.0.0.1:9/v1")
    monkeypatch.setenv(MODEL, "judge-1")
    monkeypatch.setitem(SCORERS, "endpoint", lambda making: Endpoint(lambda seconds: None))
    monkeypatch.setitem(SCORERS, "strongreject", lambda making: StrongReject(lambda seconds: None))
    over = SHORT | {
        "prompts": heldout_files,
        "evaluation": {"heldout": True, "heldout_scorers": ["endpoint", "strongreject"]},
        "export": {"kind": "none"},
    }
    result, _ = run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over))
    check("held-out", result["heldout"])
    assert all("no verdict" in judge["error"] for judge in result["heldout"]["judges"])
    assert "no verdict" in result["heldout"]["scores"]["strongreject"]["error"]
    assert any("gives no verdicts" in note for note in heldout_table(result["heldout"], "trial").notes)
    (tmp_path / "bad.py").write_text(OWN.replace("self.base = ", "raise KeyError('oh'); "), encoding="utf-8")
    over["evaluation"] = {"heldout": True, "heldout_scorers": [f"{tmp_path / 'bad.py'}:Words"]}
    again, recorder = run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over), resume=True)
    assert again["selected"] == result["selected"]
    assert not recorder.warnings
    found = again["heldout"]
    check("held-out", found)
    assert found["kl"] == result["heldout"]["kl"]
    assert found["scores"]["words"] == {
        "base": None,
        "candidate": None,
        "values": None,
        "error": found["scores"]["words"]["error"],
    }
    assert "KeyError: 'oh'" in found["scores"]["words"]["error"]
    assert any(note.startswith("words gives no score: ") for note in heldout_table(found, "trial").notes)


def test_what_scores_depend_on(own: str, tmp_path: Path) -> None:
    assert _scorers(Settings())[0] == ["refusals", "kl", "unanswered"]
    plain = _scorers(Settings(search=SearchSettings(objectives=("refusals", "kl"))))
    assert plain[0] == ["refusals", "kl"]
    assert len(plain) == 2  # as it was before there were others: studies go on
    names = _scorers(Settings(evaluation=EvaluationSettings(scorers=("refusals", "kl", f"{own}:Words"))))[0]
    assert names[2].startswith("Words ")
    assert str(tmp_path) not in json.dumps(names)


def test_lm_eval_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_tasks(Tasks())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"\[eval\]"):
        check_tasks(Tasks(("piqa",)))
    with pytest.raises(InputError, match="no folder"):
        check_tasks(Tasks((), None, tmp_path / "none"))


RESULTS: dict[str, Any] = {
    "results": {"tiny": {"alias": "tiny", "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1, "f1_stderr,strict": "N/A"}},
    "higher_is_better": {"tiny": {"acc": True}},
}


def test_results_of_lm_eval_as_rows() -> None:
    assert lm_eval.table(RESULTS, RESULTS) == [
        {"task": "tiny", "metric": "acc", "higher_is_better": True, **_both(0.5, 0.25)},
        {"task": "tiny", "metric": "f1 strict", "higher_is_better": None, **_both(1.0, None)},
    ]


def _both(value: float, stderr: float | None) -> dict[str, Any]:
    return {name: {"value": value, "stderr": stderr} for name in ("base", "candidate")}


def benchmark(model: PreTrainedModel, ready: Ready, recorder: Recorder) -> tuple[list[dict[str, Any]], str]:
    """The tasks on a model as its own candidate."""
    side = ModelView(make_engine(model, 3), contextlib.nullcontext)
    return run_tasks(side, side, make_tokenizer(), ready, recorder.warn, lambda: None)


def tiny_task() -> Ready:
    """The stub's one task, looked up."""
    ready = check_tasks(Tasks(("tiny",)))
    assert ready is not None
    return ready


class TaskManager:
    """lm-eval's, with one task."""

    def __init__(self, include_path: str | None) -> None:
        self.folder = include_path

    def match_tasks(self, names: list[str]) -> list[str]:
        return [task for task in ("tiny",) if any(fnmatch.fnmatch(task, name) for name in names)]


def stub_lm_eval(monkeypatch: pytest.MonkeyPatch, simple_evaluate: Callable[..., Any], manager: Any = TaskManager) -> None:
    """A package of that name."""
    package, huggingface, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface"), ModuleType("lm_eval.tasks")
    package.__spec__ = ModuleSpec("lm_eval", None)
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = lambda **options: options  # type: ignore[attr-defined]
    tasks.TaskManager = manager  # type: ignore[attr-defined]
    for module in (package, ModuleType("lm_eval.models"), huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_how_lm_eval_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: dict[str, Any] = {}
    stub_lm_eval(monkeypatch, lambda **options: calls.update(options) or RESULTS)
    model = make_model("llama")
    ready = check_tasks(Tasks(("ti*", "tiny"), 5, tmp_path))
    assert ready is not None
    rows = benchmark(model, ready, Recorder())
    assert rows == (lm_eval.table(RESULTS, RESULTS), "")
    assert (calls["tasks"], calls["limit"], calls["task_manager"].folder) == (["tiny"], 5, str(tmp_path))
    assert calls["model"]["pretrained"] is model
    assert calls["model"]["batch_size"] == 3
    assert check_tasks(Tasks()) is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval isn't installed (the extra eval)")
def test_a_tiny_task_with_the_real_lm_eval(
    tmp_path: Path,
    prompt_files: Files,
    heldout_files: Files,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of its own thousands of tasks it reads one folder's, and what it tells of the machine is left out: both take long."""
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "piqa" / "manager.py"))
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    rows = [
        {"question": f"To {verb} the lamp, give yourself", "good": " an hour.", "bad": " sky."} for verb in ("mend", "lift")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: ["an hour.", "sky."]\ndoc_to_target: 0\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    options = [*prompt_options(heldout_files), "--batch-size", 12, "--set", "response.max_new_tokens=8"]
    options += [part for name, path in prompt_files.items() for part in ("--set", f"prompts.{name}={path}")]
    options += ["--benchmark", "tiny", "--benchmark-path", tmp_path]
    (row,) = checked(invoke("evaluate", "demo", "demo", *options, "--json"), "evaluate")[-1]["benchmarks"]
    assert (row["task"], row["metric"], row["higher_is_better"]) == ("tiny", "acc", True)
    assert row["base"]["value"] == row["candidate"]["value"] == 1.0


def test_a_benchmark_on_the_terminal() -> None:
    rows = lm_eval.table(RESULTS, RESULTS)
    assert _cells(rows[0]) == ("tiny", "acc ↑", "0.5000 ± 0.2500", "0.5000 ± 0.2500")
    assert _cells(rows[1]) == ("tiny", "f1 strict", "1.0000", "1.0000")


def test_a_mistyped_task_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    stub_lm_eval(monkeypatch, forbidden)
    monkeypatch.setattr(pipeline_evaluate, "open_workbench", forbidden)
    assert_sentence(invoke("evaluate", "demo", "demo", "--benchmark", "tiny", "--benchmark", "tinny"), 2, "no task 'tinny'")

    def broken(include_path: str | None) -> None:
        raise KeyError("no such key")

    stub_lm_eval(monkeypatch, forbidden, broken)
    assert_sentence(invoke("evaluate", "demo", "demo", "--benchmark", "tiny"), 2, "can't read its tasks", "no such key")


@pytest.mark.parametrize("error", [ConnectionError("no data set"), torch.OutOfMemoryError("too large")])
def test_a_benchmark_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise error

    stub_lm_eval(monkeypatch, fails)
    recorder = Recorder()
    rows, reason = benchmark(make_model("llama"), tiny_task(), recorder)
    assert rows == []
    assert reason == f"lm-eval can't run tiny: {error}"
    assert recorder.warnings == [f"{reason}; the figures for held-out prompts are kept."]


def test_an_interrupted_benchmark_is_no_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(**options: Any) -> None:
        raise Interrupted

    stub_lm_eval(monkeypatch, stopped)
    with pytest.raises(Interrupted):
        benchmark(make_model("llama"), tiny_task(), Recorder())


def test_held_out_figures_survive_a_failing_benchmark(
    monkeypatch: pytest.MonkeyPatch,
    prompt_files: Files,
    heldout_files: Files,
    invoke: Invoke,
) -> None:
    def fails(**options: Any) -> None:
        raise ConnectionError("the data set can't be reached")

    stub_lm_eval(monkeypatch, fails)
    options = [*prompt_options(heldout_files), "--batch-size", 12, "--set", "response.max_new_tokens=8"]
    options += ["--set", "response.detect_prefix=false", "--benchmark", "tiny"]
    options += [part for name, path in prompt_files.items() for part in ("--set", f"prompts.{name}={path}")]
    lines = checked(invoke("evaluate", "demo", "demo", *options, "--json"), "evaluate", 1, "error")
    (found,) = [line for line in lines if line["event"] == "result"]
    assert found["heldout"]["kl"]["mean"] == 0
    assert found["benchmarks"] == []
    assert "the data set can't be reached" in found["error"]
    assert any(line["event"] == "warning" and found["error"] in line["text"] for line in lines)
    assert lines[-1]["exit_code"] == 1
    outcome = invoke("evaluate", "demo", "demo", *options)
    assert_sentence(outcome, 1, "There are no benchmarks", "the data set can't be reached")
    assert re.search(r"KL of the first token, mean +0 +0\.0000", outcome.out)
    assert re.search(r"harmless answers unchanged +8/8", outcome.out)


DOWN = """
from pathlib import Path
from abliterate.errors import ScorerUnavailable
from abliterate.types import Score

class Down:
    name, goal, reads_responses = "down", "minimize", False

    def setup(self, base): ...

    def score(self, observation):
        if Path(__file__).with_name("down").exists():
            raise ScorerUnavailable("the judge's server is down")
        return Score(self.name, 1.0, self.goal, {})
"""


def test_a_server_that_is_down_costs_no_trial(prompt_files: dict[str, str], cache: Path, tmp_path: Path) -> None:
    """The run ends with the cause, and repeats the trial when it is continued."""
    (tmp_path / "mine.py").write_text(DOWN, encoding="utf-8")
    flag = tmp_path / "down"

    class Cut(Recorder):
        def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
            super().stage(name, detail, at_once=at_once)
            if name == "search":
                flag.touch()

    over = SHORT | {"evaluation": {"scorers": ["refusals", "kl", f"{tmp_path}/mine.py:Down"]}, "export": {"kind": "none"}}
    settings, directory = quick_settings(prompt_files, cache, **over), RunDirectory(tmp_path / "run")
    with pytest.raises(AbliterateError, match=r"Trial 0 can't be scored, because .* down; .*--resume, which repeats the trial"):
        run(settings, Cut(), directory)
    flag.unlink()
    result, _ = run_in(directory.path, settings, resume=True)
    assert [trial["state"] for trial in result["trials"]] == ["complete"]
