"""From prompts to left-padded token tensors: rendering, response prefix, tokenizing. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate.errors import InputError
from abliterate.model.template import FAILURES, Form, Template, Turns
from abliterate.types import Prompt, TemplateOptions


class Chat:
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
