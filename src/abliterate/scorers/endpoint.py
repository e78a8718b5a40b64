"""Ask a chat model behind an OpenAI-compatible endpoint, for the judges that want another model's word.

The endpoint's address, model and key come from the environment only and are never written anywhere.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

from abliterate import ranks
from abliterate.errors import InputError, ScorerUnavailable, TrialError

URL, MODEL, KEY = "ABLITERATE_JUDGE_URL", "ABLITERATE_JUDGE_MODEL", "ABLITERATE_JUDGE_KEY"
TRIES, PAUSE, TIMEOUT = 4, 1.0, 60.0  # tries per request; seconds before the second try, doubled each time; seconds per try
# A busy server is asked more often: for two minutes in all, or after the pauses it asks for, of up to LONGEST seconds each.
BUSY, BUSY_TRIES, LONGEST = (408, 425, 429, 503), 8, 60.0
_LARGEST = 1 << 20  # the most bytes of a reply that are read

Verdict = TypeVar("Verdict")


class ChatEndpoint(Generic[Verdict]):
    """Puts questions to the chat model (`POST URL/chat/completions`) and reads its verdicts from the replies.

    `judge` is the name of the scorer in error sentences. `read` finds the verdict in a reply, or returns None where there is
    none. `max_tokens` bounds a reply. A question is asked once: edits often leave a response as it was.

    Raises:
        InputError: the environment names no endpoint, or holds a key that no header can hold.
    """

    def __init__(
        self, judge: str, read: Callable[[str], Verdict | None], max_tokens: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._url = os.environ.get(URL, "").rstrip("/")
        self._model = os.environ.get(MODEL, "")
        if not _is_address(self._url) or not self._model:
            raise InputError(
                f"The scorer {judge} needs the environment variables {URL} (as http://localhost:8000/v1) and {MODEL}, and "
                f"{KEY} where the server asks for a key."
            )
        if not os.environ.get(KEY, "").isascii() or not os.environ.get(KEY, "").isprintable():
            raise InputError(
                f"The environment variable {KEY} holds a line break or a character that isn't ASCII; set it again."
            )
        self._read, self._max_tokens, self._sleep = read, max_tokens, sleep
        self._verdicts: dict[str, Verdict] = {}

    def ask(self, question: str) -> Verdict:
        """The verdict on a question.

        Raises:
            ScorerUnavailable: the server can't be reached or answers with an error. TrialError: it refuses this question, or
                gives no verdict on it in all tries.
        """
        if question not in self._verdicts:
            self._verdicts[question] = ranks.agree(lambda: self._asked(question))
        return self._verdicts[question]

    def _asked(self, question: str) -> Verdict:
        """The verdict; a busy server, and a reply without a verdict, is asked again."""
        messages = [{"role": "user", "content": question}]
        body = {"model": self._model, "temperature": 0, "max_tokens": self._max_tokens, "messages": messages}
        reply, failed, busy, pause, answered = "", 0, 0, 0.0, False
        while failed < TRIES and busy < BUSY_TRIES:
            if failed + busy:
                self._sleep(pause)
            pause = min(PAUSE * 2 ** (failed + busy), LONGEST)
            answered = False
            try:
                found = self._post(body)
                # With an error in place of an answer, some gateways refuse the question, and others report an outage.
                answered = "error" in found and bool(self._verdicts)
                reply = str(found["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                error.close()
                reply = f"{error.code} {error.reason}"
                if error.code in BUSY:
                    pause = max(pause, min(_retry_after(error.headers.get("Retry-After", "")), LONGEST))
                    busy += 1
                    continue
                _check_status(error.code, reply, known=bool(self._verdicts))
            # A timeout, a refused connection, or a reply that is no chat completion or not even HTTP.
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
                reply = type(error).__name__
            else:
                verdict, answered = self._read(reply), True
                if verdict is not None:
                    return verdict
            failed += 1
        error_type = TrialError if answered else ScorerUnavailable
        raise error_type(f"the judge's endpoint gave no verdict in {failed + busy} tries (last: {reply[:80]!r})")

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY, ""):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", json.dumps(body).encode(), headers)
        with _opener().open(request, timeout=TIMEOUT) as reply:
            return json.loads(reply.read(_LARGEST))


def _opener() -> urllib.request.OpenerDirector:
    """An opener for plain HTTP only: urllib's own opener follows redirects and sends the key to whatever host they name."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _is_address(url: str) -> bool:
    """Whether requests can be sent to `url`; checked before anything is loaded."""
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # a bad port raises
    except ValueError:
        return False
    return sound and "@" not in parts.netloc and url.isascii() and url.isprintable() and " " not in url


# Statuses of a question that the server won't take: for its content or its length.
_ABOUT_THE_QUESTION = (400, 413, 422, 451)
# Some gateways answer so to a question that they flag, and others to a wrong key, which no question passes.
_FORBIDDEN = 403


def _check_status(code: int, reply: str, *, known: bool) -> None:
    """Raise an error for a status that no further try would change; a TrialError if it is about this question alone.

    `known`: the server has answered another question.
    """
    if 300 <= code < 400:
        raise ScorerUnavailable(
            f"the judge's endpoint redirects ({code}), which isn't followed; give the final address in {URL}"
        )
    if code < 500:
        is_about_it = code in _ABOUT_THE_QUESTION or (code == _FORBIDDEN and known)
        error_type = TrialError if is_about_it else ScorerUnavailable
        raise error_type(f"the judge's endpoint answers {reply[:80]}")


def _retry_after(text: str) -> float:
    """The seconds that a server asks to wait, given as a number or a date; 0 if the header can't be read."""
    try:
        return max(0.0, float(text) if text.strip().isdecimal() else parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
