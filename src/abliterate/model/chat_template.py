"""From prompts to left-padded token tensors: the chat template and its options, the response prefix, tokenizing.

What a template does with a message is found out with one probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jinja2 import ext, meta, nodes, parser
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

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


class PromptEncoder:
    """Renders and tokenizes prompts, each followed by `response_prefix`, on `device`; `options` are the template's."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        response_prefix: str = "",
        options: TemplateOptions | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.response_prefix = response_prefix
        self.template = Template(tokenizer, options or {})
        self._forms: dict[bool, Form] = {}
        # Kept: a template that writes today's date would change a run that goes on after midnight.
        self._rendered: dict[Prompt, str] = {}

    def form(self, prompt: Prompt) -> Form:
        """How this kind of prompt (with a system prompt or without) becomes messages."""
        return self.form_of(system=bool(prompt.system))

    def form_of(self, *, system: bool) -> Form:
        """The same, by whether there is a system prompt."""
        if system not in self._forms:
            self._forms[system] = self.template.form(system=system)
        return self._forms[system]

    def render(self, prompt: Prompt) -> str:
        """The text the model continues. A template that has no system role gets it before the user's text."""
        if prompt not in self._rendered:
            self._rendered[prompt] = self._conversation(prompt.system, (("user", prompt.text),))
        return self._rendered[prompt] + self.response_prefix

    def render_turns(self, system: str, turns: Turns) -> tuple[str, str]:
        """The text the model continues after `turns`, the last one the user's, and what stands after that one's text.

        The response prefix is in both.
        """
        rendered = self._conversation(system, turns)
        tail = self._tail(rendered, self.form_of(system=bool(system)).tail, turns[-1][1])
        return rendered + self.response_prefix, tail + self.response_prefix

    def _conversation(self, system: str, turns: Turns) -> str:
        try:
            return self.template.render(self.form_of(system=bool(system)).conversation(system, turns))
        except FAILURES as error:
            raise InputError(
                f"The model's chat template can't render a prompt ({error}); give another with --set load.chat_template=FILE."
            ) from error

    def tail(self, prompt: Prompt) -> str:
        """What stands after the user's text: a tag in it is the template's (or the response prefix's), not the prompt's."""
        return self._tail(self.render(prompt), self.form(prompt).tail + self.response_prefix, prompt.text)

    @staticmethod
    def _tail(rendered: str, usual: str, text: str) -> str:
        # Of a template whose end depends on what was asked, all after the text is taken, where that can be found.
        if rendered.endswith(usual):
            return usual
        return rendered.rpartition(text.strip())[2] if text.strip() and text.strip() in rendered else rendered

    def encode(self, prompts: Sequence[Prompt]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, each (n_prompts, longest) int64, padded on the left.

        No special tokens are added: the template has rendered them (a second BOS would be a silent error). Pads carry
        the row's own first token: masked from the model, they are seen by a repetition penalty, and where the pad token
        is the end token it would make a response depend on its neighbours' lengths.
        """
        texts = [self.render(prompt) for prompt in prompts]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["input_ids"] = torch.where(mask.bool(), ids, ids.gather(1, mask.argmax(dim=1, keepdim=True)))
        return batch.to(self.device)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The ids of one prompt, as in `encode`, without pads."""
        return list(self.tokenizer(self.render(prompt), add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = True) -> str:
        """Text of generated ids; special tokens are kept only to look for thinking blocks."""
        return decode_ids(self.tokenizer, ids, skip_special_tokens=skip_special_tokens)


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool) -> str:
    """Text of one row of ids."""
    row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    text = tokenizer.decode(row, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # lists come back only for lists of rows
    return text
