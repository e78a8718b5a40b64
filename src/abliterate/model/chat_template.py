"""From prompts to left-padded token tensors: the chat template and its options, the response prefix, tokenizing.

What a template does with a message is found out with one probe.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import torch
from jinja2 import ext, meta, nodes, parser
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from abliterate.errors import InputError, first_line
from abliterate.types import Prompt, TemplateOptions

Messages = list[dict[str, Any]]

# (role, text) of the user and the assistant in turn.
Turns = Sequence[tuple[str, str]]

# Exceptions of a template given messages in a form that it isn't written for: `+` of a string and a list is a TypeError.
FAILURES = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    MemoryError,  # of `'a' * 10**15`
)
# A template takes milliseconds; nested loops of a hostile one would never end.
_RENDER_SECONDS = 10.0

# Names that `transformers` passes to every template beside the special tokens; users don't set them.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "dict"}

# Words that no template contains or changes.
_PROBE = Prompt("one question to abliterate", "one instruction to abliterate")


@dataclass(frozen=True)
class Form:
    """How a prompt becomes messages. `tail`: the template's text after the user's text. `note`: a note to the user, or ""."""

    merged: bool
    parts: bool
    tail: str = ""
    note: str = ""

    def messages(self, prompt: Prompt) -> Messages:
        """`merged`: the system prompt stands before the user's text; `parts`: content in vision-language form."""
        return self.conversation(prompt.system, (("user", prompt.text),))

    def conversation(self, system: str, turns: Turns) -> Messages:
        """The messages of several turns; the first is the user's."""
        system_messages = [("system", system)] if system and not self.merged else []
        prefix = f"{system}\n\n" if system and self.merged else ""
        (role, first), *rest = turns
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in (*system_messages, (role, prefix + first), *rest)
        ]


# The function by which a template asks for the date.
_DATE = "strftime_now"


@dataclass(frozen=True)
class _Clock:
    """The part of `datetime` that `transformers` uses to tell a template the date."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@contextlib.contextmanager
def _present(moment: datetime) -> Iterator[None]:
    """While active, templates take `moment` for the present.

    `transformers` gives every template its own clock, and makes a text of any function that is passed to a template.
    """
    clock = chat_template_utils.datetime
    chat_template_utils.datetime = _Clock(moment)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = clock  # type: ignore[misc]


class Template:
    """A tokenizer's chat template, with the options of the settings. It takes `now`, by default that of its making, for today.

    Raises:
        InputError: the tokenizer has no template, or several without a default, or the template lacks one of the options.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TemplateOptions, now: datetime | None = None) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = dict(options)
        self._source = source_of(tokenizer)
        self._now = now or datetime.now()
        known = self.options
        for name in options:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise InputError(
                    f"The model's chat template has no option {name} (load.template_options); {has}; correct the setting."
                )

    @property
    def options(self) -> tuple[str, ...]:
        """Sorted names that the template reads and only the user can set, such as `enable_thinking`."""
        return tuple(sorted(_variables(self._source) - _GIVEN - set(self._tokenizer.special_tokens_map)))

    def render(self, messages: Messages) -> str:
        """The text that the model continues. An exception of the template is one of `FAILURES`."""
        with _present(self._now), _at_most(_RENDER_SECONDS):
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, chat_template=self._source, **self._options
            )
        assert isinstance(rendered, str)
        return rendered

    def form(self, *, system: bool) -> Form:
        """The first form in which no text is lost: plain, in parts, and then both with the system prompt in the user's text.

        Raises:
            InputError: the user's text is lost in every form.
        """
        probe = _PROBE if system else Prompt(_PROBE.text)
        reasons: list[str] = []
        for merged in (False, True) if system else (False,):
            for parts in (False, True):
                form = Form(merged, parts)
                try:
                    rendered = self.render(form.messages(probe))
                except FAILURES as error:
                    reasons.append(first_line(error))
                    continue
                lost = [text for text in (probe.text, probe.system) if text not in rendered]
                # A template that prints any value would print a list of parts as Python does.
                if not lost and "'text':" not in rendered:
                    note = _system_note(reasons[0]) if merged else ""
                    return Form(merged, parts, rendered.rpartition(probe.text)[2], note)
                reasons.append("" if lost != [probe.system] else "system")
        reported = next((f" ({reason})" for reason in reasons if reason not in ("", "system")), "")
        raise InputError(
            f"The model's chat template can't render a prompt: the user's text isn't in its output{reported}; give another "
            "template with --set load.chat_template=FILE."
        )


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """InputError if the `with` block takes longer; only the main thread has this limit, if the system has timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise InputError(
            f"The model's chat template doesn't end: it has rendered one conversation for {seconds:g} seconds; give another "
            "template with --set load.chat_template=FILE."
        )

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        # A program that uses this package as a library may have a timer of its own.
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3) if left else 0, interval)
        signal.signal(signal.SIGALRM, before)


def _system_note(reason: str) -> str:
    why = "leaves the system prompt out" if reason in ("", "system") else f"takes no system prompt ({reason})"
    return f"the chat template {why}; the system prompt is put before the user's text"


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write the date, so that its prompts depend on when they are rendered.

    Raises:
        InputError: there is no template.
    """
    return _DATE in source_of(tokenizer)


def source_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a plain chat, if there are several.

    Raises:
        InputError: there is none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "The model's tokenizer has no chat template; give one with --set load.chat_template=FILE, or use a chat model."
        )
    if isinstance(tokenizer.chat_template, Mapping):
        named = tokenizer.chat_template
        if "default" not in named:
            raise InputError(
                f"The model's tokenizer has several chat templates ({', '.join(sorted(named))}) and no default; give a "
                "template with --set load.chat_template=FILE."
            )
        return str(named["default"])
    return str(tokenizer.chat_template)


class _Generation(ext.Extension):
    """`{% generation %}` marks the model's answers for training; here it only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja's own

    def parse(self, parser: parser.Parser) -> Sequence[nodes.Node]:  # type: ignore[override]
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, ext.loopcontrols])
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
    except FAILURES as error:  # a RecursionError, too
        raise InputError(
            f"The model's chat template can't be read ({error}); give another template with --set load.chat_template=FILE."
        ) from error
    return frozenset(names) - set(environment.globals)


class PromptEncoder:
    """Renders and tokenizes prompts, each followed by `response_prefix`, on `device`. `options` are passed to the template.

    `now` is the moment that a template which writes the date is told, by default that at which the encoder is made.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        response_prefix: str = "",
        options: TemplateOptions | None = None,
        now: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.response_prefix = response_prefix
        self.template = Template(tokenizer, options or {}, now)
        self._forms: dict[bool, Form] = {}
        self._rendered: dict[Prompt, str] = {}
        self._tokens: dict[tuple[Prompt, str], array[int]] = {}

    def form(self, prompt: Prompt) -> Form:
        """The form of messages for this prompt; it depends on whether there is a system prompt."""
        return self.form_of(system=bool(prompt.system))

    def form_of(self, *, system: bool) -> Form:
        """The form of messages with or without a system prompt."""
        if system not in self._forms:
            self._forms[system] = self.template.form(system=system)
        return self._forms[system]

    def render(self, prompt: Prompt) -> str:
        """The text that the model continues. Without a system role, the system prompt stands before the user's text."""
        if prompt not in self._rendered:
            self._rendered[prompt] = self._conversation(prompt.system, (("user", prompt.text),))
        return self._rendered[prompt] + self.response_prefix

    def digest(self, prompts: Sequence[Prompt]) -> str:
        """A hash of the rendered prompts without the response prefix, in their order."""
        total = hashlib.sha256()
        for prompt in prompts:
            self.render(prompt)
            total.update(hashlib.sha256(self._rendered[prompt].encode("utf-8", "surrogatepass")).digest())
        return total.hexdigest()

    def render_turns(self, system: str, turns: Turns) -> tuple[str, str]:
        """(text that the model continues, its tail after the last user's text); the last of `turns` is the user's.

        Both end with the response prefix.
        """
        rendered = self._conversation(system, turns)
        tail = self._tail(rendered, self.form_of(system=bool(system)).tail, turns[-1][1])
        return rendered + self.response_prefix, tail + self.response_prefix

    def _conversation(self, system: str, turns: Turns) -> str:
        try:
            return self.template.render(self.form_of(system=bool(system)).conversation(system, turns))
        except FAILURES as error:
            raise InputError(
                f"The model's chat template can't render a prompt ({error}); give another template with "
                "--set load.chat_template=FILE."
            ) from error

    def tail(self, prompt: Prompt) -> str:
        """The rendered text after the user's text; its tags come from the template or the response prefix, not the prompt."""
        return self._tail(self.render(prompt), self.form(prompt).tail + self.response_prefix, prompt.text)

    @staticmethod
    def _tail(rendered: str, usual: str, text: str) -> str:
        # If the template's end depends on the question, everything after the user's text is taken, if that text can be found.
        if rendered.endswith(usual):
            return usual
        return rendered.rpartition(text.strip())[2] if text.strip() and text.strip() in rendered else rendered

    def encode(self, prompts: Sequence[Prompt]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, each (n_prompts, longest) int64, padded on the left.

        No special tokens are added: the template has rendered them, and a second BOS would be a silent error. Pads repeat
        the row's own first token: the model's mask hides them, but a repetition penalty sees them, and if the pad token is
        the end token, a response would depend on the lengths of the other rows.
        """
        rows = [self.token_ids(prompt) for prompt in prompts]
        pads = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[row[0]] * count + row for row, count in zip(rows, pads, strict=True)])
        mask = torch.tensor([[0] * count + [1] * len(row) for row, count in zip(rows, pads, strict=True)])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}).to(self.device)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of one prompt, as in `encode` but without pads.

        They are kept: a run asks for those of each prompt some ten times before its first trial.
        """
        key = (prompt, self.response_prefix)
        if key not in self._tokens:
            self._tokens[key] = array("q", self.tokenizer(self.render(prompt), add_special_tokens=False)["input_ids"])
        return self._tokens[key].tolist()

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """The text of generated ids. Only the search for thinking blocks keeps special tokens."""
        return decode_ids(self.tokenizer, ids, skip_special_tokens=skip_special_tokens)


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool) -> str:
    """The text of one row of ids."""
    row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    text = tokenizer.decode(row, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # the tokenizer returns a list only for a list of rows
    return text
