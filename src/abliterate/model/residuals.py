"""Captures residuals, each layer's raw output at the last position, by hooks that keep nothing else.

Index 0 is the input of layer 0 (the embedding, scaled as the family does), index l+1 the output of layer l; index n_layers is
taken before the final norm (`output_hidden_states` has it after the norm).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

from abliterate.errors import AbliterateError, InputError
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.memory import clear_device_cache, unless_full
from abliterate.types import Prompt

# Feeds prompts to the model, so that the last position of its last pass is each prompt's last token.
Feed = Callable[[Sequence[Prompt]], object]
Item = TypeVar("Item")
Captured = TypeVar("Captured")


def first_tensor(output: Any) -> Tensor:
    """The hidden state in a layer's output: the output itself, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def stream_of(hidden: Tensor) -> Tensor:
    """Hidden states (batch, T, d_model); if layers pass on several streams (Gemma 3n), the stream that blocks work on."""
    return hidden[0] if hidden.dim() == 4 else hidden


@contextlib.contextmanager
def capture_last(layers: nn.ModuleList, out: list[Tensor | None]) -> Iterator[None]:
    """While active, a forward pass fills `out` (n_layers+1 items) with last-position states (batch, d_model)."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Clones, here and below: a view of the last position would keep every position alive, and would change when the
        # model overwrites it later.
        out[0] = stream_of(args[0] if args else kwargs["hidden_states"])[:, -1].detach().clone()

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            out[index + 1] = stream_of(first_tensor(output))[:, -1].detach().clone()

        return hook

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prefill_kwargs(model: PreTrainedModel, batch: BatchEncoding, last: int = 1) -> dict[str, Any]:
    """Arguments of one forward pass over left-padded texts, with positions from the mask and logits of the `last` positions."""
    accepted = inspect.signature(model.forward).parameters
    mask = batch["attention_mask"]
    kwargs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
    if "position_ids" in accepted:
        kwargs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = last
    return kwargs


def capture_residuals(
    model: PreTrainedModel, layers: nn.ModuleList, chat: PromptEncoder, prompts: Sequence[Prompt], **options: Any
) -> Tensor:
    """Residuals (n_prompts, n_layers+1, d_model) float32; options and errors as in `stream_residuals`."""
    batches: list[Tensor] = []
    stream_residuals(model, layers, chat, prompts, batches.append, **options)
    return torch.cat(batches)


@torch.no_grad()
def stream_residuals(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    chat: PromptEncoder,
    prompts: Sequence[Prompt],
    take: Callable[[Tensor], None],
    *,
    batch_size: int,
    amp: bool = False,
    offload: bool = True,
    clear_every: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    feed: Feed | None = None,
) -> None:
    """Hand each batch's residuals (batch, n_layers+1, d_model) float32 to `take`, in the prompts' order, and keep none.

    They are on the CPU if `offload`, else on the model's device. `amp` runs the passes in bfloat16 autocast (faster, rounds
    to 8 bits); `clear_every` batches free the device's memory cache (0: never). The batch size is halved when the device
    runs out of memory. `feed` makes the passes in another way than a plain forward pass over the whole prompts.

    Raises:
        AbliterateError: a residual is not finite (float16 overflow), or a single prompt doesn't fit.
    """
    # Layers may lie on several devices; residuals are gathered on one device.
    home = torch.device("cpu") if offload else chat.device

    def once(batch: Sequence[Prompt]) -> Tensor:
        return capture_batch(model, layers, chat, batch, amp=amp, home=home, feed=feed)

    for count, captured in enumerate(in_batches(once, prompts, batch_size, chat.device, progress), start=1):
        if not torch.isfinite(captured).all():
            raise AbliterateError("The model's hidden states overflow in this dtype; load it with --dtype bfloat16 or float32.")
        take(captured)
        if clear_every and count % clear_every == 0:
            clear_device_cache(chat.device)


def in_batches(
    once: Callable[[Sequence[Item]], Captured],
    prompts: Sequence[Item],
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Iterator[Captured]:
    """What `once` gives for each batch of prompts, in their order; the batch size is halved when the device runs out of memory.

    Raises:
        AbliterateError: a single prompt doesn't fit.
    """
    done = 0
    while done < len(prompts):
        batch = prompts[done : done + batch_size]
        captured = unless_full(partial(once, batch), device)
        if captured is None:
            if len(batch) == 1:
                raise AbliterateError(
                    "The device is out of memory even for a single prompt; try --set load.quantization=bnb_4bit, shorter "
                    "prompts, or --device cpu."
                )
            batch_size = len(batch) // 2
            continue
        yield captured
        done += len(batch)
        progress(done, len(prompts))


@contextlib.contextmanager
def _one_stream(layer: nn.Module, shape: tuple[int, ...]) -> Iterator[None]:
    """InputError if the input of `layer` is neither (batch, T, d_model) nor several such streams stacked."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = tuple((args[0] if args else kwargs["hidden_states"]).shape)
        if shape not in (seen, seen[1:]):
            raise InputError(
                f"The model's layers pass on hidden states {seen} for {shape[0]} prompts of {shape[1]} tokens, which is not a "
                f"residual stream of {shape[2]} features; models that join several streams into one tensor can't be edited."
            )

    handle = layer.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def capture_batch(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    chat: PromptEncoder,
    prompts: Sequence[Prompt],
    *,
    amp: bool,
    home: torch.device,
    feed: Feed | None = None,
) -> Tensor:
    """The residuals (batch, n_layers+1, d_model) float32 of one pass, on `home`; `feed` as in `stream_residuals`."""
    states: list[Tensor | None] = [None] * (len(layers) + 1)
    with capture_last(layers, states), torch.autocast(chat.device.type, torch.bfloat16, enabled=amp):
        if feed is not None:
            feed(prompts)
        else:
            batch = chat.encode(prompts)
            with _one_stream(layers[0], (*batch["input_ids"].shape, model.config.get_text_config().hidden_size)):
                model(**prefill_kwargs(model, batch))
    for index, state in enumerate(states):
        if state is None:  # a layer that the model skips (Mllama's cross-attention without an image) adds nothing
            states[index] = states[index - 1]
    return torch.stack([state.to(home, torch.float32) for state in states if state is not None], dim=1)
