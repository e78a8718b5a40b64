"""From prompts to left-padded token tensors: chat template, system role, response prefix. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate.errors import InputError
from abliterate.types import Prompt


class Chat:
    """Renders and tokenizes prompts, each followed by `response_prefix`, on `device`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, response_prefix: str = "") -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.response_prefix = response_prefix
        if not tokenizer.chat_template:
            raise InputError(
                "The model's tokenizer has no chat template; give one with --set load.chat_template=FILE, or use a chat model."
            )

    def render(self, prompt: Prompt) -> str:
        """The text the model continues. A template that refuses a system role gets it before the user's text."""
        messages = [{"role": "user", "content": prompt.text}]
        if prompt.system:
            try:
                return self._apply([{"role": "system", "content": prompt.system}, *messages]) + self.response_prefix
            except TemplateError:
                messages = [{"role": "user", "content": f"{prompt.system}\n\n{prompt.text}"}]
        try:
            return self._apply(messages) + self.response_prefix
        except TemplateError as error:
            raise InputError(
                f"The model's chat template can't render a prompt ({error}); give another with --set load.chat_template=FILE."
            ) from error

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

    def _apply(self, messages: list[dict[str, str]]) -> str:
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        return rendered


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool) -> str:
    """Text of one row of ids."""
    row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    text = tokenizer.decode(row, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # lists come back only for lists of rows
    return text
