"""One answer of a loaded model: the conversation rendered, generated token by token, and read piece by piece.

Owns sampling and the streaming of text. Knows no edits, no history and no terminal.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from abliterate.engine.reference import end_ids
from abliterate.engine.responses import ResponseReader, TextStream, VisibleText, byte_ids
from abliterate.errors import AbliterateError, InputError
from abliterate.model.chat_template import PromptEncoder, Turns, decode_ids
from abliterate.model.memory import unless_full

# `limit`: it has as many tokens as it may; `interrupted`: somebody wanted no more of it.
Ended = Literal["end", "limit", "interrupted"]
# (whether it is of a thinking block, text): what has become certain of an answer.
Show = Callable[[bool, str], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` None: as the model's generation config says; 0: always the likeliest token.

    `max_new_tokens` 0: as much as the generation config or the default says. `seed` None: another one each time.
    """

    max_new_tokens: int = 0
    temperature: float | None = None
    seed: int | None = None


DEFAULT_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Reply:
    """What a model has said. `text` is the answer, `thinking` what lay in thinking blocks."""

    text: str
    thinking: str
    ended: Ended
    tokens: int
    seconds: float
    within_thinking: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether it was interrupted before a word."""
        return self.ended == "interrupted" and not self.text and not self.thinking


class Generator:
    """Answers with `model` as it is at that moment: whoever edits it does so between answers."""

    def __init__(self, model: PreTrainedModel, chat: PromptEncoder, reader: ResponseReader, sampling: Sampling) -> None:
        self._model: Any = model
        self._chat = chat
        self._reader = reader
        self._sampling = sampling
        self._seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._ends = end_ids(model)

    @property
    def samples(self) -> bool:
        """Whether the same conversation can get another answer."""
        return bool(self._config(1).do_sample)

    def form_note(self, system: str) -> str:
        """What a person is told of how the template takes a system prompt, if anything."""
        return self._chat.form_of(system=bool(system)).note

    def left_out(self, system: str, turns: Turns) -> bool:
        """Whether the chat template leaves an earlier message of the user out of what the model reads."""
        rendered, _ = self._chat.render_turns(system, turns)
        return any(role == "user" and text.strip() not in rendered for role, text in turns)

    def answer(self, system: str, turns: Turns, number: int, show: Show, stop: Callable[[], bool]) -> Reply:
        """The answer to `turns`, the last one the user's. `number`: equal ones draw alike. `stop` is asked after each token.

        A `KeyboardInterrupt` while it generates ends it like `stop`.

        Raises:
            InputError: the conversation can't be rendered or is too long. AbliterateError: no memory, or logits are no numbers.
        """
        started = time.perf_counter()
        rendered, tail = self._chat.render_turns(system, turns)
        starts_open = self._reader.starts_open(tail.removesuffix(self._chat.response_prefix))
        reading = _Reading(self._reader, self._chat.tokenizer, starts_open, self._chat.response_prefix, show)
        batch = self._chat.tokenizer(rendered, return_tensors="pt", add_special_tokens=False).to(self._chat.device)
        limit = self._limit(batch["input_ids"].shape[1])
        watch = _Watch(self._ends, reading.feed, stop)
        try:
            # Where memory ends, it is freed before the sentence is said.
            if unless_full(lambda: self._generate(batch, limit, number, watch), self._chat.device) is None:
                raise AbliterateError(
                    "There is too little memory for this answer; take turns back with /undo or /reset, or start with a smaller "
                    "--max-new-tokens or --dtype bfloat16."
                )
        except KeyboardInterrupt:
            watch.stopped = True
        except RuntimeError as error:  # such as probabilities that are no numbers
            raise AbliterateError(
                f"The model gave no answer ({_first_line(error)}); try --temperature 0, or --dtype float32."
            ) from error
        reading.finish()
        ended: Ended = "interrupted" if watch.stopped else "limit" if watch.count >= limit and not watch.at_end else "end"
        said = ("".join(reading.answer), "".join(reading.thinking))
        return Reply(*said, ended, watch.count, round(time.perf_counter() - started, 3), reading.within_thinking)

    @torch.inference_mode()
    def _generate(self, batch: Any, limit: int, number: int, watch: _Watch) -> bool:
        torch.manual_seed((self._seed + number) % 2**63)
        self._model.generate(
            **batch,
            generation_config=self._config(limit),
            stopping_criteria=StoppingCriteriaList([watch]),
            tokenizer=self._chat.tokenizer,  # a generation config may have texts to stop at
        )
        return True

    def _config(self, limit: int) -> GenerationConfig:
        """The model's own, with one answer at a time and the temperature asked for."""
        config = copy.deepcopy(self._model.generation_config)
        config.update(num_beams=1, num_return_sequences=1, max_length=None, min_new_tokens=None, return_dict_in_generate=False)
        config.max_new_tokens = limit
        temperature = self._sampling.temperature
        if temperature == 0 or (temperature is None and not config.do_sample):
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        elif temperature is not None:
            config.update(do_sample=True, temperature=temperature)
        if config.pad_token_id is None:
            config.pad_token_id = min(self._ends, default=None)
        return config

    def _limit(self, n_prompt: int) -> int:
        """How many tokens the answer may have: what was asked for, within what the model can read."""
        own = getattr(self._model.generation_config, "max_new_tokens", None)
        wanted = self._sampling.max_new_tokens or own or DEFAULT_NEW_TOKENS
        readable = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 0
        if readable and n_prompt >= readable:
            raise InputError(
                f"The conversation has {n_prompt} tokens and the model can read {readable}; take turns back with /undo, or "
                "begin anew with /reset."
            )
        return min(wanted, readable - n_prompt) if readable else wanted


class _Watch(StoppingCriteria):
    """Hands each token on as it comes, and stops when it is asked to."""

    def __init__(self, ends: set[int], take: Callable[[int], None], stop: Callable[[], bool]) -> None:
        self._ends, self._take, self._stop = ends, take, stop
        self.count, self.stopped, self.at_end = 0, False, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        token = int(input_ids[0, -1])
        self.count += 1
        self.at_end = token in self._ends
        if not self.at_end:
            self._take(token)
        self.stopped = not self.at_end and self._stop()
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)


class _Reading:
    """Tokens in, pieces of answer and thinking out: together they are what the whole decodes to."""

    def __init__(
        self, reader: ResponseReader, tokenizer: PreTrainedTokenizerBase, starts_open: bool, prefix: str, show: Show
    ) -> None:
        self._reader = reader
        self._show = show
        self._stream = _Words(tokenizer) if reader.tidies else TextStream(tokenizer, byte_ids(tokenizer))
        self._visible = VisibleText(reader.markup, is_open=starts_open)
        self._thought = starts_open
        self.answer: list[str] = []
        self.thinking: list[str] = []
        self._take(prefix)

    @property
    def within_thinking(self) -> bool:
        """Whether it ends within a thinking block."""
        return self._visible.is_open

    def feed(self, token: int) -> None:
        """One more token."""
        self._take(self._stream.feed([token]))

    def finish(self) -> None:
        """Nothing comes any more: what was held back is certain now."""
        self._take(self._stream.rest(), last=True)

    def _take(self, raw: str, *, last: bool = False) -> None:
        for thinking, part in self._visible.parts(raw, last=last):
            text = self._reader.without_special(part)
            self._thought = self._thought or thinking
            kept = self.thinking if thinking else self.answer
            if not kept and (thinking or self._thought):  # the empty lines behind a tag
                text = text.lstrip()
            if text:
                kept.append(text)
                self._show(thinking, text)


class _Words:
    """Like `TextStream`, of a decoder that tidies up spaces before signs: whole words, since it looks ahead that far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def feed(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        text = decode_ids(self._tokenizer, self._ids, skip_special_tokens=False)
        return self._more(text[: max(text.rfind(" "), 0)])

    def rest(self) -> str:
        return self._more(decode_ids(self._tokenizer, self._ids, skip_special_tokens=False))

    def _more(self, text: str) -> str:
        piece = text[len(self._given) :]
        self._given += piece
        return piece


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
