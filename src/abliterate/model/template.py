"""A tokenizer's chat template: which one it is, the options it takes, and the form of messages it keeps whole.

Knows no prompts of a run: what a template does is found out with one probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import ext, meta, nodes, parser
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from abliterate.errors import InputError
from abliterate.types import Prompt, TemplateOptions

Messages = list[dict[str, Any]]
# (role, text) of user and assistant in turn.
Turns = Sequence[tuple[str, str]]

# What a template's own code raises on messages of a form it isn't written for: `+` of a string and a list is a TypeError.
FAILURES = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
# What `transformers` gives every template beside the special tokens; not for a person to set.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "dict"}
# Words that no template has or changes.
_PROBE = Prompt("one question to abliterate", "one instruction to abliterate")


@dataclass(frozen=True)
class Form:
    """How a prompt becomes messages. `tail`: what the template puts after the user's text. `note`: what a person is told."""

    merged: bool
    parts: bool
    tail: str = ""
    note: str = ""

    def messages(self, prompt: Prompt) -> Messages:
        """`merged`: the system prompt before the user's text; `parts`: content as vision-language templates want it."""
        return self.conversation(prompt.system, (("user", prompt.text),))

    def conversation(self, system: str, turns: Turns) -> Messages:
        """The same of several (role, text) in turn, the user's first."""
        said = [("system", system)] if system and not self.merged else []
        before = f"{system}\n\n" if system and self.merged else ""
        (role, first), *rest = turns
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in (*said, (role, before + first), *rest)
        ]


class Template:
    """What a tokenizer makes of messages, with the options of the settings.

    Raises:
        InputError: there is none, or no single one, or it has no such options.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = dict(options)
        self._source = _source(tokenizer)
        known = self.options
        for name in options:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise InputError(
                    f"The model's chat template has no option {name} (load.template_options); {has}, or leave the setting out."
                )

    @property
    def options(self) -> tuple[str, ...]:
        """Names that the template reads and nobody else sets, sorted: `enable_thinking` and the like."""
        return tuple(sorted(_variables(self._source) - _GIVEN - set(self._tokenizer.special_tokens_map)))

    def render(self, messages: Messages) -> str:
        """The text that a model continues. Raises one of `FAILURES` where the template does."""
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=self._source, **self._options
        )
        assert isinstance(rendered, str)
        return rendered

    def form(self, *, system: bool) -> Form:
        """The first form in which nothing gets lost: as it is, as parts; else the system prompt before the user's text.

        Raises:
            InputError: the user's text is lost in all of them.
        """
        probe = _PROBE if system else Prompt(_PROBE.text)
        reasons: list[str] = []
        for merged in (False, True) if system else (False,):
            for parts in (False, True):
                form = Form(merged, parts)
                try:
                    rendered = self.render(form.messages(probe))
                except FAILURES as error:
                    reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."))
                    continue
                lost = [text for text in (probe.text, probe.system) if text not in rendered]
                # A template that writes down any value shows a list as Python does.
                if not lost and "'text':" not in rendered:
                    note = _system_note(reasons[0]) if merged else ""
                    return Form(merged, parts, rendered.rpartition(probe.text)[2], note)
                reasons.append("" if lost != [probe.system] else "system")
        told = next((f" ({reason})" for reason in reasons if reason not in ("", "system")), "")
        raise InputError(
            f"The model's chat template can't render a prompt: the user's text isn't in what it gives{told}; give another with "
            "--set load.chat_template=FILE."
        )


def _system_note(reason: str) -> str:
    why = "leaves the system prompt out" if reason in ("", "system") else f"takes no system prompt ({reason})"
    return f"the chat template {why}; it is put before the user's text"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The one template for a plain chat, of possibly several."""
    if not tokenizer.chat_template:
        raise InputError(
            "The model's tokenizer has no chat template; give one with --set load.chat_template=FILE, or use a chat model."
        )
    if isinstance(tokenizer.chat_template, Mapping):
        named = tokenizer.chat_template
        if "default" not in named:
            raise InputError(
                f"The model's tokenizer has several chat templates ({', '.join(sorted(named))}) and no default; give one with "
                "--set load.chat_template=FILE."
            )
        return str(named["default"])
    return tokenizer.chat_template


class _Generation(ext.Extension):
    """`{% generation %}` marks what a model has said, for training; here it only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja's own

    def parse(self, parser: parser.Parser) -> Sequence[nodes.Node]:  # type: ignore[override]
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, ext.loopcontrols])
    try:
        found = meta.find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise InputError(
            f"The model's chat template can't be read ({error}); give another with --set load.chat_template=FILE."
        ) from error
    return frozenset(found) - set(environment.globals)
