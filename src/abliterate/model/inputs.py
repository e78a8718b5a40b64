"""Captures the inputs of the modules to edit at the end of prompts or along answers, of all modules in one pass a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

from abliterate.errors import AbliterateError, InputError
from abliterate.model.architectures import Target
from abliterate.model.experts import is_fused
from abliterate.model.residuals import in_batches, prefill_kwargs
from abliterate.model.sharding import Columns, columns_of
from abliterate.model.weights import in_features

# Families with modules that are given flattened inputs, or aren't called for every text.
UNCAPTURED = frozenset({"opt", "mllama", "nemotron_h"})


def refuse_uncaptured(targets: Sequence[Target], mode: str) -> None:
    """Raise InputError for fused experts, each of which sees the inputs of few prompts, and not at a known position."""
    name = next((target.name for target in targets if is_fused(target.module)), "")
    if name:
        raise InputError(
            f"The edit mode {mode!r} needs the inputs of modules, which can't be captured for the fused experts in {name}; "
            "choose another --set edit.mode, or leave them out of the modules to edit with --set load.components."
        )


@dataclass(frozen=True)
class Text:
    """The ids of a prompt, and of the beginning of an answer to it."""

    prompt: Sequence[int]
    answer: Sequence[int] = ()


def capture_inputs(
    model: PreTrainedModel,
    targets: Sequence[Target],
    texts: Sequence[Text],
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """{module: its inputs (n, d_in) float32 on the CPU} of the base model.

    They are those at the tokens of the answers, n of all together, or at the last position of prompts without an answer. The
    batch size is halved when the device runs out of memory.

    Raises:
        InputError: a module isn't called, or not with a row for each position of each prompt (routed experts).
        AbliterateError: an input isn't finite, or a single prompt doesn't fit.
    """
    batches = list(in_batches(partial(_of_batch, model, targets, device), texts, batch_size, device, progress))
    # Each batch gives up its rows at once, because all of them together are large.
    return {target.name: torch.cat([batch.pop(target.name) for batch in batches]) for target in targets}


def _of_batch(
    model: PreTrainedModel, targets: Sequence[Target], device: torch.device, texts: Sequence[Text]
) -> dict[str, Tensor]:
    """The inputs of one pass, {module: (n, d_in) float32 on the CPU}."""
    wholes, lengths = [[*text.prompt, *text.answer] for text in texts], [len(text.answer) or 1 for text in texts]
    width = max(map(len, wholes))
    # Pads are on the left, and carry the text's own first token, as in `PromptEncoder.encode`.
    ids = [[whole[0]] * (width - len(whole)) + whole for whole in wholes]
    mask = [[0] * (width - len(whole)) + [1] * len(whole) for whole in wholes]
    batch = BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}).to(device)
    found = _of_pass(model, targets, batch, max(lengths))
    rows = {name: zip(inputs, lengths, strict=True) for name, inputs in found.items()}
    return {name: torch.cat([row[len(row) - length :] for row, length in own]) for name, own in rows.items()}


@torch.no_grad()
def _of_pass(model: PreTrainedModel, targets: Sequence[Target], batch: BatchEncoding, last: int) -> dict[str, Tensor]:
    """The inputs of one pass at its `last` positions, {module: (batch, last, d_in) float32 on the CPU}."""
    found: dict[str, Tensor] = {}
    shape = tuple(batch["input_ids"].shape)
    with _captured(targets, shape, found, last):
        model(**prefill_kwargs(model, batch, last=last))
    for target in targets:
        rows = found.get(target.name)
        if rows is None or rows.shape != (shape[0], last, in_features(target.module)):
            raise InputError(
                f"The inputs of {target.name} can't be captured, because it isn't called once with every position of every "
                "prompt; choose an --set edit.mode that needs none, or leave it out of the modules to edit with "
                "--set load.components."
            )
        if not torch.isfinite(rows).all():
            raise AbliterateError(
                f"The inputs of {target.name} overflow in this dtype; load the model with --dtype bfloat16 or float32."
            )
    return found


@contextlib.contextmanager
def _captured(
    targets: Sequence[Target],
    shape: tuple[int, ...],
    found: dict[str, Tensor],
    last: int,
) -> Iterator[None]:
    """While active, a pass over tokens of this shape (batch, T) fills `found` with its `last` positions."""

    def hook(name: str, columns: Columns | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            # Layers that share another's keys and values, as in Gemma 4, compute only the positions that logits are asked for.
            if x.shape[:-1] in (shape, (shape[0], last)):
                found[name] = _whole(x[:, -last:].float(), columns).cpu()

        return enter

    handles = []
    for target in targets:
        columns = columns_of(getattr(target.module, "weight", None))
        handles.append(target.module.register_forward_pre_hook(hook(target.name, columns)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole(x: Tensor, columns: Columns | None) -> Tensor:
    """The whole input (batch, last, d_in), of which a sharded module's rank has its columns."""
    if columns is None or x.shape[-1] == columns.total:
        return x
    total = x.new_zeros((*x.shape[:-1], columns.total))
    total[..., columns.start : columns.stop] = x
    return columns.summed(total)
