"""Generate one answer of a loaded model: render the conversation, sample token by token, and stream the text piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from abliterate.engine.ends import Ends
from abliterate.engine.responses import ResponseReader, TextStream, VisibleText, byte_ids
from abliterate.errors import AbliterateError, InputError, first_line
from abliterate.model.chat_template import PromptEncoder, Turns, decode_ids
from abliterate.model.generation import limited_config
from abliterate.model.memory import unless_full

# The way an answer ended. `limit`: it reached its length limit; `interrupted`: the user stopped it.
Ended = Literal["end", "limit", "interrupted"]
# (whether the text is of a thinking block, text): receives each piece of an answer once it can't change any more.
Show = Callable[[bool, str], None]


@dataclass(frozen=True)
class Sampling:
    """The sampling options. `temperature` None: that of the model's generation config; 0: always the likeliest token.

    `max_new_tokens` 0: the limit of the generation config, else the default. `seed` None: a new seed each time.
    """

    max_new_tokens: int = 0
    temperature: float | None = None
    seed: int | None = None


DEFAULT_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Reply:
    """The answer of a model. `text` is the answer itself, `thinking` the text of its thinking blocks."""

    text: str
    thinking: str
    ended: Ended
    tokens: int
    seconds: float
    within_thinking: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether the answer was interrupted before its first word."""
        return self.ended == "interrupted" and not self.text and not self.thinking


class Generator:
    """Generates answers with `model` in its current state, which may be edited between answers."""

    def __init__(self, model: PreTrainedModel, chat: PromptEncoder, reader: ResponseReader, sampling: Sampling) -> None:
        self._model: Any = model
        self._chat = chat
        self._reader = reader
        self._sampling = sampling
        self._seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._ends = Ends.of(model, chat.tokenizer)

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled, so that the same conversation can get another answer."""
        return bool(self._config(1).do_sample)

    def form_note(self, system: str) -> str:
        """A remark for a person if the template treats a system prompt in an unusual way, else ""."""
        return self._chat.form_of(system=bool(system)).note

    def left_out(self, system: str, turns: Turns) -> bool:
        """Whether the chat template omits an earlier message of the user from the model's input."""
        rendered, _ = self._chat.render_turns(system, turns)
        return any(role == "user" and text.strip() not in rendered for role, text in turns)

    def answer(self, system: str, turns: Turns, number: int, show: Show, stop: Callable[[], bool]) -> Reply:
        """The answer to `turns`, which end with the user's message. `stop` is called after each token.

        Equal values of `number` give equal samples. A `KeyboardInterrupt` during generation ends the answer as `stop` does.

        Raises:
            InputError: the conversation can't be rendered or is too long. AbliterateError: memory is full, or logits are NaN.
        """
        started = time.perf_counter()
        rendered, tail = self._chat.render_turns(system, turns)
        starts_open = self._reader.starts_open(tail.removesuffix(self._chat.response_prefix))
        reading = _Reading(self._reader, self._chat.tokenizer, starts_open, self._chat.response_prefix, show)
        batch = self._chat.tokenizer(rendered, return_tensors="pt", add_special_tokens=False).to(self._chat.device)
        limit = self._limit(batch["input_ids"].shape[1])
        streamer = _Streamer(self._ends.ids, reading.feed, stop)
        try:
            # If memory is full, it is freed before the error is raised.
            if unless_full(lambda: self._generate(batch, limit, number, streamer), self._chat.device) is None:
                raise AbliterateError(
                    "There is too little memory for this answer; take turns back with /undo or /reset, or start with a smaller "
                    "--max-new-tokens or --dtype bfloat16."
                )
        except KeyboardInterrupt:
            streamer.stopped = True
        except RuntimeError as error:  # for example, probabilities that are NaN
            raise AbliterateError(
                f"The model gave no answer ({first_line(error)}); try --temperature 0, or --dtype float32."
            ) from error
        reading.finish()
        ended: Ended = "limit" if streamer.count >= limit and not streamer.at_end else "end"
        ended = "interrupted" if streamer.stopped else ended
        text, thinking = "".join(reading.answer), "".join(reading.thinking)
        seconds = round(time.perf_counter() - started, 3)
        return Reply(text, thinking, ended, streamer.count, seconds, reading.within_thinking)

    @torch.inference_mode()
    def _generate(self, batch: Any, limit: int, number: int, streamer: _Streamer) -> bool:
        torch.manual_seed((self._seed + number) % 2**63)
        criteria = self._ends.criteria()
        criteria.append(streamer)
        self._model.generate(**batch, generation_config=self._config(limit), stopping_criteria=criteria)
        return True

    def _config(self, limit: int) -> GenerationConfig:
        """The model's own generation config with the requested temperature and a length limit."""
        config = limited_config(self._model, limit)
        temperature = self._sampling.temperature
        if temperature == 0 or (temperature is None and not config.do_sample):
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        elif temperature is not None:
            config.update(do_sample=True, temperature=temperature)
        return config

    def _limit(self, n_prompt: int) -> int:
        """The length limit of the answer in tokens: the requested limit, within the model's context length."""
        own = getattr(self._model.generation_config, "max_new_tokens", None)
        limit = self._sampling.max_new_tokens or own or DEFAULT_NEW_TOKENS
        readable = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 0
        if readable and n_prompt >= readable:
            raise InputError(
                f"The conversation has {n_prompt} tokens and the model can read {readable}; take turns back with /undo, or "
                "start anew with /reset."
            )
        return min(limit, readable - n_prompt) if readable else limit


class _Streamer(StoppingCriteria):
    """Passes each token on as it is generated, and stops the generation when `stop` says so."""

    def __init__(self, ends: Set[int], take: Callable[[int], None], stop: Callable[[], bool]) -> None:
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
    """Turns tokens into pieces of answer and thinking, which together are the text that all tokens decode to."""

    def __init__(
        self, reader: ResponseReader, tokenizer: PreTrainedTokenizerBase, starts_open: bool | None, prefix: str, show: Show
    ) -> None:
        self._reader = reader
        self._show = show
        self._stream = _Words(tokenizer) if reader.tidies else TextStream(tokenizer, byte_ids(tokenizer))
        self._visible = VisibleText(reader.markup, is_open=starts_open, at_once=True)
        self._thought = bool(starts_open)
        self.answer: list[str] = []
        self.thinking: list[str] = []
        self._take(prefix)

    @property
    def within_thinking(self) -> bool:
        """Whether the text ends within a thinking block."""
        return self._visible.is_open

    def feed(self, token: int) -> None:
        """Take one more token."""
        self._take(self._stream.feed([token]))

    def finish(self) -> None:
        """Release the text that was held back, since no more tokens follow."""
        self._take(self._stream.rest(), last=True)

    def _take(self, raw: str, *, last: bool = False) -> None:
        parts = self._visible.parts(raw, last=last)
        if self._visible.was_thinking and not self._thought:  # what was shown as the answer ended with an unopened closing tag
            self.thinking, self.answer, self._thought = self.answer, [], True
        for thinking, piece in parts:
            text = self._reader.without_special(piece)
            self._thought = self._thought or thinking
            pieces = self.thinking if thinking else self.answer
            if not pieces and (thinking or self._thought):  # the empty lines behind a tag
                text = text.lstrip()
            if text:
                pieces.append(text)
                self._show(thinking, text)


class _Words:
    """A `TextStream` for decoders that remove spaces before punctuation: it gives whole words, as far as they look ahead."""

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
